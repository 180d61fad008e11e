"""Runs the CUDA kernels on the CPU: `csrc/` compiled by g++ with the functions of `simt.h`."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from goose_mm.kernels.cuda import launch as cuda
from goose_mm.kernels.cuda import step

HERE = Path(__file__).parent
CSRC = Path(cuda.__file__).parent / "csrc"
HOPPER = 232_448  # bytes of shared memory a block may have there


@cache
def folder() -> Path:
    return Path(mkdtemp(prefix="emulated_cuda_"))


@cache
def compiled(name: str, options: tuple[str, ...]) -> ctypes.CDLL:
    library = folder() / f"{name}{''.join(options)}.so"
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-Wno-unknown-pragmas", *options]
    command += [f"-DNAME=wkv7_{name}", f'-DSOURCE="{name}.cu"', f"-I{CSRC}", f"-I{HERE}"]
    subprocess.run([*command, "-o", library, HERE / "emulator.cpp"], check=True)
    found = ctypes.CDLL(str(library))
    found.run.restype = ctypes.c_char_p
    return found


def run(name: str, options: tuple[str, ...], grid: tuple[int, int], *arguments) -> None:
    """A kernel with everything in the memory of the host."""
    values: list[int] = []
    for x in arguments:
        one = x.data_ptr() if isinstance(x, torch.Tensor) else x or 0
        values += [one] if isinstance(one, int) else one
    failure = compiled(name, options).run((ctypes.c_longlong * len(values))(*values), *grid)
    if failure:
        raise RuntimeError(failure.decode())


def launch(name, r, out, chunks, grid, *arguments) -> None:
    """As `cuda.launch`."""
    flags = cuda.options(r.dtype, r.shape[-1], out, chunks)
    run(cuda.source(name, chunks), flags, grid, *arguments)


@pytest.fixture
def compiler():
    if not shutil.which("g++") and "CI" not in os.environ:
        pytest.skip("the emulated kernels are compiled by g++")


@pytest.fixture
def emulated_step(compiler, monkeypatch):
    """The kernels of a step work on tensors of the host."""
    monkeypatch.setattr(
        step, "run", lambda name, flags, _, grid, early, *rest: run(name, flags, grid, *rest)
    )
    monkeypatch.setattr(step, "multiprocessors", lambda device: 3)


@pytest.fixture
def emulated_cuda(compiler, monkeypatch):
    """`kernel="cuda"` works on tensors of the host."""
    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "granted", lambda device: HOPPER)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda, "lacking", lambda device, dtype, head_size: "")
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN
    yield
    torch.use_deterministic_algorithms(False)
