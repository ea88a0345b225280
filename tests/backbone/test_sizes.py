"""weight_bytes: from shapes alone what freezing the real model takes."""

import pytest
import torch

import tlfast
from tests.models import CONFIGS, DECODERS, ENCODER_DECODERS, tiny
from tlfast.backbone.families import find_family
from tlfast.backbone.sizes import weight_bytes
from tlfast.backbone.stack import find_stacks


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("family", CONFIGS)
def test_bytes_are_those_of_the_frozen_model(family, precision):
    expected = tlfast.freeze(tiny(family), precision).weight_bytes()
    with torch.device("meta"):
        model = tiny(family)
    base = getattr(model, "base_model", model)
    model = model if family in DECODERS or family in ENCODER_DECODERS else base
    found = weight_bytes(model, find_stacks(base, find_family(base), None, lambda name, count: (0,)), precision)
    assert abs(found - expected) <= 0.02 * expected, (found, expected)
