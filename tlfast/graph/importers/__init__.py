"""Graphs from other people's files. Nothing is unpickled."""

from .dblp import read_dblp
from .oag import read_oag
from .ogb import read_ogb

__all__ = ["read_dblp", "read_oag", "read_ogb"]
