"""The suites for GPUs without one: rows on the processor or on no device at all, timings by events that are made up."""

import importlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from seqkern.bench import attention, attention_models, ceilings, measure, peers, place, record, tables
from seqkern.bench.attention import DECODE, OPTION
from seqkern.bench.attention_gpu import GpuAttentionRow
from seqkern.bench.ceilings import Ceilings
from seqkern.bench.place import DeviceLost, Gpu
from seqkern.bench.recurrent_gpu import GRAPHED, ON_CHIP, PACKED, STEPS, GpuRecurrentRow
from seqkern.bench.rows import (
    BACKWARD,
    CUDNN,
    EFFICIENT,
    FLASH,
    INFERENCE,
    LOOP,
    MATH,
    OURS,
    PEERS,
    TORCH,
    TRAINING,
    VARLEN,
)
from seqkern.bench.run import LOST
from seqkern.bench.suites import SUITES
from seqkern.bench.targets import PLAIN, Target, judge
from seqkern.cli import app

ROOT = Path(__file__).resolve().parents[1]
TINY = GpuAttentionRow("tiny", PEERS, "bfloat16", 2, 4, 9, 8)
ATTENTION = {
    "plain": TINY,
    "groups": replace(TINY, name="groups", kv=2, causal=True),
    "decode": replace(TINY, name="decode", group=DECODE, L=1, S=11, kv=2),
} | {
    option: replace(TINY, name=option, group=OPTION, option=option, causal=option in ("window", "varlen"))
    for option in ("mask", "bias", "dropout", "softcap", "alibi", "window", "sinks", "varlen")
}
LAYER = GpuRecurrentRow("LSTM tiny", STEPS, "bfloat16", "LSTM", 2, 3, 4, 5)
RECURRENT = {
    "steps": LAYER,
    "GRU": replace(LAYER, name="GRU tiny", module="GRU", group=ON_CHIP),
    "RNN": replace(LAYER, name="RNN tiny", module="RNN", dtype="tf32"),
    "packed": replace(LAYER, name="packed tiny", group=PACKED, packed=True),
    "graph": replace(LAYER, name="graph tiny", group=GRAPHED, graphed=True),
}
CASES = [
    pytest.param(row, mode, id=f"{name}-{mode}")
    for name, row in (ATTENTION | RECURRENT).items()
    for mode in row.modes
]
ABOUT = {"gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0", "driver": "580", "clock": "1980"}


class Event:
    """Stands where the clock stood when it was recorded."""

    now = 0.0

    def record(self):
        Event.now += 1.0  # milliseconds, as CUDA's
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


