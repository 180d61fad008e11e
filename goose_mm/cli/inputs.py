"""What verbs are given: files that must be there, models of the right kind."""

from __future__ import annotations

import os
import sys
from typing import Any


def must_exist(path: str) -> None:
    """Fail before anything slow is imported."""
    if not os.path.exists(path):  # False, too, of what is too long for a name
        raise FileNotFoundError(f"{path[-150:]}: no such file")


def read_stdin() -> bytes:
    return sys.stdin.buffer.read()


def open_model(name: str, kind: str, device: str = "") -> Any:
    from goose_mm import hub

    return hub.open_model(name, kind, device)
