"""Compiles what a launcher would launch, for an architecture that need not be here, and reads what came out.

The compiler of Triton, its assembler and its disassembler come with the wheel: no GPU and no driver is asked.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

SHARED_LIMIT = {
    80: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # of one program, by CUDA's guide


class Resources(NamedTuple):
    """What one program takes of a multiprocessor, and the tensor instructions in its code."""

    registers: int  #: of a thread
    spills: int  #: bytes of local memory of a thread
    shared: int  #: bytes
    tensor: str  #: kinds of matrix instructions, such as "HGMMA"; "" for none
    instructions: int


class _Nowhere:
    """Stands for a driver of Triton while nothing is launched; each architecture is a device of its own."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def pretending(arch: int) -> Iterator[None]:
    """Kernels warmed up in the block are compiled for ``arch``; none can be launched."""
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Nowhere(arch))  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver._active = before


@cache
def tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _output(*command: Any) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def compiled(launch: Any, arch: int) -> Any:
    """The compiled kernel of a launch (kernel, arguments, num_warps, num_stages) for an architecture."""
    with pretending(arch):
        return launch.kernel.warmup(
            **launch.arguments, grid=(1,), num_warps=launch.num_warps, num_stages=launch.num_stages
        )


def listing(kernel: Any) -> str:
    """The instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return _output(tool("nvdisasm"), "-c", file.name)


def complaints(kernel: Any, arch: int) -> str:
    """What the assembler says about a compiled kernel's code, such as that it serializes the matrix instructions."""
    with tempfile.NamedTemporaryFile(mode="w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [tool("ptxas"), f"-arch={name}", "-v", file.name, "-o", "/dev/null"]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


def resources(launch: Any, arch: int) -> Resources:
    """Compiles a launch for an architecture."""
    kernel = compiled(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(tool("cuobjdump"), "-res-usage", file.name)
    code = listing(kernel)
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    kinds = sorted(set(re.findall(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|DMMA)\b", code)))
    count = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
    return Resources(
        used["REG"], used["STACK"] + used["LOCAL"], kernel.metadata.shared, "+".join(kinds), count
    )
