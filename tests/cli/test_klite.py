"""tlfast klite lookup, coverage and prompts: tables, JSON, files, and what they refuse."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import torch
from transformers import BertModel, BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer
from typer.testing import CliRunner

from tests.cli.ladder_runs import refused, save_backbone
from tests.knowledge.small_wordnet import offset_of, write_wordnet
from tlfast.cli import app
from tlfast.cli.backbone import load_backbone
from tlfast.cli.text_encoder import text_encoder
from tlfast.data import read_examples

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["crane", "great white shark", "mice", "loggerhead sea turtle", "zzz"]
COUNTS = {"exact": 1, "underscored": 1, "lemma": 1, "head noun": 1, "none": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("klite")
    write_wordnet(folder / "wordnet")
    save_backbone(folder / "bert")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n\n")
    (folder / "ours.tsv").write_text("name\tdefinition\nzzz\tgood film\n")
    entry = {"word": "zzz", "pos": "noun", "lang_code": "en", "senses": [{"glosses": ["Sleep."]}]}
    (folder / "dump.jsonl").write_text(json.dumps(entry) + "\n")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["klite", *map(str, arguments)], catch_exceptions=False)


def result_of(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def flat(text):
    """A table's text without its lines, so that a wrapped cell is found."""
    return " ".join(text.replace("│", " ").split())


def test_lookup(data):
    result = run("lookup", "crane", "metal nail", "zzz", "--wordnet", data / "wordnet", "--senses", 2)
    assert result.exit_code == 0
    shown = flat(result.stdout)
    assert "crane (device): lifts and moves" in shown and f"n{offset_of('crane_bird'):08d}" in shown
    assert "and 2 more; --senses shows them" in shown and "head noun: nail" in shown and "zzz none" in shown
    found = result_of("lookup", "crane", "--wordnet", data / "wordnet")
    assert found["dictionary"] == "WordNet"
    (word,) = found["words"]
    assert (word["kind"], len(word["senses"])) == ("exact", 4)
    assert word["senses"][1]["hypernyms"] == ["bird", "animal", "entity"]
    assert word["senses"][1]["wnid"] == f"n{offset_of('crane_bird'):08d}"


def test_dictionaries_are_those_that_were_named(data, monkeypatch):
    monkeypatch.setenv("TLFAST_WORDNET", str(data / "wordnet"))

    def names(*options):
        return result_of("lookup", "zzz", *options)["dictionary"]

    assert names() == names("--wordnet", "auto") == "WordNet"
    assert names("--glossary", data / "ours.tsv") == "ours"
    three = ("--wiktionary", data / "dump.jsonl", "--wordnet", "auto", "--glossary", data / "ours.tsv")
    assert names(*three) == "ours, WordNet, Wiktionary"
    found = result_of("lookup", "zzz", "--wiktionary", data / "dump.jsonl")
    assert found["words"][0]["senses"][0]["definition"] == "Sleep"


def test_coverage(data, tmp_path):
    arguments = ("coverage", "--classes", data / "classes.txt", "--wordnet", data / "wordnet")
    found = result_of(*arguments)
    assert found["counts"] == COUNTS
    assert (found["classes"], found["covered"], found["ambiguous"]) == (5, 4, 2)
    assert found["missing"] == ["zzz"] and found["head_nouns"] == {"loggerhead sea turtle": "sea turtle"}
    assert result_of(*arguments, "--no-back-off")["covered"] == 3
    result = run(*arguments, "--out", tmp_path / "rows.tsv")
    assert "4 of 5 covered, 2 of them with several senses" in result.stdout
    assert "head noun 1 20.0 % loggerhead sea turtle" in flat(result.stdout)
    rows = read_examples(tmp_path / "rows.tsv", "name", "kind")
    assert rows.texts == CLASSES and rows.labels == ["exact", "underscored", "lemma", "head noun", "none"]


def test_classes_of_a_table_and_of_folders(data, tmp_path):
    (tmp_path / "classes.csv").write_text("id,title\n1,crane\n2,mouse\n")
    wordnet = ("--wordnet", data / "wordnet")
    assert result_of("coverage", "--classes", tmp_path / "classes.csv", "--column", "title", *wordnet)["covered"] == 2
    for name in ("crane", f"n{offset_of('mouse_device'):08d}", ".hidden"):
        (tmp_path / "images" / name).mkdir(parents=True)
    assert result_of("coverage", "--classes", tmp_path / "images", *wordnet)["counts"]["exact"] == 2


def test_prompts(data, tmp_path):
    arguments = ("prompts", "--classes", data / "classes.txt", "--wordnet", data / "wordnet", "--backbone")
    found = result_of(*arguments, data / "bert", "--out", tmp_path / "prompts.jsonl")
    assert (found["classes"], found["with_knowledge"], found["tokens"]["allowed"]) == (5, 4, 32)
    assert found["definitions"]["none"] == 1 and found["tokens"]["most"] <= 32
    assert [json.loads(line) for line in (tmp_path / "prompts.jsonl").open()] == found["prompts"]
    texts = {row["class"]: row["text"] for row in found["prompts"] if row["role"] == "knowledge"}
    assert texts["zzz"] == "a photo of a zzz." and texts["mice"].startswith("a photo of a mice. ; mice , small rodent")
    tokenizer = BertTokenizer.from_pretrained(data / "bert")
    assert all(row["tokens"] == len(tokenizer(row["text"])["input_ids"]) for row in found["prompts"])

    few = result_of(*arguments, data / "bert", "--max-tokens", 16)
    assert few["definitions"]["chunks"] > 0 and few["tokens"]["most"] <= 16
    (tmp_path / "templates.txt").write_text("{}\nthe {}\n")
    two = result_of(*arguments, data / "bert", "--templates", tmp_path / "templates.txt", "--no-back-off")
    assert two["with_knowledge"] == 3 and {row["template"] for row in two["prompts"]} == {0, 1}
    shown = run(*arguments, data / "bert")
    assert "4 of 5 classes have a definition" in shown.stdout and "a photo of a crane. ; crane ," in flat(shown.stdout)


