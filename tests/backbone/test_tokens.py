"""How many tokens a text may have: positions, the tokenizer, and a cap where neither limits."""

from types import SimpleNamespace

import pytest

from tlfast.backbone import most_tokens


@pytest.mark.parametrize(
    ("positions", "kind", "limit", "most"),
    [
        (514, "roberta", 600, 512),
        (512, "bert", 600, 512),
        (512, "bert", 77, 77),
        (None, "t5", 600, 600),
        (None, "t5", int(1e30), 1 << 20),
        (1 << 21, "longer", int(1e30), 1 << 20),
    ],
)
def test_the_lowest_limit_holds(positions, kind, limit, most):
    config = SimpleNamespace(model_type=kind, max_position_embeddings=positions)
    assert most_tokens(config, SimpleNamespace(model_max_length=limit)) == most
