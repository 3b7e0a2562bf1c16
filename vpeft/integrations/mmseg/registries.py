"""mmengine's registries under the scope ``vpeft``."""

from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, Registry

LOCATIONS = ["vpeft.integrations.mmseg"]
VPEFT_MODELS = Registry("model", parent=MODELS, scope="vpeft", locations=LOCATIONS)
VPEFT_HOOKS = Registry("hook", parent=HOOKS, scope="vpeft", locations=LOCATIONS)
VPEFT_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor", parent=OPTIM_WRAPPER_CONSTRUCTORS, scope="vpeft", locations=LOCATIONS
)
