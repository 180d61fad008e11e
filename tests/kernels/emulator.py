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
    kind, _, _ = name.partition("_")
    command += [f"-D{kind.upper()}", f"-DNAME=wkv7_{name}", f'-DSOURCE="{name}.cu"']
    command += [f"-I{CSRC}", f"-I{HERE}"]
    subprocess.run([*command, "-o", library, HERE / "emulator.cpp"], check=True)
    found = ctypes.CDLL(str(library))
    found.run.restype = ctypes.c_char_p
    return found


def launch(name, r, out, chunks, grid, *arguments) -> None:
    """As `cuda.launch`, with everything in the memory of the host."""
    count = len(arguments) - cuda.NUMBERS
    pointers = (ctypes.c_void_p * count)(
        *(None if x is None else x.data_ptr() for x in arguments[:count])
    )
    numbers = (ctypes.c_longlong * cuda.NUMBERS)(*arguments[count:])
    flags = cuda.options(r.dtype, r.shape[-1], out, chunks)
    failure = compiled(cuda.source(name, chunks), flags).run(pointers, numbers, *grid)
    if failure:
        raise RuntimeError(failure.decode())


@pytest.fixture
def emulated_cuda(monkeypatch):
    """`kernel="cuda"` works on tensors of the host."""
    if not shutil.which("g++") and "CI" not in os.environ:
        pytest.skip("the emulated kernels are compiled by g++")
    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "granted", lambda device: HOPPER)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda, "lacking", lambda device, dtype, head_size: "")
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN
    yield
    torch.use_deterministic_algorithms(False)
