"""Several threads, forked children and a changed thread count: the bits stay those of a serial run."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import seqkern
from seqkern.ops import _library
from seqkern.testing import on_threads

pytestmark = pytest.mark.built
LIMIT = 60  # seconds, after which a call is taken to hang


def work(seed):
    """Output and gradients of one layer, large enough for several threads."""
    torch.manual_seed(seed)
    layer = seqkern.nn.LSTM(24, 40, bidirectional=bool(seed % 2))
    x = torch.randn(12, 9, 24, requires_grad=True)
    with seqkern.backend("cpu"):
        output, _ = layer(x)
        grads = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
    return torch.cat([t.detach().flatten() for t in (output, *grads)])


# torch.manual_seed is the process's, so threads share layers that were drawn before.
def layers(n):
    torch.manual_seed(0)
    return [(seqkern.nn.GRU(24, 40), torch.randn(12, 9, 24)) for _ in range(n)]


def step(pair):
    layer, x = pair
    with seqkern.backend("cpu"):
        output, _ = layer(x)
        grads = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
    return torch.cat([t.detach().flatten() for t in (output, *grads)])


def test_threads_at_once_equal_serial():
    pairs = layers(4) * 8
    want = [step(pair) for pair in pairs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(step, pairs, timeout=LIMIT))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_thread_count_changed_midway():
    want = work(1)
    assert all(torch.equal(got, want) for got in on_threads(lambda: work(1), (1, 3, 2, 5)))


@pytest.mark.parametrize("kind", [seqkern.nn.LSTM, seqkern.nn.GRU])
def test_more_threads_than_cores(kind):
    """Members of a team that wait long for each other leave one alone in the midst of the sequence."""
    torch.manual_seed(0)
    layer, x = kind(64, 96, bidirectional=True), torch.randn(150, 1, 64)

    def run():
        output, _ = layer(x)
        return [output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run()
        for n in (16, 7):
            torch.set_num_threads(n)
            for _ in range(3):
                assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))
    finally:
        torch.set_num_threads(threads)


def in_a_child(target):
    """What a forked child sends."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(target()), daemon=True)
    process.start()
    try:
        assert ours.poll(LIMIT), "the child hangs"
        return ours.recv()
    finally:
        process.kill()
        process.join()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_after_threads():
    want = work(1)
    assert torch.equal(torch.from_numpy(in_a_child(lambda: work(1).numpy())), want)


def threads_and_work():
    x = torch.randn(300, 300)
    return _library.native().num_threads(), (x @ x).isfinite().all().item(), work(1).numpy()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads():
    """The pool of the thread that forks is given up before: torch's operators find no lost one either."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(2):  # the second time with a pool made anew
            want, _ = work(1), torch.randn(300, 300) @ torch.randn(300, 300)
            found, finite, got = in_a_child(threads_and_work)
            assert found == 3 and finite and torch.equal(torch.from_numpy(got), want)
            assert torch.equal(work(1), want)
    finally:
        torch.set_num_threads(threads)


class Worked(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return work(i)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_dataloader_worker():
    want = [work(0), work(1)]
    loader = DataLoader(
        Worked(), batch_size=None, num_workers=1, timeout=LIMIT, multiprocessing_context="fork"
    )
    assert all(torch.equal(a, b) for a, b in zip(loader, want, strict=True))
