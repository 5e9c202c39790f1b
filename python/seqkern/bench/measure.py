"""What a figure rests on: the gate that a kernel passes first, and timings taken in turns."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from seqkern import testing
from seqkern.bench.rows import BACKWARD, INFERENCE, Row

Timed = Callable[[int], float]  #: seconds that so many calls take
MIN_ROUNDS = 5  # also where a row's time is up before
SETTLE = 0.005  # seconds before a turn, in which the last one's thread pool stops spinning
LONG = 0.05  # seconds of a call from which on a turn needs no call to warm up
SURE = 1.0  # seconds of a first call that says well enough how long one takes
WRONG = 1e-3  # relative RMS beyond which a peer was set up wrongly; approximations stay below 1e-5
ROUNDED = 4  # units of rounding of a narrower dtype beyond which it was


class WrongResult(Exception):
    """A kernel failed the gate; the message says which tensor and by how much."""


class PeerFailed(Exception):
    """A peer, named first, computed something else than torch or broke down; the message says how."""

    def __init__(self, peer: str, message: str):
        super().__init__(message)
        self.peer = peer


def tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a model returns, each with a name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, PackedSequence):
        yield name, value.data
    else:
        for i, each in enumerate(value):
            yield from tensors(each, f"{name}[{i}]")


def compare(peer: str, want: Mapping[str, Tensor], got: Sequence[Tensor]) -> None:
    """Raises PeerFailed where a peer's results are not torch's, whose order they have."""
    for (name, value), found in zip(want.items(), got, strict=True):
        off = testing.relative_rms(found, value)
        if not off <= max(WRONG, ROUNDED * torch.finfo(value.dtype).eps):
            raise PeerFailed(peer, f"it and torch differ by {off:.2g} in {name}")


def leaf(value: Any) -> tuple[Any, Tensor]:
    """A model's input with its floats as a leaf that asks for a gradient, and this leaf."""
    data = value.data if isinstance(value, PackedSequence) else value
    found = data.detach().clone().requires_grad_()
    return (value._replace(data=found) if isinstance(value, PackedSequence) else found), found


def sent_back(output: Tensor) -> Tensor:
    """The gradient of an output that every subject is given."""
    draw = torch.Generator(output.device).manual_seed(1)
    shape, device = output.shape, output.device
    return torch.randn(shape, generator=draw, dtype=torch.float64, device=device).to(output.dtype)


def caller(
    model: nn.Module, inputs: tuple[Any, ...], mode: str, sent: Tensor | None = None
) -> Callable[[], dict[str, Tensor]]:
    """One call of a workload: a forward, a forward with the gradients of inputs and parameters, or, from the second
    call on, the gradients alone.

    The gradient that is sent back, unless it is given, is one of the model's first output, as of a layer whose final
    state is not used.
    """
    if mode == INFERENCE:
        model.eval()

        def forward() -> dict[str, Tensor]:
            return dict(tensors(model(*inputs)))

        return forward
    model.train()
    given, leaves = zip(*map(leaf, inputs), strict=True)
    names = [f"d input{i}" for i in range(len(leaves))] + [
        f"d {name}" for name, _ in model.named_parameters()
    ]
    wanted = [*leaves, *model.parameters()]
    kept: dict[str, Tensor] = {}  # the outputs that gradients alone are taken of

    def step() -> dict[str, Tensor]:
        nonlocal sent
        found = kept or dict(tensors(model(*given)))
        first = next(iter(found.values()))
        if sent is None:
            sent = sent_back(first)
        if mode == BACKWARD:
            kept.update(found)
        grads = torch.autograd.grad(first, wanted, sent.to(first.dtype), retain_graph=mode == BACKWARD)
        return found | dict(zip(names, grads, strict=True))

    return step


def timed(call: Callable[[], Any], mode: str, clock: Callable[[], float] = time.perf_counter) -> Timed:
    def run(calls: int) -> float:
        with torch.set_grad_enabled(mode != INFERENCE):
            start = clock()
            for _ in range(calls):
                call()
            return clock() - start

    return run


