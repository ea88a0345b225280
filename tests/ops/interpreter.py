"""Whether Triton's interpreter can run kernels here."""

from __future__ import annotations

import importlib.util
from importlib import metadata

import numpy as np
import pytest

from tlfast.ops import _dispatch


def _no_interpreter() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _dispatch.TRITON_INTERPRETED:
        return "Triton's interpreter is off: a GPU is here, and the tests marked gpu run the kernels there"
    release = tuple(int(part) for part in metadata.version("triton").split(".")[:2])
    if release < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "the interpreter of Triton before 3.7 does not work with NumPy 2.4"
    return None


interpreted = pytest.mark.skipif(_no_interpreter() is not None, reason=str(_no_interpreter()))
