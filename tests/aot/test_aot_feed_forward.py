"""Every Triton kernel of the feed-forward compiled for each GPU generation, without a GPU."""

from __future__ import annotations

HIDDEN = (192, 896)
KERNELS = {"feed_forward_fwd_kernel", "feed_forward_bwd_kernel"}


def test_compiles_without_spills(compiled_kernels):
    rows = compiled_kernels("compile_feed_forward", *HIDDEN)
    cases = {(row["kernel"], row["hidden"], row["gated"]) for row in rows}
    assert cases == {(kernel, hidden, gated) for kernel in KERNELS for hidden in HIDDEN for gated in (False, True)}
