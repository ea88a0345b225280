"""The paired bootstrap against what is known of it."""

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from tlfast.bench.comparison import difference


def test_the_interval_is_that_of_paired_answers():
    draw = np.random.default_rng(0)
    other = draw.random((1, 2000)) < 0.8
    ours = other.copy()
    ours[0, :60], other[0, :60] = True, False  # better on 60 of 2,000, and else the same answers
    found = difference(ours, other)
    share = 60 / 2000
    margin = 1.96 * np.sqrt(share * (1 - share) / 2000)
    assert found["mean"] == pytest.approx(share)
    assert found["low"] == pytest.approx(share - margin, abs=0.1 * margin)
    assert found["high"] == pytest.approx(share + margin, abs=0.1 * margin)


def test_seeds_that_disagree_widen_it():
    base = np.zeros((5, 1000), dtype=bool)
    steady, moving = base.copy(), base.copy()
    steady[:, :100] = True
    moving[::2, :100] = moving[0, 100:166] = True  # 0, 10 or 17 %
    calm, wild = difference(steady, base), difference(moving, base)
    assert wild["high"] - wild["low"] > 2 * (calm["high"] - calm["low"])
    assert calm["mean"] == pytest.approx(0.1)


def test_equal_answers_have_no_difference_and_order_only_turns_the_sign():
    draw = np.random.default_rng(1)
    a, b = (draw.random((5, 300)) < share for share in (0.8, 0.7))
    assert difference(a, a) == {"mean": 0.0, "low": 0.0, "high": 0.0, "resamples": 10_000}
    there, back = difference(a, b), difference(b, a)
    assert [there["mean"], there["low"], there["high"]] == pytest.approx([-back["mean"], -back["high"], -back["low"]])


@pytest.mark.parametrize("shape", [(5, 299), (300,), (4, 300)])
def test_answers_to_other_questions_are_refused(shape):
    with pytest.raises(ValueError, match=r"have shapes \(5, 300\) and"):
        difference(np.zeros((5, 300), dtype=bool), np.zeros(shape, dtype=bool))