def test_the_nearest_sense_is_chosen_by_the_backbone(data, monkeypatch):
    """The encoder the choice is given is the backbone's: mean last hidden states, in the order of the texts."""
    asked = []

    def choose(matches, encode):
        asked.append(encode(["good film", "bad", "the plot is good"]))
        return [match.senses[1] if len(match.senses) > 1 else None for match in matches]

    monkeypatch.setattr("tlfast.knowledge.choose_nearest", choose)
    arguments = ("prompts", "--classes", data / "classes.txt", "--wordnet", data / "wordnet", "--choice", "nearest")
    found = result_of(*arguments, "--backbone", data / "bert")
    texts = [row["text"] for row in found["prompts"] if (row["class"], row["role"]) == ("crane", "knowledge")]
    assert texts == ["a photo of a crane. ; crane , large long-necked wading bird of marshes"]
    tokenizer, model = BertTokenizer.from_pretrained(data / "bert"), BertModel.from_pretrained(data / "bert").eval()
    with torch.no_grad():
        for text, vector in zip(["good film", "bad", "the plot is good"], asked[0], strict=True):
            expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
            torch.testing.assert_close(vector, expected)


def test_an_image_text_model_encodes_by_its_text_tower(tmp_path):
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=16)
    tokenizer.save_pretrained(tmp_path)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": len(vocabulary) - 1, "bos_token_id": len(vocabulary) - 2}
    text = {**size, **ids, "vocab_size": len(vocabulary), "max_position_embeddings": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 8, "patch_size": 4}, projection_dim=12)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    texts = [*(f"ox {i}" for i in range(70)), "an ox that is longer than sixteen tokens"]
    vectors = text_encoder(load_backbone(str(tmp_path)))(texts)
    with torch.no_grad():
        for i in (0, 69, 70):
            inputs = tokenizer(texts[i], truncation=True, max_length=16, return_tensors="pt")
            features = model.get_text_features(**inputs)
            torch.testing.assert_close(vectors[i], getattr(features, "pooler_output", features)[0])


INTERRUPTED = """
from tlfast.cli import main
from tlfast.knowledge import wiktionary
def build(*_):
    raise KeyboardInterrupt
wiktionary.build = build
main()
"""


def test_indexing_that_is_interrupted(data, tmp_path):
    dump = tmp_path / "dump.jsonl"
    dump.write_bytes((data / "dump.jsonl").read_bytes())
    command = [sys.executable, "-c", INTERRUPTED, "klite", "lookup", "zzz", "--wiktionary", str(dump)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines() == ["interrupted; run the same command to go on"]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("lookup", ["--wordnet", "nowhere"], "there is no such folder; run apt-get install wordnet-base"),
        ("lookup", ["--wiktionary", "none.jsonl"], "there is no such file; download an English dump"),
        ("lookup", ["--glossary", "none.tsv"], "none.tsv: there is no such file"),
        ("coverage", ["--classes", "none.txt"], "none.txt: there is no such file"),
        ("coverage", ["--classes", "names.yaml"], "the extension '.yaml' is not known; use one of .txt, .tsv"),
        ("coverage", ["--classes", "twice.txt"], "twice.txt, line 3: 'crane' is on line 1 already; keep one"),
        ("coverage", ["--classes", "blank.txt"], "blank.txt: the file is empty; it needs a class name a line"),
        ("coverage", ["--classes", "empty"], "empty: there are no folders in it"),
        ("coverage", ["--classes", "latin.txt"], "latin.txt, line 1: not UTF-8"),
        ("coverage", ["--classes", "twice.csv"], "there is no column 'name'"),
        ("coverage", ["--out", "rows.xml"], "the extension '.xml' is not known"),
        ("prompts", ["--choice", "best"], "--choice 'best': is not available; choose one of first, nearest"),
        ("prompts", ["--fitting", "cut"], "fitting: 'cut' is not available"),
        ("prompts", ["--max-tokens", "33"], "--max-tokens 33:"),
        ("prompts", ["--max-tokens", "5"], "class 'crane': 'a photo of a crane.' has"),
        ("prompts", ["--templates", "twice.txt"], "template 'crane': needs {} once"),
        ("prompts", ["--backbone", "./nowhere"], "there is no such folder"),
    ],
)
def test_what_is_refused(data, tmp_path, monkeypatch, command, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice.txt").write_text("crane\nmouse\ncrane\n")
    (tmp_path / "twice.csv").write_text("title\ncrane\n")
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("käfer\n".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("TLFAST_WORDNET", str(data / "wordnet"))
    given = {
        "lookup": ["crane"],
        "coverage": ["--classes", data / "classes.txt"],
        "prompts": ["--classes", data / "classes.txt", "--backbone", data / "bert"],
    }
    refused(run(command, *given[command], *options), message)
