"""The suite ``rnn`` under pytest-benchmark: ``pytest benchmarks/bench_rnn.py``, with ``-k`` for some of the rows.

For comparing two states of seqkern (``--benchmark-autosave``, ``--benchmark-compare``). Ratios over peers are taken
by ``seqkern bench rnn``, which lets them take turns.
"""

import pytest
import torch

from seqkern.bench import measure
from seqkern.bench.rows import MODES, TRAINING
from seqkern.bench.suites import SUITES

NAMES = str.maketrans(" ,", "-x")  # for -k, which takes neither
CASES = [
    pytest.param(row, mode, id=f"{row.name}-{mode}".translate(NAMES))
    for row in SUITES["rnn"].rows
    for mode in MODES
]


@pytest.mark.parametrize("who", ["torch", "seqkern"])
@pytest.mark.parametrize(("row", "mode"), CASES)
def test_row(benchmark, row, mode, who):
    model, inputs = row.build()
    if who == "seqkern":
        model = row.ours(model)
        measure.gate(row, mode, model)
    benchmark.group = f"{row.name}, {mode}"
    benchmark.extra_info["flop"] = row.flop(mode)
    call = measure.caller(model, inputs, mode)
    with torch.set_grad_enabled(mode == TRAINING):
        benchmark(call)
