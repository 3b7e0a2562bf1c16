"""The few ways to act on a frozen model. Every method is made of these, and can do what its interventions can do.

An intervention is an ``nn.Module`` that is registered inside the model (under ``model.vpeft``) and holds its target modules
through ``ModuleRef`` objects, which nn.Module does not register, so that no name of the model changes. What it does at a
module stands in that module's junction, whose bound methods are torch's hooks there: these survive ``copy.deepcopy``,
pickling, ``torch.compile`` and activation checkpointing. What it keeps from one module to a later one is in the flow.

======================  ==================================================  ==========  =======  ================
class                   acts                                                mergeable   per row  file
======================  ==================================================  ==========  =======  ================
``AddToBranch``         before the module it reads, after drop path         no          yes      ``branch``
``MapOutput``           after (or before) one module                        if affine   yes      ``output``
``ForPooling``          the same at the final norm, not for maps            no          yes      ``output``
``AddToLinear``         after a linear                                      if linear   yes      ``linear``
``PromptTokens``        before and after a block                            no          yes      ``tokens``
``JoinWindows``         around a Swin block                                 no          yes      ``tokens``
``PrefixKeysValues``    around attention                                    no          yes      ``attention``
``ComputedKeysValues``  around attention, before the block                  no          yes      ``attention``
``Tap``                 reads a module's output, or input                   no          yes      ``side``
``SideOutput``          after (or before) one module                        no          yes      ``side``
``SideFeatures``        the same, at the final norm                         no          yes      ``side``
``Grid``, ``Clip``      before the module whose input they look at          as nothing  yes      ``context``
``ReplaceTensor``       in place of a tensor of the model                   yes         no       ``weights``
``ExistingTensors``     nowhere: unfreezes tensors of the model             is a load   no       ``weights``
======================  ==================================================  ==========  =======  ================

An image is changed by a ``MapOutput`` with ``on_input`` at ``sites.patch_embed``.
"""

from .attention import ComputedKeysValues, PrefixKeysValues
from .base import Folded, Intervention
from .branch import AddToBranch
from .context import Clip, Grid, clips
from .linear import AddToLinear
from .lookup import running
from .output import ForPooling, MapOutput
from .side import SideFeatures, SideOutput, Tap
from .tokens import JoinWindows, PromptTokens
from .weights import ExistingTensors, ReplaceTensor

__all__ = [
    "AddToBranch", "AddToLinear", "Clip", "ComputedKeysValues", "ExistingTensors", "Folded", "ForPooling", "Grid",
    "Intervention", "JoinWindows", "MapOutput", "PrefixKeysValues", "PromptTokens", "ReplaceTensor", "SideFeatures",
    "SideOutput", "Tap", "clips", "running",
]  # fmt: skip
