"""WordNet from dict files: senses, hypernyms by offset, names of several words, morphology, heads, and bad files."""

import pickle
import shutil

import pytest

from tests.knowledge.small_wordnet import LICENCE, offset_of, write_wordnet
from tlfast.data import InputError
from tlfast.knowledge import KINDS, Sense, WordNet


def first(wordnet, name):
    return wordnet.lookup(name)[0]


def test_a_sense_has_all_that_its_synset_says(wordnet):
    offset = offset_of("white_shark")
    assert wordnet.lookup("great white shark") == [
        Sense(
            lemma="great white shark",
            definition="large aggressive shark; known to attack",
            pos="n",
            hypernyms=("shark", "animal", "entity"),
            offset=offset,
            synonyms=("man-eating shark",),
            source="WordNet",
        )
    ]
    assert first(wordnet, "great white shark").wnid == f"n{offset:08d}"
    assert first(wordnet, "bird").examples == ("birds sing", "birds of a feather")
    assert first(wordnet, "bird").definition == "warm-blooded egg-laying vertebrate"
    assert first(wordnet, "chequered").synonyms == ("checkered",), "the syntactic marker is no part of the word"


def test_hypernyms_are_followed_by_offset_and_not_by_word(wordnet):
    """Sense 1 of crane is a device; the bird's own chain has none of it."""
    bird = next(sense for sense in wordnet.lookup("crane") if sense.offset == offset_of("crane_bird"))
    assert bird.hypernyms == ("bird", "animal", "entity")
    assert [sense.offset for sense in wordnet.hypernyms(bird)] == [offset_of("bird")]
    assert first(wordnet, "Stephen Crane").hypernyms == ("entity",), "an instance of something, too"
    with pytest.raises(InputError, match="sense 'crane': is not of WordNet"):
        wordnet.hypernyms(Sense("crane", "a bird"))


def test_senses_are_ranked(wordnet):
    """Nouns first, each in the index's order; a name in small letters means common nouns before proper ones."""
    found = [sense.offset for sense in wordnet.lookup("crane")]
    assert found == [offset_of(name) for name in ("crane_device", "crane_bird", "writer", "crane_verb")]
    assert wordnet.lookup("Crane")[0].offset == offset_of("writer")


@pytest.mark.parametrize(
    ("name", "kind", "form", "synset"),
    [
        ("shark", "exact", "shark", "shark"),
        ("SHARK", "exact", "SHARK", "shark"),
        ("Great White Shark", "underscored", "Great White Shark", "white_shark"),
        ("great_white_shark", "underscored", "great white shark", "white_shark"),
        ("  great  white shark ", "underscored", "great white shark", "white_shark"),
        ("man eating shark", "underscored", "man eating shark", "white_shark"),
        ("Black and Tan Coonhound", "underscored", "Black and Tan Coonhound", "coonhound"),
        ("St. Bernard", "underscored", "St. Bernard", "saint"),
        ("gas mask", "underscored", "gas mask", "gas_mask"),
        ("Shárk", "underscored", "Shárk", "shark"),
        ("sharks", "lemma", "sharks", "shark"),
        ("mice", "lemma", "mice", "mouse_rodent"),
        ("great white sharks", "lemma", "great white sharks", "white_shark"),
        ("attorneys general", "lemma", "attorneys general", "attorney"),
        ("best", "lemma", "best", "well"),
        ("kite (bird of prey)", "lemma", "kite", "kite_bird"),
        ("kite / crane", "lemma", "kite", "kite_toy"),
        ("gas mask or respirator", "lemma", "gas mask", "gas_mask"),
        ("traffic or street sign", "lemma", "street sign", "street_sign"),
        ("zzz, hat", "lemma", "hat", "hat"),
        ("crane bird", "head noun", "crane", "crane_bird"),
        ("mouse device", "head noun", "mouse", "mouse_device"),
        ("metal nail", "head noun", "nail", "metal_nail"),
        ("loggerhead sea turtle", "head noun", "sea turtle", "sea_turtle"),
        ("red turtles", "head noun", "turtles", "turtle"),
        ("military hat (bearskin or shako)", "head noun", "bearskin", "hat_bearskin"),
        ("hen of the woods mushroom", "head noun", "hen of the woods", "hen_of_the_woods"),
        ("bunch of zzz", "head noun", "bunch", "bunch"),
    ],
)
def test_how_a_name_is_found(wordnet, name, kind, form, synset):
    match = wordnet.find(name)
    assert (match.kind, match.form, match.name) == (kind, form, name)
    assert match.senses[0].offset == offset_of(synset)
    assert match.covered and kind in KINDS
    assert wordnet.find(name, back_off=False).covered == (kind != "head noun")


def test_what_the_parentheses_exclude_is_not_among_the_senses(wordnet):
    assert [sense.offset for sense in wordnet.lookup("kite (bird of prey)")] == [offset_of("kite_bird")]
    assert [sense.offset for sense in wordnet.lookup("crane bird")] == [offset_of("crane_bird")]
    assert len(wordnet.lookup("metal nail")) == 2, "shared words only rank"


