"""The suites of attention and of the Transformer, on tiny rows."""

from dataclasses import replace
from math import isclose

import pytest
import torch
from typer.testing import CliRunner

from seqkern.bench import (
    attention,
    attention_models,
    fresh,
    limits,
    measure,
    onnx_attention,
    onnx_peer,
    peers,
    pictures,
    record,
    run,
    tables,
    transformer,
)
from seqkern.bench.attention import BF16, DECODE, LENGTHS, OPTION, AttentionRow, SweepRow
from seqkern.bench.attention_models import OPTIONS
from seqkern.bench.rows import FLEX, INFERENCE, MODES, ONNX, OURS, PEERS, TORCH, TRAINING
from seqkern.bench.suites import SUITES
from seqkern.bench.targets import PLAIN, Target, judge
from seqkern.bench.transformer import BlocksRow, DecoderRow, EncoderRow, GenerationRow, WeightsRow
from seqkern.cli import app

TINY = AttentionRow("tiny", PEERS, "float32", 2, 4, 9, 8)
DECODING = replace(TINY, name="decode", group=DECODE, L=1, S=11, kv=2)
ATTENTION = {
    "plain": TINY,
    "causal": replace(TINY, name="causal", causal=True),
    "bf16": replace(TINY, name="bf16", group=BF16, dtype="bfloat16"),
    "decode": DECODING,
    "sweep": SweepRow("sweep", attention.SWEEP, "float32", 1, 2, 3, 4, S=5),
} | {
    option: replace(TINY, name=option, group=OPTION, option=option, causal=option == "window")
    for option in OPTIONS
    if option
}
GENERATION = GenerationRow("generation", transformer.GENERATION, "float32", 2, 5, 3, 1, 8, 2, 16, 11)
STACKS = {
    "encoder": EncoderRow("encoder", PEERS, "float32", INFERENCE, 2, 3, 1, 8, 2, 16),
    "encoder training": EncoderRow("encoder training", PEERS, "float32", TRAINING, 2, 3, 1, 8, 2, 16),
    "decoder": DecoderRow("decoder", transformer.DECODER, "float32", 2, 3, 5, 1, 8, 2, 16),
    "blocks": BlocksRow("blocks", transformer.LINEAR, "float32", 2, 3, 2, 8, 2, 16),
    "block": BlocksRow("block", transformer.LINEAR, "bfloat16", 2, 1, 2, 8, 2, 16),
    "weights": WeightsRow("weights", OPTION, "float32", 2, 3, 8, 2),
    "generation": GENERATION,
}
CASES = [
    pytest.param(row, mode, id=f"{name}-{mode}")
    for name, row in (ATTENTION | STACKS).items()
    for mode in row.modes
]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(attention_models, "WINDOW", 3)
    monkeypatch.setattr(attention, "WINDOW", 3)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs a suite of the given rows quickly and gives its records and what was printed."""
    monkeypatch.setattr(fresh, "probe", lambda *a, **k: (0.25, 1_000_000))
    monkeypatch.setattr(
        limits, "measure", lambda: limits.Limits(100.0, {"L2": 50.0, "memory": 10.0}, {"memory": 1})
    )
    monkeypatch.setattr(limits.Limits, "sample", lambda self, levels=(): None)

    def run(suite, rows, *words):
        monkeypatch.setitem(SUITES, suite, replace(SUITES[suite], rows=tuple(rows)))
        options = ("--rounds", "3", "--seconds-per-row", "0.003", "--output", str(tmp_path))
        done = CliRunner().invoke(app, ["bench", suite, *options, *words])
        assert done.exit_code == 0, done.output
        (path,) = tmp_path.glob("*.jsonl")
        return record.read(path), done.output

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
        first = found[0] if isinstance(found, tuple) else found
        worse = first + 1 if not first.is_floating_point() else first * 1.2
        return (worse, *found[1:]) if isinstance(found, tuple) else worse

    model.forward = spoilt
    with pytest.raises(measure.WrongResult, match="output"):
        measure.gate(row, mode, model)


@pytest.mark.parametrize("option", OPTIONS)
def test_torch_computes_what_seqkern_is_asked_for(option):
    """What a user of torch would write is the same function, but for the mask that dropout draws."""
    row = ATTENTION[option or "plain"]
    model, inputs = row.build()
    if option == "dropout":
        pytest.skip("torch draws a mask of its own")
    want = measure.results(attention_models.BySeqkern(model.asked, "reference"), inputs, INFERENCE)
    for name, got in measure.results(model, inputs, INFERENCE).items():
        torch.testing.assert_close(got, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", [r for r in ATTENTION.values() if ONNX in r.rivals(INFERENCE)], ids=str)
def test_onnx_agrees_with_torch(row):
    model, inputs = row.build()
    here = onnx_peer.session(onnx_attention.model(model, inputs), 1)
    found = onnx_attention.outputs(here.run(None, onnx_attention.feeds(model, inputs)), model)
    measure.compare(ONNX, measure.results(model, inputs, INFERENCE), found)
    with pytest.raises(measure.PeerFailed, match="differ by"):
        measure.compare(ONNX, measure.results(model, inputs, INFERENCE), [found[0] * 1.1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "causal", "softcap", "alibi", "window"])
def test_flex_attention_agrees_with_torch(name):
    row = replace(ATTENTION[name], group=OPTION, flex=True, L=32, D=16)
    assert FLEX in row.rivals(INFERENCE) and FLEX not in row.rivals(TRAINING)
    peer = peers.Flex(1)
    timed = peer.prepare(row, INFERENCE)
    assert timed(2) > 0 and peer.first_call > 0
    peer.close()


def test_work_is_counted():
    n = 4.0 * 2 * 4 * 8
    assert TINY.flop(INFERENCE) == n * 81 and TINY.flop(TRAINING) == 3.5 * n * 81
    assert ATTENTION["causal"].flop(INFERENCE) == n * 81 / 2
    assert ATTENTION["window"].flop(INFERENCE) == n * (1 + 2 + 7 * 3)
    assert DECODING.bytes_read(INFERENCE) == 2 * 2 * 2 * 11 * 8 * 4 and TINY.bytes_read(INFERENCE) is None
    assert DECODING.amount(INFERENCE) == DECODING.bytes_read(INFERENCE) / 1e9
    encoder = STACKS["encoder"]
    assert encoder.flop(INFERENCE) == 2 * 3 * (2 * (4 * 64 + 2 * 128) + 4 * 3 * 8)
    decoder = STACKS["decoder"]
    products = 3 * (6 * 64 + 2 * 128) + 5 * 2 * 64
    assert decoder.flop(INFERENCE) == 2 * (2 * products + 4 * 8 * (4.5 + 15))
    assert decoder.flop(TRAINING) == 2 * (6 * products + 3.5 * 4 * 8 * (4.5 + 15))
    assert GENERATION.amount(INFERENCE) == 10
    one = replace(GENERATION, B=1)
    weights = 6 * 64 + 2 * 128 + 8 * 11
    assert one.bytes_read(INFERENCE) == 4 * weights * 5 and one.bytes_held(INFERENCE) == 4 * weights


def test_levels():
    found = limits.Limits(sets={"L2": 100, "L3": 1000, "memory": 9000})
    assert [found.level(held) for held in (None, 200, 201, 2000, 2001)] == ["L2", "L2", "L3", "L3", "memory"]
    found.rooms["L3"] = 3000  # of which the probe reads less than half
    assert found.level(2001) == "L3" and found.level(3001) == "memory"


@pytest.mark.parametrize(
    ("target", "ratios", "share", "read", "verdict", "says"),
    [
        (Target(2.0, TORCH, and_peak=0.62), {TORCH: 2.1}, 0.7, None, "met", "2x torch and 62% of peak"),
        (Target(2.0, TORCH, and_peak=0.62), {TORCH: 1.9}, 0.7, None, "missed, 70% of peak", ""),
        (Target(1 / 1.3, PLAIN), {PLAIN: 0.8, TORCH: 0.1}, None, None, "met", "1.3x the plain time at most"),
        (Target(1 / 1.3, PLAIN), {PLAIN: 0.7, TORCH: 9.0}, None, None, "missed", ""),
        (Target(None, read=0.8), {TORCH: 0.5}, None, 0.81, "met", "80% of bandwidth"),
        (Target(None, read=0.8), {}, None, 0.79, "missed", ""),
        (Target(None, read=0.8), {TORCH: 3.0}, None, None, "-", ""),
    ],
)
def test_verdicts(target, ratios, share, read, verdict, says):
    assert judge(target, ratios, share, read) == verdict
    assert says in str(target)


def test_suites_have_the_rows_of_the_issue():
    for suite in ("attention", "transformer", "sdpa-sweep"):
        rows = SUITES[suite].rows
        assert len({row.name for row in rows}) == len(rows)
        assert all(row.suite == suite and row.flop(mode) > 0 for row in rows for mode in row.modes)
    rows = SUITES["attention"].rows
    assert {row.option for row in (*rows, *SUITES["attention-cuda"].rows)} == set(OPTIONS)
    assert {row.L for row in rows if row.group == LENGTHS} == {1 << n for n in range(7, 15)}
    for row in rows:
        assert row.group == LENGTHS or all(row.target(mode) for mode in row.modes)
    window = next(row for row in rows if row.option == "window")
    # In proportion to the keys that are seen, with the allowance of the other options.
    assert window.target(INFERENCE).ratio > 1
    assert {row.S for row in SUITES["sdpa-sweep"].rows} == set(attention.SWEPT)
    assert all(row.forward_flop() <= attention.SWEPT_FLOP for row in SUITES["sdpa-sweep"].rows)
    assert all(row.target(mode) for row in SUITES["transformer"].rows for mode in row.modes)


def test_attention_is_timed_written_drawn_and_shown(bench, tmp_path):
    lengths = [
        replace(TINY, name=f"{causal} {n}", group=LENGTHS, L=n, causal=causal)
        for causal in (False, True)
        for n in (4, 8)
    ]
    made, output = bench(
        "attention", [TINY, ATTENTION["mask"], DECODING, *lengths], "--peers", "torch", "--threads", "1"
    )
    assert [(r.name, r.mode) for r in made[:4]] == [("tiny", m) for m in MODES] + [("mask", m) for m in MODES]
    by_name = {r.name: r for r in made if r.mode == INFERENCE}
    assert by_name["tiny"].timings.keys() == {OURS, TORCH}
    assert by_name["mask"].timings.keys() == {OURS, TORCH, PLAIN}
    decode = by_name["decode"]
    assert decode.level == "memory" and decode.unit == "GB/s"
    assert isclose(decode.share_of_read, decode.speed(OURS) / 10.0) and isclose(decode.limit, 10.0)
    assert by_name["tiny"].limit == 100.0 and all(r.backend for r in made)
    assert "GB/s" in output and "attention took" in output
    assert max(map(len, output.splitlines())) <= 100
    assert len(list(tmp_path.glob("*.png"))) == 2
    text = tables.markdown(made, {"bars": "bars.png"})
    for heading in ("Inference, GF/s, options", "Training, GF/s, options", "Inference, GB/s, decoding"):
        assert heading in text
    assert "over its own plain time" in text and "1.3x the plain time at most: " in text


def test_stacks_are_timed(bench):
    made, output = bench("transformer", STACKS.values(), "--peers", "torch", "--threads", "1")
    assert [(r.name, r.mode) for r in made] == [
        (row.name, mode) for row in STACKS.values() for mode in row.modes
    ]
    assert made[-1].unit == "tokens/s" and made[-1].limit is None
    assert "tokens/s" in output
    assert "greedy decoding" in tables.markdown(made)


class Unreachable(SweepRow):
    def target(self, mode):
        return Target(1e9 if self.L == 1 else 0.0, TORCH)


def test_calls_of_a_sweep_that_missed_are_timed_again(bench, monkeypatch):
    rows = [Unreachable(f"1,1,{L},4,4", attention.SWEEP, "float32", 1, 1, L, 4, S=4) for L in (1, 2)]
    asked, lost = [], set()

    def run_row(row, *rest):
        asked.append(row.L)
        made = timed(row, *rest)
        return replace(made, timings={}) if len(asked) in lost else made

    timed = run.run_row
    monkeypatch.setattr(run, "run_row", run_row)
    for number in (0, 3):  # a second timing without a figure leaves the first
        asked.clear()
        lost.add(number)
        made, _ = bench("sdpa-sweep", rows, "--peers", "torch", "--threads", "1")
        assert asked == [1, 2, 1] and [each.name for each in made[-2:]] == [row.name for row in rows]
        assert all(each.ratios for each in made)
    monkeypatch.setitem(SUITES, "sdpa-sweep", replace(SUITES["sdpa-sweep"], again=0.0))
    asked.clear()
    bench("sdpa-sweep", rows, "--peers", "torch", "--threads", "1")
    assert asked == [1, 2]


def test_a_sweep_is_a_heat_map_and_its_slowest_calls(bench, tmp_path):
    rows = [
        SweepRow(f"{B},{H},{L},4,{D}", attention.SWEEP, "float32", B, H, L, D, S=4)
        for B, H in ((1, 1), (1, 2))
        for L in (1, 2)
        for D in (4, 8)
    ]
    made, output = bench("sdpa-sweep", rows, "--peers", "torch", "--threads", "1")
    assert len(made) == 8 and made[0].timings[OURS].first_call is None
    slow = replace(made[0].timings[TORCH], ratio=0.01)
    made[0] = replace(made[0], timings=made[0].timings | {TORCH: slow})
    text = tables.markdown(made)
    assert "8 calls of scaled_dot_product_attention" in text and "0.01x to" in text
    assert text.count("\n|") == 2 + min(len(made), tables.SLOW_SHOWN)
    assert "8 calls of" in " ".join(output.split())
    (picture,) = pictures.draw(made, tmp_path / "again.jsonl").values()
    assert picture.stat().st_size > 10_000
