"""Regular languages as weights: any automaton, or regular expression, as a four-layer RWKV-7.

Nothing is trained, and the model is the ordinary backbone with `a_max = 2`. It reads a token that
marks the beginning and then the word, and says after every token whether the word may end there.
The construction follows RWKV-7 "Goose" (arXiv:2503.14456, Theorem 3 and the appendix on
expressivity). With b the number of symbols in a block, at most the number of states less one:

    layer  time mixing                                  channel mixing
    1      parity of the time: a sign that flips        nothing
    2      position mod 2b: a vector turned by two      bits to one-hot position, and place
           alternating reflections, read as b bits      in the block
    3      the last 2b tokens, in a ring of slots       block before and place to a factor, and
                                                        the map that remains after it
    4      the automaton's state at the end of the      that state and the tokens of this block
           block before, moved by one factor a token    to the verdict

A transition diag(w) - kappa (a * kappa)^T swaps two states or merges one into another, but the map
of a symbol can be any map. So maps are applied block by block: those of b symbols compose to one
that b factors are enough for (`factors.py`), and these are applied during the next block.

It departs from the paper in three things:
- States are rows of a Hadamard matrix instead of unit vectors. In the unit basis a transition
  copies columns, never rows, and only the reversed language can be tracked, with up to 2^n states.
  In this one, `kappa = x` and `a = 2` where the codes x and y differ give exactly
  `S - (S x)(x - y)^T`: what was in x is now in y, and all other codes stay.
- The last layer reads the state with one head for each, after the factors that remain; the verdict
  is left to its channel mixing. Tables then need words of one block, not of two.
- Symbols that act alike share a token.

Every norm makes its 0 and 1 anew, so rounding errors add up in two states only, the vector of layer
2 and the code of layer 4, both read as signs. In float64 they grow by some 1e-16 a token, out of
reach. In float32 the vector strays by up to 4e-7 a token, and may be misread once it is 0.3 off,
for b = 5: use float64 for texts of more than some hundred thousand symbols.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from goose_mm.backbone import RWKV7, State
from goose_mm.backbone.init import uninitialised
from goose_mm.config import BackboneConfig
from goose_mm.lab.regular import layers as layers
from goose_mm.lab.regular.automata import DFA
from goose_mm.lab.regular.expressions import regex
from goose_mm.lab.regular.layers import Wires
from goose_mm.lab.regular.plan import BEGIN, Plan

TOKENS_AT_ONCE = 2**13  # of a batch, to bound memory


class Recogniser(nn.Module):
    """Embedding, backbone, and a head of one logit: positive where the word may end.

    `symbols` gives the token of each character.
    """

    def __init__(self, symbols: dict[str, int], config: BackboneConfig) -> None:
        super().__init__()
        self.symbols = symbols
        self.emb = nn.Embedding(1 + max(symbols.values()), config.dim)
        self.backbone = RWKV7(config)
        self.head = nn.Linear(config.dim, 1, bias=False)

    def forward(
        self, ids: Int[Tensor, "B T"], state: State | None = None, kernel: str = "auto"
    ) -> tuple[Float[Tensor, "B T"], State]:
        """A logit, 1 or -1, after every token; the first token of a word must be BEGIN."""
        hidden, state = self.backbone(self.emb(ids), state, kernel=kernel)
        return self.head(hidden).squeeze(-1), state

    def encode(self, words: Sequence[str]) -> Int[Tensor, "B T"]:
        """BEGIN and the symbols of each word; what stands behind its end does not matter.

        ValueError for a character that is no symbol.
        """
        ids = torch.full((len(words), 1 + max(map(len, words))), BEGIN)
        for row, word in zip(ids, words, strict=True):
            if unknown := set(word) - set(self.symbols):
                raise ValueError(
                    f"{min(unknown)!r} is no symbol of the alphabet {''.join(self.symbols)!r}"
                )
            row[1 : 1 + len(word)] = torch.tensor([self.symbols[c] for c in word])
        return ids.to(self.head.weight.device)

    @torch.no_grad()
    def accepts(self, words: Sequence[str], kernel: str = "auto") -> list[bool]:
        """Whether each word, of any length, is in the language."""
        found: list[bool] = []
        for batch in batches(words):
            logits, _ = self(self.encode(batch), kernel=kernel)
            ends = torch.tensor([[len(word)] for word in batch], device=logits.device)
            found += (logits.gather(1, ends) > 0).flatten().tolist()
        return found


def batches(words: Sequence[str]) -> Iterator[Sequence[str]]:
    """The words in order, as many at a time as fit TOKENS_AT_ONCE, or one."""
    cuts, longest = [0], 0
    for i, word in enumerate(words):
        longest = max(longest, 1 + len(word))
        if i > cuts[-1] and longest * (i + 1 - cuts[-1]) > TOKENS_AT_ONCE:
            cuts.append(i)
            longest = 1 + len(word)
    for start, stop in pairwise([*cuts, len(words)]):
        if start < stop:
            yield words[start:stop]


def compile_regex(pattern: str, alphabet: str | None = None, **settings: Any) -> Recogniser:
    """The recogniser of what `pattern` matches (`expressions.py`); settings as below."""
    return compile_dfa(regex(pattern, alphabet), **settings)


@torch.no_grad()
def compile_dfa(
    dfa: DFA, dtype: torch.dtype = torch.float64, head_size: int | None = None
) -> Recogniser:
    """The recogniser of a language.

    `head_size` is by default the smallest that works; GPU kernels want 64. The channel mixing is
    exponentially wide in the length of a block, so automata of many states and symbols are refused.

    Raises:
        ValueError: an automaton that is too large, a head size that is too small.
    """
    plan = Plan.of(dfa)
    wires, codes = Wires(plan), layers.hadamard(plan.states)
    needed = max(2 * plan.block, plan.tokens, codes.shape[1])
    size = head_size or needed
    if size < needed:
        raise ValueError(f"head_size={head_size} is too small for this automaton; give {needed}")
    tables = [
        [],
        layers.position_rows(wires),
        layers.factor_rows(plan, wires),
        layers.verdict_rows(plan, wires),
    ]
    heads = max(2 * plan.block, plan.states, -(-wires.width // size))
    config = BackboneConfig(
        dim=heads * size,
        num_layers=4,
        head_size=size,
        ffn_dim=max(map(len, tables)),
        decay_rank=1,
        a_rank=len(plan.factors),
        v_rank=1,
        gate_rank=1,
        a_max=2.0,
    )
    with uninitialised():
        model = Recogniser({c: 1 + s for c, s in plan.classes.items()}, config).double()
    blocks: Any = model.backbone.blocks
    first, second, third, fourth = blocks
    for block, rows in zip(blocks, tables, strict=True):
        layers.silence(block)
        layers.write_rows(block.ffn, rows)
    layers.write_parity(first.att, wires)
    layers.write_half_planes(second.att, wires)
    layers.write_memory(third.att, wires)
    layers.write_state(fourth.att, wires, plan)

    wires.settle(first.ln0, wires.token)
    written = [wires.token, wires.parity, wires.parity, wires.half_planes[-1], wires.place]
    written += [wires.current[-1], wires.rest[-1], wires.state]
    norms = [norm for block in blocks for norm in (block.ln1, block.ln2)]
    for norm, last in zip(norms, written, strict=True):
        wires.settle(norm, last)
    wires.settle(model.backbone.ln_out, wires.verdict)

    model.emb.weight.zero_()
    model.emb.weight[:, list(wires.one)] = 1
    model.emb.weight[range(plan.tokens), list(wires.token)] = 1
    model.head.weight.zero_()
    model.head.weight[0, list(wires.verdict)] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    return model.to(dtype).requires_grad_(False).eval()
