"""LadderModel: a frozen backbone, a side network on its taps, and a head for the task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backbone import BackboneOutput, EncoderDecoderOutput, FrozenBackbone
from . import checkpoint, generation, tasks
from .along import states_along
from .cache import SideCache, new_cache
from .config import LadderConfig
from .heads import LanguageHead, SequenceHead, TokenHead
from .initialisation import initialise
from .losses import (
    IGNORED,
    language_loss,
    next_token_labels,
    problem_type,
    sequence_loss,
    shifted_right,
    token_loss,
)
from .outputs import model_output, with_lazy_logits
from .side_network import SideNetwork
from .tapped import tapped

if TYPE_CHECKING:
    from transformers.utils import ModelOutput


class LadderModel(nn.Module):
    """A ladder on a frozen backbone. Only the side network and the head require grad.

    backbone: from `tlfast.freeze`. task: "sequence-classification", which covers regression (num_labels=1) and
        multi-label; "token-classification"; "image-classification"; "causal-lm" and "seq2seq-lm", which need a
        backbone frozen with its language-model head.
    num_labels: outputs of a classifier; the language models have none. config: a LadderConfig; its layers must be
        among the backbone's taps.
    calibration: batches (dicts of model inputs) from which init="prune" and "pca", and tap_storage="project", take
        their statistics; None takes the first batch the model sees. problem_type: as in transformers; None infers it
        from the labels.
    Works in transformers.Trainer as it is; state_dict() and checkpoints hold no backbone weights. Under
    DistributedDataParallel only the side network's gradients travel; calibration takes the batches of all processes,
    and each must take part.
    Raises ValueError for an unknown task or one that does not fit the backbone, layers that are not tapped, or a
    reduction that does not divide the block.
    Source: Sung et al. 2022, "LST: Ladder Side-Tuning" (arXiv 2206.06522).
    """

    calibrated: torch.Tensor  # 0-dim bool: whether the starting weights are set

    def __init__(
        self,
        backbone: FrozenBackbone,
        task: str = "sequence-classification",
        num_labels: int | None = 2,
        config: LadderConfig | None = None,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        problem_type: str | None = None,
    ) -> None:
        super().__init__()
        tasks.check(backbone, task, num_labels, problem_type)
        self.ladder_config = config or LadderConfig()
        self.task, self.problem_type = task, problem_type
        self.num_labels = num_labels if task in tasks.CLASSIFICATION else None
        self.backbone = tapped(backbone, self.ladder_config)
        self.side_encoder = None
        if self.backbone.is_encoder_decoder:
            self.side_encoder = SideNetwork(self.backbone.stacks["encoder"], self.ladder_config)
        memory_width = None if self.side_encoder is None else self.side_encoder.width
        self.side = SideNetwork(self.backbone.stack, self.ladder_config, memory_width)
        self.head = self._make_head()
        self._ready = self.ladder_config.init == "random" and self.ladder_config.tap_storage != "project"
        self.register_buffer("calibrated", torch.tensor(self._ready))
        self.register_state_dict_post_hook(_drop_backbone)
        self.register_load_state_dict_post_hook(_after_load)
        # DistributedDataParallel sends none of these: all processes have loaded the same backbone
        kept = self.state_dict().keys()
        self._ddp_params_and_buffers_to_ignore = [
            name
            for name, tensor in (*self.named_parameters(), *self.named_buffers())
            if not tensor.requires_grad and name not in kept
        ]
        self.to(next(backbone.parameters()).device)
        if calibration is not None:
            self.calibrate(calibration)

    def _make_head(self) -> nn.Module:
        config, spec = self.ladder_config, self.backbone.block_spec
        if self.num_labels is None:
            lm_head = self.backbone.lm_head
            assert lm_head is not None  # checked with the task
            return LanguageHead(lm_head.width, self.side.width, config)
        dropout = spec.hidden_dropout if config.dropout is None else config.dropout
        head = TokenHead if self.task == "token-classification" else SequenceHead
        return head(self.backbone.output_width, self.side.width, self.num_labels, config, dropout)

    @property
    def config(self) -> Any:
        """The backbone's transformers configuration, which Trainer and tokenizers ask for."""
        return self.backbone.config

    @property
    def loss_type(self) -> str | None:
        """What transformers calls a loss that shifts its labels: Trainer then does not count the first one of a row."""
        return "ForCausalLM" if self.task == "causal-lm" else None

    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Set the side network's starting weights from the backbone's and these batches; no backward pass is run."""
        if getattr(self, "_is_replica", False):
            raise RuntimeError("calibration: a replica of nn.DataParallel cannot keep it; pass it to LadderModel")
        sides = {self.backbone.stack.name: self.side}
        if self.side_encoder is not None:
            sides = {"encoder": self.side_encoder, **sides}
            batches = (self._with_decoder_inputs(dict(batch)) for batch in batches)
        initialise(sides, self.backbone, self.ladder_config, batches)
        self.calibrated.fill_(True)
        self._ready = True

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        backbone_output: BackboneOutput | EncoderDecoderOutput | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **others: Any,
    ) -> ModelOutput:
        """transformers' inputs; labels by task. Returns a transformers ModelOutput with loss and logits.

        labels: (B,) classes, floats for regression, (B, num_labels) floats for multi-label; (B, S) classes for tokens;
            (B, S) token ids for causal-lm, which are shifted here; (B, T) target ids for seq2seq-lm, from which the
            decoder's inputs are made. -100 is ignored wherever labels are tokens.
        backbone_output: what `look` gave for these inputs, or a cache of taps gives back; the backbone does not run,
            and beside masks and labels nothing else is read.
        logits_to_keep: give logits of that many last positions, or of those a tensor names; 0 for all.
        past_key_values (cache, as transformers 5.20 calls it): a transformers cache, which then holds the side
            network's keys and values too, and is returned. use_cache: make one where none is given.
        num_items_in_batch: how many labels an optimizer step has in all its batches and processes; Trainer passes it.
            The loss is then the sum over them divided by it.
        A language model in training mode takes the loss from a part of the tokens at a time, and makes the logits when
        they are read: until then those of all tokens do not exist.
        """
        tasks.check_others(others)
        if backbone_output is not None:
            if not (self._ready or self.calibrated):  # the second waits for a GPU
                raise ValueError("backbone_output: the starting weights are not set; pass calibration to LadderModel")
            known = backbone_output.to(self.calibrated.device)
            states = self._climbed(known, attention_mask, decoder_attention_mask, position_ids)
            return self._result(*states, attention_mask, labels, num_items_in_batch, None)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        past = cache if cache is not None else past_key_values
        if past is None and use_cache and self.num_labels is None:
            past = new_cache(self.backbone)
        extras = {
            "encoder_outputs": encoder_outputs is not None,
            "past_key_values": past is not None,
            "logits_to_keep": not (isinstance(logits_to_keep, int) and logits_to_keep == 0),
        }
        tasks.check_inputs(self.backbone, self.task, [*inputs, *(name for name, passed in extras.items() if passed)])
        if labels is not None and self.side_encoder is not None:
            inputs = self._with_decoder_inputs(inputs | {"labels": labels})
            inputs.pop("labels")
        if not self._ready:
            if not self.calibrated:  # set where DistributedDataParallel sent the first process's weights
                self.calibrate([inputs])
            self._ready = True
        side, last = self._states(inputs, encoder_outputs, past)
        if extras["logits_to_keep"]:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            side, last = side[:, kept], last[:, kept]
        return self._result(side, last, attention_mask, labels, num_items_in_batch, past)

    def look(self, **inputs: Any) -> BackboneOutput | EncoderDecoderOutput:
        """What the backbone gives for a batch, with labels or without: forward reads it, a cache of taps holds it."""
        if self.side_encoder is not None:
            inputs = self._with_decoder_inputs(inputs)
        inputs.pop("labels", None)
        return self.backbone(**inputs)

    def climb(
        self,
        output: BackboneOutput | EncoderDecoderOutput,
        attention_mask: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits from a backbone output already at hand: what forward does after the frozen forward."""
        states = self._climbed(output, attention_mask, decoder_attention_mask, position_ids)
        return self._logits(*states, attention_mask)

    def _climbed(
        self,
        output: BackboneOutput | EncoderDecoderOutput,
        attention_mask: torch.Tensor | None,
        decoder_attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head reads, as `_states`, of a backbone output at hand."""
        key_mask = _bool(attention_mask)
        if isinstance(output, EncoderDecoderOutput):
            assert self.side_encoder is not None
            memory = self.side_encoder(output.encoder, key_mask)
            side = self.side(output.decoder, _bool(decoder_attention_mask), memory=memory, memory_mask=key_mask)
            return side, output.decoder.last_hidden_state
        return self.side(output, key_mask, position_ids), output.last_hidden_state

    def _result(
        self,
        side: torch.Tensor,
        last: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        num_items: int | torch.Tensor | None,
        past: Any,
    ) -> ModelOutput:
        """Loss and logits of what the head reads."""
        if self.training and self.num_labels is None and labels is not None:
            output = model_output(self.task, self._language_loss(side, last, labels, num_items), None, past)
            return with_lazy_logits(output, lambda: self._logits(side, last, attention_mask))
        logits = self._logits(side, last, attention_mask)
        loss = None if labels is None else self._loss(logits, labels, num_items)
        return model_output(self.task, loss, logits, past)

    def encode(self, **inputs: Any) -> tuple[BackboneOutput, torch.Tensor]:
        """The encoder half of an encoder-decoder: the backbone's output and the side encoder's, (B, M, R)."""
        assert self.side_encoder is not None
        output = self.backbone.encode(**inputs)
        return output, self.side_encoder(output, _bool(inputs.get("attention_mask")))

    def _states(self, inputs: dict[str, Any], encoder_outputs: Any, past: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head reads: the side network's output and the backbone's last hidden state."""
        if torch.is_grad_enabled() and (self.ladder_config.tap_storage != "keep" or self.calibrated.is_cuda):
            if past is None and encoder_outputs is None:
                return states_along(self, inputs)
            if self.ladder_config.tap_storage == "stream":
                name = "encoder_outputs" if past is None else "past_key_values"
                raise ValueError(
                    f"{name}: tap_storage 'stream' runs the backbone once more in the backward pass, from its inputs "
                    "alone; leave it out, or call the ladder under torch.no_grad()"
                )
        blocks = max(len(stack.blocks) for stack in self.backbone.stacks.values())  # as many as a cache may have layers
        side_cache = None if past is None else SideCache(past, blocks)
        if self.side_encoder is None:
            output = self.backbone(cache=past, **inputs)
            key_mask = _bool(inputs.get("attention_mask"))
            return self.side(output, key_mask, inputs.get("position_ids"), cache=side_cache), output.last_hidden_state
        decoder_inputs = {name: inputs.pop(name) for name in list(inputs) if name.startswith("decoder_")}
        mask = inputs.get("attention_mask")
        if encoder_outputs is None:
            encoder, memory = self.encode(**inputs)
            hidden = encoder.last_hidden_state
        else:
            if getattr(encoder_outputs, "side_hidden_state", None) is None:
                raise ValueError(
                    "encoder_outputs: they hold no side_hidden_state, which a ladder's decoder reads; pass input_ids, "
                    "or what generate made of them"
                )
            hidden, memory = encoder_outputs.last_hidden_state, encoder_outputs.side_hidden_state
        output = self.backbone.decode(hidden, mask, cache=past, **decoder_inputs)
        key_mask = _bool(decoder_inputs.get("decoder_attention_mask"))
        side = self.side(output, key_mask, memory=memory, memory_mask=_bool(mask), cache=side_cache)
        return side, output.last_hidden_state

    def _language_loss(
        self, side: torch.Tensor, last: torch.Tensor, labels: torch.Tensor, num_items: int | torch.Tensor | None
    ) -> torch.Tensor:
        targets = next_token_labels(labels) if self.task == "causal-lm" else labels
        return language_loss(self.backbone.lm_head, self.head(side, _widened(last, side)), targets, num_items)

    def _logits(self, side: torch.Tensor, last: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        last = _widened(last, side)
        if self.num_labels is None:
            lm_head = self.backbone.lm_head
            assert lm_head is not None  # checked with the task
            return lm_head(self.head(side, last))
        mask = _bool(attention_mask)
        return self.head(side, last, side.new_ones(side.shape[:2], dtype=torch.bool) if mask is None else mask)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items: int | torch.Tensor | None) -> torch.Tensor:
        if self.task == "causal-lm":
            return token_loss(logits, next_token_labels(labels), num_items)
        if self.task in ("seq2seq-lm", "token-classification"):
            return token_loss(logits, labels, num_items)
        assert self.num_labels is not None
        problem = self.problem_type if self.task == "sequence-classification" else "single_label_classification"
        loss = sequence_loss(logits, labels, problem_type(labels, self.num_labels, problem))
        return loss if num_items is None else loss * ((labels != IGNORED).sum() / num_items)

    def _with_decoder_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Decoder inputs made from the labels, as transformers does, where the batch has none."""
        labels = inputs.get("labels")
        if labels is None or "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
            return inputs
        return inputs | {"decoder_input_ids": shifted_right(labels, *self._start_and_pad())}

    def _start_and_pad(self) -> tuple[int, int]:
        """The tokens that begin and fill a decoder's inputs, from the backbone's configuration."""
        pad = getattr(self.config, "pad_token_id", None)
        start = getattr(self.config, "decoder_start_token_id", None)
        if start is None:
            start = self.backbone.model.generation_config.decoder_start_token_id
        if start is None and self.backbone.model_type == "t5":  # T5 begins with padding
            start = pad
        for name, token in (("pad_token_id", pad), ("decoder_start_token_id", start)):
            if token is None:
                raise ValueError(f"labels: config.{name} is None, so no decoder inputs are made; set it, or pass them")
        assert start is not None and pad is not None
        return start, pad

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate, with its arguments: greedy, sampling, beams; the language-model tasks only.

        Keys and values of backbone and side network are cached in one transformers cache, unless use_cache=False.
        """
        return generation.generator(self).generate(*args, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors (side network and head) and config.json, with the backbone's fingerprint."""
        checkpoint.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: FrozenBackbone | nn.Module | str | Path) -> LadderModel:
        """Load a saved ladder onto its backbone: a FrozenBackbone, a transformers model, its name or its folder.

        The folder may be that of a prepared backbone. Raises ValueError if the backbone's weights or precision are not
        those the ladder was trained on, or a file is unusable.
        """
        return checkpoint.load(cls, Path(folder), backbone)

    def trainable_parameters(self) -> int:
        """Number of parameters that training changes."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _widened(last: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """In a dtype that holds both: a backbone in fewer bits gives bfloat16."""
    return last.to(torch.promote_types(last.dtype, side.dtype))


def _bool(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.bool()


def _drop_backbone(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}backbone.")]:
        del state[key]


def _after_load(module: Any, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if "backbone.model." not in key]
    module._ready = bool(module.calibrated)
