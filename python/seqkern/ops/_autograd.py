"""Gives an op its gradient, as torch.library.register_autograd does, which looks up the schema's arguments again for
each of them and so takes 0.2 ms for a call of twenty."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function


def keep(ctx, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``, but copies of inference tensors, which may not be saved: a frozen encoder's output."""
    ctx.save_for_backward(*(t.clone() if t is not None and t.is_inference() else t for t in tensors))


def register_autograd(
    library: torch.library.Library,
    name: str,
    backward: Callable,
    setup_context: Callable,
    defaults: tuple = (),
    in_backwards: bool = False,
) -> Callable:
    """Registers ``backward(ctx, *grads)`` and ``setup_context(ctx, inputs, output)`` as torch.library's function does.

    ``ctx.needs_input_grad`` has an entry more than the op has arguments, at its end. ``defaults`` are those of the
    schema's last arguments, all of which ``inputs`` holds.

    Returns the op as a function that goes to its gradient or to its kernel without the dispatcher's way through Python,
    where `_surroundings.is_looked_on` says no. An op that runs ``in_backwards``, within those of others, whose
    gradients may be batched, goes so to its kernel alone.
    """
    op = getattr(torch.ops.seqkern, name).default
    call = op._op
    c = torch._C
    any_grad, excluded = c._any_requires_grad, c._dispatch_tls_is_dispatch_key_excluded  # type: ignore[attr-defined]
    below, after = c._AutoDispatchBelowAutograd, c._after_autograd_keyset  # type: ignore[attr-defined]
    autograd = c.DispatchKey.AutogradFunctionality

    def forward(ctx, *arguments):
        *inputs, keyset = arguments
        with below():
            output = call(*inputs) if keyset is None else op.redispatch(keyset & after, *inputs)
        setup_context(ctx, inputs, output)
        return output

    def backward_of(ctx, *grads):
        return (*backward(ctx, *grads), None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of)}
    gradient = type(f"{name}_gradient", (Function,), methods)
    past_transforms = super(Function, gradient).apply  # type: ignore[attr-defined]  # without what Function.apply asks

    def run(keyset, *inputs):
        if torch.is_grad_enabled() and any_grad(*inputs):
            missing = len(op._schema.arguments) - len(inputs) if defaults else 0
            return gradient.apply(*inputs, *defaults[len(defaults) - missing :], keyset)
        with below():
            return op.redispatch(keyset & after, *inputs)

    def direct(*inputs):
        if torch.compiler.is_compiling():  # also one that follows a backward
            return op(*inputs)
        if torch.is_grad_enabled() and any_grad(*inputs):
            # Inference mode and what else runs below autograd make no graph, whatever is enabled within.
            return op(*inputs) if in_backwards or excluded(autograd) else past_transforms(*inputs, None)
        with below():
            return call(*inputs)

    library.impl(name, run, "Autograd", with_keyset=True)
    return direct
