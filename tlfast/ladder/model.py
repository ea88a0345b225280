"""LadderModel: a frozen backbone, a side network on its taps, and a head for the task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backbone import BackboneOutput, FrozenBackbone
from ..backbone.freeze import resolve_layers
from . import checkpoint
from .config import LadderConfig
from .heads import PROBLEMS, SequenceHead, problem_type, sequence_loss
from .initialisation import initialise
from .side_network import SideNetwork

if TYPE_CHECKING:
    from transformers.modeling_outputs import SequenceClassifierOutput

TASKS = ("sequence-classification",)


class LadderModel(nn.Module):
    """A ladder on a frozen backbone. Only the side network and the head require grad.

    backbone: from `tlfast.freeze`. task: "sequence-classification", which covers regression (num_labels=1).
    num_labels: outputs of the head. config: a LadderConfig; its layers must be among the backbone's taps.
    calibration: batches (dicts of model inputs) from which init="prune" and "pca" take their statistics; None takes
        the first batch the model sees. problem_type: as in transformers; None infers it from the labels.
    Works in transformers.Trainer as it is; state_dict() and checkpoints hold no backbone weights.
    Raises ValueError for an unknown task, layers that are not tapped, or a reduction that does not divide the block.
    Source: Sung et al. 2022, "LST: Ladder Side-Tuning" (arXiv 2206.06522).
    """

    calibrated: torch.Tensor  # 0-dim bool: whether the starting weights are set

    def __init__(
        self,
        backbone: FrozenBackbone,
        task: str = "sequence-classification",
        num_labels: int = 2,
        config: LadderConfig | None = None,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        problem_type: str | None = None,
    ) -> None:
        super().__init__()
        _check(backbone, task, num_labels, problem_type)
        self.ladder_config = config or LadderConfig()
        self.task, self.num_labels, self.problem_type = task, num_labels, problem_type
        self.backbone = _tapped(backbone, self.ladder_config)
        self.side = SideNetwork(self.backbone, self.ladder_config)
        spec, rate = backbone.block_spec, self.ladder_config.dropout
        self.head = SequenceHead(
            spec.width,
            self.side.norm.normalized_shape[0],
            num_labels,
            self.ladder_config,
            spec.hidden_dropout if rate is None else rate,
        )
        self.register_buffer("calibrated", torch.tensor(self.ladder_config.init == "random"))
        self._ready = self.ladder_config.init == "random"
        self.register_state_dict_post_hook(_drop_backbone)
        self.register_load_state_dict_post_hook(_after_load)
        self.to(next(backbone.parameters()).device)
        if calibration is not None:
            self.calibrate(calibration)

    @property
    def config(self) -> Any:
        """The backbone's transformers configuration, which Trainer and tokenizers ask for."""
        return self.backbone.config

    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Set the side network's starting weights from the backbone's and these batches; no backward pass is run."""
        if getattr(self, "_is_replica", False):
            raise RuntimeError("calibration: a replica of nn.DataParallel cannot keep it; pass it to LadderModel")
        initialise(self.side, self.backbone, self.ladder_config.init, batches)
        self.calibrated.fill_(True)
        self._ready = True

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """transformers' inputs, (B, S) each; labels (B,) classes, or floats for regression. Returns loss and logits."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        if not self._ready:
            self.calibrate([inputs])
        logits = self.climb(self.backbone(**inputs), attention_mask)
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        problem = problem_type(labels, self.num_labels, self.problem_type)
        return SequenceClassifierOutput(loss=sequence_loss(logits, labels, problem), logits=logits)

    def climb(self, output: BackboneOutput, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits from a backbone output already at hand: what forward does after the frozen forward."""
        key_mask = None if attention_mask is None else attention_mask.bool()
        side = self.side(output, key_mask)
        mask = side.new_ones(side.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        return self.head(side, output.last_hidden_state, mask)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors (side network and head) and config.json, with the backbone's fingerprint."""
        checkpoint.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: FrozenBackbone | nn.Module | str | Path) -> LadderModel:
        """Load a saved ladder onto its backbone: a FrozenBackbone, a transformers model, or its name or folder.

        Raises ValueError if the backbone's weights are not those the ladder was trained on, or a file is unusable.
        """
        return checkpoint.load(cls, Path(folder), backbone)

    def trainable_parameters(self) -> int:
        """Number of parameters that training changes."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _check(backbone: FrozenBackbone, task: str, num_labels: int, problem: str | None) -> None:
    if not isinstance(backbone, FrozenBackbone):
        raise TypeError(f"backbone: got a {type(backbone).__name__}; pass what tlfast.freeze(model) returns")
    if not backbone.tap_indices:
        raise ValueError("backbone: it has no taps, and a ladder has nothing to climb; pass one frozen with taps")
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is not available; allowed: {', '.join(map(repr, TASKS))}")
    if not isinstance(num_labels, int) or num_labels < 1:
        raise ValueError(f"num_labels: got {num_labels!r}; pass an integer of at least 1")
    if problem is not None and problem not in PROBLEMS:
        raise ValueError(f"problem_type: {problem!r} is not available; allowed: {', '.join(map(repr, PROBLEMS))}")


def _tapped(backbone: FrozenBackbone, config: LadderConfig) -> FrozenBackbone:
    """The backbone with exactly the taps the ladder reads."""
    if config.layers == "all":
        return backbone
    wanted = resolve_layers("layers", config.layers, len(backbone.blocks))
    missing = [index for index in wanted if index not in backbone.tap_indices]
    if missing:
        raise ValueError(
            f"layers: blocks {missing} are not tapped; the backbone has taps {list(backbone.tap_indices)}. "
            'Freeze it with taps="all"'
        )
    return backbone.with_taps(wanted)


def _drop_backbone(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}backbone.")]:
        del state[key]


def _after_load(module: Any, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if "backbone.model." not in key]
    module._ready = bool(module.calibrated)
