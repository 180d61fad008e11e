"""The RWKV-7 stack all models share: embeddings in, normalised hidden states out."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from goose_mm.backbone.block import Block
from goose_mm.backbone.init import initialise
from goose_mm.backbone.state import State
from goose_mm.backbone.token_shift import Stream
from goose_mm.config import BackboneConfig


class RWKV7(nn.Module):
    """L blocks and a last norm. Text, picture and sound tokens all enter before `ln0`.

    Feeding a sequence at once, in pieces or token by token gives the same hidden states and the
    same final `State`. A bidirectional stack reads whole sequences only and carries no state.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config = config.resolved()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.ln_out = nn.LayerNorm(config.dim)
        initialise(self.blocks, self.ln_out)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        state: State | None = None,
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        cu_seqlens: Int[Tensor, "S_plus_1"] | None = None,
        grid: tuple[int, int] | None = None,
        kernel: str = "auto",
        entered: list[Tensor] | None = None,
    ) -> tuple[Float[Tensor, "B T C"], State]:
        """Run the stack.

        `mask` marks padding (False) anywhere in a row: it touches neither shift nor state, and
        its own output means nothing. `cu_seqlens` packs S sequences into one row, with states
        `[L, S, ...]`. `grid` is needed by `shift="conv"`. What enters every block is appended to
        the list `entered`.
        """
        batch, length, dim = x.shape
        if dim != self.config.dim:
            raise ValueError(f"the backbone is {self.config.dim} wide, the input {dim}")
        if length == 0:
            raise ValueError("cannot run on 0 tokens; give at least one")
        if self.config.bidirectional and state is not None:
            raise ValueError("a bidirectional backbone reads whole sequences: state must be None")
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        stream = Stream.of(x, mask, cu_seqlens, grid)
        before = state or State.zeros(self.config, rows, x.device, x.dtype)
        if before.time_shift.shape[1] != rows:
            raise ValueError(f"the state holds {before.time_shift.shape[1]} rows, the batch {rows}")

        after = []
        v_first = None
        for block, layer_state in zip(self.blocks, zip(*before, strict=True), strict=True):
            if self.config.bidirectional:
                layer_state = (*layer_state[:2], None)
            if entered is not None:
                entered.append(x)
            x, v_first, layer_state = block(x, v_first, layer_state, stream, kernel)
            after.append(layer_state)
        if self.config.bidirectional:
            return self.ln_out(x), before
        return self.ln_out(x), State(*(torch.stack(t) for t in zip(*after, strict=True)))
