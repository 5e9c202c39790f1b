"""Linear."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqkern.functional._linear import linear, show
from seqkern.nn._modules import leaf_of_fx
from seqkern.ops import _backend, _surroundings
from seqkern.ops._linear_backends import torch_has_it
from seqkern.ops.linear import direct_linear


def _is_recorded() -> bool:
    """Whether a compiler, a trace or a mode looks for the functions and operators that torch's layer calls."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_function_stack() > 0 or torch._C._len_torch_dispatch_stack() > 0  # type: ignore[attr-defined]


def _short(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The layer without a gradient at once; None where `functional.linear` must find out whether it may be."""
    if not _backend.nobody_looks_on((input, weight), (bias,)):
        return None
    # For sizes and layouts that do not fit torch's function has words of its own.
    with contextlib.suppress(RuntimeError):
        return direct_linear(input, weight, bias)
    return None


class Linear(nn.Linear):
    r"""`torch.nn.Linear` on `functional.linear`: constructor, parameters, shapes and results are torch's.

    .. math:: y = x W^\top + b

    The kernels of this package run where they are the faster ones, by the rules of `functional.linear`: large layers
    of few rows without a gradient, as in decoding, and matmuls in dtypes or on processors that torch's has nothing
    good for. Everywhere else torch's runs, at its own price.

    Args:
        in_features: K. out_features: N. bias: whether there is b. device, dtype: as in torch.nn.Linear.

    Shapes: input [..., K] -> [..., N]. Errors: torch's.

    >>> layer = Linear(3, 4)
    >>> layer(torch.randn(2, 5, 3)).shape
    torch.Size([2, 5, 4])
    """

    stands_for = nn.Linear  #: a layer that runs its parts itself may run this class's so, and no subclass's

    @leaf_of_fx
    def forward(self, input: Tensor) -> Tensor:
        own = self._parameters
        try:  # past Module.__getattr__, which would cost as much as a small layer
            weight, bias = own["weight"], own["bias"]
        except KeyError:  # computed (parametrized, pruned, normalised): an attribute
            weight, bias = self.weight, self.bias
        if _backend.special:
            show(input, weight, bias)
        elif _is_recorded():
            return F.linear(input, weight, bias)  # type: ignore[arg-type]
        elif type(input) is Tensor and type(weight) in _surroundings.PLAIN:
            if torch_has_it(input, weight):  # type: ignore[arg-type]
                return F.linear(input, weight, bias)  # type: ignore[arg-type]
            found = _short(input, weight, bias)  # type: ignore[arg-type]
            if found is not None:
                return found
        return linear(input, weight, bias)  # type: ignore[arg-type]
