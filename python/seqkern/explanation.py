"""Which backend runs each module or function that seqkern knows on given inputs, and why the earlier ones declined."""

import copy
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from seqkern.ops import _backend
from seqkern.swap import ALREADY, swaps


class Row(NamedTuple):
    """One module or function, on its calls of one kind."""

    name: str  #: qualified name of the module, "" for the model itself or a function
    kind: str  #: its class, or the op that the function asked for
    backend: str  #: the backend that ran
    declined: tuple[tuple[str, str], ...]  #: (backend, reason) of each one that was asked before
    calls: int


@dataclass
class Explanation:
    """What `explain` returns. ``str()`` and ``print`` give a text, ``rich.print`` a table."""

    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing here runs on seqkern"
        lines = []
        for row in self.rows:
            times = "" if row.calls == 1 else f", {row.calls} calls"
            lines.append(f"{row.name or '(itself)'} ({row.kind}): {row.backend}{times}")
            lines += [f"    {backend} declined: {reason}" for backend, reason in row.declined]
        return "\n".join(lines)

    def __rich__(self):
        from seqkern import report

        return report.explanation(self)


def detached_copy(model: nn.Module) -> nn.Module:
    """A deep copy that also takes tensors computed from parameters, which copy.deepcopy refuses."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def explain(target: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells which backend runs where in ``target(*args, **kwargs)``, and why each earlier one declined.

    A model runs once as a copy, so its buffers and gradients are untouched; so is the state of the random
    number generators. The choice is the one that a call here and now meets: with the grad mode, autocast,
    forced backend and ``SEQKERN_BACKEND`` of the caller. Parts under torch.compile run as they are without it: a
    compiled graph keeps small calls, which go to torch's kernel here, on seqkern.

    Args:
        target: a module (whole models too) or a function such as ``seqkern.functional.lstm``.
        args, kwargs: what it is called with.

    Raises:
        TypeError: ``target`` cannot be called. Errors of the call itself pass through.

    >>> import torch, seqkern
    >>> model = torch.nn.Sequential(torch.nn.LSTM(3, 4))
    >>> print(seqkern.explain(model, torch.zeros(5, 2, 3)))
    0 (torch.nn.LSTM): torch
        seqkern declined: not accelerated yet: call seqkern.accelerate(model)
    >>> with seqkern.backend("reference"):
    ...     print(seqkern.explain(seqkern.nn.LSTM(3, 4), torch.zeros(5, 2, 3)))
    (itself) (seqkern.nn.LSTM): reference
    """
    if not callable(target):
        raise TypeError(
            f"explain takes a module or a function, got {type(target).__name__}; pass the model first, then its inputs"
        )
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        if isinstance(target, nn.Module):
            return _explain_module(detached_copy(target), args, kwargs)
        with _backend.watch() as seen:
            target(*args, **kwargs)
    return Explanation(_merge([("", call.op, choice) for call, choice in seen]))


def _explain_module(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    left_alone = {row.name: row for row in swaps(model) if row.after is None and row.reason != ALREADY}
    kinds = {row.name: row.after or row.before for row in swaps(model)}
    inside: list[str] = []  # names of the known modules whose forward is running
    calls = dict.fromkeys(left_alone, 0)
    found: list[tuple[str, str, _backend.Choice]] = []
    counted = 0

    with _backend.watch() as seen:

        def collect() -> None:
            nonlocal counted
            for call, choice in seen[counted:]:
                name = inside[-1] if inside else ""
                found.append((name, kinds.get(name, call.op), choice))
            counted = len(seen)

        def enter(name: str) -> None:
            collect()
            inside.append(name)
            if name in calls:
                calls[name] += 1

        def leave() -> None:
            collect()
            inside.pop()

        known = {
            module: name
            for name, module in model.named_modules()
            if name in kinds and not isinstance(module, torch.jit.ScriptModule)
        }
        _run_followed(partial(model, *args, **kwargs), known, enter, leave)
        collect()
    ran = {name for name, _, _ in found}
    for name, row in left_alone.items():
        if name not in ran and (calls[name] or "scripted" in row.reason):
            choice = _backend.Choice("torch", (("seqkern", row.reason),))
            found += [(name, row.before, choice)] * max(calls[name], 1)
    return Explanation(_merge(found))


def _run_followed(
    run: Callable[[], Any],
    names: dict[nn.Module, str],
    enter: Callable[[str], None],
    leave: Callable[[], None],
) -> None:
    """Runs with `enter` and `leave` called around each forward, and each step, of the named modules.

    By hooks that see every module: a torch layer that has one of its own leaves its native path, and one whose forward
    is replaced generates nothing.
    """

    def before(module: nn.Module, _: Any) -> None:
        if module in names:
            enter(names[module])

    def after(module: nn.Module, *_: Any) -> None:
        if module in names:
            leave()

    def followed(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run_step(*args: Any, **kwargs: Any) -> Any:
            enter(name)
            try:
                return step(*args, **kwargs)
            finally:
                leave()

        return run_step

    for module, name in names.items():  # a step is no forward: no hook sees it
        if step := getattr(module, "step", None):
            object.__setattr__(module, "step", followed(name, step))
    with ExitStack() as undone:
        undone.callback(register_module_forward_pre_hook(before).remove)
        undone.callback(register_module_forward_hook(after, always_call=True).remove)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            undone.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
            undone.enter_context(torch.compiler.set_stance("force_eager"))
        run()


def _merge(found: list[tuple[str, str, _backend.Choice]]) -> list[Row]:
    counts: dict[tuple[str, str, _backend.Choice], int] = {}
    for key in found:
        counts[key] = counts.get(key, 0) + 1
    return [Row(name, kind, choice.name, choice.declined, n) for (name, kind, choice), n in counts.items()]
