"""The command ``seqkern``: what is installed, whether it is right, how fast it is, and the demo."""

import platform
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import seqkern
from seqkern import report, testing
from seqkern.ops import _backend, _hardware, _library

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Fused kernels for PyTorch sequence models.",
)


@app.callback()
def known_backend() -> None:
    try:
        _backend.forced()
    except ValueError as e:
        typer.echo(f"seqkern: {e}", err=True)
        raise typer.Exit(2) from e


@app.command()
def info() -> None:
    """What is installed, what is missing and how to get it."""
    native = _library.native()
    rows = [
        ("seqkern", seqkern.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("backends", ", ".join(_backend.present())),
    ]
    if native is None:
        rows.append(("compiled kernels", f"missing: {_library.why_missing()}"))
    else:
        built = native.build_info()
        rows += [
            ("compiled kernels", f"for the CPU, by GCC {built['compiler']}"),
            ("instruction set", f"{native.isa()} of {', '.join(native.isas())}"),
            ("threads", native.num_threads()),
        ]
    rows += [("Triton", _hardware.TRITON_MISSING or metadata.version("triton")), ("GPU", _gpu())]
    Console().print(report.key_values("", rows))


def _gpu() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(names)
    return "none" if torch.version.cuda else f"none: torch {torch.__version__} was built without CUDA"


@app.command()
def verify() -> None:
    """Holds every kind of layer against torch and float64; exit code 1 where one is less accurate."""
    layers = ("RNN", "LSTM", "GRU")
    recurrent = [(name, {}) for name in layers]
    recurrent += [(name, {"num_layers": 2, "bidirectional": True}) for name in layers]
    recurrent.append(("LSTM", {"proj_size": 24}))
    cases = [(name, (40, 64), options, 1) for name, options in recurrent]
    cases.append(("MultiheadAttention", (40, 4), {"add_bias_kv": True}, 3))
    cases += [
        (f"Transformer{part}Layer", (40, 4, 64), {}, n) for n, part in enumerate(("Encoder", "Decoder"), 1)
    ]
    rows, failed = [], 0
    for name, sizes, options, inputs in cases:
        torch.manual_seed(0)
        model = getattr(torch.nn, name)(*sizes, **options)
        given = [torch.randn(30, 8, 40) for _ in range(inputs)]
        try:
            with testing.without_torchs_warnings():
                result, verdict = seqkern.verify(model, *given), True
        except seqkern.VerificationError as e:
            result, verdict = e.result, False
            failed += 1
        except RuntimeError as e:  # a forced backend that does not serve the layer
            typer.echo(f"seqkern verify: {name}: {e}", err=True)
            raise typer.Exit(2) from e
        worst = max(result.rows, key=lambda row: row.seqkern / row.allowed)
        said = ", ".join(f"{key}={value}" for key, value in options.items())
        figures = (report.error(worst.torch), report.error(worst.seqkern), report.error(worst.allowed))
        rows.append((f"{name}({said})", worst.name, *figures, report.verdict(verdict)))
    columns = ["layer", "worst tensor", "torch", "seqkern", "allowed", ""]
    Console().print(report.table("Relative RMS error against float64", columns, rows, right=[2, 3, 4]))
    if failed:
        raise typer.Exit(1)


@app.command()
def tune(
    cell: Annotated[str, typer.Option(help="lstm, gru, rnn_tanh, rnn_relu or all")] = "all",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or all")] = "bfloat16",
    hidden: Annotated[list[int] | None, typer.Option(min=1, help="hidden size; may be repeated")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="batch size; may be repeated")] = None,
    head_size: Annotated[
        list[int] | None, typer.Option(min=1, max=256, help="of attention; may be repeated")
    ] = None,
    group: Annotated[
        list[int] | None,
        typer.Option(min=1, max=64, help="query heads to a key head when decoding; may be repeated"),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="queries and keys of the attention that is timed, but for decoding"),
    ] = None,
    extras: Annotated[
        bool, typer.Option("--extras", help="attention with mask, bias and dropout too; slow to compile")
    ] = False,
    recurrent: Annotated[bool, typer.Option(help="tune the recurrent layers")] = True,
    attention: Annotated[bool, typer.Option(help="tune attention and decoding")] = True,
) -> None:
    """Times the Triton kernels' configurations on this GPU and keeps the best; exit code 2 without a GPU."""
    from seqkern import tune as tuner

    if reason := tuner.why_not():
        typer.echo(f"seqkern tune: {reason}", err=True)
        raise typer.Exit(2)
    cells = tuner.CELLS if cell == "all" else (cell,)
    dtypes = tuple(tuner.DTYPES) if dtype == "all" else (dtype,)
    for given, known in ((cells, tuner.CELLS), (dtypes, tuner.DTYPES)):
        if unknown := set(given) - set(known):
            typer.echo(f"seqkern tune: {unknown.pop()!r} is not one of {', '.join(known)} or all", err=True)
            raise typer.Exit(2)
    works: list[tuner.Work] = []
    if recurrent:
        sizes = [(h, b) for h in hidden or tuner.HIDDEN for b in batch or tuner.BATCH]
        works += [tuner.Recurrent(c, d, h, b) for c in cells for d in dtypes for h, b in sizes]
    if attention:
        kinds = (False, True) if extras else (False,)
        for d, size, more in product(dtypes, head_size or tuner.HEAD, kinds):
            works.append(tuner.Attention(d, size, more, length or tuner.LENGTH))
            works += [tuner.Decode(d, size, more, g) for g in group or tuner.GROUP]
    rows = tuner.tune(works, say=typer.echo)
    columns = ["kernel", "B, H, K or M, N; warps, stages", "us", "us by rule", "tried"]
    found = [
        (r.key, ", ".join(map(str, r.config)), f"{r.seconds * 1e6:.0f}", f"{r.by_rule * 1e6:.0f}", r.tried)
        for r in rows
    ]
    Console().print(report.table("Best configurations, whole op", columns, found, right=[2, 3, 4]))


