"""The rule by which tlfast taps a model that its table of families does not know."""

from __future__ import annotations

from torch import nn

from .families import SUPPORTED, config_value
from .parts import BlockSpec


def generic_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of blocks of one class in a model the table does not know.

    Raises ValueError, naming what was found, where there is none or two are equally long.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block) for block in module}) == 1
    }
    known = f"models tlfast knows inside: {', '.join(SUPPORTED)}"
    if not lists:
        raise ValueError(
            f"model: {type(model).__name__} has no nn.ModuleList of at least two blocks of one class, which is what "
            f'tlfast taps; name the list of blocks: freeze(model, blocks="path.to.list") ({known})'
        )
    longest = max(map(len, lists.values()))
    found = [name for name, module in lists.items() if len(module) == longest]
    if len(found) > 1:
        raise ValueError(
            f"model: {type(model).__name__} has {len(found)} lists of {longest} blocks ({', '.join(found)}), and "
            f'which one to tap is not known; name one: freeze(model, blocks="{found[0]}") ({known})'
        )
    return found[0], lists[found[0]]  # type: ignore[return-value]


def generic_spec(model: nn.Module, blocks: nn.ModuleList) -> BlockSpec:
    """The shape of a plain pre-norm block as wide as the blocks of a model the table does not know.

    Raises ValueError where the width cannot be told.
    """
    config = getattr(model, "config", None)
    width = config_value(config, "hidden_size|d_model|n_embd|dim")
    if width is None:
        norms = [m for m in blocks[0].modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]
        width = norms[0].normalized_shape[-1] if norms else None
    if width is None:
        raise ValueError(
            f"model: the width of the blocks of {type(model).__name__} is not known: it has no config.hidden_size, and "
            "its blocks have no nn.LayerNorm or nn.RMSNorm; give the model a config with hidden_size"
        )
    inside = (getattr(m, "num_heads", None) for m in blocks[0].modules())
    heads = config_value(config, "num_attention_heads|n_head|num_heads") or next(
        (n for n in inside if n), max(1, width // 64)
    )
    causal = bool(getattr(config, "is_decoder", False)) or type(model).__name__.endswith("ForCausalLM")
    return BlockSpec(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        hidden=config_value(config, "intermediate_size|d_ff|ffn_dim", 4 * width),
        placement="pre",
        causal=causal,
    )
