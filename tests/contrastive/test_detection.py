"""Class prompts for zero-shot detectors, on small random OWL-ViT and Grounding DINO."""

import pytest
import torch

pytest.importorskip("transformers")

from tests import detectors
from tests.detectors import DEFINITIONS, NAMES, OWLVIT_TOKENS
from tlfast import knowledge
from tlfast.contrastive.detection import detect

SENSES = [knowledge.Sense(name, said) for name, said in zip(NAMES, DEFINITIONS, strict=True)]
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def owlvit():
    return detectors.owlvit()


@pytest.fixture(scope="module")
def encode(owlvit):
    model, tokenizer = owlvit

    @torch.no_grad()
    def encode(texts):
        return model.owlvit.get_text_features(**_read(tokenizer, texts)).pooler_output

    return encode


def _read(tokenizer, texts):
    read = tokenizer(texts, padding="max_length", return_tensors="pt")
    assert read["input_ids"].shape[1] == OWLVIT_TOKENS and tokenizer.unk_token_id not in read["input_ids"]
    return {name: read[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def prompts(owlvit):
    budget = knowledge.TokenBudget.of_tokenizer(owlvit[1])
    assert budget.max_tokens == OWLVIT_TOKENS
    return knowledge.make_prompts(NAMES, SENSES, budget)


@torch.no_grad()
def test_single_texts_are_found_as_the_model_itself_finds_them(owlvit, encode):
    model, tokenizer = owlvit
    texts = ["a photo of a crane.", "a photo of a mouse."]
    found = detect(model, PIXELS, encode(texts))
    read = {name: ids.repeat(2, 1) for name, ids in _read(tokenizer, texts).items()}
    expected = model(pixel_values=PIXELS, **read)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.pred_boxes, expected.pred_boxes, atol=1e-6)


def test_definitions_of_more_than_sixteen_tokens_are_averaged_in_pieces(owlvit, encode, prompts):
    assert [prompt.fitted for prompt in prompts] == ["chunks", "chunks"]
    pieces = prompts[0].knowledge[0]
    assert len(pieces) > 2
    classes = knowledge.embed_classes(prompts, encode)
    mean = torch.nn.functional.normalize(encode(list(pieces)), dim=1).mean(dim=0)
    assert torch.allclose(classes.knowledge[0], mean / mean.norm(), atol=1e-6)
    plain, known = (detect(owlvit[0], PIXELS, vectors) for vectors in (classes.names, classes.blend()))
    assert plain.logits.shape == known.logits.shape == (2, 16, 2)
    assert torch.equal(plain.pred_boxes, known.pred_boxes)  # knowledge says what, not where
    assert not torch.allclose(plain.logits, known.logits)


def test_misuse(owlvit):
    with pytest.raises(ValueError, match=r"classes: \(2, 8\); must be \(C, 32\)"):
        detect(owlvit[0], PIXELS, torch.zeros(2, 8))
    with pytest.raises(TypeError, match="Linear has no class head"):
        detect(torch.nn.Linear(1, 1), PIXELS, torch.zeros(2, 8))


@torch.no_grad()
def test_grounding_dino_reads_all_classes_in_256_tokens():
    model, tokenizer = detectors.grounding_dino()
    assert model.config.max_text_len == tokenizer.model_max_length == 256
    (caption,) = knowledge.make_class_captions(NAMES, SENSES, knowledge.TokenBudget.of_tokenizer(tokenizer))
    read = tokenizer(caption.text, return_tensors="pt", return_offsets_mapping=True)
    offsets = read.pop("offset_mapping")[0]
    assert tokenizer.unk_token_id not in read["input_ids"]
    logits = model(pixel_values=PIXELS[:1], **read).logits
    scores = caption.scores(logits, offsets)
    assert scores.shape == (1, 5, 2) and ((scores > 0) & (scores < 1)).all()
    ids = read["input_ids"][0].tolist()
    for column, name in enumerate(NAMES):
        own = ids.index(tokenizer.convert_tokens_to_ids(name))
        assert torch.equal(scores[..., column], logits[..., own].sigmoid())
