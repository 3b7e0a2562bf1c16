"""All that is known of timm's insides: where a model's parts are, and what its attentions and blocks compute."""

from .modules import FIRST, IMAGE, LAST, BlockSite, LinearSite, ModuleRef
from .sites import Sites

__all__ = ["FIRST", "IMAGE", "LAST", "BlockSite", "LinearSite", "ModuleRef", "Sites"]
