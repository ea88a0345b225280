"""The frozen head of a language model: from hidden states to logits, as the model's own forward computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..ops import linear_cross_entropy
from .fingerprint import fingerprint


@dataclass(frozen=True)
class LMHead:
    """logits = cap * tanh(W (scale * hidden) / cap) + bias; scale, cap and bias only where the model has them.

    tied: whether W is the embedding's weight.
    """

    model: Any
    scale: float
    cap: float | None
    tied: bool

    @classmethod
    def of(cls, model: Any) -> LMHead | None:
        """The head of a transformers language model; None for a model without one.

        Raises ValueError where the configuration says it is tied to the embedding and the weights are not, or the
        other way round: older transformers scales T5's hidden states by what the configuration says. Newer ones have
        scale_decoder_outputs for that, and say of every T5 that it is tied.
        """
        can_generate = getattr(model, "can_generate", None)
        head = model.get_output_embeddings() if can_generate is not None and can_generate() else None
        if head is None:
            return None
        config = model.config
        embedding = model.get_input_embeddings()
        tied = embedding is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
        scaled = getattr(config, "scale_decoder_outputs", None)
        said = bool(getattr(config, "tie_word_embeddings", tied))
        if said != tied and scaled is None:
            raise ValueError(
                f"model: config.tie_word_embeddings is {said}, but the head's weights "
                f"{'are' if tied else 'are not'} the embedding's; call model.tie_weights(), or set it to {tied}"
            )
        if scaled is None:
            scaled = config.model_type == "t5" and tied
        return cls(
            model,
            config.d_model**-0.5 if scaled else 1.0,
            getattr(config, "final_logit_softcapping", None),
            tied,
        )

    @property
    def weight(self) -> torch.Tensor:
        """(V, D), where the model has it now."""
        return self.model.get_output_embeddings().weight

    @property
    def bias(self) -> torch.Tensor | None:
        """(V,), or None."""
        if getattr(self.model, "final_logits_bias", None) is not None:
            return self.model.final_logits_bias.reshape(-1)
        return self.model.get_output_embeddings().bias

    @property
    def width(self) -> int:
        """The width of the hidden states it takes."""
        return self.weight.shape[1]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V). The head is frozen: the gradient reaches hidden alone."""
        if self.scale != 1.0:
            hidden = hidden * self.scale
        weight = self.weight
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)  # one that its owner stores in fewer bits
        logits = F.linear(hidden, weight)
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        bias = self.bias
        return logits if bias is None else logits + bias

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor, ignored: int, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy of the logits of hidden (..., D), which never exist all at once, and labels (...)."""
        return linear_cross_entropy(
            hidden, self.weight, labels, self.bias, self.scale, self.cap, reduction, ignore_index=ignored
        )

    def fingerprint(self) -> str:
        """What identifies it: "tied" or "untied", and a hash of its settings and of what weights it adds."""
        own = {} if self.tied else {"weight": self.weight}
        bias = self.bias
        if bias is not None:
            own["bias"] = bias
        return f"{'tied' if self.tied else 'untied'}:{fingerprint(own, (self.scale, self.cap))}"