@app.command()
def demo(
    cell: Annotated[str, typer.Option(help="lstm, gru, rnn or all")] = "all",
    steps: Annotated[int, typer.Option(help="steps of training for each cell and run")] = 600,
    output: Annotated[Path, typer.Option(help="folder of the picture")] = Path("demo"),
    text: Annotated[Path | None, typer.Option(help="a text file to learn instead")] = None,
) -> None:
    """Trains a character language model on torch and on seqkern, side by side."""
    from seqkern.demo import main

    try:
        raise typer.Exit(main(cell, steps=steps, output=output, text=text))
    except ValueError as e:
        typer.echo(f"seqkern demo: {e}", err=True)
        raise typer.Exit(2) from e


@app.command()
def bench(
    suite: Annotated[
        str, typer.Argument(help="rnn, attention, transformer, sdpa-sweep, rnn-cuda or attention-cuda")
    ] = "rnn",
    only: Annotated[str, typer.Option("--filter", help="rows whose name has this text in it")] = "",
    mode: Annotated[str, typer.Option(help="inference, training, backward or both")] = "both",
    rows: Annotated[str, typer.Option(help="peers (those with known figures) or all")] = "peers",
    rounds: Annotated[
        int | None, typer.Option(help="turns of each peer in a row; the suite's number if not given")
    ] = None,
    seconds_per_row: Annotated[
        float | None, typer.Option(help="seconds of timing for each row and mode, likewise")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder of results and pictures")] = None,
    threads: Annotated[
        int | None, typer.Option(help="threads of every peer; torch's number if not given")
    ] = None,
    peers: Annotated[str, typer.Option(help="a list with commas, or all")] = "all",
    no_peers: Annotated[bool, typer.Option("--no-peers", help="time seqkern alone")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the suite's if not given")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="leave out the rows that the results file has already")
    ] = False,
) -> None:
    """Times a suite against every peer found here; writes JSON lines and a picture."""
    from seqkern.bench.peers import PEERS
    from seqkern.bench.run import Options, main

    names = () if no_peers else tuple(PEERS) if peers == "all" else tuple(peers.split(","))
    options = Options(suite, rows, only, mode, rounds, seconds_per_row, threads, names, device, resume)
    try:
        raise typer.Exit(main(options, output))
    except ValueError as e:
        typer.echo(f"seqkern bench: {e}", err=True)
        raise typer.Exit(2) from e
