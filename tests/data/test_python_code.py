"""The graph of Python sources: what is a node, an edge and a feature, and that no package's name is among them."""

import numpy as np
import pytest

from tlfast.data.errors import InputError
from tlfast.data.python_code import FAMILIES, WIDTHS, package_folders, read_code, words_of

FIRST = '''
import torch.nn as nn
from os.path import join

class Reader(nn.Module, Base):
    """Reads."""
    def read_lines(self, file_name):
        """Read all lines of a file with numpy."""
        self.lines = open(file_name).readlines()
    async def close(self): ...
    limit = 3

def read_lines(path): return join(path)
'''
SECOND = "def write_lines(path):\n    'Write lines to a file.'\n"
THIRD = "def lines(path, file): return path\ndef count_file_lines(path): pass\n"


@pytest.fixture
def folders(tmp_path):
    files = {"a/one.py": FIRST, "a/empty.py": "x = 1\n", "a/broken.py": "def (", "a/tests/no.py": SECOND}
    files |= {"b/two.py": SECOND, "b/sub/three.py": THIRD, "b/notes.txt": "def f(): pass"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return {"a": tmp_path / "a", "b": tmp_path / "b"}


def named(code, relation):
    source, _, target = relation
    pairs = code.edges[relation].T.tolist()
    return sorted((code.names[source][s], code.names[target][t]) for s, t in pairs)


def test_nodes_and_edges(folders):
    code = read_code(folders=folders)
    assert sorted(code.names["module"]) == ["a/one.py", "b/sub/three.py", "b/two.py"]
    assert code.names["class"] == ["a/one.py:Reader"]
    assert named(code, ("module", "defines", "class")) == [("a/one.py", "a/one.py:Reader")]
    assert named(code, ("class", "has", "function")) == [
        ("a/one.py:Reader", "a/one.py:Reader:close"),
        ("a/one.py:Reader", "a/one.py:Reader:read_lines"),
    ]
    assert ("b/two.py", "b/two.py:write_lines") in named(code, ("module", "defines", "function"))
    assert len(code.names["function"]) == 6 and code.edges["module", "defines", "function"].shape == (2, 4)
    mentioned = {word for _, word in named(code, ("function", "mentions", "word"))}
    assert mentioned == set(code.names["word"]) == {"lines", "path", "file"}, "words of three functions at least"
    for source, name, target in list(code.edges):
        if not name.startswith("rev_"):
            assert np.array_equal(code.edges[source, name, target][::-1], code.edges[target, f"rev_{name}", source])


def test_what_cannot_be_read_or_parsed_is_left_out(folders):
    whole = read_code(folders=folders)
    (folders["a"] / "folder.py").mkdir()
    (folders["a"] / "gone.py").symlink_to(folders["a"] / "nothing")
    (folders["a"] / "deep.py").write_text("x = " + "-" * 100_000 + "1\n")
    (folders["a"] / "less_deep.py").write_text("x = a" + "+a" * 5000 + "\n")
    assert read_code(folders=folders).names == whole.names


def test_families_and_modules(folders):
    code = read_code(folders=folders)
    for t in ("module", "class", "function"):
        family = [code.families[label] for label in code.family[t]]
        assert family == [name[0] for name in code.names[t]]
        assert [code.names["module"][m] for m in code.module[t]] == [name.split(":")[0] for name in code.names[t]]


def test_features_are_counts_of_unit_length(folders):
    code = read_code(folders=folders)
    for t, x in code.x.items():
        assert x.shape == (len(code.names[t]), WIDTHS[t]) and x.dtype == np.float32
        length = np.linalg.norm(x, axis=1)
        assert np.all((np.abs(length - 1) < 1e-6) | (length == 0))
    silent = code.names["function"].index("b/two.py:write_lines")
    assert not code.x["function"][silent].any() and code.x["class"].any() and code.x["word"].all(axis=0).sum() == 0


def test_the_seed_decides_and_repeats(folders):
    first, again = read_code(folders=folders), read_code(folders=folders)
    assert first.names == again.names and all(np.array_equal(first.x[t], again.x[t]) for t in first.x)
    drawn = {tuple(read_code(1, seed, {"b": folders["b"]}).names["module"]) for seed in range(8)}
    assert drawn == {("b/two.py",), ("b/sub/three.py",)}


def test_words_leave_out_what_names_a_package():
    assert words_of("read_HTMLPage numpyArray torch_dtype pythonic npz toNumpy x1 of") == [
        "read",
        "html",
        "page",
        "array",
        "dtype",
        "npz",
    ]


def test_folders_without_functions_and_packages_that_are_missing(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    with pytest.raises(InputError, match="has no source file with a function"):
        read_code(folders={"a": tmp_path})
    with pytest.raises(InputError, match="sources of tlfast_is_not_this are part of the graph"):
        package_folders(["tlfast_is_not_this"])
    assert set(package_folders(["python", "numpy"])) == {"python", "numpy"} <= set(FAMILIES)
