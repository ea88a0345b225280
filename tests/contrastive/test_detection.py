"""Class prompts for zero-shot detectors, on small random OWL-ViT and Grounding DINO."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from tlfast import knowledge
from tlfast.contrastive.detection import detect

NAMES = ["crane", "mouse"]
SENSES = [
    knowledge.Sense("crane", "large long-necked wading bird of marshes and plains in many parts of the world"),
    knowledge.Sense("mouse", "any of numerous small rodents typically resembling diminutive rats"),
]
TOKENS = 16  # of OWL-ViT's text encoder
PAD, START, END = 0, 1, 2


@pytest.fixture(scope="module")
def owlvit():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OwlViTConfig(
        text_config=size | {"vocab_size": 200, "max_position_embeddings": TOKENS, "eos_token_id": END},
        vision_config=size | {"image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    return transformers.OwlViTForObjectDetection(config).eval()


def tokenize(texts):
    """A token a word, between a start and an end, whose id is the highest as in CLIP's vocabulary."""
    rows = [[START, *(3 + sum(map(ord, word)) % 190 for word in text.split()), 199] for text in texts]
    assert max(map(len, rows)) <= TOKENS
    ids = torch.tensor([row + [PAD] * (TOKENS - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def encoder(model):
    @torch.no_grad()
    def encode(texts):
        found = model.owlvit.get_text_features(**tokenize(texts))
        return getattr(found, "pooler_output", found)

    return encode


BUDGET = knowledge.TokenBudget(lambda text: 2 + len(text.split()), TOKENS)
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_single_texts_are_found_as_the_model_itself_finds_them(owlvit):
    texts = ["a photo of a crane.", "a photo of a mouse."]
    found = detect(owlvit, PIXELS, encoder(owlvit)(texts))
    expected = owlvit(pixel_values=PIXELS, **{name: ids.repeat(2, 1) for name, ids in tokenize(texts).items()})
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.pred_boxes, expected.pred_boxes, atol=1e-6)


def test_definitions_of_more_than_sixteen_tokens_are_averaged_in_pieces(owlvit):
    prompts = knowledge.make_prompts(NAMES, SENSES, BUDGET)
    assert [prompt.fitted for prompt in prompts] == ["chunks", "chunks"]
    pieces = prompts[0].knowledge[0]
    assert len(pieces) > 2 and all(BUDGET.fits(text) for text in pieces)
    classes = knowledge.embed_classes(prompts, encoder(owlvit))
    mean = torch.nn.functional.normalize(encoder(owlvit)(list(pieces)), dim=1).mean(dim=0)
    assert torch.allclose(classes.knowledge[0], mean / mean.norm(), atol=1e-6)
    plain, known = (detect(owlvit, PIXELS, vectors) for vectors in (classes.names, classes.blend(0.5)))
    assert plain.logits.shape == known.logits.shape == (2, 16, 2)
    assert torch.equal(plain.pred_boxes, known.pred_boxes)  # knowledge says what, not where
    assert not torch.allclose(plain.logits, known.logits)


def test_misuse(owlvit):
    with pytest.raises(ValueError, match=r"classes: \(2, 8\); must be \(C, 32\)"):
        detect(owlvit, PIXELS, torch.zeros(2, 8))
    with pytest.raises(TypeError, match="Linear has no class head"):
        detect(torch.nn.Linear(1, 1), PIXELS, torch.zeros(2, 8))


@pytest.fixture(scope="module")
def dino():
    """Grounding DINO with the ids of BERT's vocabulary for what separates classes, and a tokenizer for it."""
    tokenizers = pytest.importorskip("tokenizers")
    special = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
    said = " ".join([*NAMES, *(sense.definition for sense in SENSES), ", -"]).replace("-", " ").split()
    vocabulary = special | {word: 200 + i for i, word in enumerate(dict.fromkeys([*said, ",", "-"]))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    inner.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=256
    )
    torch.manual_seed(0)
    text = {"vocab_size": 1100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(
            image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=transformers.BertConfig(**text, intermediate_size=64),
        d_model=64, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=5,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    return transformers.GroundingDinoForObjectDetection(config).eval(), tokenizer


@torch.no_grad()
def test_grounding_dino_reads_all_classes_in_256_tokens(dino):
    model, tokenizer = dino
    assert model.config.max_text_len == 256
    (caption,) = knowledge.make_class_captions(NAMES, SENSES, knowledge.TokenBudget.of_tokenizer(tokenizer, 256))
    read = tokenizer(caption.text, return_tensors="pt", return_offsets_mapping=True)
    offsets = read.pop("offset_mapping")[0]
    assert tokenizer.unk_token_id not in read["input_ids"]
    found = model(pixel_values=PIXELS[:1], **read)
    scores = caption.scores(found.logits, offsets)
    assert scores.shape == (1, 5, 2) and ((scores > 0) & (scores < 1)).all()
    ids = read["input_ids"][0].tolist()
    for column, name in enumerate(NAMES):
        own = ids.index(tokenizer.convert_tokens_to_ids(name))
        assert torch.equal(scores[..., column], found.logits[..., own].sigmoid())
