"""Our `State` as transformers' cache: one "layer" that holds the memory of all layers.

It does not grow with the text, so there is nothing to crop, to offload or to quantise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from goose_mm.backbone import State


class StateLayer(CacheLayerMixin):
    """The state behind `tokens` tokens of every row; None before the first."""

    supports_early_init = False

    def __init__(self, state: State | None = None, tokens: int = 0) -> None:
        super().__init__()
        self.state, self.tokens = state, tokens

    @property
    def state(self) -> State | None:
        return None if self.parts is None else State(*self.parts)

    @state.setter
    def state(self, state: State | None) -> None:
        # the exporters of transformers take a cache apart, and rebuild no tuple but a plain one
        self.parts = None if state is None else tuple(state)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("RWKV-7 keeps no keys and values; its cache is `state`")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("RWKV-7 keeps no keys and values; its cache is `state`")

    @property
    def batch_size(self) -> int:
        if self.state is None:
            raise AttributeError("batch_size")  # transformers asks with hasattr
        return self.state.time_shift.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1  # none

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def reset(self) -> None:
        self.state, self.tokens = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("RWKV-7 cannot unread tokens; keep a copy of the cache instead")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = self.state and self.state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = self.state and self.state.select(indices.to(self.state.wkv.device))


class RWKV7Cache(Cache):
    """`past_key_values` of `RWKV7ForCausalLM`; give it a `State` to go on from there.

    `tokens` counts what the state has read, padding included, where `generate` is to be given
    the whole text again; with 0 it is given the continuation alone.
    """

    def __init__(self, state: State | None = None, tokens: int = 0) -> None:
        super().__init__(layers=[StateLayer(state, tokens)])

    @property
    def memory(self) -> StateLayer:
        return self.layers[0]  # type: ignore[bad-return]

    @property
    def state(self) -> State | None:
        return self.memory.state

    def advance(self, state: State, tokens: int) -> None:
        """Take the state after `tokens` more tokens."""
        self.memory.state, self.memory.tokens = state, self.memory.tokens + tokens
