"""``seqkern::rnn_forward`` and ``seqkern::rnn_backward``: one recurrent layer, in one direction or in both.

Three forms, told apart by ``input.dim()`` and ``batch_sizes`` (sizes as in `seqkern.spec.scan`):

====== ========================= ==================== ============= =========== ===========
form   input                     hx, cx               output        h_n         c_n
====== ========================= ==================== ============= =========== ===========
dense  [T, B, I]                 [D, B, P], [D, B, H] [T, B, D*P]   [D, B, P]   [D, B, H]
packed [N, I], batch_sizes [T]   [D, B, P], [D, B, H] [N, D*P]      [D, B, P]   [D, B, H]
step   [B, I]                    [B, P], [B, H]       [B, P]        [0]         [B, H]
====== ========================= ==================== ============= =========== ===========

What does not exist (c_n of a cell other than lstm, the gradient of an absent bias, …) is a tensor of shape [0].
The compiled library adds the implementations on a CPU, `seqkern.kernels.rnn` those on a GPU; the schemas, the shapes
and the gradients stand here.

``seqkern::rnn_step`` is one step of a cell with a batch, ``seqkern::rnn_layers`` a stack of layers over a dense batch,
with the arguments of torch's cells and layers and no gradient: the compiled kernels by a way so short that it does not
count in a small call. They return h' and, of an lstm, c'; the output, h_n and c_n; Nones where they do not serve.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkern import spec
from seqkern.ops import _gpu
from seqkern.ops._autograd import keep, register_autograd
from seqkern.ops._double_backward import through_spec
from seqkern.ops._surroundings import is_looked_on

TENSORS = [
    *("input", "batch_sizes", "hx", "cx"),
    *("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"),
    *("w_ih_reverse", "w_hh_reverse", "b_ih_reverse", "b_hh_reverse", "w_hr_reverse"),
]
OPTIONAL = {"batch_sizes", "cx", "b_ih", "b_hh", "w_hr", *TENSORS[9:]}
GRADIENTS = [name for name in TENSORS if name != "batch_sizes"]  # what rnn_backward returns, in this order
RESERVE = {"lstm": 5, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}  # numbers saved per row and hidden unit

_ARGUMENTS = ", ".join(f"Tensor{'?' if name in OPTIONAL else ''} {name}" for name in TENSORS)
_LIBRARY = torch.library.Library("seqkern", "DEF")
_LIBRARY.define(
    f"rnn_forward({_ARGUMENTS}, str cell, bool save) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"rnn_backward(Tensor grad_output, Tensor grad_h_n, Tensor grad_c_n, Tensor output, Tensor reserve, "
    f"{_ARGUMENTS}, str cell, bool need_input, bool need_weights) -> ("
    + ", ".join(f"Tensor d_{name}" for name in GRADIENTS)
    + ")",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "rnn_step(Tensor input, Tensor hx, Tensor? cx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, str cell)"
    " -> (Tensor? h, Tensor? c)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "rnn_layers(Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, int num_layers, bool bidirectional, "
    "bool batch_first, str cell) -> (Tensor? output, Tensor? h_n, Tensor? c_n)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_gpu.serve(_LIBRARY, "rnn_forward", "seqkern.kernels.rnn", "forward")
_gpu.serve(_LIBRARY, "rnn_backward", "seqkern.kernels.rnn", "backward")

Tensors = Sequence[Tensor | None]


def is_step(input: Tensor, batch_sizes: Tensor | None) -> bool:
    return input.dim() == 2 and batch_sizes is None


def reserve_numel(input: Tensor, w_hh: Tensor, cell: str, directions: int) -> int:
    """How many numbers a forward that saves puts aside for its backward."""
    count = directions * RESERVE[cell] * (w_hh.shape[0] // spec.CELLS[cell].gates)
    for size in input.shape[:-1]:  # Size.numel() would freeze symbolic sizes
        count = count * size
    return count


def run_spec(tensors: Tensors, cell: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The op as the spec describes it: output, h_n and c_n, None where the op returns a [0] tensor."""
    input, batch_sizes, hx, cx, *weights = tensors
    assert input is not None and hx is not None
    if is_step(input, batch_sizes):
        output, *c_n = spec.step(cell, input, (hx,) if cx is None else (hx, cx), weights[:5])
        return output, None, c_n[0] if c_n else None
    backward_weights = None if weights[5] is None else weights[5:]
    return spec.layer(cell, input, batch_sizes, hx, cx, weights[:5], backward_weights)


def spec_vjp(grads: Tensors, tensors: Tensors, cell: str, create_graph: bool) -> list[Tensor | None]:
    """Gradients of the spec, in the order of GRADIENTS; ``grads`` belong to output, h_n and c_n."""
    leaves = [t for t, name in zip(tensors, TENSORS, strict=True) if t is not None and name != "batch_sizes"]
    outs = run_spec(tensors, cell)
    pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o is not None and g is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], leaves, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    )
    return [
        None if t is None else next(found)
        for t, name in zip(tensors, TENSORS, strict=True)
        if name != "batch_sizes"
    ]


@torch.library.register_fake("seqkern::rnn_forward", lib=_LIBRARY)
def _forward_fake(input, batch_sizes, hx, cx, w_ih, w_hh, *rest):
    *biases, cell, save = rest
    directions = 2 if biases[3] is not None else 1
    c_n = input.new_empty(cx.shape if cell == "lstm" else (0,))
    output = input.new_empty((*input.shape[:-1], directions * hx.shape[-1]))
    h_n = input.new_empty((0,) if is_step(input, batch_sizes) else hx.shape)
    kept = torch.float64 if input.dtype == torch.float64 else torch.float32
    numel = reserve_numel(input, w_hh, cell, directions) if save else 0
    return output, h_n, c_n, input.new_empty((numel,), dtype=kept)


