"""``seqkern::attention`` and ``seqkern::attention_backward``: scaled dot-product attention, dense or packed.

The arguments are the fields of `seqkern.spec.attention.Tensors` and `Options`. The results (sizes as there):

====== ==================== ============= ===========================================
form   output               lse           weights
====== ==================== ============= ===========================================
dense  [B, Hq, L, Dv]       [B, Hq, L]    [B, Hq, L, S] "heads", [B, L, S] "mean", [0]
packed [total_q, Hq, Dv]    [Hq, total_q] [0]
====== ==================== ============= ===========================================

Contracts. mask and bias have four dimensions, each of full size or 1. lse is float32, or float64 for float64. Dense
results with heads lie in memory as [B, L, H, D], so that what merges the heads afterwards copies nothing. A gradient
that was not asked for, or whose tensor is absent, has shape [0]. No result shares memory with an argument.

A backend adds an implementation for its device; where none has, the spec runs.

``seqkern::sdpa`` has the arguments of torch's scaled_dot_product_attention but the dropout, and no gradient: the
compiled kernels by a way so short that it does not count in a small call. It returns None where they do not serve. Its
output lies as torch's: heads within a row where the queries' do, else plain.
"""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from seqkern.ops._attention_backends import triton_declines
from seqkern.ops._autograd import keep, register_autograd
from seqkern.ops._double_backward import through_spec
from seqkern.spec import attention as spec
from seqkern.spec.attention import Options, Tensors

TENSORS = Tensors._fields
GRADIENTS = spec.Gradients._fields  # what attention_backward returns, in this order
NEEDS = ("need_query", "need_key_value", "need_bias", "need_alibi_slopes", "need_sinks")
_SIZES = {"max_seqlen_q", "max_seqlen_k", "window_left", "window_right"}
_TYPES = {float: "float", bool: "bool", str: "str", int: "int"}

