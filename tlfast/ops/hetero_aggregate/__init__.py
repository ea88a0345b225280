from .api import IMPLEMENTATIONS, hetero_aggregate
from .relation import Relation, RelationGroup

__all__ = ["IMPLEMENTATIONS", "Relation", "RelationGroup", "hetero_aggregate"]
