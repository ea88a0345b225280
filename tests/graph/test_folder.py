"""The folder format: what is written is read again; nothing outside the folder and no pickle is ever read."""

import errno
import json
import resource

import numpy as np
import pytest
import torch

from tests.graph.test_adjacency import make_graph
from tlfast.data.errors import InputError
from tlfast.graph import Adjacency, HeteroGraph, as_graph, load, read_folder, save
from tlfast.graph.folder import digest


def test_what_is_written_is_read_again(tmp_path):
    graph = make_graph(class_names=["a", "b", "c", "d"], name="täst")
    save(graph, tmp_path / "graph")
    back = read_folder(tmp_path / "graph")
    for name in ("num_nodes", "num_classes", "class_names", "name", "edge_types"):
        assert getattr(back, name) == getattr(graph, name)
    for kind in ("x", "y", "edges"):
        for name, tensor in getattr(graph, kind).items():
            assert torch.equal(tensor, getattr(back, kind)[name].to(tensor.dtype))
    assert np.load(tmp_path / "graph" / "edges0.npy").dtype == np.int32


def test_edges_that_int32_would_bend_are_refused(tmp_path):
    graph = make_graph()
    graph.edges["author", "writes", "paper"][1, 7] = 2**32 + 3
    with pytest.raises(InputError, match=r"edges of \('author', 'writes', 'paper'\) names target node 4294967299"):
        save(graph, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_unsigned_edges_are_read(dtype, tmp_path):
    graph = make_graph()
    save(graph, tmp_path)
    np.save(tmp_path / "edges0.npy", np.load(tmp_path / "edges0.npy").astype(dtype))
    back = read_folder(tmp_path)
    assert torch.equal(back.edges["author", "writes", "paper"], graph.edges["author", "writes", "paper"])
    assert Adjacency(back).num_edges == 170
    np.save(tmp_path / "edges0.npy", np.zeros((2, 3), np.complex64))
    with pytest.raises(InputError, match=r"edges0\.npy: is no \.npy array of numbers .*complex64"):
        read_folder(tmp_path)


def test_load_gives_hetero_data(tmp_path):
    pytest.importorskip("torch_geometric")
    graph = make_graph()
    graph.x["venue"] = graph.x["venue"].bfloat16()
    save(graph, tmp_path)
    data = load(tmp_path)
    assert data.validate() and data["author", "writes", "paper"].edge_index.dtype == torch.int64
    assert data["venue"].x.dtype == torch.float32 and torch.equal(data["venue"].x, graph.x["venue"].float())
    save(data, tmp_path / "again")
    assert as_graph(load(tmp_path / "again")).num_nodes == graph.num_nodes


def test_dblp(data_folder):
    graph = read_folder(data_folder / "dblp")
    assert graph.num_nodes == {"paper": 14376, "term": 8920, "conf": 20, "author": 14475}
    adjacency = Adjacency(graph)
    assert adjacency["paper", "mentions", "term"].num_edges == 114624
    assert graph.x["paper"].dtype == torch.float32 and graph.num_classes == 4


def rewrite(folder, change):
    listing = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    change(listing)
    (folder / "graph.json").write_text(json.dumps(listing), encoding="utf-8")


def put(*keys):
    *path, last, value = keys

    def change(listing):
        for key in path:
            listing = listing[key]
        if value is None:
            del listing[last]
        else:
            listing[last] = value

    return change


@pytest.mark.parametrize(
    "name", ["../secret.npy", "/etc/hostname", "a/../../secret.npy", "link.npy", "linked/secret.npy"]
)
def test_paths_that_lead_out_of_the_folder_are_refused(name, tmp_path):
    folder = tmp_path / "graph"
    save(make_graph(), folder)
    np.save(tmp_path / "secret.npy", np.zeros((4, 2), dtype=np.float32))
    (folder / "link.npy").symlink_to(tmp_path / "secret.npy")
    (folder / "linked").symlink_to(tmp_path)
    rewrite(folder, put("node_types", "venue", "x", name))
    with pytest.raises(InputError, match="points outside the folder"):
        read_folder(folder)


def test_pickles_are_refused(tmp_path):
    save(make_graph(), tmp_path)
    np.save(tmp_path / "node2.x.npy", np.array([{}, {}, {}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"node2.x.npy: is no .npy array of numbers .*numpy.save"):
        read_folder(tmp_path)


def npy(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


DAMAGED = {
    "unclosed": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4L, 2\n"),
    "archive": b"PK\x03\x04damaged",
    "huge": npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (2000000000, 2000000000), }\n"),
    "long": npy(b" " * 20000 + b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 2), }\n"),
    "big-endian": npy(b"{'descr': '>f4', 'fortran_order': False, 'shape': (1,), }\n") + bytes(4),
    "cut": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 2), }\n") + bytes(5),
    "empty": b"",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_arrays_are_one_line(damage, tmp_path):
    save(make_graph(), tmp_path)
    (tmp_path / "node2.x.npy").write_bytes(DAMAGED[damage])
    with pytest.raises(InputError, match=r"node2.x.npy: is no .npy array of numbers") as error:
        read_folder(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["a\0b.npy", "loop.npy", "long" * 100])
def test_paths_that_are_none(name, tmp_path):
    save(make_graph(), tmp_path)
    (tmp_path / "loop.npy").symlink_to(tmp_path / "loop.npy")
    rewrite(tmp_path, put("node_types", "venue", "x", name))
    with pytest.raises(InputError, match=r"is no path of a file|is no \.npy array"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        (put("node_types", None), ["'node_types'"]),
        (put("node_types", "venue", "num_nodes", None), ["'num_nodes'"]),
        (put("node_types", "venue", "num_nodes", "4"), ["'num_nodes'", "int"]),
        (put("node_types", "venue", "x", 3), ["path of an .npy file", "3"]),
        (put("node_types", "venue", "x", "gone.npy"), ["gone.npy", "no .npy array"]),
        (put("node_types", "venue", None), ["'venue'", "no node type"]),
        (put("edge_types", 0, "target", None), ["'target'"]),
        (put("edge_types", 0, "edge_index", None), ["'edge_index'"]),
        (put("node_types", "author", "num_nodes", 29), ["'author'", "29 nodes", "(30,"]),
    ],
)
def test_what_is_missing_or_wrong(change, words, tmp_path):
    save(make_graph(), tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(InputError) as error:
        read_folder(tmp_path)
    for word in ["graph.json", *words] if "gone.npy" not in words else words:
        assert word in str(error.value)


def test_damaged_listings(tmp_path):
    with pytest.raises(InputError, match=r"there is no graph.json in it"):
        read_folder(tmp_path)
    for text, words in (("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[]", "must hold an object")):
        (tmp_path / "graph.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=words):
            read_folder(tmp_path)
    save(make_graph(), tmp_path)
    rewrite(tmp_path, lambda listing: listing["edge_types"].append(listing["edge_types"][0]))
    with pytest.raises(InputError, match=r"names the relation \('author', 'writes', 'paper'\) twice"):
        read_folder(tmp_path)


def test_class_names_that_do_not_fit_are_refused_with_the_folder(tmp_path):
    save(make_graph(), tmp_path)
    listing = json.loads((tmp_path / "graph.json").read_text())
    (tmp_path / "graph.json").write_text(json.dumps(listing | {"class_names": ["one"]}))
    with pytest.raises(InputError, match=r"graph\.json: class_names has 1 names and num_classes is 4"):
        read_folder(tmp_path)


def test_the_digest_tells_graphs_apart():
    graphs = [make_graph(), make_graph(name="another"), make_graph(class_names=list("abcd")), make_graph()]
    graphs[0].x = graphs[1].x = graphs[2].x = {t: x.clone() for t, x in graphs[3].x.items()}
    assert digest(graphs[0]) == digest(graphs[1]) != digest(graphs[2])
    for part, name in (("x", "paper"), ("y", "author"), ("edges", ("author", "writes", "paper"))):
        changed = make_graph()
        changed.x = {t: x.clone() for t, x in graphs[0].x.items()}
        getattr(changed, part)[name][..., 0] += 1
        assert digest(changed) != digest(graphs[0]), part


def test_a_full_disk_says_so(tmp_path):
    graph = HeteroGraph({"node": 4096}, {}, {"node": torch.zeros(4096, 8)}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # a write beyond it falls short, as on a full disk
    try:
        with pytest.raises(OSError, match="space") as found:
            save(graph, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found.value.errno == errno.ENOSPC and str(tmp_path) in found.value.filename
