from .api import packed_blocks, pays_in_float32, why_not
from .shared import SharedWeight
from .table import BlockWeights, Form, NormWeights, Table

__all__ = [
    "BlockWeights",
    "Form",
    "NormWeights",
    "SharedWeight",
    "Table",
    "packed_blocks",
    "pays_in_float32",
    "why_not",
]
