"""The Triton programs, compiled without a GPU: `gpu_cases.py` runs them."""

from __future__ import annotations

import os
import re
import subprocess
from importlib import import_module
from typing import Any

import pytest
import torch

from goose_mm.kernels.triton import launch as kernel

triton: Any = (import_module if "CI" in os.environ else pytest.importorskip)("triton")
COMMON = {"N": kernel.HEAD_SIZE, "Q": kernel.CHUNK, "REVERSE": 0}
HALF = torch.float16
PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "prepare": ("scan", {"LOWEST": -0.7, "BACK": False} | kernel.PREPARE[HALF]),
    "prepare back": ("scan", {"LOWEST": -0.7, "BACK": True} | kernel.PREPARE[HALF]),
    "scan": ("scan", {"SAVE": False} | kernel.SCAN[HALF]),
    "scan save": ("scan", {"SAVE": True} | kernel.SCAN[HALF]),
    "scan_back": ("scan", kernel.SCAN_BACK[HALF]),
    "gradients": ("gradients", kernel.GRADIENTS[HALF]),
}
POINTERS = dict.fromkeys(("decays", "scales", "state", "dstate"), "*fp32")
POINTERS |= dict.fromkeys(("chunks", "saved", "dsaved"), "*fp16")
POINTERS |= {"cu_seqlens": "*i32", "fits": "*i32", "owner": "*i64"}
SIZES = ("T", "H", "rows", "slots", "sequences")


def compiled(name: str, arch: int, packed: bool) -> Any:
    """A program as it is compiled for bfloat16, with or without packed sequences and a state."""
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, given = PROGRAMS[name]
    program = getattr(import_module(f"goose_mm.kernels.triton.{module}"), name.split()[0])
    options = {key: given[key] for key in given if key not in program.arg_names}
    constants = {key: x for key, x in (COMMON | given).items() if key in program.arg_names}
    if not packed:
        optional = ["cu_seqlens", "owner"] + ["state"] * (name == "gradients")
        constants |= {key: None for key in optional if key in program.arg_names}
    signature, attributes = {}, {}
    for i, argument in enumerate(program.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in SIZES:
            signature[argument] = "i32"
        else:
            signature[argument] = POINTERS.get(argument, "*bf16")
            attributes[i,] = [["tt.divisibility", 16]]
    places = {(program.arg_names.index(key),): x for key, x in constants.items()}
    source = ASTSource(program, signature, places, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles_without_a_gpu_and_spills_little(name, arch, packed, tmp_path):
    found = compiled(name, arch, packed)
    assert "wgmma" not in found.asm["ptx"]  # see triton_chunk.py
    binary = tmp_path / "program.cubin"
    binary.write_bytes(found.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = map(int, re.findall(r"STACK:(\d+)", usage))
    assert stack <= (128 if "maxnreg" in PROGRAMS[name][1] else 0), usage
    assert found.metadata.shared <= 48 << 10
