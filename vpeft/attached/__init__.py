"""What an attached method consists of, as the method sees it: its tree of modules, its classifier, the task's loss."""

from .classifier import Classifier
from .objective import Criterion, Objective
from .tree import Tree

__all__ = ["Classifier", "Criterion", "Objective", "Tree"]
