"""Zero-shot classification of pictures by UniCL against a frozen text encoder, with and without knowledge (K-LITE).

One network is trained a seed. On it sit heads that learn class names, WordNet's definitions, and the mean of both; so
what the rows of the table differ by is the texts, and nothing else. A last head learns names that were dealt out anew
among the classes, without moving the network: pictures then tell nothing about the names of unseen classes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.convnet import ConvNet, Views, optimisers, plain_view
from benchmarks.pictures import PictureSet, Trial
from tlfast import knowledge
from tlfast.contrastive import DualEncoder, TextEncoder, TowerConfig

NAMES, DEFINITIONS, BOTH, SHUFFLED = "names", "definitions", "both", "shuffled"
KINDS = (NAMES, DEFINITIONS, BOTH, SHUFFLED)
TOPS = (1, 5)
_ZOOMS = (0.9, 1.0, 1.1)  # of the views, and their mirror images, whose embeddings are averaged
_EVALUATED, _PIXELS, _CHUNK = 256, 16, 512
_RESAMPLES = 2000


@dataclass(frozen=True)
class Settings:
    """Of training; chosen on dev classes, see bench_emoji.py. size: pixels. rate: Muon's. average: of weights."""

    width: int = 48
    size: int = 32
    steps: int = 1900
    batch: int = 128
    rate: float = 0.01
    decay: float = 0.05
    scale: float = 10.0
    average: float = 0.99
    warmup: float = 0.1
    views: Views = field(default_factory=Views)


@dataclass(frozen=True)
class Texts:
    """What stands for each class, (C, D) of length 1, by kind; and how its definitions were found."""

    vectors: dict[str, torch.Tensor]
    coverage: dict[str, int]


def embed_texts(names: Sequence[Sequence[str]], wordnet: knowledge.Dictionary, text: Any, tokenizer: Any) -> Texts:
    """Class texts under a frozen text encoder: the mean over a class's names, alone and with its first name's sense.

    The sense is the one nearest to the other classes. A first name that is a WordNet id, as ImageNet's folders have,
    reads as its word. text: a transformers text model.
    """
    encoder = TextEncoder(_dual(ConvNet(1), text, 1.0), tokenizer)
    encode = encoder.features
    found = knowledge.cover(wordnet, [name[0] for name in names])
    senses = knowledge.choose_nearest(found.matches, encode)
    names = [(match.read_as, *all_names[1:]) for match, all_names in zip(found.matches, names, strict=True)]
    spoken = [name for all_names in names for name in all_names]
    meant = [sense for all_names, sense in zip(names, senses, strict=True) for _ in all_names]
    budget = knowledge.TokenBudget.of_tokenizer(tokenizer, encoder.max_length)
    prompts = knowledge.make_prompts(spoken, meant, budget, templates=("{}",))
    embedded = knowledge.embed_classes(prompts, encode)
    counts = [len(all_names) for all_names in names]

    def by_class(vectors: torch.Tensor) -> torch.Tensor:
        return F.normalize(torch.stack([part.mean(dim=0) for part in vectors.split(counts)]), dim=1)

    classes = knowledge.ClassEmbeddings(by_class(embedded.names), by_class(embedded.knowledge))
    vectors = {NAMES: classes.names, DEFINITIONS: classes.knowledge, BOTH: classes.blend()}
    return Texts(vectors, found.counts)


def _dual(network: nn.Module, text: Any, scale: float) -> DualEncoder:
    """A linear head on the network, trained with it towards a frozen text tower; tau stays."""
    dual = DualEncoder(network, text, TowerConfig("full", head="linear"), TowerConfig("nothing"), None, scale)
    dual.loss.requires_grad_(False)
    return dual


