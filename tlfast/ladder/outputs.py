"""What a ladder returns; of a language model in training the logits are made when somebody reads them: few do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_MAKE, _MADE = "_make_logits", "_logits"


def model_output(task: str, loss: torch.Tensor | None, logits: torch.Tensor | None, past: Any) -> Any:
    """What transformers' models return for a task."""
    from transformers import modeling_outputs as outputs

    output_class: Any = {
        "sequence-classification": outputs.SequenceClassifierOutput,
        "token-classification": outputs.TokenClassifierOutput,
        "image-classification": outputs.ImageClassifierOutput,
        "causal-lm": outputs.CausalLMOutputWithPast,
        "seq2seq-lm": outputs.Seq2SeqLMOutput,
    }[task]
    if past is None:
        return output_class(loss=loss, logits=logits)
    name = "cache" if "cache" in output_class.__dataclass_fields__ else "past_key_values"
    return output_class(loss=loss, logits=logits, **{name: past})


def with_lazy_logits(output: Any, make: Callable[[], torch.Tensor]) -> Any:
    """A transformers ModelOutput without logits as one of its own class that calls `make` once they are asked for.

    As an attribute, by name or by place. Until then, and in what transformers or PyTorch make of it (to_tuple, gathered
    or cast copies), it has none.
    """
    output_class: Any = type(output)
    lazy = _lazy_class(output_class)(**output)
    lazy.__dict__[_MAKE] = make
    return lazy


@functools.cache
def _lazy_class(output_class: Any) -> Any:
    def read(self: Any) -> torch.Tensor | None:
        make = self.__dict__.pop(_MAKE, None)
        if make is not None:
            self["logits"] = make()  # which sets the attribute, too
            for name in list(output_class.__dataclass_fields__)[_place(output_class) + 1 :]:
                if name in self:
                    self.move_to_end(name)
        return self.__dict__.get(_MADE)

    def write(self: Any, logits: torch.Tensor | None) -> None:
        self.__dict__[_MADE] = logits

    def get_item(self: Any, key: Any) -> Any:
        if key == "logits" or (isinstance(key, slice) or (isinstance(key, int) and key != 0)):
            read(self)
        return output_class.__getitem__(self, key)

    members = {"logits": property(read, write), "__getitem__": get_item, "__doc__": output_class.__doc__}
    return type(output_class.__name__, (output_class,), members)


def _place(output_class: Any) -> int:
    return list(output_class.__dataclass_fields__).index("logits")
