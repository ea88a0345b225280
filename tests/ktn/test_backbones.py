"""KTN on other message passing networks of PyTorch Geometric: it takes any {type: states}."""

import itertools

import pytest
import torch

from tests.ktn.test_training import two_worlds
from tlfast.graph import Adjacency, to_hetero_data
from tlfast.ktn import Classifier, KnowledgeTransfer, scores
from tlfast.ktn.classifier import label_distribution

pytest.importorskip("torch_geometric")
WIDTH = 16


class Rgcn(torch.nn.Module):
    """RGCNConv knows one kind of node: the types one below the other, relations as numbers."""

    def __init__(self, data):
        from torch_geometric.nn import RGCNConv

        super().__init__()
        widths = [6, WIDTH, WIDTH]
        self.convs = torch.nn.ModuleList(RGCNConv(a, b, len(data.edge_types)) for a, b in itertools.pairwise(widths))

    def forward(self, data):
        one = data.to_homogeneous()
        h = one.x
        for conv in self.convs:
            h = conv(h, one.edge_index, one.edge_type).relu()
        return {t: h[one.node_type == i] for i, t in enumerate(data.node_types)}


class Stacked(torch.nn.Module):
    """Two layers that take and give dictionaries."""

    def __init__(self, data, kind):
        super().__init__()
        self.layers = torch.nn.ModuleList(kind(width, WIDTH, data.metadata(), heads=2) for width in (-1, WIDTH))

    def forward(self, data):
        h = data.x_dict
        for layer in self.layers:
            h = {t: states.relu() for t, states in layer(h, data.edge_index_dict).items()}
        return h


class Sage(torch.nn.Module):
    """SAGEConv made heterogeneous by to_hetero."""

    def __init__(self, data):
        from torch_geometric.nn import SAGEConv, to_hetero

        class Plain(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = SAGEConv((-1, -1), WIDTH), SAGEConv((-1, -1), WIDTH)

            def forward(self, x, edge_index):
                return self.second(self.first(x, edge_index).relu(), edge_index).relu()

        super().__init__()
        self.inner = to_hetero(Plain(), data.metadata())

    def forward(self, data):
        return self.inner(data.x_dict, data.edge_index_dict)


def hgt(data):
    from torch_geometric.nn import HGTConv

    return Stacked(data, HGTConv)


def han(data):
    from torch_geometric.nn import HANConv

    return Stacked(data, HANConv)


@pytest.mark.parametrize("make", [Rgcn, hgt, han, Sage], ids=["RGCNConv", "HGTConv", "HANConv", "SAGE by to_hetero"])
def test_transfer_on_other_backbones(make):
    torch.manual_seed(0)
    data = to_hetero_data(two_worlds())
    adjacency, labels = Adjacency(data), label_distribution(data["item"].y, 3)
    gnn, classifier = make(data), Classifier(WIDTH, 3)
    ktn = KnowledgeTransfer(data, source="item", target="user", dim=WIDTH)
    with torch.no_grad():
        gnn(data)  # layers of unknown width make their weights
    parameters = [*gnn.parameters(), *ktn.parameters(), *classifier.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(100):
        h = gnn(data)
        loss = classifier.loss(classifier(h["item"]), labels) + ktn.matching_loss(h, adjacency)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ktn.parameters())
    assert any(p.grad is not None and p.grad.any() for p in gnn.parameters())
    linked = adjacency["item", "bought_by", "user"].by_target.degree > 0
    truth = label_distribution(data["user"].y, 3)[linked]
    with torch.no_grad():
        h = {t: states[linked] if t == "user" else states for t, states in gnn(data).items()}
    found = scores(classifier(h["user"], ktn.matrix()), truth)["accuracy"]
    assert found > 0.8, found
    torch.testing.assert_close(classifier(ktn.transform(h["user"])), classifier(h["user"], ktn.matrix()))