def test_an_exception_may_have_several_base_forms(wordnet):
    assert [sense.offset for sense in wordnet.lookup("axes")] == [offset_of("ax"), offset_of("axis")]


def test_a_name_that_is_not_there(wordnet):
    match = wordnet.find("zzz qqq")
    assert (match.kind, match.senses, match.covered) == ("none", (), False)
    assert wordnet.lookup("zzz") == []
    for name in ("", "  ", "_"):
        with pytest.raises(InputError, match="is empty; pass a word or several"):
            wordnet.lookup(name)


def test_wnids(wordnet, tmp_path):
    wnid = f"n{offset_of('crane_bird'):08d}"
    assert wordnet.synset(wnid).definition == "large long-necked wading bird of marshes"
    assert wordnet.find(wnid).kind == "exact" and wordnet.lookup(wnid) == [wordnet.synset(wnid)]
    with pytest.raises(InputError, match=r"data\.noun: no synset begins at byte 12345678"):
        wordnet.synset("n12345678")
    with pytest.raises(InputError, match="wnid 'crane': must be n, v, a or r and eight digits"):
        wordnet.synset("crane")
    other = WordNet(write_wordnet(tmp_path / "other", LICENCE.replace("3.0", "3.1")))
    assert other.version == "3.1" and other.lookup("crane")
    with pytest.raises(InputError, match=r"means WordNet 3\.0, and .* is 3\.1"):
        other.synset(wnid)


def test_travels_to_other_processes(wordnet):
    again = pickle.loads(pickle.dumps(wordnet))
    assert again.lookup("crane") == wordnet.lookup("crane")


def test_where_it_is_found(wordnet, tmp_path, monkeypatch):
    shutil.copytree(wordnet.folder, tmp_path / "home" / "dict")
    assert WordNet(tmp_path / "home").folder == tmp_path / "home" / "dict"
    for variable, value in (("WNHOME", "home"), ("WNSEARCHDIR", "home/dict"), ("TLFAST_WORDNET", "home")):
        with monkeypatch.context() as patch:
            for name in ("WNHOME", "WNSEARCHDIR", "TLFAST_WORDNET"):
                patch.delenv(name, raising=False)
            patch.setenv(variable, str(tmp_path / value))
            assert WordNet().folder == tmp_path / "home" / "dict"


def test_none_anywhere_says_how_to_get_it(tmp_path, monkeypatch):
    for name in ("WNHOME", "WNSEARCHDIR", "TLFAST_WORDNET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tlfast.knowledge.wndb._PLACES", (str(tmp_path),))
    hint = r"apt-get install wordnet-base, or unpack WNdb-3\.0\.tar\.gz from https://wordnet\.princeton\.edu"
    with pytest.raises(InputError, match=f"in none of the usual places; run {hint}"):
        WordNet()
    with pytest.raises(InputError, match=f"has no index.noun; run {hint}"):
        WordNet(tmp_path)
    with pytest.raises(InputError, match="there is no such folder; run"):
        WordNet(tmp_path / "nowhere")


def damaged(wordnet, tmp_path, name, change):
    folder = shutil.copytree(wordnet.folder, tmp_path / "damaged")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("index.noun", lambda data: b"", r"index\.noun: has no words"),
        ("index.noun", lambda data: data + b"word\n", r"index\.noun, line \d+: is no line of a WordNet index"),
        ("index.noun", lambda data: data.replace(b"crane n", b"cr\xe4ne n"), r"index\.noun: byte \d+ is not UTF-8"),
        ("index.noun", lambda data: data.replace(b"crane n 3 1", b"crane n 3 x"), "the line of 'crane' is malformed"),
        ("index.noun", lambda data: data.replace(b"crane n 3 1", b"crane n 4 1"), "the line of 'crane' is malformed"),
        ("data.noun", lambda data: b"", r"data\.noun: cannot be read"),
        ("data.noun", lambda data: data.replace(b"\n", b"\r\n"), r"data\.noun: no synset begins at byte"),
        ("data.noun", lambda data: data.replace(b" n 01 crane", b" n zz crane"), "the synset at byte .* is malformed"),
    ],
)
def test_damaged_files(wordnet, tmp_path, name, change, message):
    with pytest.raises(InputError, match=message):
        WordNet(damaged(wordnet, tmp_path, name, change)).lookup("crane")


def test_missing_files(wordnet, tmp_path):
    folder = shutil.copytree(wordnet.folder, tmp_path / "part")
    (folder / "noun.exc").unlink()
    assert not WordNet(folder).find("mice").covered, "no exceptions, but no harm either"
    (folder / "data.verb").unlink()
    with pytest.raises(InputError, match=r"data\.verb: there is no such file; run apt-get"):
        WordNet(folder)
