from .api import packed_blocks, why_not
from .table import BlockWeights, Form, NormWeights, Table

__all__ = ["BlockWeights", "Form", "NormWeights", "Table", "packed_blocks", "why_not"]