@torch.library.register_fake("seqkern::rnn_backward", lib=_LIBRARY)
def _backward_fake(grad_output, grad_h_n, grad_c_n, output, reserve, *rest):
    *tensors, cell, need_input, need_weights = rest
    found = dict(zip(TENSORS, tensors, strict=True))

    def wanted(name: str) -> bool:
        if found[name] is None or (name == "cx" and cell != "lstm"):
            return False
        return need_input if name == "input" else need_weights or name in ("hx", "cx")

    return tuple(output.new_empty(found[name].shape if wanted(name) else (0,)) for name in GRADIENTS)


@torch.library.register_fake("seqkern::rnn_layers", lib=_LIBRARY)
def _layers_fake(input, hx, cx, weights, num_layers, bidirectional, batch_first, cell):
    T, B = (input.shape[1], input.shape[0]) if batch_first else input.shape[:2]
    directions, (rows, size) = 2 if bidirectional else 1, weights[1].shape
    output = input.new_empty((T, B, directions * size))
    sets = num_layers * directions
    c_n = input.new_empty((sets, B, rows // spec.CELLS[cell].gates)) if cell == "lstm" else None
    return output.transpose(0, 1) if batch_first else output, input.new_empty((sets, B, size)), c_n


@torch.library.register_fake("seqkern::rnn_step", lib=_LIBRARY)
def _step_fake(input, hx, cx, *_):
    return hx.new_empty(hx.shape), None if cx is None else cx.new_empty(cx.shape)


def _may_share(output: Tensor, tensors: Sequence[Tensor | None], cell: str) -> bool:
    """Whether the output itself is kept, and computed anew for a backward should somebody have written into it: of a
    layer whose output torch's keeps, so that few do. What is saved must be seen by those who ask for it (offloading,
    checkpoints), as this is not."""
    if cell != "lstm" or output.dtype is not torch.float32 or not output.is_cpu:
        return False
    packed, projected, reverse = (tensors[i] is not None for i in (1, 8, 9))
    if packed or projected or reverse or output.is_inference() or is_looked_on():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # type: ignore[attr-defined]


def _forward_setup(ctx, inputs, output):
    *tensors, cell, save = inputs
    out, _, c_n, reserve = output
    ctx.mark_non_differentiable(reserve)
    ctx.set_materialize_grads(False)
    # What follows may write into the output, as ReLU(inplace=True) does, and torch's layers let it.
    ctx.is_shared = _may_share(out, tensors, cell)
    if ctx.is_shared:
        ctx.shared = (out.detach(), out._version)
    keep(ctx, None if ctx.is_shared else out.clone(), reserve, *tensors)
    ctx.cell, ctx.save = cell, save
    ctx.h_n_shape = output[1].shape
    ctx.c_n_shape = c_n.shape


def _forward_backward(ctx, grad_output, grad_h_n, grad_c_n, _):
    none: tuple[None, ...] = (None,) * len(TENSORS)
    if grad_output is None and grad_h_n is None and grad_c_n is None:
        return (*none, None, None)
    output, reserve, *tensors = ctx.saved_tensors
    written = False
    if ctx.is_shared and torch.compiler.is_compiling():
        written = True  # or may be: a compiler cannot ask
    elif ctx.is_shared:
        output, version = ctx.shared
        written = output._version != version
        if not torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[attr-defined]
            ctx.shared = None  # freed as what is saved is
    if written or not ctx.save:  # not: a graph made without gradients, through which one goes now
        with torch.no_grad():
            made, _, _, reserve = torch.ops.seqkern.rnn_forward(*tensors, ctx.cell, True)
        output = made if written else output

    def zeros(grad, shape):
        return output.new_zeros(()).expand(shape) if grad is None else grad

    needs = dict(zip(TENSORS, ctx.needs_input_grad, strict=False))
    found = _direct_backward(
        zeros(grad_output, output.shape),
        zeros(grad_h_n, ctx.h_n_shape),
        zeros(grad_c_n, ctx.c_n_shape),
        output,
        reserve,
        *tensors,
        ctx.cell,
        needs["input"],
        any(needs[name] for name in TENSORS[4:]),
    )
    grads = dict(zip(GRADIENTS, found, strict=True))
    return (*(grads[name] if needs[name] else None for name in TENSORS), None, None)


def _backward_setup(ctx, inputs, output):
    grad_output, grad_h_n, grad_c_n, _, _, *tensors, ctx.cell, ctx.need_input, ctx.need_weights = inputs
    ctx.set_materialize_grads(False)
    keep(ctx, grad_output, grad_h_n, grad_c_n, *tensors)


def _backward_backward(ctx, *grad_grads):
    found = through_spec(
        ctx.saved_tensors,
        grad_grads,
        lambda saved: spec_vjp(saved[:3], saved[3:], ctx.cell, create_graph=True),
    )
    return (*found[:3], None, None, *found[3:], None, None, None)


direct_rnn = register_autograd(_LIBRARY, "rnn_forward", _forward_backward, _forward_setup)
_direct_backward = register_autograd(
    _LIBRARY, "rnn_backward", _backward_backward, _backward_setup, in_backwards=True
)
