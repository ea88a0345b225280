"""Heterogeneous graphs: adjacency for the kernels, a folder format, conversion from and to PyTorch Geometric."""

from .adjacency import Adjacency
from .folder import load, read_folder, save
from .hetero import EdgeType, HeteroGraph, as_graph, to_hetero_data
from .hetero_conv import HeteroConv
from .loader import NeighbourLoader
from .sampler import NeighbourSampler, Sample

__all__ = [
    "Adjacency",
    "EdgeType",
    "HeteroConv",
    "HeteroGraph",
    "NeighbourLoader",
    "NeighbourSampler",
    "Sample",
    "as_graph",
    "load",
    "read_folder",
    "save",
    "to_hetero_data",
]
