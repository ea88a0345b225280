"""The SQLite index of a Wiktionary dump: written once, in constant memory, resumed where it was interrupted."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from ..data.errors import InputError
from .dump import Dump
from .wiktextract import Row, parse_line, rows_of

FORMAT = "1"
_BATCH_BYTES = 8 << 20  # of the dump between two commits
_TABLES = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE sense (key TEXT NOT NULL, word TEXT NOT NULL, pos TEXT NOT NULL, proper INTEGER NOT NULL, "
    "definition TEXT, target TEXT)",
)
Progress = Callable[[int], None]


def build(path: Path, index: Path, language: str = "en", progress: Progress | None = None) -> None:
    """Index a dump, or go on with an index that an earlier call left unfinished.

    language: wiktextract's lang_code; entries of others are passed over. progress: called after each commit with the
    (unpacked) bytes of the dump that are done. Of the dump no more than some MiB are ever in memory.
    Raises InputError, with the line's number, for a malformed line (what precedes it is kept, so that the next call
    goes on there), where the dump is not the one the index was begun on, and where another process writes it.
    """
    with Dump(path) as dump, closing(connect(index)) as database:
        try:
            _begin(database, dump, language)
            _fill(database, dump, language, progress)
            _finish(database, dump)
        except sqlite3.OperationalError as error:
            raise InputError(f"{index}: cannot be written ({error}); free space or pass another index") from None


def connect(index: Path, read_only: bool = False) -> sqlite3.Connection:
    """The index's database; InputError where it cannot be opened, or the file is something else."""
    try:
        uri = f"{index.absolute().as_uri()}{'?mode=ro' if read_only else ''}"
        database = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        raise InputError(f"{index}: cannot be opened ({error}); check its folder or pass another index") from None
    except sqlite3.DatabaseError:
        raise InputError(f"{index}: is no index of a dictionary; remove it or pass another index") from None
    return database


def read_meta(database: sqlite3.Connection) -> dict[str, str]:
    """What the index says of itself; {} where it is empty."""
    tables = database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'meta'").fetchone()[0]
    return dict(database.execute("SELECT name, value FROM meta")) if tables else {}


def _begin(database: sqlite3.Connection, dump: Dump, language: str) -> None:
    """Make the tables, or take the dump to where an earlier call stopped."""
    database.execute("BEGIN IMMEDIATE")  # of two that begin, one waits here and then goes on with the other's tables
    meta = read_meta(database)
    if not meta:
        for statement in _TABLES:
            database.execute(statement)
        values = {"format": FORMAT, "language": language, "offset": "0", "line": "0", "window": "", "dump": ""}
        database.executemany("INSERT INTO meta VALUES (?, ?)", list(values.items()))
    database.execute("COMMIT")
    if not meta:
        return
    check_settings(meta, dump.path, language)
    offset = int(meta["offset"])
    if offset:
        dump.go_to(offset, int(meta["line"]))
        if dump.offset != offset or dump.window() != meta["window"]:
            raise InputError(f"{dump.path}: is not the file that its index was begun on; rebuild the index")


def check_settings(meta: dict[str, str], path: Path, language: str) -> None:
    """InputError where an index was made with other settings."""
    found = (meta.get("format"), meta.get("language"))
    if found != (FORMAT, language):
        raise InputError(
            f"{path}: its index is of format {found[0]!r} and language {found[1]!r}, not {FORMAT!r} and {language!r}; "
            "rebuild the index or pass another"
        )


def _fill(database: sqlite3.Connection, dump: Dump, language: str, progress: Progress | None) -> None:
    """Rows of the lines from where the dump is, a transaction for every few MiB."""
    rows: list[Row] = []
    before = dump.offset
    try:
        for line in dump:
            try:
                rows += rows_of(parse_line(line, dump.path, dump.line), dump.path, dump.line, language)
            except InputError:
                dump.unread()
                raise
            if dump.offset - before >= _BATCH_BYTES:
                _commit(database, dump, before, rows)
                rows, before = [], dump.offset
                if progress is not None:
                    progress(dump.offset)
    except InputError:  # what precedes a malformed line is kept
        _commit(database, dump, before, rows)
        raise
    _commit(database, dump, before, rows)


def _commit(database: sqlite3.Connection, dump: Dump, before: int, rows: list[Row]) -> None:
    """Write rows and the place in the dump together, if the index still stands where they were read from."""
    database.execute("BEGIN IMMEDIATE")
    stands = database.execute("SELECT value FROM meta WHERE name = 'offset'").fetchone()[0]
    if int(stands) != before:
        database.execute("ROLLBACK")
        raise InputError(f"{dump.path}: another process writes its index; wait for it, then call again")
    database.executemany("INSERT INTO sense VALUES (?, ?, ?, ?, ?, ?)", rows)
    place = {"offset": str(dump.offset), "line": str(dump.line), "window": dump.window()}
    database.executemany("UPDATE meta SET value = ? WHERE name = ?", [(value, name) for name, value in place.items()])
    database.execute("COMMIT")


def _finish(database: sqlite3.Connection, dump: Dump) -> None:
    """Make the table searchable; by sorting once, which is faster than keeping it sorted from the start."""
    database.execute("BEGIN IMMEDIATE")
    database.execute("CREATE INDEX IF NOT EXISTS by_key ON sense (key)")
    database.execute("UPDATE meta SET value = ? WHERE name = 'dump'", (dump.state(),))
    database.execute("COMMIT")
