"""Wiktionary's index: what it holds, resuming, constant memory, and bad dumps."""

import gzip
import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc

import pytest

from benchmarks.wiktextract import definition, word, write_dump
from tlfast.data import InputError
from tlfast.knowledge import Wiktionary, wiktionary_index

ENTRIES = [
    ("mouse", "noun", [{"glosses": ["Any small rodent."]}, {"glosses": ["A black eye."], "tags": ["slang"]}]),
    ("mouse", "verb", [{"glosses": ["To hunt mice."]}]),
    ("geese", "noun", [{"glosses": ["plural of goose"], "form_of": [{"word": "goose"}], "tags": ["form-of"]}]),
    ("goose", "noun", [{"glosses": ["Any of various grazing birds:", "The female bird."]}]),
    ("Goose", "name", [{"glosses": ["A surname."]}]),
    ("chequer", "noun", [{"glosses": ["The fruit of the wild service tree."]}]),
    ("chequer", "verb", [{"glosses": ["To mark with squares."]}]),
    ("chequered", "verb", [{"glosses": ["past of chequer"], "form_of": [{"word": "chequer"}]}]),
    ("chequered", "adj", [{"glosses": ["Divided into squares, like a chessboard."]}]),
    ("chequering", "verb", [{"glosses": ["participle of chequer"], "form_of": [{"word": "chequer"}]}]),
    ("grey parrots", "noun", [{"glosses": ["plural"], "form_of": [{"word": "grey parrot"}]}]),
    ("grey parrot", "noun", [{"glosses": ["Alternative spelling"], "alt_of": [{"word": "gray parrot"}]}]),
    ("gray parrot", "noun", [{"glosses": ["A large parrot."]}]),
    ("car", "noun", [{"glosses": ["A chariot."], "tags": ["obsolete"]}, {"raw_glosses": ["(road) A\n  vehicle."]}]),
    ("wight", "noun", [{"glosses": ["A person."], "tags": ["archaic"]}]),
    ("empty", "noun", [{"tags": ["no-gloss"]}]),
    ("and", "conj", [{"glosses": ["As well as."]}]),
]


def entry(word, pos, senses, **more):
    return {"word": word, "pos": pos, "lang": "English", "lang_code": "en", "senses": senses, **more}


def write(path, entries):
    lines = (json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in entries)
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture
def dump(tmp_path):
    entries = [entry(*item) for item in ENTRIES]
    entries[0]["forms"] = [
        {"form": "mice", "tags": ["plural"]},
        {"form": "meese", "tags": ["plural", "obsolete"]},
        {"form": "en-noun", "tags": ["inflection-template"]},
    ]
    entries.append({**entry("Maus", "noun", [{"glosses": ["mouse"]}]), "lang_code": "de"})
    return write(tmp_path / "dump.jsonl", entries)


@pytest.fixture
def wiktionary(dump):
    return Wiktionary(dump)


def said(dictionary, name):
    return [sense.definition for sense in dictionary.lookup(name)]


def test_senses_in_order_without_slang_and_obsolete_ones(wiktionary):
    assert said(wiktionary, "mouse") == ["Any small rodent", "To hunt mice"]
    assert said(wiktionary, "car") == ["(road) A vehicle"]
    for name in ("wight", "empty", "and", "Maus", "meese", "en-noun"):
        assert said(wiktionary, name) == []
    sense = wiktionary.lookup("goose")[0]
    assert (sense.lemma, sense.pos, sense.source, sense.offset) == ("goose", "n", "Wiktionary", None)
    assert sense.definition == "Any of various grazing birds: The female bird", "behind what it is nested in"
    assert said(wiktionary, "goose")[1] == "A surname", "names come behind nouns"


@pytest.mark.parametrize(
    ("name", "kind", "definitions"),
    [
        ("goose", "exact", ["Any of various grazing birds: The female bird", "A surname"]),
        ("gray parrot", "exact", ["A large parrot"]),
        ("gray-parrot", "underscored", ["A large parrot"]),
        ("geese", "lemma", ["Any of various grazing birds: The female bird", "A surname"]),
        ("mice", "lemma", ["Any small rodent"]),
        ("grey parrot", "lemma", ["A large parrot"]),
        ("grey parrots", "lemma", ["A large parrot"]),
        ("gooses", "lemma", ["Any of various grazing birds: The female bird", "A surname"]),
        ("chequering", "lemma", ["To mark with squares"]),
        ("African gray parrot", "head noun", ["A large parrot"]),
        ("white geese", "head noun", ["Any of various grazing birds: The female bird", "A surname"]),
    ],
)
def test_forms_and_spellings_are_followed(wiktionary, name, kind, definitions):
    match = wiktionary.find(name)
    assert match.kind == kind
    assert [sense.definition for sense in match.senses] == definitions


def test_chequered_is_no_fruit(wiktionary):
    """K-LITE followed the verb's form to the first noun spelled like its lemma."""
    assert said(wiktionary, "chequered") == ["Divided into squares, like a chessboard"]