class Learner(nn.Module):
    """The network and a dual encoder on it for each kind of text."""

    def __init__(self, data: PictureSet, texts: Texts, text: Any, settings: Settings, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.settings = settings
        self.network = ConvNet(settings.width)
        self.duals = {kind: _dual(self.network, text, settings.scale) for kind in KINDS}
        order = torch.randperm(len(data.names))
        self.texts = texts.vectors | {SHUFFLED: texts.vectors[NAMES][order]}
        for kind, dual in self.duals.items():
            dual.text.centre_on(self.texts[kind][data.seen])
        self.heads = nn.ModuleDict({kind: dual.image.head for kind, dual in self.duals.items()})

    def loss(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum of UniCL's losses over kinds; the shuffled texts' does not reach the network."""
        features = self.network(pixels)
        losses = []
        for kind, dual in self.duals.items():
            seen = features.detach() if kind == SHUFFLED else features
            losses.append(dual(image_features=seen, text_features=self.texts[kind][labels], labels=labels).loss)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def ranks(self, data: PictureSet, trial: Trial) -> dict[str, torch.Tensor]:
        """(R,) int64 by kind: how many candidates lie nearer to each picture of a trial than its own class."""
        self.eval()
        parts = [_floats(rows, data) for rows in trial.rows.split(_EVALUATED)]
        views = [
            torch.cat([self.network(plain_view(part, self.settings.size, zoom, mirrored)) for part in parts])
            for zoom in _ZOOMS
            for mirrored in (False, True)
        ]
        found = {}
        for kind, dual in self.duals.items():
            image = torch.stack([dual.encode_image(features=view) for view in views]).sum(dim=0)
            scores = image @ dual.encode_text(features=self.texts[kind][trial.candidates]).T
            found[kind] = rank(scores, trial, data.labels)
        return found


def train(learner: Learner, data: PictureSet, settings: Settings, progress: Callable[[], Any] = lambda: None) -> None:
    """Train on random views; the learner ends with the average of its weights."""
    learner.train()
    learned = nn.ModuleList([learner.network, learner.heads])
    averaged = torch.optim.swa_utils.AveragedModel(
        learned, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(settings.average), use_buffers=True
    )
    found = optimisers(learned, settings.rate, settings.decay)

    def factor(step: int) -> float:
        return min((step + 1) / (settings.warmup * settings.steps), 1 - step / settings.steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, factor) for optimiser in found]
    for rows in _batches(data.training, settings):
        pixels = settings.views.draw(_floats(rows, data), settings.size)
        loss = learner.loss(pixels, data.labels[rows])
        learned.zero_grad()
        loss.backward()
        for optimiser, schedule in zip(found, schedules, strict=True):
            optimiser.step()
            schedule.step()
        averaged.update_parameters(learned)
        progress()
    learned.load_state_dict(copy.deepcopy(averaged.module.state_dict()))


def _batches(rows: torch.Tensor, settings: Settings) -> Any:
    """Whole batches of rows, drawn anew each time all have been seen, for so many steps."""
    size = min(settings.batch, len(rows))
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(settings.steps):
        if len(left) < size:
            left = rows[torch.randperm(len(rows))]
        batch, left = left[:size], left[size:]
        yield batch


def _floats(rows: torch.Tensor, data: PictureSet) -> torch.Tensor:
    return data.pictures[rows].float() / 255


def rank(scores: torch.Tensor, trial: Trial, labels: torch.Tensor) -> torch.Tensor:
    """(R, C) scores -> (R,): how many candidates score higher than the right one; equal ones count as higher."""
    place = torch.searchsorted(trial.candidates, labels[trial.rows])
    return (scores >= scores.gather(1, place[:, None])).sum(dim=1) - 1


def nearest_pixels(data: PictureSet, texts: Texts, trial: Trial) -> torch.Tensor:
    """The baseline's ranks: a picture takes the name of the training picture that is nearest in 16 x 16 pixels."""

    def small(rows: torch.Tensor) -> torch.Tensor:
        parts = (plain_view(_floats(part, data), _PIXELS * 2) for part in rows.split(_CHUNK))
        return torch.cat([F.avg_pool2d(part, 2).flatten(1) for part in parts])

    training = small(data.training)
    nearest = torch.cat([torch.cdist(part, training).argmin(dim=1) for part in small(trial.rows).split(_CHUNK)])
    names = texts.vectors[NAMES]
    centred = F.normalize(names - names[data.seen].mean(dim=0), dim=1)
    return rank(centred[data.labels[data.training[nearest]]] @ centred[trial.candidates].T, trial, data.labels)


@dataclass(frozen=True)
class Rate:
    """A share of pictures, its mean over seeds, in [0, 1], and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def rate(hits: torch.Tensor, classes: torch.Tensor, seed: int = 0) -> Rate:
    """Of hits, (seeds, R) bool, of pictures of classes (R,). Bootstrap: classes are drawn, with all their pictures."""
    each = hits.double().mean(dim=0)
    different, place = classes.unique(return_inverse=True)
    sums = torch.zeros(len(different), dtype=torch.float64).index_add_(0, place, each)
    counts = place.bincount(minlength=len(different)).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(different), (_RESAMPLES, len(different)), generator=generator)
    rates = sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1)
    low, high = rates.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Rate(float(each.mean()), low, high)


@dataclass(frozen=True)
class Outcome:
    """ranks: for each trial and method (seeds, R) int64, "pixels" being the baseline. seconds: (wall, CPU) a seed."""

    ranks: dict[str, dict[str, torch.Tensor]]
    seconds: list[tuple[float, float]]


def run(
    data: PictureSet,
    texts: Texts,
    text: Any,
    settings: Settings,
    seeds: Sequence[int],
    say: Callable[[str], Any] = lambda line: None,
) -> Outcome:
    """Train a learner a seed and put all trials to each."""
    found: dict[str, dict[str, list[torch.Tensor]]] = {
        name: {"pixels": [nearest_pixels(data, texts, trial)]} for name, trial in data.trials.items()
    }
    seconds = []
    for seed in seeds:
        learner = Learner(data, texts, text, settings, seed)
        wall, cpu = time.perf_counter(), time.process_time()
        train(learner, data, settings)
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
        say(f"seed {seed}: trained in {seconds[-1][0]:.0f} s, of them {seconds[-1][1]:.0f} s of CPU time")
        for name, trial in data.trials.items():
            shares = []
            for kind, ranks in learner.ranks(data, trial).items():
                found[name].setdefault(kind, []).append(ranks)
                tops = " / ".join(f"{100 * float((ranks < top).double().mean()):.1f}" for top in TOPS)
                shares.append(f"{kind} {tops}")
            say(f"  {name}: {', '.join(shares)}")
    return Outcome(
        {name: {kind: torch.stack(ranks) for kind, ranks in kinds.items()} for name, kinds in found.items()}, seconds
    )


def rates(outcome: Outcome, data: PictureSet, name: str) -> dict[str, dict[int, Rate]]:
    """Of a trial: method -> 1 and 5 -> how often the right class is among so many."""
    classes = data.labels[data.trials[name].rows]
    return {kind: {top: rate(ranks < top, classes) for top in TOPS} for kind, ranks in outcome.ranks[name].items()}


def chance(data: PictureSet, name: str) -> dict[int, float]:
    """Of a trial: 1 and 5 -> how often a guess is right."""
    return {top: min(1.0, top / len(data.trials[name].candidates)) for top in TOPS}


def written(found: Mapping[int, Rate]) -> str:
    """Top-1 and top-5 in per cent, each with its interval."""
    return " / ".join(f"{100 * r.mean:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]" for r in found.values())
