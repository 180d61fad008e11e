"""What verbs are given: files that must be there, models of the right kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def must_exist(path: str) -> None:
    """Fail before anything slow is imported."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")


def open_model(name: str, kind: str, device: str = "") -> Any:
    from goose_mm import hub

    return hub.open_model(name, kind, device)
