"""A frozen model and the activations ("taps") it gives away."""

from .fingerprint import fingerprint
from .freezing import freeze, resolve_layers
from .frozen import BackboneOutput, EncoderDecoderOutput, FrozenBackbone

__all__ = ["BackboneOutput", "EncoderDecoderOutput", "FrozenBackbone", "fingerprint", "freeze", "resolve_layers"]
