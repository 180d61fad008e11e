"""The memory of a picture: read it once, ask about it as often as you like.

A prefix is the state after the picture. Its size depends on the model alone (2.4 MB at 0.1B),
not on the number of image tokens. Asking never changes it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from goose_mm.backbone import State


@dataclass(frozen=True)
class Prefix:
    """State after the text and pictures that precede a question, for a batch of one."""

    state: State
    n_tokens: int  # that were read
    fingerprint: str  # of the model that read them: no other can use the state

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.state)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {name: t.detach().contiguous() for name, t in self.state._asdict().items()}
        about = {"n_tokens": str(self.n_tokens), "fingerprint": self.fingerprint}
        part = Path(f"{path}.part")
        save_file(tensors, part, metadata=about)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Prefix:
        """Read what `save` wrote. FileNotFoundError, or ValueError when it is something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(device)) as file:
                about = file.metadata() or {}
                state = State(*(file.get_tensor(name) for name in State._fields))
                return cls(state, int(about["n_tokens"]), about["fingerprint"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a saved prefix: {error}") from None


class PrefixCache:
    """The prefixes used last, up to `max_bytes` of state together. Safe to share by threads."""

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, ...], Prefix] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[str, ...], make: Callable[[], Prefix]) -> Prefix:
        """The prefix under `key` (digests of pictures and model), made now if there is none."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        prefix = make()
        with self._lock:
            self._kept[key] = prefix
            while self.nbytes > self.max_bytes:
                self._kept.popitem(last=False)
        return prefix

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self._kept.values())
