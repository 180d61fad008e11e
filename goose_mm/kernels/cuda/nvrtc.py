"""CUDA C++ from `csrc/`, compiled where it is first needed: no nvcc, no build step.

NVRTC and the driver's interface come with the wheels of torch. A compiled module is kept on disk
under a hash of everything it depends on; processes that race write the same bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import import_module, resources
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

SOURCES = (
    "device.cuh",
    "tiles.cuh",
    "chunk.cuh",
    "reading.cuh",
    "gradients.cuh",
    "step.cuh",
    "matrices.cuh",
)  # headers of every kernel


@cache
def bindings(name: str) -> Any:
    """`cuda.bindings.NAME`: "nvrtc" or "driver"."""
    return import_module(f"cuda.bindings.{name}")


@cache
def missing() -> str:
    """What keeps this installation from compiling; empty if nothing."""
    try:
        bindings("nvrtc"), bindings("driver")
    except Exception as error:  # also OSError: a library of another CUDA version
        return f"the package cuda-bindings does not load ({error}); pip install cuda-bindings"
    return ""


def compile_source(name: str, arch: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """The cubin of `csrc/NAME.cu` for an architecture ("sm_90"), and what the assembler says.

    Needs no GPU. Raises RuntimeError with the compiler's log if it does not compile.
    """
    nvrtc = bindings("nvrtc")

    folder = resources.files("goose_mm.kernels.cuda") / "csrc"
    source = (folder / f"{name}.cu").read_bytes()
    headers = [(folder / header).read_bytes() for header in SOURCES]
    program = ask(
        nvrtc.nvrtcCreateProgram(
            source, f"{name}.cu".encode(), len(SOURCES), headers, [s.encode() for s in SOURCES]
        )
    )
    flags = (f"--gpu-architecture={arch}", "-std=c++17", "--ptxas-options=-v", *options)
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    log = b" " * ask(nvrtc.nvrtcGetProgramLogSize(program))
    ask(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.rstrip(b"\0 ").decode(errors="replace")
    if failed != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(
            f"{name}.cu does not compile for {arch} with {' '.join(options)}: {text}"
        )
    cubin = b" " * ask(nvrtc.nvrtcGetCUBINSize(program))
    ask(nvrtc.nvrtcGetCUBIN(program, cubin))
    return cubin, text


def cubin(name: str, arch: str, options: tuple[str, ...]) -> bytes:
    """The compiled module, from the cache on disk where it can be read and written."""
    nvrtc = bindings("nvrtc")

    folder = resources.files("goose_mm.kernels.cuda") / "csrc"
    sources = [(folder / file).read_bytes() for file in (f"{name}.cu", *SOURCES)]
    version = nvrtc.nvrtcVersion()[1:]
    digest = hashlib.sha256(repr((sources, arch, options, version)).encode()).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "goose_mm"
    path = root / f"{name}-{arch}-{digest[:24]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        compiled, _ = compile_source(name, arch, options)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root, delete=False) as part:
            part.write(compiled)
        os.replace(part.name, path)
    except OSError:
        pass  # a full or read-only disk costs the next process a second
    return compiled


def kernel(name: str, arch: str, options: tuple[str, ...], device: int) -> tuple[Any, int, int]:
    """The kernel `wkv7_NAME` ready for a device, its threads, its bytes of shared memory."""
    driver = bindings("driver")

    enter(device)
    image = cubin(name, arch, options)
    library = ask(driver.cuLibraryLoadData(image, [], [], 0, [], [], 0))
    found = ask(driver.cuLibraryGetKernel(library, f"wkv7_{name}".encode()))
    _, threads = ask(driver.cuLibraryGetGlobal(library, b"block_size"))
    _, shared = ask(driver.cuLibraryGetGlobal(library, b"shared_size"))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    ask(driver.cuKernelSetAttribute(most, shared, found, driver.CUdevice(device)))
    return driver.CUfunction(int(found)), threads, shared


def enter(device: int) -> None:
    """Make the device's context current: a thread of autograd may have none yet."""
    driver = bindings("driver")

    if not int(ask(driver.cuCtxGetCurrent())):
        ask(driver.cuCtxSetCurrent(ask(driver.cuDevicePrimaryCtxRetain(device))))


def launch(
    function: Any,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    device: int,
    stream: int,
    arguments: Sequence[int | Sequence[int]],
    early: bool = False,
) -> None:
    """Start a kernel with pointers and integers, on a stream of a device.

    A sequence among the arguments is a struct. `early`: the kernel may begin before the one ahead
    of it has ended (programmatic dependent launch).
    """
    driver = bindings("driver")

    enter(device)  # the kernel may have been loaded by another thread
    structs = [(x,) if isinstance(x, int) else x for x in arguments]
    values = (ctypes.c_ulonglong * sum(map(len, structs)))(*chain.from_iterable(structs))
    first = ctypes.addressof(values)
    begins = accumulate(map(len, structs[:-1]), initial=0)
    places = (ctypes.c_void_p * len(structs))(*(first + 8 * begin for begin in begins))
    if not early:
        ask(
            driver.cuLaunchKernel(
                function, *grid, threads, 1, 1, shared, stream, ctypes.addressof(places), 0
            )
        )
        return
    config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    config.attrs, config.numAttrs = [attribute], 1
    ask(driver.cuLaunchKernelEx(config, function, ctypes.addressof(places), 0))


def ask(answer: tuple[Any, ...]) -> Any:
    """The results of a call, without the error code in front. RuntimeError if it failed."""
    error, *results = answer
    if int(error):
        raise RuntimeError(f"CUDA: {error!r}")
    return results[0] if len(results) == 1 else tuple(results)
