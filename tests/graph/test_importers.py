"""Importers on small folders made as their programs write them; what is damaged, missing or pickled is refused."""

import csv
import gzip
import pickle
import zlib

import numpy as np
import pytest
import torch

from tlfast.data.errors import InputError
from tlfast.graph.importers import read_dblp, read_oag, read_ogb

# OAG-CS, as KTN's code stores it


def write_oag(folder, classes=3):
    draw = np.random.default_rng(0)
    folder.mkdir()
    lists = {"paper": [[0, 2], [1], [], [2]], "author": [[0], [1], [2, 1]], "venue": [[1], []], "field": None}
    for t, rows in lists.items():
        with (folder / f"nodes-{t}.npy").open("wb") as file:
            np.save(file, draw.normal(size=(len(rows) if rows else 5, 7)))
            if rows is None:
                continue
            listed = -np.ones((len(rows), 50), np.int64)
            for i, found in enumerate(rows):
                listed[i, : len(found)] = found
            for kind in ("L1", "L2", "venue")[: 3 if t == "paper" else 2]:
                np.save(file, listed if kind == "L1" else np.where(listed >= 0, 0, -1))
                np.save(file, np.array([classes if kind == "L1" else 2]))
                if kind == "L1":
                    np.save(file, np.ones(len(rows), np.int64))
    for relation, target, source, pairs in (
        ("AP_write_last", "paper", "author", [(0, 0), (1, 0), (1, 3)]),
        ("AP_write_other", "paper", "author", [(1, 0), (2, 1)]),
        ("AP_write_first", "paper", "author", [(2, 2)]),
        ("rev_AP_write_last", "author", "paper", [(0, 0), (0, 1)]),
        ("rev_PF_in_L1", "paper", "field", [(1, 1)]),
        ("PF_in_L2", "field", "paper", [(3, 4)]),
        ("PV_Journal", "venue", "paper", []),
    ):
        with (folder / f"edges-{relation}-to-{target}-from-{source}.csv").open("w") as file:
            writer = csv.DictWriter(file, ["Source", "Target", "Time"])
            writer.writeheader()
            writer.writerows({"Source": s, "Target": t, "Time": "None"} for s, t in pairs)
    return folder


def test_oag_is_what_the_authors_training_makes_of_it(tmp_path):
    graph = read_oag(write_oag(tmp_path / "oag"))
    assert graph.num_nodes == {"author": 3, "field": 5, "paper": 4, "venue": 2}
    assert graph.edges["author", "author-paper", "paper"].T.tolist() == [[0, 0], [1, 0], [1, 3], [2, 1]]
    assert set(graph.edges) == {
        (s, f"{s}-{t}", t)
        for s, t in (("author", "paper"), ("paper", "author"), ("paper", "field"), ("paper", "venue"))
    }
    assert graph.edges["paper", "paper-venue", "venue"].shape == (2, 0)
    assert graph.y["paper"].tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert graph.y["author"].tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]] and "field" not in graph.y
    for x in graph.x.values():
        torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)))


def test_other_labels_of_oag(tmp_path):
    folder = write_oag(tmp_path / "oag")
    graph = read_oag(folder, "L2")
    assert graph.y["paper"].tolist() == [[1, 0], [1, 0], [0, 0], [1, 0]] and set(graph.y) == {
        "paper",
        "author",
        "venue",
    }
    assert set(read_oag(folder, "venue").y) == {"paper"}
    with pytest.raises(InputError, match="labels must be one of L1, L2, venue, not 'L3'"):
        read_oag(folder, "L3")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran')",)


def overwrite(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1640])


