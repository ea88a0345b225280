"""A frozen model and the activations ("taps") it gives away."""

from .fingerprint import fingerprint
from .freezing import freeze, resolve_layers
from .frozen import FrozenBackbone
from .outputs import BackboneOutput, EncoderDecoderOutput
from .prepared_folder import is_prepared
from .tokens import most_tokens

__all__ = [
    "BackboneOutput",
    "EncoderDecoderOutput",
    "FrozenBackbone",
    "fingerprint",
    "freeze",
    "is_prepared",
    "most_tokens",
    "resolve_layers",
]
