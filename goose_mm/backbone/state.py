"""What an RWKV-7 stack remembers: an argument and a result, never an attribute of a module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from goose_mm.config import BackboneConfig


class State(NamedTuple):
    """Memory after some tokens; its size does not depend on how many there were.

    L layers, B batch rows, C channels, H heads, N head size.
    """

    time_shift: Float[Tensor, "L B C"]  # last input of every time mix
    channel_shift: Float[Tensor, "L B C"]  # last input of every channel mix
    wkv: Float[Tensor, "L B H N N"]  # (value, key), fp32

    @classmethod
    def zeros(
        cls,
        config: BackboneConfig,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> State:
        """The state before the first token. `wkv` is fp32 unless `dtype` is float64."""
        shift = torch.zeros(config.num_layers, batch, config.dim, device=device, dtype=dtype)
        heads = (config.num_heads, config.head_size, config.head_size)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        wkv = torch.zeros(config.num_layers, batch, *heads, device=device, dtype=wide)
        return cls(shift, shift.clone(), wkv)

    def select(self, rows: int | slice | Tensor | list[int]) -> State:
        """The state of some batch rows; an int keeps a batch of one."""
        if isinstance(rows, int):
            rows = [rows]
        return State(*(t[:, rows] for t in self))

    def repeat(self, times: int) -> State:
        """Every row `times` times in a row (B -> B * times): one prefix, many continuations."""
        return State(*(t.repeat_interleave(times, dim=1) for t in self))

    def clone(self) -> State:
        return State(*(t.clone() for t in self))

    def detach(self) -> State:
        return State(*(t.detach() for t in self))

    def to(self, device: torch.device | str) -> State:
        return State(*(t.to(device) for t in self))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        part = Path(f"{path}.part")
        save_file({k: t.detach().contiguous() for k, t in self._asdict().items()}, part)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> State:
        """Read what `save` wrote. ValueError when the file is not a state."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path, device=device)
            return cls(**{name: tensors[name] for name in cls._fields})
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a saved state: {error}") from None
