"""A frozen model and the activations ("taps") it gives away."""

from .fingerprint import fingerprint
from .freezing import freeze, resolve_layers
from .frozen import BackboneOutput, EncoderDecoderOutput, FrozenBackbone
from .prepared_folder import is_prepared

__all__ = [
    "BackboneOutput",
    "EncoderDecoderOutput",
    "FrozenBackbone",
    "fingerprint",
    "freeze",
    "is_prepared",
    "resolve_layers",
]