def test_forms_in_a_circle(tmp_path):
    dump = write(
        tmp_path / "dump.jsonl",
        [entry(a, "noun", [{"glosses": ["x"], "alt_of": [{"word": b}]}]) for a, b in [("one", "two"), ("two", "one")]],
    )
    assert said(Wiktionary(dump), "one") == []


def test_an_index_is_enough_and_is_made_once(dump, wiktionary, monkeypatch):
    assert wiktionary.index == dump.with_name("dump.jsonl.sqlite")
    monkeypatch.setattr("tlfast.knowledge.wiktionary.build", None)
    again = Wiktionary(dump)
    dump.unlink()
    for other in (again, Wiktionary(wiktionary.index), pickle.loads(pickle.dumps(wiktionary))):
        assert said(other, "mouse") == said(wiktionary, "mouse")


def test_gzip_byte_order_mark_and_blank_lines(dump, tmp_path):
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + dump.read_bytes().replace(b"\n", b"\r\n\r\n")))
    assert said(Wiktionary(packed), "mouse") == ["Any small rodent", "To hunt mice"]


def test_another_language(dump):
    german = Wiktionary(dump, index=dump.parent / "de.sqlite", language="de")
    assert said(german, "Maus") == ["mouse"] and said(german, "goose") == []
    with pytest.raises(InputError, match="its index is of format '1' and language 'de', not '1' and 'en'"):
        Wiktionary(dump, index=dump.parent / "de.sqlite")


# interrupted and resumed


def rows(index):
    with sqlite3.connect(index) as database:
        return database.execute("SELECT * FROM sense ORDER BY rowid").fetchall()


KILLED = """
import os, signal, sys
from tlfast.knowledge import Wiktionary, wiktionary_index
wiktionary_index._BATCH_BYTES = 20_000
def progress(done):
    if done > 150_000:
        os.kill(os.getpid(), signal.{signal})
Wiktionary(sys.argv[1], progress=progress)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_goes_on_after_a_kill(tmp_path, name, suffix):
    plain = tmp_path / "plain.jsonl"
    words = write_dump(plain, 300_000)
    whole = Wiktionary(plain)
    dump = plain
    if suffix == ".jsonl.gz":
        dump = tmp_path / "packed.jsonl.gz"
        dump.write_bytes(gzip.compress(plain.read_bytes()))
    index = tmp_path / "killed.sqlite"
    code = KILLED.format(signal=name).replace("Wiktionary(sys.argv[1],", f"Wiktionary(sys.argv[1], {str(index)!r},")
    done = subprocess.run([sys.executable, "-c", code, str(dump)], capture_output=True, text=True, timeout=120)
    assert done.returncode in (-signal.SIGKILL, -signal.SIGINT, 130, 1) and done.returncode, done.stderr
    with pytest.raises(InputError, match=r"killed\.sqlite: is unfinished; pass the dump"):
        Wiktionary(index)
    assert 0 < len(rows(index)) < len(rows(whole.index))
    reported = []
    resumed = Wiktionary(dump, index, progress=reported.append)
    assert rows(index) == rows(whole.index)
    assert all(definition(number) in said(resumed, word(number)) for number in range(words))


def test_another_dump_does_not_go_on(tmp_path):
    dump = tmp_path / "dump.jsonl"
    write_dump(dump, 50_000)
    good = dump.read_bytes()
    dump.write_bytes(good + b"{broken\n")
    with pytest.raises(InputError, match="malformed JSON"):
        Wiktionary(dump)
    dump.write_bytes(b" " + good)
    with pytest.raises(InputError, match="is not the file that its index was begun on; rebuild the index"):
        Wiktionary(dump)
    dump.write_bytes(good[:1000])
    with pytest.raises(InputError, match="is not the file that its index was begun on"):
        Wiktionary(dump)


def test_a_malformed_line_that_is_mended_goes_on(dump):
    good = dump.read_bytes()
    dump.write_bytes(good + b'{"word": "cut sho')
    for _ in range(2):
        with pytest.raises(InputError, match=r"dump\.jsonl, line 19: malformed JSON"):
            Wiktionary(dump)
    dump.write_bytes(good + json.dumps(entry("cut short", "noun", [{"glosses": ["Mended."]}])).encode())
    mended = Wiktionary(dump)
    assert said(mended, "cut short") == ["Mended"] and said(mended, "mouse") == ["Any small rodent", "To hunt mice"]


def test_a_malformed_line_far_down_goes_on_too(tmp_path):
    dump = tmp_path / "dump.jsonl"
    write_dump(dump, 400_000)
    lines = dump.read_bytes().splitlines(keepends=True)
    place = len(lines) * 3 // 4
    assert sum(map(len, lines[:place])) > 3 << 16
    dump.write_bytes(b"".join((*lines[:place], lines[place][: len(lines[place]) // 2] + b"\n", *lines[place + 1 :])))
    with pytest.raises(InputError, match=f"line {place + 1}"):
        Wiktionary(dump)
    dump.write_bytes(b"".join(lines))
    Wiktionary(dump)


def test_a_damaged_gzip_is_an_error_of_the_file(tmp_path):
    whole = gzip.compress(b'{"word": "a", "pos": "noun", "lang_code": "en", "senses": []}\n' * 300)
    dump = tmp_path / "dump.jsonl.gz"
    for place in range(10, len(whole), 7):
        dump.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            Wiktionary(dump, tmp_path / f"{place}.sqlite")
        except InputError:
            continue


def test_a_changed_dump_is_noticed(dump, wiktionary):
    os.utime(dump, (1, 1))
    with pytest.raises(InputError, match=r"has changed since .* was made of it; rebuild the index"):
        Wiktionary(dump)
    assert said(Wiktionary(dump, rebuild=True), "mouse") == ["Any small rodent", "To hunt mice"]
    dump.unlink()
    with pytest.raises(InputError, match="there is no such file"):
        Wiktionary(dump, rebuild=True)
    assert wiktionary.index.exists()


def test_two_processes_do_not_write_twice(tmp_path, monkeypatch):
    """Another one commits while this one reads: whoever comes late says so."""
    dump, index = tmp_path / "dump.jsonl", tmp_path / "shared.sqlite"
    write_dump(dump, 200_000)
    monkeypatch.setattr(wiktionary_index, "_BATCH_BYTES", 50_000)
    calls = []

    def progress(done):
        calls.append(done)
        if len(calls) == 1:
            wiktionary_index.build(dump, index)

    with pytest.raises(InputError, match="another process writes its index; wait for it"):
        wiktionary_index.build(dump, index, progress=progress)
    assert rows(Wiktionary(dump, index).index) == rows(Wiktionary(dump).index)


# cost


def test_memory_does_not_grow_with_the_dump(tmp_path, monkeypatch):
    """Python's own memory while indexing; benchmarks/bench_knowledge.py has a gigabyte and the whole process."""
    monkeypatch.setattr(wiktionary_index, "_BATCH_BYTES", 100_000)
    peaks = []
    for i, size in enumerate((400_000, 3_200_000)):
        dump = tmp_path / f"{i}.jsonl"
        write_dump(dump, size)
        tracemalloc.start()
        Wiktionary(dump)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] and peaks[1] < 2_000_000


