"""Real pictures, zero-shot: emoji of classes and of a vendor that were never trained on, by name, definition, and both.

`tlfast bench emoji` runs it on the emoji; `python -m benchmarks.bench_emoji --data FOLDER` prints the same table for a
folder of images with a folder for each class. Settings were chosen with --dev, which holds other classes out of the
seen ones and looks at no picture of the unseen classes and none of the unseen vendor.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import emoji, zero_shot
from benchmarks.pictures import PictureSet, read_folder
from benchmarks.zero_shot import BOTH, DEFINITIONS, NAMES, SHUFFLED, Outcome, Settings, Texts
from tlfast.data import InputError
from tlfast.knowledge import WordNet

SEEDS = (0, 1, 2)
DEFAULTS = Settings()
TRIALS = (
    "unseen classes",
    "unseen classes without a word of seen names",
    "unseen classes, unseen vendor",
    "seen classes, unseen vendor",
)
_LUCK = 0.01  # by which an interval may miss chance
_SAID = {
    NAMES: "names",
    DEFINITIONS: "with WordNet",
    BOTH: "both",
    "pixels": "nearest pixels",
    SHUFFLED: "shuffled names",
}


@dataclass(frozen=True)
class Ran:
    """A set of pictures, and what came out of it."""

    data: PictureSet
    texts: Texts
    outcome: Outcome


def measure(
    data: PictureSet,
    seeds: tuple[int, ...] = SEEDS,
    settings: Settings = DEFAULTS,
    say: Any = lambda line: None,
) -> Ran:
    """Raises InputError where WordNet or the text encoder's package is missing."""
    import tlfast
    from tlfast.cli.backbone import MINILM, load_backbone

    wordnet = WordNet()
    loaded = load_backbone(MINILM)
    text = tlfast.freeze(loaded.model)
    texts = zero_shot.embed_texts(data.names, wordnet, text, loaded.tokenizer)
    say(f"{len(data.names):,} classes in WordNet: {texts.coverage}")
    return Ran(data, texts, zero_shot.run(data, texts, text, settings, seeds, say))


@pytest.fixture(scope="module")
def ran() -> Ran:
    try:
        return measure(emoji.load(), say=lambda line: print(line, file=sys.stderr))
    except (InputError, emoji.CannotFetch) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", TRIALS)
def test_emoji(benchmark: Any, ran: Ran, name: str) -> None:
    trial, seconds = ran.data.trials[name], ran.outcome.seconds
    found = benchmark.pedantic(lambda: zero_shot.rates(ran.outcome, ran.data, name), rounds=1)
    guessed = zero_shot.chance(ran.data, name)
    benchmark.extra_info.update(
        {kind: {top: vars(r) for top, r in both.items()} for kind, both in found.items()},
        pictures=len(trial.rows),
        candidates=len(trial.candidates),
        training_seconds=[wall for wall, _ in seconds],
        training_cpu_seconds=[cpu for _, cpu in seconds],
        wordnet=ran.texts.coverage,
    )
    benchmark.extra_info["row"] = {
        "what": f"Emoji, {name}: top-1 / top-5 of {len(trial.candidates)}, % [95 % interval], mean of {len(SEEDS)} "
        f"seeds, {len(trial.rows)} pictures",
        "ours": "; ".join(f"{_SAID[kind]} {zero_shot.written(found[kind])}" for kind in (NAMES, DEFINITIONS, BOTH)),
        "peer": "; ".join(f"{_SAID[kind]} {zero_shot.written(found[kind])}" for kind in ("pixels", SHUFFLED))
        + f"; chance {100 * guessed[1]:.1f} / {100 * guessed[5]:.1f}",
        "how": "tlfast bench emoji",
    }
    if name != "seen classes, unseen vendor":  # what pictures say about shuffled names of unseen classes is nothing
        for top, r in found[SHUFFLED].items():
            assert r.low - _LUCK <= guessed[top] <= r.high + _LUCK


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with a folder of images for each class; default: the emoji")
    parser.add_argument("--dev", action="store_true", help="the emoji's dev classes, by which settings are chosen")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument("--steps", type=int, default=DEFAULTS.steps, help="of training; more for more images")
    options = parser.parse_args()
    try:
        if options.data is not None:
            data = read_folder(options.data)
        else:
            data = emoji.load_dev() if options.dev else emoji.load()
        settings = replace(DEFAULTS, steps=options.steps)
        result = measure(data, tuple(range(options.seeds)), settings, print)
    except (InputError, emoji.CannotFetch) as error:
        sys.exit(f"bench_emoji: {error}")
    for name, trial in data.trials.items():
        guessed = zero_shot.chance(data, name)
        print(f"\n{name}: {len(trial.rows):,} pictures, {len(trial.candidates)} candidates; top-1 / top-5, %")
        for kind, found in zero_shot.rates(result.outcome, data, name).items():
            print(f"  {_SAID[kind]:16}{zero_shot.written(found)}")
        print(f"  {'chance':16}{100 * guessed[1]:.1f} / {100 * guessed[5]:.1f}")


if __name__ == "__main__":
    main()
