"""The picture of a schema: every type, relation and path is in it, also loops and relations side by side."""

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from tests.ktn.cases import make_graph
from tlfast.ktn import metapaths
from tlfast.ktn.metapaths import describe
from tlfast.training.curve import draw_curve
from tlfast.training.schema import draw_schema


@pytest.mark.parametrize("hops", [1, 4])
def test_everything_is_in_the_picture(hops, tmp_path, monkeypatch):
    graph = make_graph()
    edges = {relation: pairs.shape[1] for relation, pairs in graph.edges.items()}
    edges["paper", "also_in", "venue"] = 3
    paths = [(path, describe(path)) for path in metapaths(list(edges), "paper", "venue", hops)]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    draw_schema(tmp_path / "schema.png", graph.num_nodes, edges, paths, "paper", "venue")
    (axes,) = drawn[0].axes
    texts = [text.get_text() for text in axes.texts]
    assert {"paper\n40\nlabels", "venue\n6\nto predict", "author\n30", "field\n11"} <= set(texts)
    for (_, name, _), count in edges.items():
        assert f"{name}  {count:,}" in texts
    title = axes.get_title(loc="left")
    assert paths[0][1] in title and ("and " in title.splitlines()[-1]) == (len(paths) > 6)


def test_it_is_a_png(tmp_path):
    draw_schema(
        tmp_path / "schema.png", {"a": 1, "b": 2}, {("a", "r", "b"): 3}, [((("a", "r", "b"),), "b <-r- a")], "b", "a"
    )
    assert (tmp_path / "schema.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_no_formulas(tmp_path):
    a, relation, b = (f"{name}$\\frac$" for name in "arb")
    edge_type = a, relation, b
    draw_schema(tmp_path / "schema.png", {a: 1, b: 2}, {edge_type: 3}, [((edge_type,), describe([edge_type]))], b, a)
    draw_curve(tmp_path / "curve.png", [{"epoch": 1, "loss": 1.0, "eval_accuracy": 0.5}], "accuracy", 1, a)
    for name in ("schema.png", "curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
