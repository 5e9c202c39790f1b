"""Choosing configurations: the rules, and the cache of what was measured, with a timer that makes its times up."""

import json
import warnings

import pytest
import torch
from typer.testing import CliRunner

from seqkern import tune
from seqkern.cli import app
from seqkern.kernels import launch, rnn, tuning, tuning_attention, tuning_cache
from seqkern.kernels.tuning import Config, Problem
from seqkern.kernels.tuning_attention import Shape

HERE = {"gpu": "a GPU", "driver": 13000, "triton": "3.6.0", "seqkern": "0.1.0"}
WORK = tune.Recurrent("lstm", "bfloat16", 64, 16, T=2)
ATTENTION = tune.Attention("bfloat16", 128, L=20, B=1, H=2)
DECODE = tune.Decode("bfloat16", 128, S=600, B=1, H=1)
SHAPE = Shape(80, 2, 128, 0, rows=8)  # of both, on what is not a GPU


def problem(
    kernel="sequence_forward", cell="lstm", G=4, R=5, has_c=True, dtype=torch.bfloat16, B=16, H=128, D=1
):
    return Problem(kernel, cell, G, R, has_c, dtype, dtype != torch.float32, B, H, H, D, False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning_cache, "machine", lambda: HERE)
    monkeypatch.setattr(rnn, "launch", lambda *launch: None)
    monkeypatch.setattr(launch, "run", lambda each: None)
    tuning_cache.measured.cache_clear()
    yield tmp_path / "seqkern" / "tuning.json"
    tuning_cache.measured.cache_clear()


def made_up(good):
    """A timer that finds one configuration twice as fast as all others."""

    def timer(run):
        return 1.0 if good in tuning_cache.force.get().configs.values() else 2.0

    return timer


@pytest.mark.parametrize(
    ("arch", "H", "fits"),
    [(80, 64, True), (80, 128, True), (80, 256, False), (86, 128, False), (90, 128, True), (90, 256, False)],
)
def test_a_sequence_fits_where_shared_memory_holds_its_weights(arch, H, fits):
    for kernel in ("sequence_forward", "sequence_backward"):
        found = tuning.sequence_candidates(arch, problem(kernel, H=H))
        assert bool(found) == fits
        for config in found:
            assert tuning.shared_bytes(problem(kernel, H=H), config) <= tuning.limits(arch).shared


def test_float32_keeps_less_on_chip():
    assert tuning.sequence_candidates(90, problem(dtype=torch.float32, H=32))
    assert not tuning.sequence_candidates(90, problem(dtype=torch.float32, H=128))


@pytest.mark.parametrize(
    ("arch", "like"), [(75, 86), (80, 80), (87, 86), (89, 89), (103, 100), (121, 120), (110, 86)]
)
def test_an_unknown_architecture_goes_by_one_that_is_no_larger(arch, like):
    assert tuning.limits(arch) == tuning.ARCHS[like]


