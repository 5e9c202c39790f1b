"""Tables for the terminal and folders for what is written, shared by the command line's parts."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def writable(folder: Path) -> Path:
    """The folder, made where it is missing; raises ValueError where nothing could be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ValueError(f"cannot write into the output folder {folder}: {e.strerror}") from e
    return folder


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    right: Iterable[int] = (),
    *,
    tight: bool = False,
) -> Table:
    """A table of plain texts; the columns numbered in ``right`` (from 0) hold figures and are aligned so.

    ``tight`` leaves the frame away, for many columns.
    """
    found = Table(title=title or None, title_justify="left")
    if tight:
        found.box, found.padding, found.pad_edge = box.SIMPLE_HEAD, (0, 1, 0, 0), False
    for i, column in enumerate(columns):
        found.add_column(column, justify="right" if i in set(right) else "left", overflow="fold")
    for row in rows:
        found.add_row(*(each if isinstance(each, Text) else escape(str(each)) for each in row))
    return found


def key_values(title: str, rows: Iterable[tuple[str, Any]]) -> Table:
    """Two columns without a heading."""
    found = table(title, ["", ""], rows)
    found.show_header = False
    return found


def error(value: float) -> str:
    """A relative error for a table's cell."""
    return f"{value:.1e}"


def verdict(ok: bool) -> Text:
    return Text("ok", style="green") if ok else Text("too large", style="bold red")


def explanation(what: Any) -> Table:
    rows = [
        (
            row.name or "(itself)",
            row.kind,
            row.backend,
            row.calls,
            "\n".join(f"{backend}: {reason}" for backend, reason in row.declined),
        )
        for row in what.rows
    ]
    return table(
        "Which backend runs", ["module", "kind", "backend", "calls", "declined before it"], rows, right=[3]
    )


def verification(what: Any) -> Group:
    rows = [
        (
            row.name,
            str(row.dtype)[6:],
            error(row.torch),
            error(row.seqkern),
            error(row.allowed),
            verdict(row.ok),
        )
        for row in what.rows
    ]
    columns = ["tensor", "dtype", "torch", "seqkern", "allowed", ""]
    body = table("Relative RMS error against float64", columns, rows, right=[2, 3, 4])
    return Group(body, *(Text(note) for note in what.notes()), explanation(what.backends))
