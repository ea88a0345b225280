"""Edges of a relation as the kernels read them: compressed rows both ways, and work dealt out by edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ... import _native

# A task is about so many edges and rows: enough to hide the hand-out, little enough to balance the threads. A row with
# more than HUB edges is a task for each of four slices of its columns, so that one hub does not keep one thread busy
# while the others wait. csrc/ops/cpu/hetero_aggregate.cpp and its CUDA twin read both.
TASK_WORK, HUB, SLICES = 1024, 8192, 4
_LARGEST = 2**31 - 1
_INDICES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Rows:
    """Compressed sparse rows: row i has the columns col[rowptr[i]:rowptr[i + 1]].

    rowptr: (rows + 1,) int32; col: (edges,) int32, ascending in a row; columns: how many there are to name;
    inverse_degree: (rows,) float32, 1 / number of edges, 0 for a row without; tasks: see `make_tasks`.
    """

    rowptr: torch.Tensor
    col: torch.Tensor
    columns: int
    inverse_degree: torch.Tensor
    tasks: torch.Tensor

    @staticmethod
    def compress(row: torch.Tensor, col: torch.Tensor, rows: int, columns: int) -> Rows:
        """From one row and one column an edge (int64); duplicates stay."""
        order = torch.argsort(row * columns + col)
        degree = torch.bincount(row, minlength=rows)
        rowptr = torch.zeros(rows + 1, dtype=torch.int64, device=row.device)
        torch.cumsum(degree, 0, out=rowptr[1:])
        inverse = torch.where(degree > 0, 1.0 / degree.clamp(min=1), 0.0).to(torch.float32)
        return Rows(rowptr.to(torch.int32), col[order].to(torch.int32), columns, inverse, make_tasks([degree]))

    @property
    def degree(self) -> torch.Tensor:
        """Edges a row, (rows,) int32."""
        return self.rowptr.diff()

    def to(self, device: torch.device | str) -> Rows:
        """The same on another device."""
        rowptr, col, inverse_degree, tasks = (
            tensor.to(device) for tensor in (self.rowptr, self.col, self.inverse_degree, self.tasks)
        )
        return Rows(rowptr, col, self.columns, inverse_degree, tasks)


class Relation:
    """The edges of one relation from source nodes to target nodes, compressed by target and, for gradients, by source.

    Attributes:
        num_sources, num_targets: nodes on either side.
        by_target, by_source: `Rows` of the matrix A (targets x sources) and of its transpose.
    """

    def __init__(self, by_target: Rows, by_source: Rows) -> None:
        self.by_target, self.by_source = by_target, by_source
        self.num_sources, self.num_targets = by_target.columns, by_source.columns

    @staticmethod
    def from_edges(edge_index: torch.Tensor, num_sources: int, num_targets: int, name: str = "edge_index") -> Relation:
        """From an edge list (2, E) of integers, row 0 the source and row 1 the target of each edge; duplicates stay.

        Raises:
            ValueError: no (2, E) integers, or an index out of range; `name` says in the message which list.
        """
        check_edges(edge_index, num_sources, num_targets, name)
        if max(edge_index.shape[1], num_sources, num_targets) > _LARGEST:
            raise ValueError(
                f"{name} has more than {_LARGEST} edges or nodes, which int32 cannot count: split the graph"
            )
        if edge_index.device.type == "cpu" and not _native.why_not():
            source, target = edge_index.to(torch.int32)
            return _counted(source, target, num_sources, num_targets)
        source, target = edge_index.to(torch.int64)
        by_target = Rows.compress(target, source, num_targets, num_sources)
        return Relation(by_target, Rows.compress(source, target, num_sources, num_targets))

    @staticmethod
    def from_rows(rows: Sequence[tuple[torch.Tensor, torch.Tensor, int]]) -> list[Relation]:
        """From (rowptr, col, sources) of each relation, compressed rows over its targets as in `Rows`, on the CPU.

        They are taken as they are, unchecked, and shared.
        """
        both = [_plain_both_ways(*one) for one in rows] if _native.why_not() else _native_both_ways(rows)
        return [Relation(*one) for one in both]

    @property
    def num_edges(self) -> int:
        """Edges, duplicates counted."""
        return self.by_target.col.numel()

    def t(self) -> Relation:
        """The edges the other way round; shares all tensors."""
        return Relation(self.by_source, self.by_target)

    def edge_index(self) -> torch.Tensor:
        """The edges as (2, E) int64, ordered by target, then source."""
        degree = self.by_target.degree.to(torch.int64)
        target = torch.repeat_interleave(torch.arange(self.num_targets, device=degree.device), degree)
        return torch.stack([self.by_target.col.to(torch.int64), target])

    def to(self, device: torch.device | str) -> Relation:
        """The same on another device."""
        return Relation(self.by_target.to(device), self.by_source.to(device))

    def __repr__(self) -> str:
        return f"Relation({self.num_sources} -> {self.num_targets}, {self.num_edges} edges)"


class RelationGroup:
    """Relations into the same targets, to be aggregated in one pass over them.

    Raises:
        ValueError: there are none, or they have different numbers of targets.
    """

    def __init__(self, relations: Sequence[Relation]) -> None:
        self.relations = tuple(relations)
        counts = {relation.num_targets for relation in self.relations}
        if len(counts) != 1:
            raise ValueError(f"relations must be at least one, all into the same targets; these go into {counts}")
        self.num_targets = counts.pop()
        self.tasks = tasks_of([relation.by_target for relation in self.relations])


def tasks_of(rows: Sequence[Rows]) -> torch.Tensor:
    """`make_tasks` of relations that are aggregated in one pass."""
    if len(rows) == 1:
        return rows[0].tasks
    count = rows[0].rowptr.numel() - 1
    if sum(one.col.numel() for one in rows) + count < TASK_WORK:
        return one_task(count, rows[0].col.device)
    return make_tasks([one.degree for one in rows])


def one_task(rows: int, device: torch.device) -> torch.Tensor:
    """What `make_tasks` gives for rows of so little work, in all less than TASK_WORK."""
    return torch.tensor([[0, rows, -1]] if rows else [], dtype=torch.int32, device=device).view(-1, 3)


def make_tasks(degrees: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows dealt out by edges, (tasks, 3) int32: first row, row after the last, slice of the columns (-1: all)."""
    degree = torch.stack([d.to(torch.int64) for d in degrees]).sum(0)
    rows = degree.numel()
    if rows == 0:
        return torch.empty(0, 3, dtype=torch.int32, device=degree.device)
    hub = degree > HUB
    chunk = torch.cumsum(degree + 1, 0) // TASK_WORK
    begins = torch.ones(rows, dtype=torch.bool, device=degree.device)
    begins[1:] = (chunk[1:] != chunk[:-1]) | hub[1:] | hub[:-1]
    first = begins.nonzero().flatten()
    end = torch.cat([first[1:], first.new_tensor([rows])])
    pieces = torch.where(hub[first], SLICES, 1)
    task = torch.repeat_interleave(torch.arange(first.numel(), device=degree.device), pieces)
    piece = torch.arange(task.numel(), device=degree.device) - (torch.cumsum(pieces, 0) - pieces)[task]
    piece = torch.where(pieces[task] == 1, -1, piece)
    return torch.stack([first[task], end[task], piece], 1).to(torch.int32).contiguous()