class Pretended(Gpu):
    """A GPU whose memory is this machine's and whose clock ticks with each event."""

    def __init__(self, fatal=""):
        super().__init__(Event, self.answer, "cpu", dirt=1 << 10)
        self.fatal, self.dead = fatal, False

    def answer(self):
        if self.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def captured(self, call, mode):
        return call

    def limits(self):
        return Ceilings({"bfloat16": 800e3, "tf32": 400e3}, {"memory": 3000.0})

    def machine(self):
        return record.machine() | ABOUT


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    for module in (attention_models, attention):
        monkeypatch.setattr(module, "WINDOW", 3)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs a suite of tiny rows on the pretended GPU and gives the exit code, what was printed and the records."""

    def run(suite, rows, *words, here=None, code=0):
        monkeypatch.setattr(place, "found", lambda name: here or Pretended())
        monkeypatch.setitem(SUITES, suite, replace(SUITES[suite], rows=tuple(rows)))
        options = ("--rounds", "3", "--seconds-per-row", "0.003", "--output", str(tmp_path))
        done = CliRunner().invoke(app, ["bench", suite, *options, *words])
        assert done.exit_code == code, done.output
        return record.read(next(tmp_path.glob(f"{suite}*.jsonl"))), done.output

    return run


@pytest.mark.parametrize(("row", "mode"), CASES)
def test_gate_passes_what_is_right(row, mode):
    measure.gate(row, mode, row.ours(row.build()[0]))


@pytest.mark.parametrize(("row", "mode"), CASES)
def test_gate_refuses_what_is_wrong(row, mode):
    model = row.ours(row.build()[0])
    forward = model.forward

    def spoilt(*args):
        found = forward(*args)
        if not isinstance(found, tuple):
            return found * 1.2
        first, *rest = found
        return (first._replace(data=first.data * 1.2) if row.packed else first * 1.2, *rest)

    model.forward = spoilt
    with pytest.raises(measure.WrongResult, match="output"):
        measure.gate(row, mode, model)


def test_gate_looks_at_the_last_heads_too():
    model = TINY.ours(TINY.build()[0])
    forward = model.forward
    for head, seen in ((0, True), (1, False), (3, True)):

        def spoilt(*args, head=head):
            found = forward(*args).clone()
            found[:, head] += 1
            return found

        model.forward = spoilt
        if seen:
            with pytest.raises(measure.WrongResult):
                measure.gate(TINY, INFERENCE, model)
        else:
            measure.gate(TINY, INFERENCE, model)


@pytest.mark.parametrize(
    "row", [*SUITES["rnn-cuda"].rows, *SUITES["attention-cuda"].rows], ids=lambda r: r.name
)
def test_rows_are_made_wholly_on_their_device(row):
    """At full size, on the device that holds no numbers; a tensor left on the processor would be refused."""
    with torch.device("meta"):
        model, inputs = row.build()
        assert {t.device.type for _, t in measure.tensors(inputs)} == {"meta"}
        assert row.flop(INFERENCE) > 0
        few = row.oracle() if isinstance(row, GpuAttentionRow) else None
    if few is not None:
        assert few[0](*few[1]).shape == row.judged("output", model(*inputs)).shape


def test_suites_have_the_rows_of_the_issue():
    for suite in ("rnn-cuda", "attention-cuda"):
        rows = SUITES[suite].rows
        assert not [name for name, n in Counter(row.name for row in rows).items() if n > 1]
        assert all(row.suite == suite for row in rows) and SUITES[suite].device == "cuda"
    rows = SUITES["attention-cuda"].rows
    assert {row.option for row in rows} == {"", *ATTENTION} - {"plain", "groups", "decode"}
    assert {(r.D, r.causal, r.L) for r in rows if r.group == PEERS} == {
        (D, causal, L) for D in (64, 128) for causal in (False, True) for L in (2048, 4096, 8192, 16384)
    }
    assert all(
        row.bytes_read(INFERENCE) >= 256 << 20 and 8 * row.kv == row.H for row in rows if row.group == DECODE
    )
    assert all(row.target(mode) for row in rows for mode in row.modes)
    rows = SUITES["rnn-cuda"].rows
    assert {row.module for row in rows if row.group == ON_CHIP and row.H <= 128} == {"LSTM", "GRU", "RNN"}
    assert all(LOOP in row.rivals(TRAINING) for row in rows if row.group == GRAPHED)
    graphs = [row.graphed for row in rows]
    assert graphs == sorted(graphs), "captures come last"


@pytest.mark.parametrize(
    ("target", "ratios", "read", "verdict"),
    [
        (Target(1 / 1.3, PLAIN, and_best=1.0), {PLAIN: 0.8, TORCH: 1.1}, None, "met"),
        (Target(1 / 1.3, PLAIN, and_best=1.0), {PLAIN: 0.8, TORCH: 0.9}, None, "missed"),
        (Target(1 / 1.3, PLAIN, and_best=1.0), {PLAIN: 0.7, TORCH: 1.1}, None, "missed"),
        (Target(0.65), {CUDNN: 0.7, FLASH: 0.9}, None, "met"),
        (Target(None, read=0.85), {TORCH: 2.0}, 0.86, "met"),
    ],
)
def test_verdicts(target, ratios, read, verdict):
    assert judge(target, ratios, None, read) == verdict
    assert "best peer" in str(target) or target.read


@pytest.mark.parametrize("module", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("mode", [INFERENCE, TRAINING])
def test_a_loop_of_cells_is_the_layer(module, mode):
    row = replace(LAYER, module=module, dtype="float32")
    assert peers.Loop(1).prepare(row, mode)(1) > 0


@pytest.mark.parametrize(("peer", "runs"), [(peers.Flash, True), (peers.Math, True), (peers.Cudnn, False)])
def test_one_kernel_of_torchs(peer, runs):
    row = replace(TINY, dtype="float32", L=16, D=16)
    assert {CUDNN, FLASH, EFFICIENT, MATH} <= row.rivals(BACKWARD)
    if runs:
        assert peer(1).prepare(row, BACKWARD)(1) > 0
    else:  # a processor has no such kernel
        with pytest.raises(RuntimeError, match=r"No (viable backend|available kernel)"):
            peer(1).prepare(row, INFERENCE)


def test_packed_attention_has_a_peer_of_its_own(monkeypatch):
    row, asked = ATTENTION["varlen"], []
    assert VARLEN in row.rivals(INFERENCE) and VARLEN not in TINY.rivals(INFERENCE)

    def stand_in(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size=(-1, -1)):
        asked.append((starts_q.tolist(), longest_q, window_size))
        return row.build()[0](q, k, v)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    assert peers.Varlen(1).prepare(row, INFERENCE)(1) > 0
    assert asked[0] == ([0, 9, 10], 9, (-1, 0))


def test_calls_are_timed_by_events_over_a_cold_cache():
    here, order = Pretended(), []
    here.flush = lambda: order.append("flush")

    def call():
        order.append("call")
        Event.now += 4.0

    assert here.timed(call, INFERENCE, graphed=False)(3) == pytest.approx(3 * 5e-3)
    assert order == ["flush", "call"] * 3


def test_a_turn_has_no_more_calls_than_a_median_needs():
    called = []
    subjects = {"seqkern": lambda calls: called.append(calls) or 1e-6 * calls}
    measure.interleaved(subjects, rounds=5, seconds=10.0, settle=0.0, most_calls=7, clock=lambda: 0.0)
    assert max(called) == 7


def test_ceilings_are_measured():
    here = Pretended()
    found = ceilings.measure("cpu", lambda call: here.by_events(call, INFERENCE), 32, 1 << 12)
    assert found.peaks.keys() == set(ceilings.TYPES) and found.level(1e9) == "memory"
    assert found.bandwidth["memory"] == pytest.approx(2 * (1 << 12) / 1e-3 / 1e9)
    assert found.share_of_peak(found.peaks["tf32"] * 1e9, 2.0, "tf32") == pytest.approx(0.5)
    assert found.share_of_peak(1.0, 1.0, "float64") is None
    assert found.share_of_read(None, 1.0, "memory") is None


def test_rounding_is_the_rows():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for dtype, name in (("tf32", "high"), ("float32", "highest")):
        with place.CPU.rounding(dtype):
            assert torch.get_float32_matmul_precision() == name
            assert torch.backends.cudnn.allow_tf32 == (dtype == "tf32")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize(
    ("suite", "rows"), [("rnn-cuda", RECURRENT.values()), ("attention-cuda", ATTENTION.values())]
)
def test_rows_are_timed_written_and_shown(bench, suite, rows, tmp_path):
    made, output = bench(suite, rows, "--peers", "torch,loop,flash,math")
    assert len(made) == 2 * len(rows) - (suite == "attention-cuda")
    assert not [each.failure for each in made if each.failure], output
    first = made[0]
    assert first.machine["gpu"] == ABOUT["gpu"] and first.peaks["bfloat16"] == 800e3
    assert first.versions.keys() >= {"torch", "triton", "cuda", "cudnn"}
    assert first.share_of_peak == pytest.approx(first.speed(OURS) / 800) and first.limit == 800.0
    assert "nvidia-h100-80gb-hbm3" in next(tmp_path.glob("*.jsonl")).name
    assert max(map(len, output.splitlines())) <= 100
    text = tables.markdown(made)
    assert text.startswith("NVIDIA H100 80GB HBM3, driver 580, clock 1980")
    assert "matmul bfloat16 800 TF/s" in text and "of the matmul rate" in text
    assert list(tmp_path.glob("*.png"))
    if suite == "attention-cuda":
        by_name = {each.name: each for each in made if each.mode == INFERENCE}
        assert by_name["decode"].level == "memory" and by_name["decode"].share_of_read
        assert PLAIN in by_name["mask"].timings and "1.3x the plain time at most and 1x the best peer" in text


def test_a_row_that_fails_leaves_the_others(bench, monkeypatch):
    build = GpuRecurrentRow.ours

    def ours(self, model):
        if self.module == "GRU":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. " + "Tried " * 100)
        return build(self, model)

    monkeypatch.setattr(GpuRecurrentRow, "ours", ours)
    rows = [RECURRENT["GRU"], LAYER]
    made, output = bench("rnn-cuda", rows, "--peers", "torch", "--mode", INFERENCE, code=1)
    assert [bool(each.timings) for each in made] == [False, True]
    assert made[0].failure.startswith("OutOfMemoryError: CUDA out of memory") and len(made[0].failure) < 400
    assert "GRU tiny, inference: no figure: OutOfMemoryError" in " ".join(output.split())
    text = tables.markdown(made)
    assert "- GRU tiny, inference: OutOfMemoryError" in text and "GRU tiny |" not in text


@pytest.mark.parametrize("when", ["prepared", "timed"])
def test_a_peer_that_cannot_is_noted(bench, monkeypatch, when):
    def fail(calls):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(peers.Flash, "prepare", lambda self, row, mode: fail if when == "timed" else fail(1))
    made, output = bench("attention-cuda", [TINY], "--peers", "torch,flash", "--mode", INFERENCE)
    assert made[0].timings.keys() == {OURS, TORCH}
    assert made[0].left_out == {FLASH: "RuntimeError: No available kernel. Aborting execution."}
    assert "torch, flash is left out: RuntimeError: No available kernel" in " ".join(output.split())


def test_a_lost_device_ends_the_run_and_another_goes_on(bench, monkeypatch):
    here, build = Pretended(), GpuRecurrentRow.ours

    def ours(self, model):
        if self.module == "GRU":
            here.dead = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return build(self, model)

    monkeypatch.setattr(GpuRecurrentRow, "ours", ours)
    rows, words = [RECURRENT["GRU"], LAYER], ("--peers", "torch", "--mode", INFERENCE, "--resume")
    made, output = bench("rnn-cuda", rows, *words, here=here, code=LOST)
    assert len(made) == 1 and "illegal memory access" in made[0].failure and "rnn-cuda stopped" in output
    made, _ = bench("rnn-cuda", rows, *words)
    assert [(each.name, bool(each.timings)) for each in made] == [("GRU tiny", False), ("LSTM tiny", True)]


def test_recovery_tells_a_dead_device():
    here = Pretended()
    here.recover("nothing")
    here.dead = True
    with pytest.raises(DeviceLost, match="answers no more after a row"):
        here.recover("a row")


def test_the_driver_is_asked(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert place.nvidia_smi() == {}
    tool.write_text("#!/bin/sh\necho '580.1, 1980, 1980, 2619, 40, 120.5'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    told = place.nvidia_smi()
    assert (told["driver"], told["clock"], told["watts"]) == ("580.1", "1980", "120.5")
    tool.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert place.nvidia_smi() == {}


@pytest.mark.parametrize("device", [(), ("--device", "cuda")])
def test_without_a_gpu_nothing_is_run(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["bench", "rnn-cuda", *device, "--output", str(tmp_path)])
    assert done.exit_code == 2 and "there is no GPU here" in done.output and not list(tmp_path.glob("*"))


def test_the_rows_run_on_a_processor_when_asked(monkeypatch, tmp_path):
    monkeypatch.setitem(SUITES, "rnn-cuda", replace(SUITES["rnn-cuda"], rows=(RECURRENT["graph"],)))
    words = ("--device", "cpu", "--rounds", "1", "--seconds-per-row", "0.003", "--output", str(tmp_path))
    done = CliRunner().invoke(app, ["bench", "rnn-cuda", *words])
    assert done.exit_code == 0, done.output
    assert record.read(next(tmp_path.glob("*.jsonl")))[0].timings.keys() == {OURS, TORCH, LOOP}


def test_the_script_runs_a_suite_and_sums_it_up(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("gpu")
    monkeypatch.setattr(place, "found", lambda name: Pretended())
    suite = replace(SUITES["attention-cuda"], rows=(TINY, ATTENTION["mask"]), rounds=2, seconds=0.01)
    monkeypatch.setitem(SUITES, "attention-cuda", suite)
    monkeypatch.setattr(peers.Efficient, "missing", classmethod(lambda cls: "left out of this test"))
    assert script.bench("attention-cuda", str(tmp_path), "mask") == 0
    assert script.bench("attention-cuda", str(tmp_path)) == 0
    made = record.read(next(tmp_path.glob("*.jsonl")))
    assert [each.name for each in made] == ["mask", "mask", "tiny", "tiny"]
    capsys.readouterr()
    failed = replace(made[2], mode="training", timings={}, left_out={OURS: "no luck"})
    record.append(next(tmp_path.glob("*.jsonl")), [failed])
    assert script.summary(str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "attention-cuda: the best peer's time" in output and "tiny, training: no luck" in output
