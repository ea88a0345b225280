"""What a class name means, from dictionaries, and text prompts with it (K-LITE, NeurIPS 2022, arXiv 2204.09222).

A dictionary finds senses of names, a choice takes one for each class, prompts put its definition behind the name within
the tokens a text encoder takes, and embeddings of names and of knowledge are blended.
"""

from .captions import CaptionText, augment_captions
from .choice import CHOICES, choose_first, choose_nearest, describe
from .class_captions import ClassCaption, make_class_captions
from .coverage import Coverage, cover
from .dictionary import Dictionaries, Dictionary
from .embeddings import ClassEmbeddings, embed_classes
from .glossary import Glossary
from .prompts import FITTINGS, TEMPLATES, ClassPrompts, TokenBudget, make_prompts, read_templates
from .sense import KINDS, Match, Sense
from .shortening import chunk, shorten
from .wiktionary import Wiktionary
from .wordnet import WordNet

__all__ = [
    "CHOICES",
    "FITTINGS",
    "KINDS",
    "TEMPLATES",
    "CaptionText",
    "ClassCaption",
    "ClassEmbeddings",
    "ClassPrompts",
    "Coverage",
    "Dictionaries",
    "Dictionary",
    "Glossary",
    "Match",
    "Sense",
    "TokenBudget",
    "Wiktionary",
    "WordNet",
    "augment_captions",
    "choose_first",
    "choose_nearest",
    "chunk",
    "cover",
    "describe",
    "embed_classes",
    "make_class_captions",
    "make_prompts",
    "read_templates",
    "shorten",
]