@pytest.mark.parametrize("B", [1, 3, 16, 64, 1000])
@pytest.mark.parametrize("H", [1, 33, 128, 1000, 4096])
@pytest.mark.parametrize("arch", tuning.ARCHS)
def test_every_size_has_a_step(arch, H, B):
    for kernel in ("step_forward", "step_backward"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert tuning.step_candidates(arch, problem(kernel, H=H, B=B, dtype=dtype))


def test_wide_tiles_where_narrow_ones_would_queue():
    few, many = (tuning.sequence_candidates(90, problem(H=64, B=B))[0] for B in (16, 65536))
    assert few.BLOCK_B < many.BLOCK_B


def test_the_best_is_kept_and_found_again(cache):
    best = Config(16, 64, 64, 8, 2)
    rows = tune.tune([WORK], device="cpu", timer=made_up(best))
    assert {row.key.split("|")[0] for row in rows} == {
        f"{a}_{b}" for a in ("sequence", "step") for b in ("forward", "backward")
    }
    assert rows[0].config == best and rows[0].seconds == 1.0 and rows[0].by_rule == 2.0 and rows[0].tried > 4
    assert tuning.choose(90, problem(H=64)) == best
    assert tuning.choose(90, problem(H=128)) == tuning.sequence_candidates(90, problem(H=128))[0]
    assert [entry["machine"] for entry in json.loads(cache.read_text())["machines"]] == [HERE]


def test_attention_is_tuned_kernel_by_kernel(cache):
    best = tuning_attention.Config(64, 64, 8, 2)
    rows = tune.tune([ATTENTION, DECODE], device="cpu", timer=made_up(best))
    assert [row.key for row in rows] == [
        "attention_forward|16-bit|D128|plain",
        "attention_keys|16-bit|D128|plain",
        "attention_queries|16-bit|D128|plain",
        "attention_decode|16-bit|D128|plain|M16",
    ]
    forward, keys, queries, decode = rows
    assert forward.config == queries.config == best and (forward.seconds, forward.by_rule) == (1.0, 2.0)
    assert forward.tried == len(tuning_attention.candidates("forward", SHAPE))
    assert tuning_attention.choose("forward", SHAPE) == best
    assert keys.seconds == keys.by_rule == 2.0  # no candidate of theirs, so all took as long
    assert decode.config[0] == 16 and tuning_attention.choose("decode", SHAPE) == decode.config
    other = SHAPE._replace(size=64)
    assert tuning_attention.choose("forward", other) == tuning_attention.forward_config(other)


def test_extras_are_another_kind(cache):
    works = [each._replace(extras=True) for each in (ATTENTION, DECODE)]
    rows = tune.tune(works, device="cpu", timer=made_up(None))
    assert len(rows) == 4 and all("|extras" in row.key for row in rows)


def test_what_is_timed_is_launched_with_the_candidate(cache, monkeypatch):
    seen = []

    def timer(run):
        run()
        return float(len(seen))

    monkeypatch.setattr(launch, "run", lambda each: seen.append(each))
    rows = tune.tune([ATTENTION, DECODE], device="cpu", timer=timer)
    made = {}
    for each in seen:
        config = (
            each.arguments.get("BLOCK_M"),
            each.arguments.get("BLOCK_N"),
            each.num_warps,
            each.num_stages,
        )
        made.setdefault(each.kernel.fn.__name__, []).append(config)
    rule = tuning_attention.KERNELS["keys"].rule(SHAPE)
    assert (
        made["keys_kernel"] == tuning_attention.candidates("keys", SHAPE) and made["keys_kernel"][0] == rule
    )
    assert len(made["delta_kernel"]) == len(made["keys_kernel"]) + len(made["queries_kernel"])
    assert made["decode_kernel"] == tuning_attention.candidates("decode", SHAPE)
    tuned = [row.key.split("|")[0].removeprefix("attention_") for row in rows]
    assert tuned == [
        name for name in tuning_attention.KERNELS if name != "bias"
    ]  # which goes by its rule alone
    assert [row.config for row in rows] == [made[f"{name}_kernel"][0] for name in tuned]


def test_one_file_holds_both_kinds(cache):
    layers = tune.tune([WORK], device="cpu", timer=made_up(None))
    before = tuning_cache.read(cache, HERE)
    others = tune.tune([ATTENTION, DECODE], device="cpu", timer=made_up(None))
    found = tuning_cache.read(cache, HERE)
    assert before.items() < found.items()
    assert found == {row.key: row.config for row in [*layers, *others]}
    assert {len(config) for config in found.values()} == {4, 5}


def test_a_stop_keeps_what_was_found(cache):
    def timer(run):
        if any(key.startswith("attention_queries") for key in tuning_cache.force.get().configs):
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tune.tune([ATTENTION], device="cpu", timer=timer)
    assert list(tuning_cache.read(cache, HERE)) == [
        f"attention_{kernel}|16-bit|D128|plain" for kernel in ("forward", "keys")
    ]


def test_another_machine_has_its_own(cache, monkeypatch):
    best = Config(16, 64, 64, 8, 2)
    tune.tune([WORK], device="cpu", timer=made_up(best))
    for what in HERE:
        monkeypatch.setattr(tuning_cache, "machine", lambda what=what: {**HERE, what: "other"})
        tuning_cache.measured.cache_clear()
        assert tuning.choose(90, problem(H=64)) == tuning.sequence_candidates(90, problem(H=64))[0]
    tune.tune([WORK], device="cpu", timer=made_up(Config(16, 64, 64, 8, 3)))
    assert len(json.loads(cache.read_text())["machines"]) == 2


def test_a_second_run_keeps_what_it_did_not_measure(cache):
    tune.tune([WORK], device="cpu", timer=made_up(None))
    before = tuning_cache.read(cache, HERE)
    tune.tune([WORK._replace(H=32)], device="cpu", timer=made_up(None))
    assert before.items() < tuning_cache.read(cache, HERE).items()


def kept(configs):
    return json.dumps({"machines": [{"machine": HERE, "configs": configs}]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"machines": 3}',
        '{"machines": [{}]}',
        '{"other": "program"}',
        kept({"step_forward|x": [1, 2]}),
        kept({"step_forward|x": [1, 2, 4, 4, -5]}),
        kept({"step_forward|x": [16, 48, 64, 8, 2]}),
        kept({"step_forward|x": [16, 64, 64, 8, True]}),
        kept({"step_forward|x": "16888"}),
        kept({"step_forward|x": 16}),
        kept({"attention_forward|x": [64, 64, 64, 8, 2]}),
        kept({"attention_forward|x": [64, 48, 8, 2]}),
        kept({"attention_forward|x": [64, 64, 8, 2.0]}),
        kept({"sequence_forward|x": [16, 64, 64, 8, 2], "attention_keys|x": [64, 64, 8, 0]}),
        kept({"x": [16, 64, 64, 8, 2]}),
    ],
)
def test_a_file_that_is_not_ours_is_ignored_with_one_warning(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            assert tuning.choose(90, problem()) == tuning.sequence_candidates(90, problem())[0]
            assert tuning_attention.choose("keys", SHAPE) == tuning_attention.keys_config(SHAPE)
    assert len(seen) == 1 and "is not a file of `seqkern tune` and is ignored" in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune.tune([WORK], device="cpu", timer=made_up(None))
        assert tuning.choose(90, problem(H=64)) is not None


def test_a_sequence_takes_no_tile_that_would_not_hold_it(cache):
    p = problem(H=128)
    tuning_cache.write(cache, HERE, {p.key: Config(16, 64, 64, 4, 1)})
    assert tuning.choose(90, p) == tuning.sequence_candidates(90, p)[0]


def test_a_candidate_that_fails_is_passed_over(cache):
    def timer(run):
        (config,) = tuning_cache.force.get().configs.values()
        if config[-2] == 8:  # warps
            raise RuntimeError("out of resources")
        return 1.0

    rows = tune.tune([WORK, DECODE], device="cpu", timer=timer)
    assert len(rows) == 5 and all(row.config[-2] == 4 for row in rows)

    def fails(run):
        raise RuntimeError("out of resources")

    for work, kernel in ((WORK, "sequence_forward"), (ATTENTION, "attention_forward")):
        with pytest.raises(RuntimeError, match=f"not one configuration of {kernel}"):
            tune.tune([work], device="cpu", timer=fails)


def test_driver_and_machine_are_told_without_a_gpu():
    assert tuning_cache.driver_version() >= 0
    assert set(tuning_cache.machine()) == set(HERE)


def test_command_refuses_before_it_does_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["tune"])
    assert done.exit_code == 2 and "nothing was timed" in done.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = CliRunner().invoke(app, ["tune", "--cell", "elman"])
    assert done.exit_code == 2 and "'elman' is not one of lstm" in done.output
    assert not list(tmp_path.iterdir())