def pickled(name):
    return lambda folder: np.save(folder / name, np.array([Bomb()]), allow_pickle=True)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (truncate("nodes-author.npy"), ["nodes-author.npy", "holds no array"]),
        (pickled("nodes-field.npy"), ["nodes-field.npy", "pickled"]),
        (overwrite("edges-PF_in_L2-to-field-from-paper.csv", "a,b\n1,2\n"), ["Source and Target", "a,b"]),
        (overwrite("edges-PF_in_L2-to-field-from-paper.csv", "Source,Target\n1,x\n"), ["PF_in_L2", "numbers"]),
        (overwrite("edges-in.csv", "Source,Target\n"), ["edges-in.csv", "is not named as"]),
        (overwrite("edges-x-to-book-from-paper.csv", "Source,Target\n1,1\n"), ["no node type 'book'", "'paper'"]),
        (overwrite("edges-PF_in_L2-to-field-from-paper.csv", "Source,Target\n1,5\n"), ["target node 5", "5 nodes"]),
        (overwrite("edges-PF_in_L2-to-field-from-paper.csv", "Source,Target\n-1,2\n"), ["source node -1", "4 nodes"]),
        (lambda f: np.save(f / "nodes-field.npy", np.zeros((2, 2), np.complex64)), ["nodes-field", "numbers"]),
        (lambda f: (f / "nodes-field.npy").write_bytes(b"PK\x03\x04 no archive"), ["nodes-field", "holds no array"]),
    ],
)
def test_damaged_oag(spoil, words, tmp_path):
    folder = write_oag(tmp_path / "oag")
    spoil(folder)
    with pytest.raises(InputError) as error:
        read_oag(folder)
    for word in words:
        assert word in str(error.value)


def test_a_pickled_oag_is_never_read(tmp_path):
    (tmp_path / "graph_CS.pk").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"graph_CS\.pk: a pickle runs code and is not read; run Data/main\.py"):
        read_oag(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        read_oag(tmp_path / "nothing")


def test_classes_of_oag_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"up to 2, do not fit its 3 nodes and \[2\] classes"):
        read_oag(write_oag(tmp_path / "oag", classes=2))


@pytest.mark.parametrize("count", [-1, 10**12, 0, float("nan"), 3.5])
def test_counts_of_classes_that_are_none(count, tmp_path):
    folder = write_oag(tmp_path / "oag", classes=count)
    for t in ("paper", "author", "venue"):
        with (folder / f"nodes-{t}.npy").open("rb") as file:
            rows = len(np.load(file))
        with (folder / f"nodes-{t}.npy").open("wb") as file:
            for array in (np.ones((rows, 7)), -np.ones((rows, 50), np.int64), np.array([count])):
                np.save(file, array)
            np.save(file, np.ones(rows))
    with pytest.raises(InputError, match=r"nodes-author\.npy: .* classes"):
        read_oag(folder)


# OGB


def write_gz(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)


def write_ogb(folder):
    raw = folder / "raw"
    write_gz(raw / "num-node-dict.csv.gz", "author,paper,school\n3,4,2\n")
    write_gz(raw / "triplet-type-list.csv.gz", "author,writes,paper\npaper,cites,paper\nauthor,at,school\n")
    write_gz(raw / "relations/author___writes___paper/edge.csv.gz", "0,0\n1,0\n1,3\n1,3\n")
    write_gz(raw / "relations/paper___cites___paper/edge.csv.gz", "")
    write_gz(raw / "relations/author___at___school/edge.csv.gz", "0,1\n2,1\n1,0\n")
    write_gz(raw / "node-feat/paper/node-feat.csv.gz", "1,0\n0,1\n3,4\n5,6\n")
    write_gz(raw / "node-label/paper/node-label.csv.gz", "1\n0\nnan\n2\n")
    write_gz(folder / "mapping/labelidx2venue.csv.gz", "label idx,venue\n0,A\n1,B\n2,A\n")
    return folder


def test_ogb(tmp_path):
    graph = read_ogb(write_ogb(tmp_path / "mag"))
    assert graph.num_nodes == {"author": 3, "paper": 4, "school": 2}
    assert graph.edges["author", "writes", "paper"].T.tolist() == [[0, 0], [1, 0], [1, 3]]
    assert graph.edges["paper", "rev_writes", "author"].T.tolist() == [[0, 0], [0, 1], [3, 1]]
    assert ("paper", "rev_cites", "paper") not in graph.edges
    assert graph.x["author"].tolist() == [[1, 0], [3, 3], [0, 0]], "the means of an author's papers"
    assert graph.x["school"].tolist() == [[3, 3], [0.5, 0]], "and of a school's authors"
    assert graph.y["paper"].tolist() == [1, 0, -1, 2] and graph.class_names == ["A", "B", "A (2)"]
    assert read_ogb(tmp_path / "mag" / "raw").num_nodes == graph.num_nodes


