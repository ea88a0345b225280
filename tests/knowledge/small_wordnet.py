"""A small WordNet in the format of wndb(5WN): data files with byte offsets, indices, exceptions, the licence above."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

LICENCE = "".join(f"  {i} {line}  \n" for i, line in enumerate(["This software", "WordNet 3.0 Copyright 2006"], 1))
FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}

# name: (part of speech, words, names of hypernyms, gloss); a word's senses are in this order
SYNSETS = {
    "entity": ("n", ["entity"], [], "that which exists"),
    "animal": ("n", ["animal", "beast"], ["entity"], "a living organism that moves"),
    "bird": ("n", ["bird"], ["animal"], 'warm-blooded egg-laying vertebrate; "birds sing"; "birds of a feather"'),
    "hawk": ("n", ["raptor", "bird_of_prey"], ["bird"], "any bird that hunts"),
    "shark": ("n", ["shark"], ["animal"], "elongate fish with teeth"),
    "white_shark": (
        "n",
        ["great_white_shark", "man-eating_shark"],
        ["shark"],
        "large aggressive shark; known to attack",
    ),
    "thing": ("n", ["artifact"], ["entity"], "a man-made object"),
    "device": ("n", ["device"], ["thing"], "an instrument invented for a purpose"),
    "writer": ("n", ["Crane", "Stephen_Crane"], ["@entity"], "United States writer (1871-1900)"),
    "crane_device": ("n", ["crane"], ["device"], "lifts and moves heavy objects; has a pivoted boom"),
    "crane_bird": ("n", ["crane"], ["bird"], "large long-necked wading bird of marshes"),
    "mouse_rodent": ("n", ["mouse"], ["animal"], "small rodent with a tail"),
    "mouse_device": ("n", ["mouse", "computer_mouse"], ["device"], "hand-operated electronic device with buttons"),
    "kite_toy": ("n", ["kite"], ["thing"], "plaything flown in wind at the end of a string"),
    "kite_bird": ("n", ["kite"], ["hawk"], "any of several small graceful birds"),
    "finger_nail": ("n", ["nail"], ["animal"], "horny plate on the end of a finger"),
    "metal_nail": ("n", ["nail"], ["device"], "a thin pointed piece of metal that is hammered"),
    "ax": ("n", ["ax", "axe"], ["device"], "an edge tool"),
    "axis": ("n", ["axis"], ["entity"], "a straight line through a body"),
    "sea_turtle": ("n", ["sea_turtle"], ["animal"], "any turtle of the sea"),
    "turtle": ("n", ["turtle"], ["animal"], "reptile with a shell"),
    "hat_bearskin": ("n", ["bearskin"], ["thing"], "tall hat worn by some British soldiers"),
    "hat": ("n", ["hat"], ["thing"], "headdress that protects the head"),
    "street_sign": ("n", ["street_sign"], ["thing"], "a sign visible from the street"),
    "traffic": ("n", ["traffic"], ["entity"], "vehicles on the move"),
    "gas_mask": ("n", ["gasmask", "gas_helmet"], ["device"], "a protective mask with a filter"),
    "hen_of_the_woods": ("n", ["hen_of_the_woods"], ["entity"], "large greyish-brown edible fungus"),
    "hen": ("n", ["hen"], ["bird"], "adult female chicken"),
    "mushroom": ("n", ["mushroom"], ["entity"], "fleshy body of a fungus"),
    "bunch": ("n", ["bunch"], ["entity"], "a grouping of similar things"),
    "coonhound": ("n", ["black-and-tan_coonhound"], ["animal"], "American breed of large hound"),
    "saint": ("n", ["St_Bernard"], ["animal"], "a Swiss alpine breed of large dog"),
    "attorney": ("n", ["attorney_general"], ["entity"], "the chief law officer"),
    "stretch": ("v", ["stretch"], [], "extend one's limbs"),
    "crane_verb": ("v", ["crane", "stretch_out"], ["stretch"], "stretch the neck so as to see better"),
    "chequered": ("a", ["checkered(a)", "chequered"], [], "patterned with alternating squares of color"),
    "well": ("r", ["well"], [], 'in a good manner; "done well"'),
}
EXCEPTIONS = {"n": "axes ax axis\nmice mouse\n", "v": "", "a": "", "r": "best well\n"}


def write_wordnet(folder: Path, licence: str = LICENCE) -> Path:
    """Write the files; the offsets of synsets are where their lines begin, as in the real ones."""
    folder.mkdir(parents=True, exist_ok=True)
    places = _offsets(licence)
    for pos, suffix in FILES.items():
        lines = [_data_line(name, places) for name, synset in SYNSETS.items() if synset[0] == pos]
        (folder / f"data.{suffix}").write_text(licence + "".join(lines), encoding="ascii", newline="")
        (folder / f"index.{suffix}").write_text(licence + _index(pos, places), encoding="ascii", newline="")
        if EXCEPTIONS[pos]:
            (folder / f"{suffix}.exc").write_text(EXCEPTIONS[pos], encoding="ascii")
    return folder


def offset_of(name: str, licence: str = LICENCE) -> int:
    """Where a synset's line begins."""
    return _offsets(licence)[name]


def _offsets(licence: str) -> dict[str, int]:
    places = dict.fromkeys(SYNSETS, 0)
    at = defaultdict(lambda: len(licence))
    for name, (pos, *_) in SYNSETS.items():
        places[name] = at[pos]
        at[pos] += len(_data_line(name, places))  # offsets have eight digits whatever they are
    return places


def _data_line(name: str, places: dict[str, int]) -> str:
    pos, words, parents, gloss = SYNSETS[name]
    spelled = " ".join(f"{word} 0" for word in words)
    pointers = [
        f"{'@i' if parent.startswith('@') else '@'} {places[parent.removeprefix('@')]:08d} {pos} 0000"
        for parent in parents
    ]
    frames = " 01 + 02 00" if pos == "v" else ""
    fields = " ".join([f"{len(words):02x}", spelled, f"{len(pointers):03d}", *pointers])
    return f"{places[name]:08d} 03 {pos} {fields}{frames} | {gloss}  \n"


def _index(pos: str, places: dict[str, int]) -> str:
    senses = defaultdict(list)
    for name, (of, words, *_) in SYNSETS.items():
        for word in words if of == pos else ():
            senses[word.partition("(")[0].lower()].append(places[name])
    lines = [
        f"{lemma} {pos} {len(at)} 1 @ {len(at)} 0 {' '.join(f'{offset:08d}' for offset in at)}  \n"
        for lemma, at in sorted(senses.items())
    ]
    return "".join(lines)
