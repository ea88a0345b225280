"""How "auto" picks, on machines that lack something."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from tlfast import _native
from tlfast.ops import _dispatch

NAMES = ("reference", "native", "triton", "cuda")


def takes_all(name: str) -> None:
    return None


@pytest.mark.parametrize(
    "reason, architectures, triton, expected",
    [
        (None, "80,90", True, {}),
        (None, "", True, {"cuda": "built without CUDA"}),
        (None, "80", False, {"triton": "pip install triton"}),
        ("broken", None, False, {"native": "broken", "cuda": "broken", "triton": "not installed"}),
    ],
)
def test_what_is_missing(reason, architectures, triton, expected, monkeypatch):
    monkeypatch.setattr(_native, "why_not", lambda: reason)
    monkeypatch.setattr(_native, "library", lambda: SimpleNamespace(cuda_architectures=lambda: architectures))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    missing = _dispatch._find_missing()
    assert set(missing) == set(expected)
    for name, words in expected.items():
        assert words in missing[name]


@pytest.mark.parametrize(
    "device, missing, expected",
    [
        ("cpu", {}, "native"),
        ("cpu", {"native": "broken"}, "reference"),
        ("cuda", {}, "triton"),
        ("cuda", {"triton": "broken"}, "cuda"),
        ("cuda", {"triton": "broken", "cuda": "broken"}, "reference"),
        ("mps", {}, "reference"),
    ],
)
def test_auto_takes_the_first_that_can_run(device, missing, expected, monkeypatch):
    monkeypatch.setattr(_dispatch, "MISSING", missing)
    assert _dispatch.choose("op", "auto", NAMES, device, takes_all) == expected


def test_auto_passes_over_what_refuses_the_inputs():
    def refuses(name: str) -> str | None:
        return "no" if name != "reference" else None

    assert _dispatch.choose("op", "auto", NAMES, "cpu", refuses) == "reference"
    with pytest.raises(RuntimeError, match="op: impl='native' cannot run: no"):
        _dispatch.choose("op", "native", NAMES, "cpu", refuses)


@pytest.mark.parametrize("impl, device", [("native", "cuda"), ("cuda", "cpu"), ("native", "meta")])
def test_a_named_one_stays_on_its_device(impl, device, monkeypatch):
    monkeypatch.setattr(_dispatch, "MISSING", {})
    with pytest.raises(RuntimeError, match=f"was given {device} ones; move the inputs"):
        _dispatch.choose("op", impl, NAMES, device, takes_all)


def test_automatic_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_dispatch, "MISSING", {})
    assert _dispatch.automatic(NAMES) == ("native", "first choice for cpu tensors")
    monkeypatch.setattr(_dispatch, "MISSING", {"native": "broken"})
    assert _dispatch.automatic(NAMES) == ("reference", "no native: broken")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _dispatch.automatic(NAMES) == ("triton", "first choice for cuda tensors")


def test_availability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_dispatch, "MISSING", {"native": "broken"})
    monkeypatch.setattr(_dispatch, "TRITON_INTERPRETED", False)
    expected = {"reference": "available", "native": "broken", "triton": "no CUDA device", "cuda": "no CUDA device"}
    assert _dispatch.availability(NAMES) == expected
    monkeypatch.setattr(_dispatch, "TRITON_INTERPRETED", True)
    assert _dispatch.availability(NAMES)["triton"].startswith("available (TRITON_INTERPRET=1")
