"""Two processes of one gloo group, started once and given one function of a test after the other."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

COUNT = 2
PATIENCE = 120.0  # seconds; only a hung collective takes that long, however busy the machine is


class Processes:
    """Runs functions in COUNT processes at once. Importing torch and transformers there is paid for once.

    The processes find each other through a file, so no port has to be free. After a failure all of them are killed,
    since one of them may wait for the other for ever; the next call starts new ones.
    """

    def __init__(self) -> None:
        self.running: list[Any] = []
        self.pipes: list[Connection] = []
        self.meeting = tempfile.TemporaryDirectory()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What function(rank, *arguments) returns in each process; AssertionError with its traceback if one fails."""
        if not self.running:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        try:
            while len(results) < COUNT:
                ready = wait([pipe for rank, pipe in enumerate(self.pipes) if rank not in results], PATIENCE)
                assert ready, f"{function.__name__}: no answer of a process in {PATIENCE:.0f} s"
                for pipe in ready:
                    rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                    failure, results[rank] = _answer(self.pipes[rank])
                    assert failure is None, f"process {rank} of {function.__name__}:\n{failure}"
        except BaseException:
            self.stop()
            raise
        return [results[rank] for rank in range(COUNT)]

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        meeting = Path(self.meeting.name) / "meeting"
        meeting.unlink(missing_ok=True)
        for rank in range(COUNT):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, str(meeting), theirs), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies ends our waiting for it
            self.running.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        """Kill the processes; they hold nothing that is worth an orderly end."""
        for process in self.running:
            process.kill()
        for process in self.running:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.running, self.pipes = [], []


def _answer(pipe: Connection) -> tuple[str | None, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return "it died", None


def _work(rank: int, meeting: str, pipe: Connection) -> None:
    # what torchrun sets, for transformers.Trainer
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(COUNT), "LOCAL_WORLD_SIZE": str(COUNT)}
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=PATIENCE)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=COUNT, timeout=patience
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:  # pytest has ended
            return
        try:
            pipe.send((None, function(rank, *arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
