"""What the modules of torch.nn that a transformer is made of do, and whether it may be done elsewhere."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Proxy


def leaf_of_fx(forward: Callable) -> Callable:
    """A module's forward that torch.fx's symbolic tracer records as a call of the module, which is how it takes the
    modules of torch.nn: by where their class was written. What else calling it would do, as hooks, has been recorded
    when it comes here, so only plain ones are."""

    @wraps(forward)
    def run(self: nn.Module, *args, **kwargs):
        for each in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(each, Proxy):
                tracer: Any = each.tracer
                plain = getattr(type(self), "forward", None) is run and not changed(self)
                if plain and self is not getattr(tracer, "root", None):
                    return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
                break
        return forward(self, *args, **kwargs)

    return run


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's; one that was put back there, as accelerate's hooks
    leave it, is its class's."""
    if "forward" not in module.__dict__:
        return False
    found: Any = module.__dict__["forward"]
    of, function = getattr(found, "__self__", None), getattr(found, "__func__", None)
    return of is not module or function is not type(module).forward


def changed(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks of its own, or a forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooks or module._backward_pre_hooks or has_own_forward(module))


_FORWARDS: dict[type[nn.Module], Callable] = {
    cls: cls.forward for cls in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.ReLU, nn.GELU)
}


def patched() -> bool:
    """Whether somebody has replaced the forward or the call of a class of torch.nn that a transformer's parts have."""
    own = nn.Module.__call__
    return any(cls.forward is not forward or cls.__call__ is not own for cls, forward in _FORWARDS.items())


def kind_of(module: nn.Module) -> type[nn.Module]:
    """A module's class; of one of ours that does what torch's does, torch's."""
    cls = type(module)
    return vars(cls).get("stands_for", cls)


def unheard(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether calling the module is what its class does, and nobody listens: then its work can be done elsewhere."""
    if torch.compiler.is_compiling() or kind_of(module) is not known or changed(module):
        return False
    if known.forward is not _FORWARDS[known] or known.__call__ is not nn.Module.__call__:
        return False
    return not nn.modules.module._has_any_global_hook()


def activation_name(function: Callable) -> str | None:
    """The name by which `seqkern.functional.linear` knows the function."""
    if function is F.relu or function is F.gelu:
        return "relu" if function is F.relu else "gelu"
    if isinstance(function, nn.ReLU) and unheard(function, nn.ReLU):
        return "relu"
    if isinstance(function, nn.GELU) and function.approximate == "none" and unheard(function, nn.GELU):
        return "gelu"
    return None