def _tasks(rowptr: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    rows = rowptr.numel() - 1
    little = rows + col.numel() < TASK_WORK
    return one_task(rows, col.device) if little else make_tasks([rowptr.diff()])


def _plain_both_ways(rowptr: torch.Tensor, col: torch.Tensor, columns: int) -> tuple[Rows, Rows]:
    row = torch.repeat_interleave(torch.arange(rowptr.numel() - 1), rowptr.diff())
    source, rows = col.to(torch.int64), rowptr.numel() - 1
    return Rows.compress(row, source, rows, columns), Rows.compress(source, row, columns, rows)


def _counted(source: torch.Tensor, target: torch.Tensor, num_sources: int, num_targets: int) -> Relation:
    """By counting instead of sorting: edges by source, these by target, and back; each is a transpose of rows."""
    each = torch.arange(len(source) + 1, dtype=torch.int32)  # a row an edge
    _, (starts, edge, _) = _transposed([(each, source.contiguous(), num_sources)])[0]
    _, (starts, sources, _) = _transposed([(starts, target[edge], num_targets)])[0]
    return Relation(*_native_both_ways([(starts, sources, num_sources)])[0])


def _native_both_ways(rows: Sequence[tuple[torch.Tensor, torch.Tensor, int]]) -> list[tuple[Rows, Rows]]:
    """Each relation's rows and their transpose."""
    found = []
    for (rowptr, col, columns), (scale, (starts, rows_of, back)) in zip(rows, _transposed(rows), strict=True):
        there = Rows(rowptr, col, columns, scale, _tasks(rowptr, col))
        found.append((there, Rows(starts, rows_of, rowptr.numel() - 1, back, _tasks(starts, rows_of))))
    return found


def _transposed(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor, int]],
) -> list[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """1 / edges of each relation's rows, and rowptr, col and 1 / edges of its transpose; all parts of two tensors."""
    sizes = [(rowptr.numel() - 1, col.numel(), columns) for rowptr, col, columns in rows]
    whole = torch.empty(sum(edges + columns + 1 for _, edges, columns in sizes), dtype=torch.int32)
    scales = torch.empty(sum(count + columns for count, _, columns in sizes), dtype=torch.float32)
    structure = whole.split([size for _, edges, columns in sizes for size in (columns + 1, edges)])
    inverse = scales.split([size for count, _, columns in sizes for size in (count, columns)])
    table, found = [], []
    for i, ((rowptr, col, _), (count, _, columns)) in enumerate(zip(rows, sizes, strict=True)):
        (starts, rows_of), (scale, back) = structure[2 * i : 2 * i + 2], inverse[2 * i : 2 * i + 2]
        tensors = (rowptr, col, starts, rows_of, scale, back)
        table.append([*(tensor.data_ptr() for tensor in tensors), count, columns])
        found.append((scale, (starts, rows_of, back)))
    lines = torch.tensor(table, dtype=torch.int64)
    _native.library().transpose_rows_cpu(lines.data_ptr(), len(table), torch.get_num_threads())
    return found


def check_edges(edge_index: torch.Tensor, num_sources: int, num_targets: int, name: str) -> None:
    """ValueError for what is no (2, E) integers, or an index out of range; `name` says in the message which list."""
    if not isinstance(edge_index, torch.Tensor) or edge_index.dtype not in _INDICES:
        given = edge_index.dtype if isinstance(edge_index, torch.Tensor) else type(edge_index).__name__
        raise ValueError(f"{name} must be a tensor of integers, int64 or narrower, not {given}")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"{name} must be (2, E), sources over targets, not {tuple(edge_index.shape)}")
    if not edge_index.shape[1]:
        return
    for row, (side, count) in enumerate((("source", num_sources), ("target", num_targets))):
        low, high = (int(bound) for bound in edge_index[row].aminmax())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{name} names {side} node {wrong}, but its {side} type has {count} nodes, 0 to {count - 1}: mend the"
                f" edges or the number of nodes"
            )
