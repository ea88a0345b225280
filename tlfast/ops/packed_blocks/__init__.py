from .api import Form, packed_blocks, why_not
from .table import BlockWeights, NormWeights, Table

__all__ = ["BlockWeights", "Form", "NormWeights", "Table", "packed_blocks", "why_not"]