_ARGUMENTS = ", ".join(
    [f"Tensor{'?' if name in Tensors._field_defaults else ''} {name}" for name in TENSORS]
    + [
        f"{'SymInt' if name in _SIZES else _TYPES[Options.__annotations__[name]]} {name}"
        for name in Options._fields
    ]
)
_LIBRARY = torch.library.Library("seqkern", "FRAGMENT")
_LIBRARY.define(
    f"attention({_ARGUMENTS}) -> (Tensor output, Tensor lse, Tensor weights)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"attention_backward(Tensor? grad_output, Tensor? grad_lse, Tensor? grad_weights, Tensor output, Tensor lse, "
    f"{_ARGUMENTS}, {', '.join(f'bool {name}' for name in NEEDS)}) -> ("
    + ", ".join(f"Tensor d_{name}" for name in GRADIENTS)
    + ")",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "sdpa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, bool enable_gqa)"
    " -> Tensor?",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def empty_heads(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Dense [B, H, L, D] laid out as [B, L, H, D], packed [total, H, D] as it is; the dtype of ``like``."""
    if len(shape) == 3:
        return like.new_empty(shape)
    B, H, L, D = shape
    return like.new_empty((B, L, H, D)).transpose(1, 2)


def empty_outputs(t: Tensors, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for output, lse and weights."""
    query = t.query
    kept = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = empty_heads(query, (*query.shape[:-1], t.value.shape[-1]))
    if t.cu_seqlens_q is not None:
        lse = query.new_empty((query.shape[1], query.shape[0]), dtype=kept)
        return output, lse, query.new_empty((0,))
    B, Hq, L, _ = query.shape
    heads = {"": None, "heads": (B, Hq), "mean": (B,)}[o.weights]
    weights = query.new_empty((0,) if heads is None else (*heads, L, t.key.shape[2]))
    return output, query.new_empty((B, Hq, L), dtype=kept), weights


def empty_gradients(t: Tensors, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Memory for what attention_backward returns; shape [0] for what is not wanted."""
    query, key_value, bias, slopes, sinks = needs
    wanted = (query, key_value, key_value, bias, slopes, sinks)
    found = []
    for name, want in zip(GRADIENTS, wanted):
        x = getattr(t, name)
        if x is None or not want:
            found.append((t.query if x is None else x).new_empty((0,)))
        else:
            found.append(empty_heads(x, x.shape) if name in TENSORS[:3] else x.new_empty(x.shape))
    return tuple(found)


def split(arguments: Sequence) -> tuple[Tensors, Options]:
    """The op's arguments as the two tuples that they are the fields of."""
    return Tensors(*arguments[: len(TENSORS)]), Options(*arguments[len(TENSORS) :])


def run_spec(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The op, computed by the spec."""
    found = spec.attention(*arguments)
    outs = empty_outputs(*split(arguments))
    return tuple(out if x is None else out.copy_(x) for out, x in zip(outs, found))  # type: ignore[return-value]


def run_spec_backward(grad_output, grad_lse, grad_weights, output, lse, *rest) -> tuple[Tensor, ...]:
    """The backward op, computed by the spec."""
    arguments, needs = rest[: -len(NEEDS)], rest[-len(NEEDS) :]
    found = spec.attention_backward((grad_output, grad_lse, grad_weights), *arguments)
    outs = empty_gradients(split(arguments)[0], needs)
    return tuple(out if x is None or out.shape != x.shape else out.copy_(x) for out, x in zip(outs, found))


def run_triton(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The op, computed by the Triton kernels."""
    serve = import_module("seqkern.kernels.serve")

    t, o = split(arguments)
    outs = empty_outputs(t, o)
    serve.forward(t, o, *outs)
    return outs


def run_triton_backward(grad_output, grad_lse, grad_weights, output, lse, *rest) -> tuple[Tensor, ...]:
    """The backward op, computed by the Triton kernels, which know no gradient of the weights."""
    serve = import_module("seqkern.kernels.serve")

    t, o = split(rest[: -len(NEEDS)])
    needs = rest[-len(NEEDS) :]
    present = (True, True, *(getattr(t, name) is not None for name in GRADIENTS[3:]))
    needs = [need and there for need, there in zip(needs, present)]
    outs = empty_gradients(t, needs)
    serve.backward(t, o, grad_output, grad_lse, output, lse, outs, needs)
    return outs


def _run_cuda(*arguments):
    return (run_spec if triton_declines(*split(arguments)) else run_triton)(*arguments)


def _run_cuda_backward(*arguments):
    declined = arguments[2] is not None or triton_declines(*split(arguments[5 : -len(NEEDS)]))
    return (run_spec_backward if declined else run_triton_backward)(*arguments)


def _not_here(*arguments) -> None:
    return None


for _key in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA"):
    _LIBRARY.impl("sdpa", _not_here, _key)
for _key in ("AutogradCPU", "AutogradNestedTensor"):
    _LIBRARY.impl("sdpa", torch.library.fallthrough_kernel, _key)
_LIBRARY.impl("attention", _run_cuda, "CUDA")
_LIBRARY.impl("attention_backward", _run_cuda_backward, "CUDA")
_LIBRARY.impl("attention", run_spec, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", run_spec_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("seqkern::attention", lib=_LIBRARY)
def _forward_fake(*arguments):
    return empty_outputs(*split(arguments))


@torch.library.register_fake("seqkern::sdpa", lib=_LIBRARY)
def _sdpa_fake(query, key, value, attn_mask, is_causal, scale, enable_gqa):
    shape = (*query.shape[:-1], value.shape[-1])
    as_it_lies = query.stride(-1) == 1 or query.shape[-1] <= 1  # else a contiguous copy is read
    if len(shape) == 4 and shape[1] > 1 and shape[2] > 1 and as_it_lies and query.stride(1) < query.stride(2):
        return empty_heads(query, shape)
    return query.new_empty(shape)


@torch.library.register_fake("seqkern::attention_backward", lib=_LIBRARY)
def _backward_fake(grad_output, grad_lse, grad_weights, output, lse, *rest):
    return empty_gradients(split(rest[: -len(NEEDS)])[0], rest[-len(NEEDS) :])


def _forward_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    keep(ctx, *output[:2], *inputs[: len(TENSORS)])
    ctx.options = inputs[len(TENSORS) :]


def _forward_backward(ctx, grad_output, grad_lse, grad_weights):
    none = (None,) * (len(TENSORS) + len(Options._fields))
    if grad_output is None and grad_lse is None and grad_weights is None:
        return none
    output, lse, *tensors = ctx.saved_tensors
    wanted = dict(zip(TENSORS, ctx.needs_input_grad))
    needs = (
        wanted["query"],
        wanted["key"] or wanted["value"],
        *(wanted[name] for name in GRADIENTS[3:]),
    )
    if grad_weights is not None and not ctx.options[Options._fields.index("weights")]:
        grad_weights = None
    found = _direct_backward(grad_output, grad_lse, grad_weights, output, lse, *tensors, *ctx.options, *needs)
    grads = dict(zip(GRADIENTS, found))
    return (
        *(grads[name] if wanted[name] and name in grads else None for name in TENSORS),
        *((None,) * len(ctx.options)),
    )


def _backward_setup(ctx, inputs, output):
    grads, rest = inputs[:3], inputs[5:]
    ctx.set_materialize_grads(False)
    keep(ctx, *grads, *rest[: len(TENSORS)])
    ctx.options = rest[len(TENSORS) : -len(NEEDS)]


def _backward_backward(ctx, *grad_grads):
    found = through_spec(
        ctx.saved_tensors,
        grad_grads,
        lambda saved: spec.attention_backward(saved[:3], *saved[3:], *ctx.options),
    )
    return (*found[:3], None, None, *found[3:], *((None,) * (len(ctx.options) + len(NEEDS))))


direct_attention = register_autograd(_LIBRARY, "attention", _forward_backward, _forward_setup)
_direct_backward = register_autograd(
    _LIBRARY, "attention_backward", _backward_backward, _backward_setup, in_backwards=True
)
