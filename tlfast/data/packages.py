"""Packages that are installed, and what each says of itself in one line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from .docstrings import NAMES, package_roots
from .errors import InputError

# What it is called -> what it is imported as. All have prose in their docstrings, and come with tlfast's extra [demo].
_FAMILIES = {
    "NumPy": "numpy",
    "PyTorch": "torch",
    "SciPy": "scipy",
    "scikit-learn": "sklearn",
    "Matplotlib": "matplotlib",
    "Transformers": "transformers",
    "SymPy": "sympy",
    "NetworkX": "networkx",
    "fontTools": "fontTools",
    "Accelerate": "accelerate",
}
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where it is installed under another name
STANDARD_LIBRARY = "Python standard library"

# With the short names that give one away; "transformer" alone is also a kind of network.
MASKED = re.compile(
    NAMES.pattern
    + r"|\w*(?:scipy|sklearn|scikit|matplotlib|pyplot|mpl|transformers|huggingface|sympy|networkx|fonttools)\w*"
    + r"|\b(?:nx|plt|ttlib|accelerate|accelerator|hugging face)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Family:
    """A package. root: where its sources are. summary: its metadata's, None where it has none."""

    name: str
    root: Path
    summary: str | None


def installed_families() -> list[Family]:
    """The packages whose docstrings can be told apart, as far as they are installed, and Python's standard library.

    Raises InputError where only the standard library is.
    """
    families = [Family(STANDARD_LIBRARY, package_roots()["python"], None)]
    for name, module in _FAMILIES.items():
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            families.append(Family(name, Path(spec.origin).parent, _summary(_DISTRIBUTIONS.get(module, module))))
    if len(families) == 1:
        raise InputError('none of the packages whose docstrings are read is installed; run pip install -e ".[demo]"')
    return families


def _summary(distribution: str) -> str | None:
    try:
        summary = importlib.metadata.metadata(distribution)["Summary"]
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return None
    return " ".join(summary.split()) if summary and summary != "UNKNOWN" else None
