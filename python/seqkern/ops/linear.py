"""``seqkern::linear`` and ``seqkern::mm``, the products of linear layers, and ``seqkern::ending_``, what follows them.

linear: input [..., K], weight [N, K], bias [N] or None -> [..., N], through an activation of `ACTIVATIONS`. Few rows
read the weights once and as they lie; more have them packed. mm: a [R, K], b [K, C] -> [R, C], transposed matrices as
they lie. ending_: y [..., C] becomes norm(x + a(y + bias)) in place, with what there is of bias [C], activation a, x
[..., C] and, where eps is given, the norm's weight and bias [C]; without a gradient. The compiled library adds the
implementations on a CPU; the schemas, the shapes and the gradients stand here.
"""

import torch
import torch.nn.functional as F

from seqkern.ops._autograd import keep, register_autograd
from seqkern.ops._linear_backends import gradient_of_weights_is_ours

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2}

_LIBRARY = torch.library.Library("seqkern", "FRAGMENT")
for _schema in (
    "linear(Tensor input, Tensor weight, Tensor? bias, int activation=0) -> Tensor",
    "mm(Tensor a, Tensor b) -> Tensor",
    "ending_(Tensor(a!) y, Tensor? bias, int activation, Tensor? x, Tensor? weight, Tensor? norm_bias, float? eps) "
    "-> ()",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("seqkern::linear", lib=_LIBRARY)
def _fake(input, weight, bias, activation=0):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.register_fake("seqkern::mm", lib=_LIBRARY)
def _fake_mm(a, b):
    return a.new_empty((a.shape[0], b.shape[1]))


@torch.library.register_fake("seqkern::ending_", lib=_LIBRARY)
def _fake_ending(y, bias, activation, x, weight, norm_bias, eps):
    return None


def _setup(ctx, inputs, output):
    input, weight, bias, ctx.activation = inputs
    of_activation = {0: None, 1: output, 2: bias}[ctx.activation]
    need_input, need_weight = ctx.needs_input_grad[:2]
    anew = ctx.activation == ACTIVATIONS["gelu"]
    ctx.input_shape = input.shape
    # What no gradient reads may be written to, as with torch's.
    keep(ctx, input if need_weight or anew else None, weight if need_input or anew else None, of_activation)


def _backward(ctx, grad):
    input, weight, kept = ctx.saved_tensors
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    if ctx.activation == ACTIVATIONS["relu"]:
        grad = torch.where(kept <= 0, 0, grad)
    elif ctx.activation == ACTIVATIONS["gelu"]:
        grad = torch.ops.aten.gelu_backward(grad, F.linear(input, weight, kept))
    rows = grad.reshape(-1, grad.shape[-1])
    of_input = _direct_mm if rows.numel() else torch.mm
    of_weight = of_input if gradient_of_weights_is_ours(len(rows), rows.dtype) else torch.mm
    return (
        of_input(rows, weight).reshape(ctx.input_shape) if need_input else None,
        of_weight(rows.mT, input.reshape(-1, input.shape[-1])) if need_weight else None,
        rows.sum(0) if need_bias else None,
        None,
    )


def _setup_mm(ctx, inputs, output):
    (a, b), (need_a, need_b) = inputs, ctx.needs_input_grad[:2]
    keep(ctx, a if need_b else None, b if need_a else None)


def _backward_mm(ctx, grad):
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad[:2]
    return grad @ b.mT if need_a else None, a.mT @ grad if need_b else None


direct_linear = register_autograd(_LIBRARY, "linear", _backward, _setup, defaults=(0,))
_direct_mm = register_autograd(_LIBRARY, "mm", _backward_mm, _setup_mm, in_backwards=True)