def results(
    model: nn.Module, inputs: tuple[Any, ...], mode: str, sent: Tensor | None = None
) -> dict[str, Tensor]:
    with torch.set_grad_enabled(mode != INFERENCE):
        return {name: t.detach() for name, t in caller(model, inputs, mode, sent)().items()}


def _widened(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.double())
    return value.double() if value.is_floating_point() else value


def gate(
    row: Row,
    mode: str,
    ours: nn.Module,
    drawing: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Raises WrongResult unless every tensor of ``ours`` is as near to float64 as `testing.tolerance` asks.

    Integers, which are tokens, must be those of float64 or of torch. ``drawing`` gives the context in which models and
    inputs are made.
    """
    with drawing():
        model, inputs = row.oracle()
        whole = row.build()[1] if row.partly_judged else inputs
    sent = None
    if row.partly_judged:
        before = results(ours, whole, mode)
        testing.poison(*before.values())
        first, output = next(iter(before.items()))
        sent = row.judged(first, sent_back(output)) if mode != INFERENCE else None
        del before, output
    theirs = results(model, inputs, mode, sent)
    if not row.partly_judged:
        testing.poison(*theirs.values())
    got = {name: row.judged(name, each) for name, each in results(ours, whole, mode).items()}
    want = results(model.double(), tuple(map(_widened, inputs)), mode, sent)
    for name, value in theirs.items():
        if got[name].shape != value.shape:
            raise WrongResult(f"{name} is {tuple(got[name].shape)}, not {tuple(value.shape)}")
        if not value.is_floating_point():
            if not any(torch.equal(got[name], each[name]) for each in (want, theirs)):
                raise WrongResult(f"{name} differs from torch's in some places")
            continue
        error = testing.relative_rms(got[name], want[name])
        allowed = testing.tolerance(value.dtype, testing.relative_rms(value, want[name]), row.depth())
        if not error <= allowed:  # NaN fails
            at = testing.worst(got[name], want[name])
            raise WrongResult(f"{name} is off by {error:.2g}, allowed {allowed:.2g}; worst {at}")


@dataclass(frozen=True)
class Spread:
    """Seconds of a call, or a ratio of them, over the rounds."""

    median: float
    p20: float
    p80: float


def spread(values: list[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), cuts[0], cuts[3])


def interleaved(
    subjects: Mapping[str, Timed],
    *,
    rounds: int,
    seconds: float,
    settle: float = SETTLE,
    most_calls: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, list[float]]:
    """Seconds per call of each subject, one figure a round, taken in turns so that a noisy machine slows all alike.

    The turns of a round come in the order of the last round reversed. A row that has used up its ``seconds`` ends
    early, after `MIN_ROUNDS` at the soonest. A turn is of ``most_calls`` at most, after ``settle`` seconds of rest.
    """
    until = clock() + seconds
    calls, warm = {}, {}
    for name, run in subjects.items():
        once = run(1)
        if once < SURE:
            once = min(run(1), run(1))
        fit = max(1, round(seconds / (rounds * len(subjects) * max(once, 1e-7))))
        calls[name] = min(fit, most_calls or fit)
        warm[name] = once < LONG
    order = list(subjects)
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for done in range(rounds):
        if done >= MIN_ROUNDS and clock() > until:
            break
        for name in order:
            sleep(settle)
            if warm[name]:
                subjects[name](1)
            found[name].append(subjects[name](calls[name]) / calls[name])
        order.reverse()
    return found


def ratios(times: Mapping[str, list[float]], ours: str) -> dict[str, Spread]:
    """For each peer the spread over rounds of its seconds over ours in the same round."""
    return {
        name: spread([theirs / own for theirs, own in zip(each, times[ours], strict=True)])
        for name, each in times.items()
        if name != ours
    }
