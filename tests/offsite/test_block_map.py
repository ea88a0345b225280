"""Which middle blocks an emulator keeps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tlfast
from tlfast.offsite.block_map import BlockMap


def test_the_papers_emulators():
    assert tlfast.offsite.emulator_blocks(24, adapter=(2, 2), keep=8) == [2, 5, 7, 10, 13, 16, 18, 21]
    large = [2, 4, 5, 7, 8, 10, 12, 13, 15, 16, 18, 19, 21, 23, 24, 26, 27, 29]
    assert tlfast.offsite.emulator_blocks(32, adapter=(2, 2), keep=18) == large


@given(st.integers(1, 80), st.integers(0, 5), st.integers(0, 5), st.data())
def test_blocks_are_of_the_middle_ascending_and_with_its_ends(middle, first, last, data):
    first += first + last == 0
    keep = data.draw(st.integers(1, middle))
    found = tlfast.offsite.emulator_blocks(first + middle + last, (first, last), keep)
    assert found == sorted(set(found)) and len(found) == keep
    assert found[0] == first
    if keep > 1:
        assert found[-1] == first + middle - 1
    if keep == middle:
        assert found == list(range(first, first + middle))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((24, (2, 2), 0), "keep: 0 of the 20 middle blocks"),
        ((24, (2, 2), 21), "pass 1 to 20"),
        ((24, (2, 2), 2.0), "keep: 2.0 is not a whole number"),
        ((24, (2, 2), True), "keep: True is not a whole number"),
        ((4, (2, 2), 1), r"adapter: \(2, 2\) leaves no middle block of 4; pass sizes whose sum is at most 3"),
        ((24, (0, 0), 1), "one of them above 0"),
        ((24, (-1, 2), 1), "at least 0"),
        ((24, 2, 1), "adapter: 2 is not allowed"),
        ((24, (1, 2, 3), 1), "adapter: .* is not allowed"),
        ((24, ("1", 2), 1), "adapter: '1' is not a whole number"),
        ((2.5, (1, 1), 1), "num_blocks: 2.5"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        tlfast.offsite.emulator_blocks(*arguments)


def test_roles_are_the_same_in_the_emulator_and_in_the_full_model():
    blocks = BlockMap(total=10, adapter=(2, 1), middle=(3, 5))
    assert blocks.kept == (0, 1, 3, 5, 9) and list(blocks.middle_places) == [2, 3]
    assert [blocks.role(place, 5) for place in range(5)] == ["first.0", "first.1", None, None, "last.0"]
    assert blocks.adapter_places(5) == [0, 1, 4] and blocks.adapter_places(10) == [0, 1, 9]
    assert blocks.role(9, 10) == "last.0" and blocks.role(4, 10) is None