@pytest.fixture
def asked(monkeypatch):
    """What the command has tuned, on a GPU that is made up."""
    works = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    row = tune.Row("attention_forward|16-bit|D64|plain", (128, 64, 8, 3), 1e-3, 2e-3, 17)
    monkeypatch.setattr(tune, "tune", lambda given, say: works.extend(given) or [row])
    return works


def test_command_tunes_layers_and_attention(asked):
    done = CliRunner().invoke(app, ["tune"])
    assert done.exit_code == 0 and "128, 64, 8, 3" in done.output and "2000" in done.output
    kinds = {
        kind: [w for w in asked if isinstance(w, kind)]
        for kind in (tune.Recurrent, tune.Attention, tune.Decode)
    }
    assert len(kinds[tune.Recurrent]) == len(tune.CELLS) * len(tune.HIDDEN) * len(tune.BATCH)
    assert kinds[tune.Attention] == [tune.Attention("bfloat16", D) for D in tune.HEAD]
    assert kinds[tune.Decode] == [tune.Decode("bfloat16", D) for D in tune.HEAD]


def test_command_tunes_what_it_is_asked_for(asked):
    words = "--no-recurrent --dtype float16 --head-size 80 --group 1 --group 32 --length 512 --extras"
    assert CliRunner().invoke(app, f"tune {words}").exit_code == 0
    assert asked == [
        each
        for extras in (False, True)
        for each in (
            tune.Attention("float16", 80, extras, 512),
            tune.Decode("float16", 80, extras, 1),
            tune.Decode("float16", 80, extras, 32),
        )
    ]
    asked.clear()
    assert CliRunner().invoke(app, "tune --no-attention --cell gru --hidden 64 --batch 4").exit_code == 0
    assert asked == [tune.Recurrent("gru", "bfloat16", 64, 4)]
