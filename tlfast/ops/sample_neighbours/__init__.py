from .api import IMPLEMENTATIONS, Sampled, sample_neighbours

__all__ = ["IMPLEMENTATIONS", "Sampled", "sample_neighbours"]
