from .api import IMPLEMENTATIONS, quantise_rows

__all__ = ["IMPLEMENTATIONS", "quantise_rows"]
