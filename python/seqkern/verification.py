"""Holds an accelerated model against the original: outputs and gradients, each measured from float64."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from seqkern.explanation import Explanation, detached_copy, explain
from seqkern.swap import Swap, accelerate, check_module, restore, swaps
from seqkern.testing import relative_rms, tolerance

_DROPOUT_MODULES = (nn.modules.dropout._DropoutNd,)
_DROPOUT_ATTRIBUTES = (nn.RNNBase, nn.MultiheadAttention)
_DROPOUT_FUNCTIONS = {
    getattr(room, name)
    for room in (torch, nn.functional)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    if hasattr(room, name)
}


Dtype = torch.dtype  # `Row` has a column named torch
Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # of a call, by place and by name


class VerificationError(RuntimeError):
    """The accelerated model is less accurate than the original by more than the tolerance.

    ``result`` holds the `Verification` with all its rows.
    """

    def __init__(self, message: str, result: "Verification"):
        super().__init__(message)
        self.result = result


class Row(NamedTuple):
    """One tensor: its relative root-mean-square errors against float64."""

    name: str  #: ``output…``, ``d input…`` or ``d`` and a parameter's name
    torch: float
    seqkern: float
    allowed: float  #: 2 * torch + 4 eps of the dtype, of float64 64 eps
    dtype: Dtype
    numbers: int  #: how many it has
    compared: int  #: how many of them are finite in torch and in float64

    @property
    def ok(self) -> bool:
        return self.seqkern <= self.allowed


@dataclass
class Verification:
    """What `verify` returns. ``str()`` gives a text, ``rich.print`` a table."""

    rows: list[Row]
    dropout: list[str]  #: what dropped out in the model and was set to 0 for the comparison
    swaps: list[Swap]
    backends: Explanation

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        found = []
        if self.dropout:
            found.append("dropout was set to 0 for the comparison: " + ", ".join(self.dropout))
        if not any(row.after for row in self.swaps):
            found.append("nothing was accelerated, so both columns are torch's")
        found += [
            f"{row.name or '(itself)'} was left alone: {row.reason}" for row in self.swaps if not row.after
        ]
        found += [
            f"{row.name}: {row.numbers - row.compared} of {row.numbers} numbers are not finite in torch or in "
            "float64 and were not compared"
            for row in self.rows
            if row.compared < row.numbers
        ]
        return found

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [6])
        lines = [f"{'tensor':{width}}  torch     seqkern   allowed"]
        for row in self.rows:
            mark = "" if row.ok else "  TOO LARGE"
            lines.append(f"{row.name:{width}}  {row.torch:.2e}  {row.seqkern:.2e}  {row.allowed:.2e}{mark}")
        return "\n".join([*lines, *self.notes()])

    def __rich__(self):
        from seqkern import report

        return report.verification(self)


class _NoFunctionalDropout(TorchFunctionMode):
    """Lets calls of torch.nn.functional.dropout and its kin pass their input through."""

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _DROPOUT_FUNCTIONS:
            self.met |= self._would_drop(*args[1:], **kwargs)
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)

    @staticmethod
    def _would_drop(p: float = 0.5, training: bool = True, *_: Any, train: bool = True, **__: Any) -> bool:
        return p > 0 and training and train


def _map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=change(value.data))
    if isinstance(value, dict):
        return {key: _map(each, change) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(each, change) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(_map(each, change) for each in value)
    return value


def _floats(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors within a value, each with a name that says where it was."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, PackedSequence):
        yield f"{name}.data", value.data
    elif dataclasses.is_dataclass(value) and not isinstance(value, type | dict):
        for each in dataclasses.fields(value):
            yield from _floats(getattr(value, each.name), f"{name}.{each.name}")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _floats(each, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _floats(each, f"{name}[{i}]" if len(value) > 1 else name)


def _silence_dropout(model: nn.Module) -> list[str]:
    """Sets every dropout probability in the model to 0 and names those that would have dropped something."""
    found = []
    for name, module in model.named_modules():
        attribute = "p" if isinstance(module, _DROPOUT_MODULES) else "dropout"
        if not isinstance(module, _DROPOUT_MODULES + _DROPOUT_ATTRIBUTES) or not getattr(module, attribute):
            continue
        if module.training:
            found.append(f"{name or type(module).__name__} ({getattr(module, attribute)})")
        setattr(module, attribute, 0.0)
    return found


def _run(model: nn.Module, inputs: Inputs, seed: int) -> tuple[dict[str, Tensor], bool]:
    """Outputs and gradients by name, and whether a functional dropout was met."""
    leaves: dict[str, Tensor] = {}

    def fresh(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        leaf = t.detach().clone().requires_grad_()
        leaves[str(len(leaves))] = leaf
        return leaf.clone()  # no leaf, so that a model may write into it

    given, named = _map(inputs, fresh)
    taken = {"input", *(name for name, _ in model.named_parameters())}
    of_named = (
        each
        for name, value in inputs[1].items()
        for each in _floats(value, f"input {name}" if name in taken else name)
    )
    names = [f"d {name}" for name, _ in (*_floats(inputs[0], "input"), *of_named)]
    wanted = dict(zip(names, leaves.values(), strict=True))
    wanted |= {f"d {name}": p for name, p in model.named_parameters() if p.requires_grad}
    with torch.random.fork_rng([]), torch.enable_grad(), _NoFunctionalDropout() as mode:
        torch.manual_seed(seed)
        outputs = dict(_floats(model(*given, **named), "output"))
        if not outputs:
            raise ValueError(
                "verify compares floating-point outputs, and the model returned none; wrap it in a module whose "
                "forward returns them"
            )
        torch.manual_seed(seed)
        live = {name: t for name, t in outputs.items() if t.requires_grad}
        sent = [torch.randn(t.shape, dtype=torch.float64).to(t) for t in live.values()]
        found: tuple[Tensor | None, ...] = ()
        if live and wanted:
            found = torch.autograd.grad(list(live.values()), list(wanted.values()), sent, allow_unused=True)
    grads = {name: g for name, g in zip(wanted, found, strict=False) if g is not None}
    return {name: t.detach() for name, t in {**outputs, **grads}.items()}, mode.met


def _compare(name: str, wide: Tensor, theirs: Tensor, ours: Tensor) -> Row:
    """Where torch itself is not finite, seqkern may be so too; the errors are those of the rest."""
    common = wide.isfinite() & theirs.isfinite()
    error = relative_rms(theirs[common], wide[common])
    own = relative_rms(ours[common], wide[common])
    own = own if own == own else float("inf")
    allowed = tolerance(theirs.dtype, error)
    return Row(name, error, own, allowed, theirs.dtype, common.numel(), int(common.sum()))


def verify(model: nn.Module, *inputs: Any, **named: Any) -> Verification:
    """Compares outputs and gradients before and after `accelerate`, each against a float64 run.

    The gradients are those of the floating-point inputs and of the parameters, for random gradients of the
    outputs. Everything runs on copies, in the mode that the model is in: the model, its gradients, its
    buffers and the random number generators are as before. Dropout draws other masks in other
    implementations, so it is set to 0 for the comparison, in modules and in ``torch.nn.functional``; the
    result names what it was set to 0 in.

    Args:
        model: a module, accelerated already or not.
        inputs, named: what it is called with, by place and by name: tensors, packed sequences, tuples, lists and dicts
            of them.

    Returns:
        A `Verification`: for each tensor the relative root-mean-square errors of torch and of seqkern.

    Raises:
        VerificationError: a tensor of ours is farther from float64 than 2 times torch's distance + 4 eps (64 eps of
            float64).
        TypeError: ``model`` is not a module.
        ValueError: the model returns no floating-point tensor, or no number that is finite in torch and in float64.
        RuntimeError: the model does not run in float64, or not twice with the same outputs.

    >>> import torch, seqkern
    >>> result = seqkern.verify(torch.nn.GRU(3, 4), torch.randn(5, 2, 3))
    >>> result.ok, [row.name for row in result.rows][:3]
    (True, ['output[0]', 'output[1]', 'd input'])
    """
    check_module(model, "verify")
    plain = restore(detached_copy(model))
    dropout = _silence_dropout(plain)
    fast = accelerate(detached_copy(plain))
    wide = detached_copy(plain).double()
    seed = 0
    given = (inputs, named)
    theirs, functional_dropout = _run(plain, given, seed)
    ours, _ = _run(fast, given, seed)
    try:
        reference, _ = _run(wide, _map(given, lambda t: t.double() if t.is_floating_point() else t), seed)
    except (RuntimeError, ValueError, TypeError) as e:
        raise RuntimeError(f"verify measures against float64, and the model does not run in it: {e}") from e
    if functional_dropout:
        dropout.append("calls of torch.nn.functional.dropout")
    if ours.keys() != theirs.keys() or reference.keys() != theirs.keys():
        odd = sorted(set(ours) ^ set(theirs) | set(reference) ^ set(theirs))
        raise RuntimeError(
            f"verify got other outputs or gradients from one run than from another: {', '.join(odd)}; the model "
            "changes with its calls, draws random numbers, or depends on the dtype"
        )
    rows = [_compare(name, reference[name], theirs[name], ours[name]) for name in theirs]
    outputs = [row for row in rows if row.name.startswith("output")]
    if any(row.numbers for row in outputs) and not any(row.compared for row in outputs):
        raise ValueError(
            "verify compares finite numbers, and the model's outputs have none in torch and in float64: look for "
            "NaN or inf in the inputs and parameters"
        )
    result = Verification(rows, dropout, swaps(fast), explain(fast, *inputs, **named))
    if not result.ok:
        bad = max((row for row in rows if not row.ok), key=lambda row: row.seqkern / row.allowed)
        count = sum(not row.ok for row in rows)
        raise VerificationError(
            f"{count} of {len(rows)} tensors are less accurate on seqkern than the tolerance allows; worst "
            f"is {bad.name}: {bad.seqkern:.3g} against float64, torch has {bad.torch:.3g}, allowed "
            f"{bad.allowed:.3g}",
            result,
        )
    return result
