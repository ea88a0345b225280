"""Relation paths by which messages of the target type reach the source type."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.errors import InputError
from ..graph import EdgeType
from ..graph.hetero import there_are

Metapath = tuple[EdgeType, ...]


def metapaths(edge_types: Sequence[EdgeType], source: str, target: str, hops: int) -> list[Metapath]:
    """All paths r_1 .. r_k of at most `hops` relations, r_1 into the source type, r_k out of the target type, each
    relation into the type that the one before comes out of; the target type is met at the end only.

    Shortest first, then by the order of the relations into a type, as the authors' code lists them.
    Raises InputError where there are none, and says what leads to the source; for equal types, or hops below 1.
    """
    types = list(dict.fromkeys(end for edge_type in edge_types for end in (edge_type[0], edge_type[2])))
    for role, name in (("source", source), ("target", target)):
        if name not in types:
            raise InputError(f"{role} {name!r}: no relation begins or ends there; {there_are(types)}")
    if source == target:
        raise InputError(f"source and target are both {source!r}; transfer goes from one node type to another")
    if hops < 1:
        raise InputError(f"hops must be at least 1, not {hops}")
    found: list[Metapath] = []
    open_paths: list[Metapath] = [()]
    for _ in range(hops):
        longer = [(*path, r) for path in open_paths for r in edge_types if r[2] == (path[-1][0] if path else source)]
        found += [path for path in longer if path[-1][0] == target]
        open_paths = [path for path in longer if path[-1][0] != target]
    if not found:
        raise InputError(
            f"no path of at most {hops} relations leads from {target!r} to {source!r}; within {hops} these do lead to"
            f" {source!r}: {_reached(edge_types, source, hops)}. Raise hops or choose another target"
        )
    return found


def describe(path: Metapath) -> str:
    """A path as one line: source <-relation- type <-relation- target."""
    return path[0][2] + "".join(f" <-{name}- {begin}" for begin, name, _ in path)


def _reached(edge_types: Sequence[EdgeType], source: str, hops: int) -> str:
    """Shortest path from each type that reaches the source."""
    paths: dict[str, Metapath] = {source: ()}
    for _ in range(hops):
        longer = {r[0]: (*paths[r[2]], r) for r in edge_types if r[2] in paths and r[0] not in paths}
        paths |= longer
    return ", ".join(describe(path) for path in paths.values() if path) or "none"
