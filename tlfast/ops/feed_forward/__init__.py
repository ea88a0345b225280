from .api import IMPLEMENTATIONS, feed_forward

__all__ = ["IMPLEMENTATIONS", "feed_forward"]