def test_lookups_take_less_than_a_millisecond(tmp_path):
    dump = tmp_path / "dump.jsonl"
    words = write_dump(dump, 1_000_000)
    wiktionary = Wiktionary(dump)
    start = time.process_time()
    found = [wiktionary.lookup(word(number)) for number in range(words)]
    assert all(found)
    assert (time.process_time() - start) / words < 1e-3


# bad dumps


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"word": "x"', r"line 2: malformed JSON \(.* at column 13\); the file may be cut short"),
        ('{"word": "größe"}'.encode("latin-1"), r"line 2: not UTF-8 \(byte 0xf6 at column 13\); convert"),
        (b"[1, 2]", "line 2: a JSON list; wiktextract writes objects"),
        (b"[" * 100_000, "line 2: JSON that is nested too deep"),
        (b'{"word": "x", "pos": "noun", "lang_code": "en", "senses": [1]}', "line 2: not as wiktextract writes"),
        (b'{"word": "x", "pos": "noun", "lang_code": "en", "senses": 5}', "line 2: not as wiktextract writes"),
        (b'{"word": "x", "pos": ["noun"], "lang_code": "en"}', "line 2: not as wiktextract writes"),
    ],
)
def test_malformed_lines(tmp_path, line, message):
    dump = tmp_path / "dump.jsonl"
    dump.write_bytes(json.dumps(entry("mouse", "noun", [{"glosses": ["A rodent."]}])).encode() + b"\n" + line + b"\n")
    with pytest.raises(InputError, match=message):
        Wiktionary(dump)


def test_other_files(tmp_path, dump):
    with pytest.raises(InputError, match=r"there is no such file; download an English dump .*kaikki\.org"):
        Wiktionary(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="there is no such index; pass the dump"):
        Wiktionary(tmp_path / "none.sqlite")
    with pytest.raises(InputError, match="cannot be read"):
        Wiktionary(tmp_path)
    (tmp_path / "text.sqlite").write_text("no database, but long enough to look at" * 40)
    with pytest.raises(InputError, match=r"text\.sqlite: is no index of a dictionary; remove it or pass another"):
        Wiktionary(tmp_path / "text.sqlite")
    with pytest.raises(InputError, match=r"cannot be opened .* check its folder"):
        Wiktionary(dump, index=tmp_path / "nowhere" / "index.sqlite")
    packed = tmp_path / "cut.jsonl.gz"
    packed.write_bytes(gzip.compress(dump.read_bytes())[:-20])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz, line \d+: .* download the file again"):
        Wiktionary(packed)
    packed.write_bytes(dump.read_bytes())
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz: Not a gzipped file .* download the file again"):
        Wiktionary(packed)
