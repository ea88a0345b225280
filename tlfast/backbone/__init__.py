"""A frozen model and the activations ("taps") it gives away."""

from .fingerprint import fingerprint
from .freeze import BackboneOutput, FrozenBackbone, freeze

__all__ = ["BackboneOutput", "FrozenBackbone", "fingerprint", "freeze"]
