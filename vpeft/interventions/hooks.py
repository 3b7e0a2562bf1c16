"""torch's tables of hooks: what is in them, in which order, and out of them again."""

from collections import OrderedDict

from torch import nn

from ..numerics import drops

# Of torch's module: hooks that are called at every module.
_EVERYWHERE = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


def unhook(module: nn.Module, owner: object, *, pre: bool = True, post: bool = True) -> None:
    """Take an object's hooks off a module: those before it, those after it, or both."""
    tables = []
    if pre:
        tables.append((module._forward_pre_hooks, ("_forward_pre_hooks_with_kwargs",)))
    if post:
        tables.append((module._forward_hooks, ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")))
    for hooks, flags in tables:
        for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key]
            for flag in flags:
                getattr(module, flag).pop(key, None)


def as_ordered(hooks: OrderedDict) -> None:
    """Let the plain dictionary in a table of hooks have the table's order: older compilers of torch go by that one."""
    entries = list(hooks.items())
    hooks.clear()
    hooks.update(entries)


def hooked_only_by(module: nn.Module, *known: object) -> bool:
    """Whether nothing but these objects hooks a module, in forward or backward, or stands in place of its forward."""
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if not (own[0] or own[1] or own[2] or own[3] or any(_EVERYWHERE) or "forward" in module.__dict__):
        return True
    for table in (*own, *_EVERYWHERE):
        if table and not all(getattr(hook, "__self__", hook) in known for hook in table.values()):
            return False  # a plain function has no __self__
    forward = module.__dict__.get("forward")
    return forward is None or getattr(forward, "__self__", forward) in known


def unhooked(module: nn.Module) -> bool:
    """Whether nothing hooks a module or one inside of it, or stands in place of their forwards."""
    children = module._modules.values()
    return hooked_only_by(module) and all(child is None or unhooked(child) for child in children)


def is_plain_dropout(module: nn.Module) -> bool:
    """Whether a module's call is torch's own dropout at its ``p``, or nothing where that is 0 or in evaluation."""
    return type(module).forward is nn.Dropout.forward and hooked_only_by(module)


def lets_through(dropout: nn.Module) -> bool:
    """Whether a dropout is torch's own and drops nothing now, so that it need not be called."""
    return is_plain_dropout(dropout) and not drops(dropout)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module's call is torch's own product of its weight and bias, so that these can do without the call.

    Hooks may change what it gives, or make its weight before each call, as pruning does.
    """
    return type(module).forward is nn.Linear.forward and hooked_only_by(module)