def test_labels_of_several_columns(tmp_path):
    folder = write_ogb(tmp_path / "mag")
    write_gz(folder / "raw/node-label/paper/node-label.csv.gz", "1,0,1\n0,0,0\nnan,1,0\n0,0,1\n")
    assert read_ogb(folder).y["paper"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("raw/num-node-dict.csv.gz", "author,paper\n", ["num-node-dict", "2 lines, not 1"]),
        ("raw/num-node-dict.csv.gz", "author,paper,school\n3,x,2\n", ["num-node-dict", "numbers of nodes"]),
        ("raw/triplet-type-list.csv.gz", "author,writes\n", ["triplet-type-list", "['author', 'writes']"]),
        ("raw/relations/author___writes___paper/edge.csv.gz", "0,zero\n", ["edge.csv.gz", "numbers separated"]),
        ("raw/relations/author___writes___paper/edge.csv.gz", "0,9\n", ["writes", "node 9"]),
        ("raw/num-node-dict.csv.gz", "author,paper,school\n3,\u00b2,2\n", ["num-node-dict", "numbers of nodes"]),
        ("raw/num-node-dict.csv.gz", "author,paper,paper\n3,4,2\n", ["num-node-dict", "a type twice", "'paper'"]),
        ("raw/num-node-dict.csv.gz", "author,paper,../school\n3,4,2\n", ["num-node-dict", "'../school'", "rename"]),
        ("raw/num-node-dict.csv.gz", "author,paper,a\\b\n3,4,2\n", ["num-node-dict", "rename"]),
        ("raw/num-node-dict.csv.gz", f"author,paper\n{'9' * 200_000},2\n", ["num-node-dict", "field larger"]),
        ("raw/triplet-type-list.csv.gz", "author,/x,paper\n", ["triplet-type-list", "'/x'", "rename"]),
        ("raw/node-label/paper/node-label.csv.gz", "1\n0\n1.7\n2\n", ["node-label", "whole number", "1.7", "row 2"]),
        ("raw/node-label/paper/node-label.csv.gz", "1\n0\ninf\n2\n", ["node-label", "whole number", "inf"]),
        ("raw/node-feat/paper/node-feat.csv.gz", "1\n2\n", ["features of 'paper'", "4 nodes"]),
        ("raw/node-feat/paper/node-feat.csv.gz", "1\n2\n3\nnan\n", ["features of 'paper'", "NaN"]),
        ("raw/node-label/paper/node-label.csv.gz", "1\n0\n7\n2\n", ["labels of 'paper'", "7"]),
        ("mapping/labelidx2venue.csv.gz", "i,v\n1,A\n", ["labelidx2venue", "index 0"]),
    ],
)
def test_damaged_ogb(name, text, words, tmp_path):
    folder = write_ogb(tmp_path / "mag")
    write_gz(folder / name, text)
    with pytest.raises(InputError) as error:
        read_ogb(folder)
    for word in words:
        assert word in str(error.value)


def test_missing_parts_of_ogb(tmp_path):
    folder = write_ogb(tmp_path / "mag")
    (folder / "raw/relations/author___at___school/edge.csv.gz").unlink()
    with pytest.raises(InputError, match=r"edge\.csv\.gz: is missing"):
        read_ogb(folder)
    write_gz(folder / "raw/relations/author___at___school/edge.csv.gz", "0,0\n")
    (folder / "raw/num-node-dict.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"is no gzipped \.csv"):
        read_ogb(folder)
    (folder / "raw/num-node-dict.csv.gz").unlink()
    with pytest.raises(InputError, match=r"num-node-dict\.csv\.gz: is missing"):
        read_ogb(folder)


@pytest.mark.parametrize("name", ["num-node-dict.csv.gz", "node-feat/paper/node-feat.csv.gz"])
def test_damaged_gzip(name, tmp_path):
    path = write_ogb(tmp_path / "mag") / "raw" / name
    whole = gzip.compress(b"author,paper,school\n3,4,2\n")
    path.write_bytes(whole[:10] + b"\xff" * 8 + whole[18:])  # no such kind of block
    with pytest.raises(zlib.error):
        gzip.decompress(path.read_bytes())
    with pytest.raises(InputError, match="invalid block type"):
        read_ogb(tmp_path / "mag")


def test_features_that_reach_no_type(tmp_path):
    folder = write_ogb(tmp_path / "mag")
    (folder / "raw/node-feat/paper/node-feat.csv.gz").unlink()
    with pytest.raises(InputError, match="'author': has no features, and no relation leads there"):
        read_ogb(folder)


# DBLP


def save_sparse(path, dense):
    row, column = dense.nonzero()
    start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(dense)))])
    np.savez(
        path,
        indices=column.astype(np.int32),
        indptr=start.astype(np.int32),
        data=dense[row, column],
        shape=dense.shape,
        format=b"csr",
    )


