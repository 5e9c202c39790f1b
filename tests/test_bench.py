"""The benchmarks, on tiny rows and with a clock that is told the time."""

import importlib.util
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import seqkern
from seqkern.bench import (
    fresh,
    limits,
    measure,
    onnx_peer,
    onnx_recurrent,
    peers,
    pictures,
    place,
    record,
    run,
    tables,
)
from seqkern.bench.recurrent import RecurrentRow
from seqkern.bench.rows import INFERENCE, MODES, ONNX, OTHER, TRAINING
from seqkern.bench.suites import SUITES
from seqkern.bench.targets import Target, judge
from seqkern.cli import app
from seqkern.ops import _library

ROOT = Path(__file__).resolve().parents[1]
LAYER = RecurrentRow("LSTM tiny", "peers", "float32", "LSTM", 2, 3, 4, 5)
ROWS = {
    "layer": LAYER,
    "packed": replace(LAYER, name="GRU tiny", module="GRU", layers=2, bidirectional=True, packed=True),
    "proj": replace(LAYER, name="proj tiny", proj=3),
    "cell": RecurrentRow("GRUCell tiny", "other", "float32", "GRUCell", 1, 1, 4, 5),
    "bf16": replace(LAYER, name="bf16 RNN tiny", module="RNN", dtype="bfloat16"),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN"
)  # torch's


