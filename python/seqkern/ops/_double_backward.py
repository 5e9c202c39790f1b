"""The gradient of a backward op, which is the spec's own: the op's results depend on gradients and arguments alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _distinct(t: Tensor | None) -> Tensor | None:
    """A differentiable tensor of its own, still linked to t: one tensor given twice gets two gradients."""
    if t is None or not t.is_floating_point():
        return t
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def through_spec(
    saved: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
    gradients: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]],
) -> list[Tensor | None]:
    """For each of ``saved`` its gradient, or None; ``gradients`` is what the backward op computes from them."""
    with torch.enable_grad():
        leaves = [_distinct(t) for t in saved]
        pairs = [(d, g) for d, g in zip(gradients(leaves), grad_grads) if d is not None and g is not None]
        pairs = [(d, g) for d, g in pairs if d.requires_grad and g.shape == d.shape]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    found = iter(
        torch.autograd.grad(
            [d for d, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return [None if t is None or not t.requires_grad else next(found) for t in leaves]
