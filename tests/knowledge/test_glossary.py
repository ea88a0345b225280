"""A user's own definitions, several dictionaries as one, and coverage."""

import pytest

from tlfast.data import InputError
from tlfast.knowledge import KINDS, Dictionaries, Glossary, cover

ROWS = "name\tdefinition\ncrane\tour own machine\ncrane\tour other machine\nzeta bolt\ta bolt of kind zeta\n"


@pytest.fixture
def glossary(tmp_path):
    (tmp_path / "ours.tsv").write_text(ROWS)
    return Glossary(tmp_path / "ours.tsv")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Zeta Bolt", "exact"),
        ("zeta-bolt", "underscored"),
        ("zeta bolts", "lemma"),
        ("steel zeta bolt", "head noun"),
        ("eta", "none"),
    ],
)
def test_names_are_found_as_in_any_dictionary(glossary, name, kind):
    match = glossary.find(name)
    assert match.kind == kind
    assert [sense.definition for sense in match.senses] == ([] if kind == "none" else ["a bolt of kind zeta"])


def test_rows_of_one_name_are_its_senses(glossary):
    senses = glossary.lookup("crane")
    assert [sense.definition for sense in senses] == ["our own machine", "our other machine"]
    assert {(sense.source, sense.pos, sense.wnid) for sense in senses} == {("ours", "n", None)}
    assert len(glossary) == 2


def test_jsonl_and_other_columns(tmp_path):
    path = tmp_path / "ours.jsonl"
    path.write_text('{"class": "crane", "meaning": "a\\nmachine"}\n')
    assert Glossary(path, "class", "meaning").lookup("crane")[0].definition == "a machine"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("g.tsv", "name\ncrane\n", r"g\.tsv: there is no column 'definition'; it has 'name'"),
        ("g.tsv", "name\tdefinition\ncrane\t\n", r"g\.tsv, line 2: the column 'definition' is empty"),
        ("g.jsonl", '{"name": "crane", "definition": "x"}\n{"name"\n', r"g\.jsonl, line 2: malformed JSON"),
        ("g.yaml", "crane: x\n", "the extension '.yaml' is not known"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        Glossary(tmp_path / name)


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "g.tsv").write_bytes("name\tdefinition\nkäfer\tbeetle\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"g\.tsv, line 2: not UTF-8 \(byte 0xe4 at column 2\)"):
        Glossary(tmp_path / "g.tsv")


def test_of_several_dictionaries_the_closest_match_counts(glossary, wordnet):
    both = Dictionaries([glossary, wordnet])
    assert both.name == "ours, WordNet"
    assert both.lookup("crane")[0].source == "ours", "equally close: the first one's"
    assert both.lookup("great white shark")[0].source == "WordNet"
    assert both.find("great white shark").kind == "underscored"
    assert both.find("steel bolt").kind == "none"
    swapped = Dictionaries([wordnet, glossary])
    assert swapped.lookup("crane")[0].source == "WordNet"
    assert swapped.lookup("zeta bolt")[0].source == "ours"
    with pytest.raises(InputError, match="dictionaries: there is none; pass at least one"):
        Dictionaries([])


def test_a_head_noun_does_not_beat_a_name(glossary, wordnet):
    """WordNet has only the crane of a "zeta bolt crane"; a glossary's whole name is closer."""
    assert Dictionaries([wordnet, glossary]).find("zeta bolts").senses[0].source == "ours"
    assert Dictionaries([wordnet, glossary]).find("zeta bolt crane").senses[0].source == "WordNet"


def test_coverage_counts_each_way(wordnet):
    names = ["shark", "crane", "great white shark", "mice", "loggerhead sea turtle", "zzz"]
    found = cover(wordnet, names)
    assert found.counts == {"exact": 2, "underscored": 1, "lemma": 1, "head noun": 1, "none": 1}
    assert tuple(found.counts) == KINDS
    assert (found.covered, found.ambiguous, found.missing) == (5, 2, ["zzz"])
    assert [match.name for match in found.matches] == names
    without = cover(wordnet, names, back_off=False)
    assert without.covered == 4 and without.missing == ["loggerhead sea turtle", "zzz"]
    with pytest.raises(InputError, match="names: there are none"):
        cover(wordnet, [])
