"""What a call is made in: a gradient to come, a transform, a trace, a compiler, an export."""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# Sizes are Python numbers to us, as to torch's own modules, whose warnings torch hides so too: traces hold for other
# sizes.
_warning = torch.jit.TracerWarning  # type: ignore[attr-defined]
warnings.filterwarnings("ignore", category=_warning, module=r"seqkern\.")

R = TypeVar("R")
F = TypeVar("F", bound=Callable)

PLAIN = frozenset((Tensor, Parameter))  # the classes of tensors that are nothing but numbers

TRANSFORMED = "a function transform or forward-mode differentiation is active"
ONNX_KNOWS = "an ONNX export knows torch's own operators only"


def as_constant(function: F) -> F:
    """Has compiled graphs take what the function returns as it was when they were traced.

    What torch.compiler.assume_constant_result does, which imports the whole of Dynamo to do it: a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def known_constant(function: Callable[..., R]) -> Callable[..., R]:
    """Keeps what the function returned for each argument, and has compiled graphs take it as a constant.

    Dynamo looks for the mark behind functools.cache, where it would be lost: it has to be on a function that calls it.
    """
    kept = cache(function)

    def call(*arguments):
        return kept(*arguments)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.cache_clear, call._dynamo_marked_constant = kept.cache_clear, True  # type: ignore[attr-defined]
    return call


def in_transform() -> bool:
    """Whether a functorch transform or a forward-mode level is open: the ops know only reverse mode."""
    if torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def in_trace() -> bool:
    """Whether torch.jit.trace records what is called."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def goes_to_onnx() -> bool:
    """Whether a trace or an exported graph becomes an ONNX model, which knows torch's own operators only."""
    if "torch.onnx" not in sys.modules:
        return False
    graph = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return graph and torch.onnx.is_in_onnx_export()


def is_looked_on() -> bool:
    """Whether something follows what is done with tensors: a compiler, a trace, a transform, forward AD, a mode of
    dispatch."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return in_transform() or torch._C._len_torch_dispatch_stack() > 0  # type: ignore[attr-defined]


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)  # type: ignore[attr-defined]


def expects_grad(tensors: Sequence[Tensor | None]) -> bool:
    """`needs_grad`, for what changes no result; False in a trace, which is checked against one without gradients."""
    return not in_trace() and needs_grad(tensors)


def declines() -> str | None:
    """Why no kernel of this package can be called here, whatever the tensors."""
    if in_transform():
        return TRANSFORMED
    return ONNX_KNOWS if goes_to_onnx() else None
