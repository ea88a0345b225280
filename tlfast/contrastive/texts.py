"""The texts a dual encoder is trained with: for each class or caption several, of which a step takes one at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..training import processes
from .encoders import TextEncoder

FEATURE_BYTES = 2 << 30  # kept features; what takes more is made anew at every step


@dataclass(frozen=True)
class TextGroup:
    """The texts of one class or caption. label: the class, -1 for a caption without one.

    plain: at least one, without knowledge. knowledge: the same with a definition; none where none is known.
    """

    label: int
    plain: tuple[str, ...]
    knowledge: tuple[str, ...] = ()


class TextBank:
    """Groups of texts. knowledge_share: how often a step takes a text with knowledge where a group has any.

    Features of a text tower that does not learn are made once, by `keep_features`.
    Raises ValueError for a share outside [0, 1] and a group without texts.
    """

    def __init__(self, groups: Sequence[TextGroup], knowledge_share: float = 0.5) -> None:
        if not 0 <= knowledge_share <= 1:
            raise ValueError(
                f"knowledge_share: {knowledge_share!r} must be in [0, 1]: 0 never takes knowledge, 1 always"
            )
        for number, group in enumerate(groups):
            if not group.plain:
                raise ValueError(f"groups: the one at {number} has no text; each needs one")
        self.groups, self.knowledge_share = groups, knowledge_share
        self.labels = torch.tensor([group.label for group in groups], dtype=torch.int64)
        self._features: torch.Tensor | None = None
        self._row: dict[str, int] = {}

    @property
    def keeps_features(self) -> bool:
        """Whether features are made once."""
        return self._features is not None

    def keep_features(self, encoder: TextEncoder) -> bool:
        """Make the features of all texts, where the text tower does not learn and they take at most 2 GiB."""
        different = list(dict.fromkeys(text for group in self.groups for text in (*group.plain, *group.knowledge)))
        if not encoder.model.text.static or 4 * len(different) * encoder.model.text.width > FEATURE_BYTES:
            return False
        self._features = encoder.features(different)
        if not self._features.isfinite().all():
            row = int((~self._features.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(f"text: the tower makes NaN or infinity of {different[row]!r}; mend its weights")
        self._row = {text: row for row, text in enumerate(different)}
        return True

    def draw(self, groups: torch.Tensor) -> list[str]:
        """A text of each group, (B,) int64, by PyTorch's generator, which transformers.Trainer saves for resuming."""
        chances = torch.rand(processes.count(), len(groups), 2)[processes.rank()]  # all have the same generator
        return [self._one(self.groups[i], *pair) for i, pair in zip(groups.tolist(), chances.tolist(), strict=True)]

    def standing_for(self, group: int) -> tuple[str, ...]:
        """The texts whose mean stands for a group when images are classified: those a step may take."""
        found = self.groups[group]
        if not found.knowledge or self.knowledge_share == 0:
            return found.plain
        return found.knowledge if self.knowledge_share == 1 else (*found.plain, *found.knowledge)

    def encode(self, encoder: TextEncoder, texts: Sequence[str]) -> torch.Tensor:
        """(N, dim), rows of length 1, with a graph where the tower learns."""
        if self._features is not None:
            return encoder.model.encode_text(features=self._features[[self._row[text] for text in texts]])
        different = list(dict.fromkeys(texts))  # images of one class often draw the same
        parts = (different[i : i + encoder.batch_size] for i in range(0, len(different), encoder.batch_size))
        found = torch.cat([encoder.model.encode_text(**encoder.inputs(part)) for part in parts])
        place = {text: row for row, text in enumerate(different)}
        return found[[place[text] for text in texts]]

    def _one(self, group: TextGroup, kind: float, which: float) -> str:
        texts = group.knowledge if group.knowledge and kind < self.knowledge_share else group.plain
        return texts[int(which * len(texts))]
