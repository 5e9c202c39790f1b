"""What the compilers make of the Triton kernels, without a GPU: registers, shared memory, spills, instructions.

    python benchmarks/compiled.py     rewrites results/compiled-rnn.jsonl, which tests/test_triton_compile.py holds

Each case runs the launcher on tensors of its sizes with the launch itself taken out, so that what is compiled has the
configuration, the constants and the alignments that a GPU would be given.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqkern.kernels import rnn, tuning, tuning_cache
from seqkern.kernels.cells import CELLS

RESULTS = Path(__file__).parent / "results" / "compiled-rnn.jsonl"
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
ARCHS = (80, 90, 100)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
COUNTED = ("HGMMA", "UTCHMMA", "HMMA", "FFMA", "FFMA2", "LDGSTS", "LDL", "STL", "BAR")


class Case(NamedTuple):
    """One forward and backward of a layer."""

    cell: str
    dtype: str
    H: int
    B: int
    path: str = "sequence"  # or "steps", or "cell" for a single step of a cell module
    proj: int = 0
    packed: bool = False
    D: int = 1

    @property
    def name(self) -> str:
        options = [f"proj{self.proj}"] * bool(self.proj) + ["packed"] * self.packed + ["both"] * (self.D == 2)
        return "-".join([self.cell, self.dtype, f"H{self.H}", f"B{self.B}", self.path, *options])


CASES = [
    Case("lstm", "bfloat16", 64, 16),
    Case("lstm", "bfloat16", 128, 16),
    Case("lstm", "bfloat16", 100, 16),
    Case("lstm", "bfloat16", 128, 16, packed=True, D=2),
    Case("lstm", "bfloat16", 128, 4096),
    Case("lstm", "bfloat16", 64, 8192),
    Case("lstm", "float16", 128, 16),
    Case("lstm", "float16", 64, 16, proj=32),
    Case("lstm", "float32", 32, 16),
    Case("lstm", "tf32", 64, 16),
    Case("gru", "bfloat16", 128, 16),
    Case("gru", "bfloat16", 33, 16, packed=True),
    Case("gru", "float32", 32, 16),
    Case("gru", "bfloat16", 100, 3),
    Case("lstm", "bfloat16", 33, 1),
    Case("rnn_tanh", "bfloat16", 256, 16),
    Case("rnn_tanh", "float16", 250, 16),
    Case("rnn_relu", "float32", 64, 16),
    Case("lstm", "bfloat16", 512, 1, "steps"),
    Case("lstm", "bfloat16", 1024, 64, "steps"),
    Case("lstm", "bfloat16", 512, 32, "steps", proj=128, packed=True, D=2),
    Case("lstm", "float32", 512, 16, "steps"),
    Case("lstm", "tf32", 1024, 64, "steps"),
    Case("gru", "bfloat16", 1000, 64, "steps"),
    Case("gru", "float32", 512, 64, "steps"),
    Case("rnn_tanh", "bfloat16", 2048, 64, "steps"),
    Case("lstm", "bfloat16", 1024, 64, "cell"),
    Case("gru", "float32", 256, 16, "cell"),
]


@contextmanager
def pretending(arch: int, case: Case, into: list):
    """The launchers as on a GPU of this architecture, each launch noted down instead of made."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    with (
        mock.patch.object(rnn, "launch", lambda *launch, **_: into.append(launch)),
        mock.patch.object(tuning, "arch_of", return_value=arch),
        mock.patch.object(tuning_cache, "measured", return_value={}),
        tuning_cache.forced({}, steps=case.path != "sequence"),
    ):
        matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def problem(case: Case, kernel: str) -> tuning.Problem:
    """What the launcher asks a configuration for."""
    c, dtype = CELLS[case.cell], torch.float32 if case.dtype == "tf32" else getattr(torch, case.dtype)
    sizes = (case.B, case.H, case.proj or case.H, case.D)
    return tuning.Problem(
        kernel, case.cell, c.G, c.R, c.HAS_C, dtype, case.dtype != "float32", *sizes, case.proj > 0
    )


def launches(arch: int, case: Case) -> list:
    """(kernel, grid, arguments, constants, config) of the forward and of the backward."""
    dtype = torch.float32 if case.dtype == "tf32" else getattr(torch, case.dtype)
    G, H, B, P, I = CELLS[case.cell].G, case.H, case.B, case.proj or case.H, 16

    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    lead = () if case.path == "cell" else (case.D,)
    one = [empty(G * H, I), empty(G * H, P), empty(G * H), empty(G * H), empty(P, H) if case.proj else None]
    weights = [*one, *(one if case.D == 2 else [None] * 5)]
    batch_sizes = torch.tensor([B, 1]) if case.packed else None
    rows = (B,) if case.path == "cell" else (B + 1,) if case.packed else (2, B)
    c = empty(*lead, B, H) if case.cell == "lstm" else None
    tensors = [empty(*rows, I), batch_sizes, empty(*lead, B, P), c, *weights]
    found: list = []
    with pretending(arch, case, found):
        output, h_n, c_n, reserve = rnn.forward(*tensors, case.cell, True)
        rnn.backward(output, h_n, c_n, output, reserve, *tensors, case.cell, True, True)
    first = {kernel.__name__: (kernel, *rest) for kernel, *rest in reversed(found)}  # one of many equal steps
    return list(first.values())


def compiled(kernel, arguments: dict, constants: dict, config: tuning.Config, arch: int):
    """A launch, compiled as Triton's runtime would."""
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = constants[name] if name in constants else arguments[name]
        special = i not in kernel.do_not_specialize and name not in kernel.do_not_specialize
        if name in constants or value is None or (special and type(value) is int and value == 1):
            signature[name] = "constexpr"
            fixed[(i,)] = value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[name] = TYPES[value.dtype] if tensor else "i32"
        if tensor or (special and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def figures(binary) -> dict:
    """Registers, shared memory, bytes of local memory and counts of telling instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [TOOLS / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())  # type: ignore[union-attr]
    seen = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9]*)", code, re.MULTILINE))
    return {
        "registers": registers,
        "shared": binary.metadata.shared,
        "local": stack + local,
        "instructions": sum(seen.values()),
        **{name: seen[name] for name in COUNTED if seen[name]},
    }


def measure(job: tuple[int, Case]) -> list[dict]:
    """Rows of the table for one case on one architecture."""
    arch, case = job
    torch.set_num_threads(1)
    found = []
    for kernel, _, arguments, constants, config in launches(arch, case):
        row = {"case": case.name, "kernel": kernel.__name__, "arch": arch, "config": list(config)}
        found.append({**row, **figures(compiled(kernel, arguments, constants, config, arch))})
    return found


def measure_all(jobs: list[tuple[int, Case]]) -> list[dict]:
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(measure, jobs) for row in rows]


def main() -> int:
    rows = measure_all([(arch, case) for case in CASES for arch in ARCHS])
    RESULTS.parent.mkdir(exist_ok=True)
    head = {"triton": triton.__version__, "torch": torch.__version__}
    RESULTS.write_text("".join(json.dumps(each) + "\n" for each in [head, *rows]))
    spilled = [r for r in rows if r["local"]]
    for r in spilled:
        print(f"{r['local']} bytes spilled: sm_{r['arch']} {r['kernel']} {r['case']} {r['config']}")
    print(f"{len(rows)} kernels compiled, {len(spilled)} spill; written to {RESULTS}")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