class Clock:
    """Stands still but for what `advance` adds."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def tiny(monkeypatch):
    """A suite of two tiny rows, and no process but this one."""
    monkeypatch.setitem(SUITES, "rnn", replace(SUITES["rnn"], rows=(ROWS["layer"], ROWS["cell"])))
    monkeypatch.setattr(fresh, "probe", lambda *a, **k: (0.25, 1_000_000))
    monkeypatch.setattr(limits, "measure", lambda: limits.Limits(100.0, {"L2": 50.0}))
    monkeypatch.setattr(limits.Limits, "sample", lambda self, levels=(): None)


def bench(*words):
    return CliRunner().invoke(app, ["bench", *words])


def ran(tmp_path, *words):
    """Records of a quick run of the tiny suite."""
    options = ("--rounds", "3", "--seconds-per-row", "0.01", "--output", str(tmp_path), "--rows", "all")
    done = bench("rnn", *options, *words)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*.jsonl")
    return record.read(path), done.output


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_gate_passes_what_is_right(row, mode):
    measure.gate(row, mode, row.ours(row.build()[0]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_gate_refuses_a_wrong_kernel(row, mode):
    model = row.ours(row.build()[0])
    with torch.no_grad():
        next(model.parameters())[0] += 0.5
    with pytest.raises(measure.WrongResult, match=r"output.* is off by"):
        measure.gate(row, mode, model)


def test_gate_refuses_nan_and_wrong_gradients():
    class Wrong(torch.nn.LSTM):
        def forward(self, x, hx=None):
            output, state = super().forward(x * float("nan") if self.how == "nan" else x, hx)
            return (output.detach() * 0.5 + output * 0.5 if self.how == "gradient" else output), state

    for how, mode in (("nan", INFERENCE), ("gradient", TRAINING)):
        model = Wrong(4, 5)
        model.load_state_dict(LAYER.build()[0].state_dict())
        model.how = how
        with pytest.raises(measure.WrongResult):
            measure.gate(LAYER, mode, model)


def test_a_wrong_kernel_gets_no_figure(tiny, tmp_path, monkeypatch):
    def spoilt(self, model):
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        return model

    monkeypatch.setattr(RecurrentRow, "ours", spoilt)
    done = bench("rnn", "--output", str(tmp_path), "--no-peers")
    assert done.exit_code == 1
    assert "LSTM tiny, inference: no figure: output[0] is off by" in done.output
    (path,) = tmp_path.glob("*")  # no picture
    made = record.read(path)
    assert all(not each.timings and "is off by" in each.failure for each in made)
    assert tables.markdown(made).count("is off by") == len(made) == 2


def test_flop_and_bytes():
    assert LAYER.flop(INFERENCE) == 2 * 4 * 5 * (4 + 5) * 2 * 3
    assert LAYER.flop(TRAINING) == 3 * LAYER.flop(INFERENCE)
    assert replace(LAYER, proj=3).flop(INFERENCE) == 2 * (4 * 5 * (4 + 3) + 5 * 3) * 2 * 3
    assert ROWS["packed"].flop(INFERENCE) == 2 * 2 * 3 * 5 * ((4 + 5) + (10 + 5)) * (3 + 1)
    assert LAYER.bytes_read(INFERENCE) is None
    assert replace(LAYER, B=1).bytes_read(INFERENCE) == 4 * (3 * 4 * 5 * 5 + 4 * 5 * 4)


def test_suite_has_the_rows_of_the_issue():
    rows = SUITES["rnn"].rows
    assert len({row.name for row in rows}) == len(rows)
    named = [row for row in rows if row.group == "peers"]
    assert len(named) == 15 and all(row.target(mode) for row in named for mode in MODES)
    for row in rows:
        assert row.flop(INFERENCE) > 0


def test_turns_alternate_and_ratios_are_of_one_round():
    clock, order = Clock(), []

    def subject(name, seconds):
        def run(calls):
            order.append(name)
            start = clock()
            clock.advance(calls * seconds)
            return clock() - start

        return run

    subjects = {"seqkern": subject("seqkern", 0.1), "torch": subject("torch", 0.3)}
    found = measure.interleaved(subjects, rounds=6, seconds=100.0, clock=clock, sleep=clock.advance)
    assert order[6:] == ["seqkern", "torch", "torch", "seqkern"] * 3  # after three calls each to calibrate
    assert measure.ratios(found, "seqkern")["torch"].median == pytest.approx(3.0)


def test_a_row_out_of_time_ends_early():
    clock = Clock()

    def long(calls):
        clock.advance(10.0 * calls)
        return 10.0 * calls

    found = measure.interleaved({"seqkern": long}, rounds=50, seconds=1.0, clock=clock, sleep=clock.advance)
    assert len(found["seqkern"]) == measure.MIN_ROUNDS


def test_ratio_is_the_median_over_rounds():
    times = {"seqkern": [1.0, 2.0, 4.0], "torch": [2.0, 2.0, 12.0]}  # ratios 2, 1, 3; medians would say 1
    found = measure.ratios(times, "seqkern")["torch"]
    assert (found.median, found.p20, found.p80) == pytest.approx((2.0, 1.4, 2.6))
    assert measure.spread([5.0]) == measure.Spread(5.0, 5.0, 5.0)


@pytest.mark.parametrize(
    ("target", "ratios", "share", "says"),
    [
        (None, {"torch": 9.0}, 0.9, "-"),
        (Target(1.05, or_peak=0.83), {"torch": 2.0, "onnxruntime": 1.06}, 0.1, "met"),
        (Target(1.05, or_peak=0.83), {"torch": 2.0, "onnxruntime": 1.04}, 0.1, "missed"),
        (Target(1.05, or_peak=0.83), {"torch": 0.9}, 0.83, "met, 83% of peak"),
        (Target(1.25), {"torch": 1.2}, 0.99, "missed"),
        (Target(2.5, "torch", noted_peak=0.8), {"torch": 2.4, "compile": 9.0}, 0.81, "missed, 81% of peak"),
        (Target(2.5, "torch", noted_peak=0.8), {"torch": 2.6}, None, "met"),
        (Target(2.5, "torch"), {"compile": 3.0}, 0.5, "-"),
    ],
)
def test_verdict(target, ratios, share, says):
    assert judge(target, ratios, share) == says


def test_results_are_written_read_drawn_and_shown(tiny, tmp_path):
    made, output = ran(tmp_path, "--peers", "torch")
    assert [r.key for r in made] == [(row.name, mode) for row in SUITES["rnn"].rows for mode in MODES]
    first = made[0]
    assert first.timings["torch"].ratio > 0 and first.timings["seqkern"].ratio is None
    assert first.backend == ("cpu" if _library.native() else "torch")
    assert (first.timings["seqkern"].first_call, first.timings["seqkern"].peak_bytes) == (0.25, 1_000_000)
    assert first.share_of_peak == pytest.approx(first.speed("seqkern") / 100)
    assert {"cpu", "cores", "isa"} <= first.machine.keys() and first.versions[
        "seqkern"
    ] == seqkern.__version__
    assert next(tmp_path.glob("*.png")).stat().st_size > 10_000
    assert max(map(len, output.splitlines())) <= 100
    path = tmp_path / "again.jsonl"
    record.append(path, made[:2])
    record.append(path, made[2:])
    assert record.read(path) == made
    again = replace(first, run="2999-01-01T00:00:00+00:00", rounds=99)
    assert record.latest([*made, again])[0] == again and len(record.latest([*made, again])) == len(made)


def test_a_second_run_is_appended(tiny, tmp_path):
    ran(tmp_path, "--no-peers", "--mode", INFERENCE)
    made, _ = ran(tmp_path, "--no-peers", "--mode", INFERENCE)
    assert len(made) == 4 and made[0].verdict == "-"


def test_markdown_shows_losses_like_wins(tiny, tmp_path):
    made, _ = ran(tmp_path, "--peers", "torch", "--mode", INFERENCE)
    lost = replace(made[0].timings["torch"], ratio=0.5, ratio_p20=0.4, ratio_p80=0.6)
    made[0] = replace(made[0], timings=made[0].timings | {"torch": lost}, share_of_peak=0.01)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:rnn -->\nold\n<!-- /bench:rnn -->\nafter\n")
    text = tables.markdown(made, {"bars": "rnn.png"})
    assert tables.put(page, "bench:rnn", text) and not tables.put(page, "bench:rnn", text)
    assert tables.between(page, "bench:rnn") == text
    assert page.read_text().startswith("before\n<!--") and page.read_text().endswith("-->\nafter\n")
    assert "0.50x (0.40x to 0.60x)" in text and "1.05x the best peer or 83% of peak: missed" in text
    with pytest.raises(ValueError, match="0 places"):
        tables.put(page, "bench:other", text)


def test_a_line_that_is_no_result_is_named(tmp_path):
    path = tmp_path / "rnn-x.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"line 1 is not a result.*remove the line"):
        record.read(path)


def test_results_begin_on_a_line_of_their_own(tiny, tmp_path):
    made, _ = ran(tmp_path, "--peers", "torch")
    path = tmp_path / "again.jsonl"
    record.append(path, made)
    whole = path.read_text()
    path.write_text(whole.rstrip("\n"))
    record.append(path, made)
    assert path.read_text() == 2 * whole


def test_a_file_that_cannot_be_read_is_told_before_anything_is_timed(tmp_path):
    here = place.found("cpu")
    path = tmp_path / f"rnn-{record.kind(here.machine())}.jsonl"
    path.write_text("{}\n")
    done = bench("rnn", "--filter", "GRU 1,100", "--output", str(tmp_path))
    assert done.exit_code == 2 and "line 1 is not a result" in " ".join(done.output.split())
    assert path.read_text() == "{}\n"


def test_what_was_timed_is_kept_when_a_process_is_ended(tiny, tmp_path, monkeypatch):
    asked, timed = [], run.run_row

    def run_row(row, *rest):
        asked.append(row.name)
        if len(asked) == 2:
            signal.raise_signal(signal.SIGTERM)
        return timed(row, *rest)

    monkeypatch.setattr(run, "run_row", run_row)
    with pytest.raises(SystemExit) as stopped:
        run.main(run.Options("rnn", peers=("torch",), threads=1), tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    (path,) = tmp_path.glob("*.jsonl")
    assert [each.name for each in record.read(path)] == asked[:1]


def test_the_end_of_a_process_unwinds():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, run.ended_in_order():
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("suite", SUITES)
def test_pages_show_the_committed_results(suite, tmp_path):
    of_machines = []
    for path in record.published(ROOT / "benchmarks" / "results", suite):
        records = record.latest(record.read(path))
        drawn = pictures.draw(records, tmp_path / path.name)
        shown = {said: f"benchmarks/results/{each.name}" for said, each in drawn.items()}
        assert all((ROOT / each).is_file() for each in shown.values())
        of_machines.append((records, shown))
    above = [
        (records, {said: f"../{each}" for said, each in shown.items()}) for records, shown in of_machines
    ]
    for page, told, shown in (
        ("README.md", tables.short, of_machines),
        ("docs/benchmarks.md", tables.page, above),
    ):
        text = told(shown) if shown else ""
        assert tables.between(ROOT / page, f"bench:{suite}") == text, "run benchmarks/publish.py"


def test_a_page_and_the_front_one_are_renewed(tiny, tmp_path):
    made, _ = ran(tmp_path, "--peers", "torch")
    (path,) = tmp_path.glob("*.jsonl")
    (tmp_path / "docs").mkdir()
    page, front = tmp_path / "docs" / "all.md", tmp_path / "front.md"
    for each in (page, front):
        each.write_text("<!-- bench:rnn -->\n<!-- /bench:rnn -->\n")
    picture = run.publish([path, path], "rnn", page, front)[0]
    assert f"](../{picture.name})" in page.read_text() and f"]({picture.name})" in front.read_text()
    ratios = " / ".join(tables.times(each.ratios["torch"]) for each in made if each.name == made[0].name)
    assert f"| {made[0].name} | {ratios} | {ratios} |" in front.read_text()
    assert "inference / training | " in front.read_text()


def test_the_front_page_may_lack_main_rows(tiny, tmp_path):
    made, _ = ran(tmp_path, "--peers", "torch", "--mode", INFERENCE)
    others = [replace(each, group=OTHER) for each in made]
    assert tables.short([(others, {"bars": "x.png"})]) == "![bars](x.png)\n\nNone of these rows has a figure."


def test_other_machines_are_folded_away(tiny, tmp_path):
    made, _ = ran(tmp_path, "--peers", "torch", "--mode", INFERENCE)
    one, two = tables.page([(made, {})]), tables.page([(made, {}), (made, {"bars": "x.png"})])
    assert one == tables.markdown(made) and two.startswith(one + "\n\n<details>\n<summary>")
    assert "![bars](x.png)" in two and two.endswith("</details>")


def test_a_file_of_another_suite_is_not_shown(tiny, tmp_path):
    ran(tmp_path, "--peers", "torch", "--mode", INFERENCE)
    (path,) = tmp_path.glob("*.jsonl")
    path.rename(tmp_path / f"rnn-cuda-{path.name}")
    assert record.published(tmp_path, "rnn-cuda") == []


def test_pictures_refuse_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no result"):
        pictures.draw([], tmp_path / "x.jsonl")


@pytest.mark.parametrize("module", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_onnx_agrees_with_torch(module, bidirectional):
    row = replace(LAYER, module=module, bidirectional=bidirectional)
    layer, (x,) = row.build()
    here = onnx_peer.session(onnx_recurrent.model(layer, (x,)), 1)
    found = onnx_recurrent.outputs(here.run(None, onnx_recurrent.feeds(layer, (x,))), layer)
    for (name, want), got in zip(measure.results(layer, (x,), INFERENCE).items(), found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_onnx_runtime_answers_from_its_own_process(monkeypatch):
    peer = peers.OnnxRuntime(1)
    try:
        timed = peer.prepare(LAYER, INFERENCE)
        assert peer.first_call > 0 and timed(3) > 0
        with pytest.raises(measure.PeerFailed, match="TypeError"):
            peer.prepare(replace(LAYER, module="Linear"), INFERENCE)
        assert timed(1) > 0
        monkeypatch.setattr(onnx_peer, "ANSWER", 0)
        with pytest.raises(measure.PeerFailed, match="gave no answer"):
            timed(1_000_000)
    finally:
        peer.close()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_onnx_serves_plain_layers_in_inference(row):
    assert (ONNX in row.rivals(INFERENCE)) == (row is LAYER)
    assert ONNX not in row.rivals(TRAINING)


def test_fresh_process_tells_first_call_and_memory():
    row = replace(LAYER, B=16, T=64, I=64, H=64)
    seconds, size = fresh.probe(row, INFERENCE, accelerated=True, threads=1)
    assert seconds > 0
    assert (
        size is None or 16 * 64 * 64 * 4 / 2 < size < 100e6
    )  # half of the output at least: the counters are coarse


def test_working_sets_fit_their_level():
    sets = limits.working_sets({1: 32 << 10, 2: 1 << 20, 3: 32 << 20}, 2)
    assert sets == {"L2": 1 << 20, "L3": 16 << 20, "memory": 512 << 20}
    shared = limits.working_sets({2: 2 << 20, 3: 260 << 20}, 2)
    assert shared == {"L2": 2 << 20, "L3": 16 << 20, "memory": 512 << 20}
    assert limits.working_sets({}, 2) == {"memory": 512 << 20}
    assert "L3" not in limits.working_sets({2: 1 << 20, 3: 4 << 20}, 4)


@pytest.mark.built
def test_limits_are_measured():
    found = limits.measure(0.01)
    peak = found.fma_peak
    assert peak > 1 and found.bandwidth["memory"] > 0.1
    found.sample(0.01)
    assert found.fma_peak >= peak
    assert found.share_of_peak(1e9, 1.0, "bfloat16") is None


@pytest.mark.parametrize(
    ("name", "says"), [("onnxruntime", "no onnxruntime here"), ("matplotlib", "no picture")]
)
def test_a_missing_package_is_left_out(tiny, tmp_path, monkeypatch, name, says):
    if name == "matplotlib":
        monkeypatch.setattr(pictures, "find_spec", lambda n: None)
    else:
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else real(n, *a))
    asked = "torch,onnxruntime" if name == "onnxruntime" else "torch"
    made, output = ran(tmp_path, "--mode", INFERENCE, "--peers", asked)
    assert says in output
    assert len(made) == 2


@pytest.mark.parametrize("when", ["prepared", "timed"])
def test_a_peer_that_fails_is_left_out(tiny, tmp_path, monkeypatch, when):
    def fail(calls):
        raise measure.PeerFailed("compile", "no luck")

    def broken(self, row, mode):
        return fail if when == "timed" else fail(1)

    monkeypatch.setattr(peers.Compiled, "prepare", broken)
    made, output = ran(tmp_path, "--peers", "torch,compile", "--filter", "LSTM", "--mode", INFERENCE)
    assert made[0].timings.keys() == {"seqkern", "torch"}
    assert "torch.compile is left out: no luck" in output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("keras",), "suite is 'keras', expected one of rnn, attention, transformer, sdpa-sweep"),
        (("rnn", "--rows", "some"), "rows is 'some'"),
        (("rnn", "--mode", "both_of"), "mode is 'both_of'"),
        (("rnn", "--rounds", "0"), "rounds is 0"),
        (("rnn", "--seconds-per-row", "-1"), "seconds-per-row is -1"),
        (("rnn", "--threads", "0"), "threads is 0"),
        (("rnn", "--peers", "torch,keras"), "peers names 'keras'"),
        (("rnn", "--filter", "elman"), "filter 'elman' fits none of the rows"),
        (("rnn", "--filter", "LSTMCell"), "which are: LSTM 1,100,128,128,"),
        (("rnn", "--filter", "LSTMCell"), "; it fits 4 with --rows all"),
        (("rnn-cuda",), "there is no GPU here"),
        (("rnn", "--output", "/proc/nowhere"), "cannot write into the output folder"),
    ],
)
def test_refuses(words, says):
    done = bench(*words)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())


def test_console_and_threads_are_the_callers(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    console = Console(width=90, record=True, quiet=True)
    options = run.Options("rnn", rounds=1, seconds=0.001, threads=3, peers=())
    assert run.main(options, tmp_path, console) == 0
    assert seen == [3]


@pytest.mark.slow
def test_the_suite_under_pytest_benchmark():
    words = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-disable",
        "-k",
        "GRU-1x1x256x256",
        "benchmarks/bench_rnn.py",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_a_machine_is_called_by_its_cores():
    generations = {"25-1-1": " Zen 3", "25-17-1": " Zen 4", "26-2-1": " Zen 5", "27-2-1": "", "": ""}
    for family, generation in generations.items():
        told = {"family": family, "isa": "avx2"}
        assert record.title({"cpu": "AMD EPYC", **told}) == f"AMD EPYC{generation} avx2"
        assert record.title({"cpu": "Intel Xeon", **told}) == "Intel Xeon avx2"
