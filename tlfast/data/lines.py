"""The lines of a text file, as every reader takes them."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError


def read_text(path: Path) -> str:
    """The file's text, UTF-8, without a byte order mark; \\r\\n becomes \\n.

    Raises InputError for a folder, a missing or unreadable file, and, with its line, what is not UTF-8.
    """
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; pass a file")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; check the path") from None
    except PermissionError:
        raise InputError(f"{path}: the file may not be read; change its permissions") from None
    lines = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            lines.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            at = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
            raise InputError(f"{path}, line {number}: not UTF-8 ({at}); convert the file to UTF-8") from None
    return "\n".join(lines)


def read_lines(path: Path, needed: str) -> list[str]:
    """The file's lines, without line ends and without blank lines at its end.

    Only \\n and \\r\\n end a line: str.splitlines would also split at characters such as U+0085 inside a text.
    needed: what the file should hold, for the error where it is empty.
    """
    lines = read_text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f"{path}: the file is empty; it needs {needed}")
    return lines
