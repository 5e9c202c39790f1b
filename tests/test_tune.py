"""Choosing configurations: the rules, and the cache of what was measured, with a timer that makes its times up."""

import json
import warnings

import pytest
import torch
from typer.testing import CliRunner

from seqkern import tune
from seqkern.cli import app
from seqkern.kernels import rnn, tuning, tuning_cache
from seqkern.kernels.tuning import Config, Problem

HERE = {"gpu": "a GPU", "driver": 13000, "triton": "3.6.0", "seqkern": "0.1.0"}
WORK = tune.Work("lstm", "bfloat16", 64, 16, T=2)


def problem(
    kernel="sequence_forward", cell="lstm", G=4, R=5, has_c=True, dtype=torch.bfloat16, B=16, H=128, D=1
):
    return Problem(kernel, cell, G, R, has_c, dtype, dtype != torch.float32, B, H, H, D, False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning_cache, "machine", lambda: HERE)
    monkeypatch.setattr(rnn, "launch", lambda *launch: None)
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
        if config.warps == 8:
            raise RuntimeError("out of resources")
        return 1.0

    assert all(row.config[3] != 8 for row in tune.tune([WORK], device="cpu", timer=timer))

    def fails(run):
        raise RuntimeError("out of resources")

    with pytest.raises(RuntimeError, match="not one configuration of sequence_forward"):
        tune.tune([WORK], device="cpu", timer=fails)


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
