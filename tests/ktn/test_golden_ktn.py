"""KTN against golden values of the authors' own model code, and against a plain implementation of our own."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.conftest import ROOT
from tlfast.graph import Adjacency, HeteroGraph
from tlfast.ktn import HMPNN, Classifier, KnowledgeTransfer, scores
from tlfast.ktn.hmpnn import parameter_name

FOLDER = Path(os.environ.get("TLFAST_GOLDEN", ROOT / "../shared/golden"))
FILES = sorted(FOLDER.glob("ktn_*.safetensors"))
ALLOWED, RANKING = 1e-5, 1e-9
each_file = pytest.mark.parametrize(
    "path",
    FILES or [pytest.param(None, marks=pytest.mark.skip(f"no ktn_*.safetensors in {FOLDER}: set TLFAST_GOLDEN"))],
    ids=lambda path: getattr(path, "stem", "none"),
)


class Golden:
    """One file: its tensors, and its configuration."""

    def __init__(self, path):
        with safe_open(path, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def edge_types(self):
        """Triples in the order in which messages into a type are joined."""
        relations = self.config["relations"]
        ordered = [name for names in self.config["relation_order_per_target"].values() for name in names]
        assert sorted(ordered) == sorted(relations)
        return {name: (relations[name][0], name, relations[name][1]) for name in ordered}

    def graph(self):
        edges = {
            edge_type: torch.stack([self.tensors[f"edge.{name}.{end}"] for end in ("source", "target")])
            for name, edge_type in self.edge_types().items()
        }
        x = {t: self.tensors[f"x.{t}"] for t in self.config["node_counts"]}
        return HeteroGraph(self.config["node_counts"], edges, x)

    def models(self, graph):
        config = self.config
        gnn = HMPNN(graph, config["hidden_dim"], config["relation_dim"], config["num_layers"])
        ends = config["source_type"], config["target_type"]
        ktn = KnowledgeTransfer(graph, *ends, config["matching_hops"], config["hidden_dim"])
        return gnn, ktn, Classifier(config["hidden_dim"], config["num_classes"])

    def names(self, gnn, ktn, classifier):
        """The file's name of every parameter of ours."""
        types = self.edge_types()
        names = {f"adapt_w.{t}.weight": gnn.adapt[t] for t in gnn.node_types}
        for i, layer in enumerate(gnn.layers):
            names |= {f"message_w.{r}{i}.weight": layer.message[parameter_name(types[r])] for r in types}
            names |= {f"transform_w.{t}{i}.weight": layer.transform[t] for t in gnn.node_types}
        for i, listed in enumerate(self.paths()):
            place = ktn.paths.index(listed)
            for edge_type in listed:
                names[f"matching_w.{i}{edge_type[1]}.weight"] = ktn.matrices[f"{place}:{parameter_name(edge_type)}"]
        names["classifier.linear.weight"] = classifier.weight
        return names

    def paths(self):
        types = self.edge_types()
        return [tuple(types[name] for name in path[1:]) for path in self.config["matching_paths"]]


def assert_near(name, ours, golden):
    assert ours.shape == golden.shape, f"{name}: {ours.shape} against {golden.shape}"
    error = ((ours - golden).abs().max() / golden.abs().max()).item()
    assert error <= ALLOWED, f"{name}: {error:.1e} of its largest value, allowed {ALLOWED:.0e}"


@each_file
def test_golden_ktn(path):
    golden = Golden(path)
    tensors, config, graph = golden.tensors, golden.config, golden.graph()
    gnn, ktn, classifier = golden.models(graph)
    assert sorted(ktn.paths) == sorted(golden.paths())
    parameters = golden.names(gnn, ktn, classifier)
    everything = [p for module in (gnn, ktn, classifier) for p in module.parameters()]
    assert {id(p) for p in everything} == {id(p) for p in parameters.values()}
    assert {f"param.{name}" for name in parameters} == {name for name in tensors if name.startswith("param.")}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"param.{name}"])

    adjacency = Adjacency(graph)
    h = gnn(graph.x, adjacency)
    for t, states in h.items():
        assert_near(f"hidden {t}", states, tensors[f"hidden.{t}"])
    predicted = classifier(h[config["source_type"]])
    assert_near("source log-probabilities", predicted, tensors["source_log_probs"])
    classification = classifier.loss(predicted, tensors["labels_source"])
    matching = ktn.matching_loss(h, adjacency)
    assert_near("classification loss", classification.reshape(1), tensors["loss_classification"])
    assert_near("matching loss", matching.reshape(1), tensors["loss_matching"])
    (classification + matching).backward()
    for name, parameter in parameters.items():
        expected = tensors.get(f"grad.{name}")
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if expected is None or not expected.any():  # the last layer of a type that no loss sees
            assert not gradient.any(), name
        else:
            assert_near(name, gradient, expected)

    with torch.no_grad():
        target = h[config["target_type"]]
        assert_near("transformed target", ktn.transform(target), tensors["transformed_target"])
        assert_near("zero shot", classifier(ktn.transform(target)), tensors["zero_shot_log_probs"])
        folded = classifier(target, ktn.matrix())
        assert_near("zero shot, folded", folded, tensors["zero_shot_log_probs"])
    found = scores(folded, tensors["labels_target"])
    ndcg, mrr = tensors["ndcg_mrr"].tolist()
    assert abs(found["ndcg_paper"] - ndcg) <= RANKING and abs(found["mrr"] - mrr) <= RANKING
