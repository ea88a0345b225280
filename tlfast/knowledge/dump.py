"""A dump read line by line, with what it takes to go on reading it later."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..data.errors import InputError

_WINDOW = 1 << 16  # bytes before a place that tell whether the dump is still the same one
_LONGEST_LINE = 256 << 20  # the longest of English Wiktionary have a few MiB


class Dump:
    """The lines of a .jsonl or .jsonl.gz file.

    offset, line: the (unpacked) bytes and the lines that were read. Only the line at hand and 64 KiB before it are in
    memory. Raises InputError where there is no such file, and, while reading, for a line of more than 256 MiB or a .gz
    file that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.line = path, 0, 0
        self._recent: deque[bytes] = deque()
        self._recent_size = 0
        self._file = _open(path)

    def __enter__(self) -> Dump:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        """The lines from where reading stands, without line ends; blank ones are passed over."""
        while True:
            try:
                line = self._file.readline(_LONGEST_LINE)
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{self.path}, line {self.line + 1}: {error}; download the file again") from None
            if not line:
                return
            if len(line) == _LONGEST_LINE:
                raise InputError(f"{self.path}, line {self.line + 1}: has over 256 MiB; is this a .jsonl file?")
            yield_line = line.removeprefix(b"\xef\xbb\xbf") if self.offset == 0 else line
            self._note(line)
            if not yield_line.isspace():
                yield yield_line.rstrip(b"\r\n")

    def unread(self) -> bytes:
        """Take the last line back: offset and line are as before it, though reading goes on behind it."""
        line = self._recent.pop()
        self._recent_size -= len(line)
        self.offset -= len(line)
        self.line -= 1
        return line

    def go_to(self, offset: int, line: int) -> None:
        """Go on at an offset that was reached before."""
        start = max(0, offset - _WINDOW)
        try:
            self._file.seek(start)
            window = self._file.read(offset - start)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{self.path}: {error}; download the file again") from None
        self.offset, self.line = start + len(window), line
        self._recent, self._recent_size = deque([window]), len(window)

    def window(self) -> str:
        """A hash of the bytes before the offset."""
        return hashlib.sha256(b"".join(self._recent)[-_WINDOW:]).hexdigest()

    def state(self) -> str:
        """Size and time of the last change of the file."""
        stat = self.path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def _note(self, line: bytes) -> None:
        self.offset += len(line)
        self.line += 1
        self._recent.append(line)
        self._recent_size += len(line)
        # a window must be left when the last line is taken back
        while self._recent_size - len(self._recent[0]) - len(line) >= _WINDOW:
            self._recent_size -= len(self._recent.popleft())


def _open(path: Path) -> IO[bytes]:
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
    except FileNotFoundError:
        raise InputError(
            f"{path}: there is no such file; download an English dump (.jsonl or .jsonl.gz) from https://kaikki.org"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); pass a .jsonl or .jsonl.gz file") from None
