"""`gpu_cases.py`: Triton under its interpreter, and all GPU kernels on a GPU if there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from goose_mm.kernels import triton

CASES = Path(__file__).with_name("gpu_cases.py")


def run(**environment):
    """In a process of its own: Triton asks for its interpreter once, when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(
        command,
        env=os.environ | environment,
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_under_the_interpreter():
    run(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
def test_on_the_gpu():
    run(TRITON_INTERPRET="0")


def test_says_why_it_cannot_run():
    reason = triton.unavailable(torch.device("cpu"), torch.float32, 64)
    assert "NVIDIA GPU" in reason
    assert "size 64" in triton.unavailable(torch.device("cuda"), torch.float32, 16)
    assert "float64" in triton.unavailable(torch.device("cuda"), torch.float64, 64)
