"""Rounding errors: exact is exact, float32 is near, bfloat16 costs what storing costs."""

import json

import torch

from goose_mm.cli import main
from goose_mm.lab.precision import errors, inputs


def test_errors_are_those_of_the_dtype():
    given = inputs(100, False, torch.device("cpu"))
    assert max(errors("reference", torch.float64, given).values()) < 1e-12
    assert max(errors("chunked", torch.float32, given).values()) < 1e-5
    rounded = errors("chunked", torch.bfloat16, given)
    assert 1e-3 < rounded["y"] < 3e-3 and rounded["state"] < 1e-5


def test_command_writes_numbers_and_figure(tmp_path):
    call = ["eval", "lab", "precision", "--out", str(tmp_path), "--lengths", "16", "40"]
    assert main(call) == 0
    rows = json.loads((tmp_path / "precision.json").read_text())
    assert {row["length"] for row in rows} == {16, 40}
    assert (tmp_path / "precision.svg").stat().st_size > 1000
