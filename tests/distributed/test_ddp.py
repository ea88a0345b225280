"""A ladder under DistributedDataParallel: two processes train as one does, and only side gradients travel.

This folder mirrors none of tlfast: that the parts work together in several processes is a property of the whole.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import cases
from tlfast import LadderModel

BERT = "sequence-classification"
STEPS = 20
BAR = 1e-5  # of the losses; what the two runs round otherwise


@pytest.fixture(autouse=True)
def one_thread():
    """As the two processes have: sums of the same numbers in the same order then round alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_in_two(rank, task):
    model = cases.ladder(task, seed=rank)  # the heads differ until the wrapper sends the first one's
    losses = cases.train(DistributedDataParallel(model), task, STEPS, rank, 2)
    return losses, cases.side_weights(model)


@pytest.mark.parametrize("task", cases.TASKS)
def test_two_processes_train_as_one(two_processes, task):
    one, accumulating = cases.ladder(task), cases.ladder(task)
    expected = cases.train(one, task, STEPS)
    exact = accumulate(accumulating, task)
    (losses, weights), (other_losses, other_weights) = two_processes(train_in_two, task)
    assert np.mean([losses, other_losses], axis=0) == pytest.approx(expected, abs=BAR, rel=0)
    for name, weight in weights.items():
        assert np.array_equal(weight, other_weights[name]), f"{name} differs between the processes"
        assert np.array_equal(weight, exact[name]), f"{name} is not that of one process with the same two halves"


def accumulate(model, task):
    """One process whose steps take the two processes' shares one after the other: the same sums, term by term."""
    model.calibrate([cases.share(cases.step_batch(task, 0), rank, 2) for rank in range(2)])
    optimizer = cases.optimizer(model.train())
    for step in range(STEPS):
        rows = cases.step_batch(task, step)
        items = cases.label_tokens(task, rows["labels"])
        for rank in range(2):
            loss = model(**cases.share(rows, rank, 2), num_items_in_batch=items).loss
            (loss / 2 if items is None else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return cases.side_weights(model)


def travel(rank, task):
    model = cases.ladder(task, seed=rank, init="random")
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(rank)  # as it must not be: what is sent would make them equal
    frozen = {name: tensor.clone() for name, tensor in model.backbone.state_dict(keep_vars=True).items()}
    wrapped = DistributedDataParallel(model)
    sent = []

    def count(_state, bucket):
        sent.append(bucket.buffer().nbytes)
        work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, count)
    cases.train(wrapped, task, 2, rank, 2)
    kept = all(torch.equal(tensor, frozen[name]) for name, tensor in model.backbone.state_dict().items())
    buffers = [name for name, _ in model.named_buffers() if name not in wrapped.parameters_to_ignore]
    return sent, kept, buffers, cases.side_weights(model)


@pytest.mark.parametrize("task", cases.TASKS)
def test_only_side_gradients_travel(two_processes, task):
    both = two_processes(travel, task)
    side = sum(p.nbytes for p in cases.ladder(task).parameters() if p.requires_grad)
    for sent, kept, buffers, weights in both:
        assert sum(sent) == 2 * side, "a step sends the side network's gradients once, and nothing else"
        assert kept, "the backbone was sent from one process to the other"
        assert buffers == ["calibrated"]
        assert all(np.array_equal(weight, both[0][3][name]) for name, weight in weights.items())


def train_storage_in_two(rank, task, storage):
    model = cases.ladder(task, seed=rank, tap_storage=storage, tap_dim=8)
    losses = cases.train(DistributedDataParallel(model), task, 5, rank, 2)
    return losses, cases.side_weights(model), {name: x.numpy() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("storage", ["stream", "project"])
@pytest.mark.parametrize("task", ["sequence-classification", "seq2seq-lm"])
def test_two_processes_train_as_one_with_every_tap_storage(two_processes, task, storage):
    expected = cases.train(cases.ladder(task, tap_storage=storage, tap_dim=8), task, 5)
    (losses, weights, state), (other_losses, _, other_state) = two_processes(train_storage_in_two, task, storage)
    assert np.mean([losses, other_losses], axis=0) == pytest.approx(expected, abs=BAR, rel=0)
    assert weights and all(np.array_equal(tensor, other_state[name]) for name, tensor in state.items())


def calibrate(rank, init, which):
    model = cases.ladder("sequence-classification", init=init)
    model.calibrate(SHARES[which](rank))
    return cases.side_weights(model)


def rows_of(rank):
    return {name: tensor for name, tensor in cases.share(cases.batch(BERT, 1), rank, 2).items() if name != "labels"}


def without_tokens(rank):
    return {name: tensor[:, : 0 if rank else None] for name, tensor in rows_of(rank).items()}


SHARES = {  # what a process calibrates on
    "other lengths": lambda rank: [rows_of(rank)],
    "a batch without tokens": lambda rank: [without_tokens(rank)],
    "no batch": lambda rank: [] if rank else [rows_of(rank)],
    "nothing anywhere": lambda rank: [],
}


@pytest.mark.parametrize("init", ["prune", "pca"])
@pytest.mark.parametrize("which", list(SHARES)[:3])
def test_calibration_takes_what_each_process_has(two_processes, init, which):
    first, second = two_processes(calibrate, init, which)
    one = cases.ladder(BERT, init=init)
    one.calibrate([*SHARES[which](0), *SHARES[which](1)])
    for name, weight in cases.side_weights(one).items():
        assert np.array_equal(first[name], second[name]), name
        assert np.array_equal(first[name], weight), name


def refuse(rank, action):
    with pytest.raises(ValueError) as caught:
        action(rank)
    return str(caught.value)


def calibrate_on_nothing(rank):
    calibrate(rank, "prune", "nothing anywhere")


def train_on_other_backbones(rank):
    model = cases.ladder(BERT)
    with torch.no_grad():
        next(model.backbone.parameters()).add_(rank)
    DistributedDataParallel(model)(**rows_of(rank))


def test_every_process_hears_what_is_wrong_in_one(two_processes):
    assert all("the batches hold no token" in message for message in two_processes(refuse, calibrate_on_nothing))
    assert all("different weights" in message for message in two_processes(refuse, train_on_other_backbones))


def start_from_the_first(rank, folder):
    model = cases.ladder(BERT, seed=rank)
    if rank == 0:
        model = LadderModel.from_pretrained(folder, backbone=model.backbone)
    wrapped = DistributedDataParallel(model.eval())
    logits = wrapped(**rows_of(0)).logits  # would wait for ever if the second process calibrated alone
    return logits.detach().numpy()


def test_weights_loaded_by_the_first_process_reach_the_other(two_processes, tmp_path):
    model = cases.ladder(BERT).eval()
    model.calibrate([rows_of(1)])
    expected = model(**rows_of(0)).logits.detach().numpy()
    model.save_pretrained(tmp_path)
    for logits in two_processes(start_from_the_first, tmp_path):
        assert np.array_equal(logits, expected)