def write_dblp(folder):
    folder.mkdir()
    codes = np.array([0, 0, 1, 1, 1, 2, 2, 3])
    links = np.zeros((8, 8))
    for a, b in ((0, 2), (0, 3), (1, 4), (2, 5), (3, 6), (2, 7), (4, 7)):
        links[a, b] = links[b, a] = 1
    save_sparse(folder / "adjM.npz", links)
    save_sparse(folder / "features_0.npz", np.array([[1.0, 0, 2], [0, 0, 3]]))
    save_sparse(folder / "features_1.npz", np.array([[1.0, 1], [0, 0], [3, 0]]))
    np.save(folder / "features_2.npy", np.ones((2, 4)))
    np.save(folder / "labels.npy", np.array([1, 0]))
    np.save(folder / "node_types.npy", codes)
    return folder


def test_dblp(tmp_path):
    graph = read_dblp(write_dblp(tmp_path / "dblp"))
    assert graph.num_nodes == {"author": 2, "paper": 3, "term": 2, "conference": 1}
    assert graph.edges["author", "author_to_paper", "paper"].T.tolist() == [[0, 0], [0, 1], [1, 2]]
    assert graph.edges["conference", "conference_to_paper", "paper"].T.tolist() == [[0, 0], [0, 2]]
    assert len(graph.edges) == 6
    assert graph.x["author"].tolist() == [[1, 0, 2], [0, 0, 3]]
    assert graph.x["conference"].tolist() == [[2, 0.5]]
    assert graph.y["author"].tolist() == [1, 0]


def test_dblp_against_scipy(tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    folder = write_dblp(tmp_path / "dblp")
    expected = read_dblp(folder)
    sparse.save_npz(folder / "adjM.npz", sparse.load_npz(folder / "adjM.npz"))
    for edge_type, pairs in read_dblp(folder).edges.items():
        assert torch.equal(pairs, expected.edges[edge_type])


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: (f / "labels.npy").unlink(), ["labels.npy: is missing", "DBLP_processed.zip"]),
        (lambda f: (f / "adjM.npz").unlink(), ["adjM.npz: is missing"]),
        (lambda f: (f / "adjM.npz").write_bytes(b"PK damaged"), ["adjM.npz", "damaged"]),
        (pickled("labels.npy"), ["labels.npy", "pickled"]),
        (lambda f: np.save(f / "node_types.npy", np.array([0, 1, 0])), ["node_types.npy", "ascending"]),
        (lambda f: np.save(f / "node_types.npy", np.array([0, 1, 3])), ["adjM.npz", "3 nodes"]),
        (lambda f: np.save(f / "labels.npy", np.array([1])), ["labels of 'author'", "2 nodes"]),
        (
            lambda f: np.savez(f / "features_0.npz", indices=[-1], indptr=[0, 1, 1], data=[1.0], shape=[2, 3]),
            ["features_0", "do not fit each other"],
        ),
        (
            lambda f: np.savez(f / "features_0.npz", indices=[9], indptr=[0, 1], data=[1.0], shape=[1, 3]),
            ["features_0"],
        ),
    ],
)
def test_damaged_dblp(spoil, words, tmp_path):
    folder = write_dblp(tmp_path / "dblp")
    spoil(folder)
    with pytest.raises(InputError) as error:
        read_dblp(folder)
    for word in words:
        assert word in str(error.value)
