"""mmsegmentation 1.2 on current torch, without compiled mmcv, and adapted timm models as its backbones.

Importing this package makes ``mmseg.models`` and ``mmseg.apis`` importable (import it first), teaches mmengine to load files
of ``SaveTrained``, and registers, under mmengine's scope ``vpeft``:

- ``vpeft.TimmBackbone``, a timm model with a method attached;
- ``vpeft.SaveTrained``, a hook that saves what was trained and resumes from it;
- ``vpeft.TrainedOnly``, an optimiser constructor that takes the trained parameters alone.

An ordinary mmsegmentation configuration needs ``custom_imports = dict(imports=["vpeft.integrations.mmseg"])`` and another
``backbone=``.
"""

from ...tasks.segmentation.model import need_mmseg

need_mmseg()  # in front of all else, which imports mmengine: it says what to install

from . import loading, optimizer  # noqa: E402
from .backbone import TimmBackbone  # noqa: E402
from .optimizer import TrainedOnly  # noqa: E402
from .registries import VPEFT_CONSTRUCTORS, VPEFT_HOOKS, VPEFT_MODELS  # noqa: E402
from .saving import SaveTrained  # noqa: E402
from .trained import load_trained, trained_tensors  # noqa: E402

loading.register()
optimizer.register()

__all__ = [
    "VPEFT_CONSTRUCTORS", "VPEFT_HOOKS", "VPEFT_MODELS", "SaveTrained", "TimmBackbone", "TrainedOnly", "load_trained",
    "trained_tensors",
]  # fmt: skip
