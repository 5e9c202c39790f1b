"""``seqkern::linear``: few rows times a matrix, whose compiled kernel reads the matrix once and as it lies.

input [..., K], weight [N, K], bias [N] or None -> [..., N]. The compiled library adds the implementation on a CPU; the
schema, the shapes and the gradient stand here.
"""

import torch

_LIBRARY = torch.library.Library("seqkern", "FRAGMENT")
_LIBRARY.define(
    "linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.register_fake("seqkern::linear", lib=_LIBRARY)
def _fake(input, weight, bias):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _setup(ctx, inputs, output):
    input, weight, _ = inputs
    ctx.save_for_backward(input, weight)


def _backward(ctx, grad):
    input, weight = ctx.saved_tensors
    need_input, need_weight, need_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        grad @ weight if need_input else None,
        rows.mT @ input.reshape(-1, input.shape[-1]) if need_weight else None,
        rows.sum(0) if need_bias else None,
    )


torch.library.register_autograd("seqkern::linear", _backward, setup_context=_setup, lib=_LIBRARY)
