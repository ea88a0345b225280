"""FrozenBackbone: one forward without a graph, and the activations seen on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .fingerprint import fingerprint
from .lm_head import LMHead
from .neighbours import kept_together
from .outputs import (
    BackboneOutput,
    EncoderDecoderOutput,
    Visit,
    check_mask,
    finish,
    is_empty,
    last_hidden_state_of,
    pack,
    token_shape,
    without_padding,
)
from .packed import Batch, PackedStack, contiguous, first_weight, reach_blocks
from .packed_block import why_not, why_not_fp32
from .parts import BlockSpec
from .sharding import own_part
from .shared_weights import weights_state
from .stack import Stack
from .watching import EMBEDDING, cache_arguments, capture

_DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
# what a model is done with before its first block
_BEFORE_BLOCKS = (
    "input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "pixel_values",
    "bool_masked_pos", "interpolate_pos_encoding",
)  # fmt: skip
_OF_MEMORY = ("encoder_hidden_states", "encoder_attention_mask")
# settings that taps depend on and that neither weights nor BlockSpec show
_SETTINGS = (
    "position_embedding_type",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "layer_types",
    "sliding_window",
    "local_attention",
    "attn_logit_softcapping",
    "scale_embedding",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "pos_att_type",
    "position_biased_input",
)


class FrozenBackbone(nn.Module):
    """A frozen model with taps. Made by `freeze`.

    The model's parameters are shared, not copied, and never change. Always in eval mode, never builds a graph.
    """

    def __init__(
        self,
        model: Any,
        stacks: dict[str, Stack],
        precision: str,
        fingerprint: str | None = None,
        weight_errors: dict[str, list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.stacks = stacks
        self.precision = precision
        # shared by all that share the weights
        self._known: dict[str, str] = {} if fingerprint is None else {"fingerprint": fingerprint}
        self._weight_errors = weight_errors or {}
        self._packed: dict[str, tuple[Any, PackedStack | None]] = {}
        self._slow = {name: self._why_slow(stack) for name, stack in stacks.items()}
        self.train(False)

    @property
    def base(self) -> Any:
        """The model without its head."""
        return getattr(self.model, "base_model", self.model)

    @property
    def config(self) -> Any:
        """The transformers configuration of the frozen model; None where it has none."""
        return getattr(self.model, "config", None)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it has two stacks, of which the second attends to the first."""
        return len(self.stacks) == 2

    @property
    def stack(self) -> Stack:
        """The only stack, or an encoder-decoder's last one: what the output comes from."""
        return list(self.stacks.values())[-1]

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of `stack`."""
        return self.stack.blocks

    @property
    def tap_indices(self) -> tuple[int, ...]:
        """The tapped blocks of `stack`."""
        return self.stack.taps

    @property
    def block_spec(self) -> BlockSpec:
        """The shape of the blocks of `stack`."""
        return self.stack.spec

    @property
    def output_width(self) -> int:
        """The width of last_hidden_state: that of the blocks, unless the model projects it (OPT-350m)."""
        return getattr(self.config, "word_embed_proj_dim", None) or self.block_spec.width

    @property
    def model_type(self) -> str:
        """What transformers calls this kind of model; the class's name where it has no configuration."""
        return getattr(self.config, "model_type", type(self.model).__name__)

    @property
    def name(self) -> str:
        """Where the model came from, as transformers knows it; empty for a model made from a configuration."""
        return getattr(self.config, "_name_or_path", "")

    @functools.cached_property
    def lm_head(self) -> LMHead | None:
        """The frozen language-model head, None for a model that was frozen without one."""
        return LMHead.of(self.model)

    def fingerprint(self) -> str:
        """SHA-256 of all weights and settings the taps depend on; computed once, since they are frozen."""
        if "fingerprint" not in self._known:
            values = {name: getattr(self.config, name, None) for name in _SETTINGS}
            given = sorted((name, _in_order(value)) for name, value in values.items() if value is not None)
            settings = (self.model_type, [stack.spec for stack in self.stacks.values()], given)
            self._known["fingerprint"] = fingerprint(self.base, settings)
        return self._known["fingerprint"]

    def _why_slow(self, stack: Stack) -> str | None:
        """None where a stack runs over packed tokens, otherwise the reason."""
        return why_not_fp32(stack, self.base) if self.precision == "fp32" else why_not(stack, self.base)

    def _why_slow_now(self, stack: Stack) -> str | None:
        """The same after what has become of the weights since."""
        shared = self.precision == "fp32" and self._slow[stack.name] is None
        return self._why_slow(stack) if shared else self._slow[stack.name]

    def describe(self) -> list[dict[str, Any]]:
        """For each block "stack", "block", "path" ("packed", or "module": as transformers runs it), "why", "precision".

        "weight_error": ||W - stored|| / ||W|| of its linear layers, 0 for fp32.
        """
        rows = []
        for name, stack in self.stacks.items():
            slow = self._why_slow_now(stack)
            errors = self._weight_errors.get(name, [0.0] * len(stack.blocks))
            for index, error in enumerate(errors):
                row = {"stack": name, "block": index, "path": "module" if slow else "packed", "why": slow or ""}
                rows.append(row | {"precision": self.precision, "weight_error": error})
        return rows

    def weight_bytes(self) -> int:
        """Bytes that the frozen weights and buffers take, in this process where they are sharded."""
        tensors = map(own_part, (*self.model.parameters(), *self.model.buffers()))
        return sum(storage.nbytes() for storage in _storages(tensors).values())

    def with_taps(self, indices: Sequence[int], encoder: Sequence[int] | None = None) -> FrozenBackbone:
        """The same frozen model, tapped at other blocks of `stack`; weights and fingerprint are shared.

        encoder: of an encoder-decoder, the encoder's; None keeps them.
        """
        stacks = dict(self.stacks)
        stacks[self.stack.name] = self.stack.tapped(tuple(indices))
        if encoder is not None:
            stacks["encoder"] = stacks["encoder"].tapped(tuple(encoder))
        other = FrozenBackbone(self.model, stacks, self.precision, weight_errors=self._weight_errors)
        other._known = self._known
        return other

    @contextmanager
    def through_modules(self) -> Iterator[None]:
        """While entered, all blocks run as transformers has them, so that hooks on their layers see what passes."""
        usual, self._slow = self._slow, dict.fromkeys(self.stacks, "its layers are watched")
        try:
            yield
        finally:
            self._slow = usual

    def save_pretrained(
        self, folder: str | Path, tokenizer: Any = None, progress: Callable[[int], Any] = lambda count: None
    ) -> None:
        """Write the prepared weights to a folder, from which `from_pretrained` has them back without preparing again.

        A folder of a prepared backbone is replaced, and one that is mapped by a process stays whole for it. The layout
        of the weights is that of every machine.
        tokenizer: or an image processor, whose files are kept beside. progress: called with how many more bytes of
            weights are written.
        Raises ValueError for a model that is not transformers' own or whose structure was changed, weights that are not
        finite, and a folder that holds another model; OSError for a disk that is full. Nothing is left half-written.
        """
        from .saving import save

        save(self, Path(folder), tokenizer, progress)

    @classmethod
    def from_pretrained(cls, folder: str | Path, taps: str | Sequence[int] = "all") -> FrozenBackbone:
        """The backbone that `save_pretrained` wrote: to the last bit the taps of the one that was saved.

        The weights are mapped into memory and shared with other processes that load them; none is copied, and no
        float32 model is made.
        taps: as for `freeze`.
        Raises ValueError for a folder that is not there or holds no prepared backbone, one of another format, damaged
        or missing files, and blocks that are not there.
        """
        from .loading import load

        return load(Path(folder), taps)

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in eval mode, whatever mode is asked for: a frozen model has no dropout."""
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> FrozenBackbone:
        with kept_together(self.model):
            return super()._apply(*args, **kwargs)

    def forward(self, *, packed: bool = False, cache: Any = None, visit: Visit | None = None, **inputs: Any) -> Any:
        """Run the model once on transformers' inputs (input_ids, attention_mask, pixel_values ...) and keep its taps.

        attention_mask: (B, S), nonzero where a token is; without it every position is one. With a cache it covers
            the cached positions too.
        packed: give (tokens, D) instead of (B, S, D). cache: transformers' cache of a decoder's keys and values.
        visit: called with what the first block reads and then with each tap, (B, S, D), as soon as it is there; the
            output then has none. In fewer bits than float32 the sums between pre-norm blocks may be rounded once more.
            Of an encoder-decoder `encode` and `decode` take one each.
        Returns a BackboneOutput, for an encoder-decoder an EncoderDecoderOutput.
        """
        if not self.is_encoder_decoder:
            return self._output(self.stack, self.base, inputs, cache, packed, visit)
        if visit is not None:
            raise ValueError("visit: an encoder-decoder has two stacks of taps; pass one to encode and one to decode")
        names = _DECODER_INPUTS
        decoder_inputs = {name: inputs.pop(name) for name in list(inputs) if name in names}
        encoder = self.encode(**inputs)
        mask = inputs.get("attention_mask")
        decoder = self.decode(encoder.last_hidden_state, mask, packed, cache, **decoder_inputs)
        if packed:
            encoder = pack(encoder, None if mask is None else mask.bool())
        return EncoderDecoderOutput(encoder, decoder)

    def encode(self, visit: Visit | None = None, **inputs: Any) -> BackboneOutput:
        """Run an encoder-decoder's encoder alone."""
        return self._output(self.stacks["encoder"], self.base.get_encoder(), inputs, None, packed=False, visit=visit)

    def decode(
        self,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        packed: bool = False,
        cache: Any = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        visit: Visit | None = None,
    ) -> BackboneOutput:
        """Run an encoder-decoder's decoder on what its encoder gave."""
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("decoder_input_ids: an encoder-decoder needs them; pass the target's tokens shifted right")
        inputs = {
            "input_ids": decoder_input_ids,
            "inputs_embeds": decoder_inputs_embeds,
            "attention_mask": decoder_attention_mask,
            # packed tokens are in bfloat16, modules are not
            "encoder_hidden_states": encoder_hidden_states.to(
                torch.promote_types(encoder_hidden_states.dtype, torch.float32)
            ),
            "encoder_attention_mask": encoder_attention_mask,
        }
        given = {name: value for name, value in inputs.items() if value is not None}
        return self._output(self.stacks["decoder"], self.base.get_decoder(), given, cache, packed, visit)

    def _output(
        self, stack: Stack, module: Any, inputs: dict[str, Any], cache: Any, packed: bool, visit: Visit | None
    ) -> BackboneOutput:
        """One forward of a stack, over packed tokens where it can be."""
        fast = None if cache is not None or is_empty(inputs) or _meets_blocks(stack, inputs) else self._fast(stack)
        if fast is not None:
            mask = check_mask(inputs.get("attention_mask"), token_shape(inputs), 0, "")
            if not stack.measures_distance or contiguous(mask):
                return self._run_packed(fast, stack, module, inputs, mask, packed, visit)
        return finish(*self._run(stack, module, inputs, cache, visit), packed)

    def _run_packed(
        self,
        fast: PackedStack,
        stack: Stack,
        module: Any,
        inputs: dict[str, Any],
        mask: torch.Tensor | None,
        packed: bool,
        visit: Visit | None,
    ) -> BackboneOutput:
        """One forward whose blocks see tokens alone, without padding."""
        if self.model.training:
            self.train(False)
        with torch.no_grad():
            embedding, block_inputs = reach_blocks(stack, module, inputs)
            batch = Batch.of(stack, embedding.shape[:2], mask, block_inputs)
            x = batch.pack(embedding.to(fast.dtype))
            if visit is not None:
                visit(batch.unpack(x))
                last = fast.run_visiting(x, batch.sequences, stack.taps, lambda tap: visit(batch.unpack(tap)))
                return BackboneOutput(batch.unpack(x), (), batch.unpack(last))
            taps, last = fast.run(x, batch.sequences, stack.taps)
            if packed:
                return BackboneOutput(x, tuple(taps), last, batch.sequences.offsets.placed)
            return BackboneOutput(batch.unpack(x), tuple(map(batch.unpack, taps)), batch.unpack(last))

    def _fast(self, stack: Stack) -> PackedStack | None:
        """The stack over packed tokens, made anew where its weights have changed; None where it runs as modules."""
        if self._slow[stack.name] is not None:
            return None
        shared = self.precision == "fp32"
        state = weights_state(stack) if shared else first_weight(stack).data_ptr()
        found = self._packed.get(stack.name)
        if found is None or found[0] != state:
            can = not shared or why_not_fp32(stack, self.base) is None
            found = self._packed[stack.name] = state, PackedStack(stack, self.model_type) if can else None
        return found[1]

    def _run(
        self, stack: Stack, module: Any, inputs: dict[str, Any], cache: Any, visit: Visit | None
    ) -> tuple[BackboneOutput, torch.Tensor | None]:
        """One forward of a stack, padded and with whatever stands at padding; and the mask of its tokens."""
        shape = token_shape(inputs)
        if shape is None and "pixel_values" in inputs and not inputs["pixel_values"].shape[0]:
            raise ValueError("pixel_values: the batch is empty; pass at least one image")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = check_mask(inputs.get("attention_mask"), shape, past, "decoder_" if stack.spec.cross else "")
        if shape is not None and 0 in shape:
            weight = next(self.model.parameters())
            width = self.output_width if stack is self.stack else stack.spec.width
            embedding, *taps = (weight.new_zeros(*shape, stack.spec.width) for _ in range(1 + len(stack.taps)))
            if visit is not None:
                for tap in (embedding, *taps):
                    visit(tap)
                taps.clear()
            return BackboneOutput(embedding, tuple(taps), weight.new_zeros(*shape, width)), mask
        if self.model.training:  # the caller's own handle on the shared model may have switched it
            self.train(False)
        if stack.spec.causal:
            inputs = inputs | cache_arguments(module, cache)
        with (
            torch.no_grad(),
            capture(stack, None if visit is None else (lambda x: visit(without_padding(x, mask)))) as seen,
        ):
            last = last_hidden_state_of(module(**inputs))
        return BackboneOutput(
            seen.pop(EMBEDDING), tuple(seen[index] for index in stack.taps if index in seen), last
        ), mask

    def extra_repr(self) -> str:
        """One line for print(): of each stack how its blocks run, why not over packed tokens, and which are tapped."""
        parts = [f"family={self.model_type}, precision={self.precision}"]
        for stack in self.stacks.values():
            slow = self._why_slow_now(stack)
            path = f"as modules ({slow})" if slow else "over packed tokens"
            unknown = "" if stack.parts is not None else ", found by the generic rule"
            taps = f"taps={stack.path}{list(stack.taps)}"
            parts.append(f"{stack.name}: {len(stack.blocks)} blocks {path}{unknown}, {taps}")
        return "; ".join(parts)


def _meets_blocks(stack: Stack, inputs: dict[str, Any]) -> bool:
    """Whether something was given that the blocks themselves read, such as past keys, and packed tokens have not."""
    known = _BEFORE_BLOCKS + (_OF_MEMORY if stack.spec.cross else ())
    return any(value is not None and name not in known for name, value in inputs.items())


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """What several tensors take, each piece of memory once, by address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages}


def _in_order(value: Any) -> Any:
    """A setting whose repr does not depend on the order in which a dict was filled."""
    return sorted((str(name), _in_order(inner)) for name, inner in value.items()) if isinstance(value, dict) else value
