"""Every Triton kernel of the feed-forward compiled for each GPU generation, without a GPU."""

from __future__ import annotations

WIDTHS = (48, 96, 256)
KERNELS = {"feed_forward_fwd_kernel", "feed_forward_bwd_kernel", "feed_forward_bwd_weight_kernel"}


def test_compiles_without_spills(compiled_kernels):
    rows = compiled_kernels("compile_feed_forward", *WIDTHS)
    cases = {(row["kernel"], row["width"], row["gated"]) for row in rows}
    assert cases == {(kernel, width, gated) for kernel in KERNELS for width in WIDTHS for gated in (False, True)}
