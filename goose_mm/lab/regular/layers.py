"""The four layers of a recogniser, written into an RWKV-7 of zeros; `regular.py` tells what for.

All that the residual stream carries is one-hot, so its mean and variance are known before every
norm, and a norm with the right weight and bias returns its input. Token shifts, decay, value
residual, bonus and gate are switched off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from goose_mm.backbone.time_mix import NORM_EPS
from goose_mm.lab.regular.factors import Factor
from goose_mm.lab.regular.plan import BEGIN, Plan, Row

# C channels, N head size, n states, b block length

ONE = 0  # the channel that is always 1
SURE = 1000.0  # a sigmoid of this is 1 and of its negative 0, exactly
LOUD = 2.0**20  # written to states whose sign is read: nothing to it is the eps of the group norm


class Wires:
    """The channels of the residual stream: groups of which one is hot, in order of appearance."""

    def __init__(self, plan: Plan) -> None:
        self.groups: list[range] = []
        self.width = 0
        self.one = self.group(1)
        slots = range(plan.block)
        self.token = self.group(plan.tokens)
        self.parity = self.group(2)
        self.half_planes = [self.group(2) for _ in slots]  # yes, no
        self.position = self.group(2 * plan.block)
        self.place = self.group(plan.block)  # in the block
        self.before = [self.group(plan.tokens) for _ in slots]  # tokens of the block before
        self.current = [self.group(plan.tokens) for _ in slots]  # of this one, as far as it goes
        self.factor = self.group(len(plan.factors))
        self.rest = [self.group(plan.states) for _ in range(plan.states)]  # the map still to apply
        self.state = self.group(plan.states)  # after the block before
        self.verdict = self.group(2)  # yes, no

    def group(self, size: int) -> range:
        self.groups.append(range(self.width, self.width + size))
        self.width += size
        return self.groups[-1]

    def settle(self, norm: nn.LayerNorm, last: range) -> None:
        """Make `norm` return its input, when all groups up to `last` are in the stream."""
        dim = len(norm.weight)
        mean = sum(g.start <= last.start for g in self.groups) / dim
        norm.weight.fill_(math.sqrt(mean - mean**2 + norm.eps))
        norm.bias.fill_(mean)


def silence(block: Any) -> None:
    """All weights zero, but what would be in the way: now block(x) == x and nothing decays."""
    for parameter in block.parameters():
        parameter.zero_()
    block.att.w0.fill_(-SURE)
    if hasattr(block.att, "v0"):
        block.att.v0.fill_(-SURE)
    block.att.g2[0] = 2  # g1 is 0, and the sigmoid 1/2
    block.att.k_k.fill_(1)


def write_parity(att: Any, wires: Wires) -> None:
    """Layer 1: a number that changes its sign with every token, positive at the beginning."""
    att.a0.fill_(SURE)
    att.key.weight[0, ONE] = 1
    att.receptance.weight[0, ONE] = 1
    read_sign(att, 0, wires, *wires.parity)


def write_half_planes(att: Any, wires: Wires) -> None:
    """Layer 2: a vector of the plane, at angle g pi/b for a g that tells the position mod 2b.

    Even and odd tokens reflect it along axes pi/b apart, so that any two turn it by 2 pi/b. Head h
    tells on which side it lies of a line between the angles h and h + 1.
    """
    size, block = att.r_k.shape[1], len(wires.half_planes)
    step = math.pi / block
    odd, even = step / 2 - math.pi / 2, step * 3 / 2 - math.pi / 2  # where the axes point
    att.a0.fill_(SURE)
    for head, sides in enumerate(wires.half_planes):
        axes, line = slice(head * size, head * size + 2), (head + 0.5) * step
        att.key.weight[axes, wires.parity[0]] = unit(even)
        att.key.weight[axes, wires.parity[1]] = unit(odd)
        att.key.weight[axes, wires.token[BEGIN]] = unit(0.0) - unit(even)
        att.receptance.weight[axes, ONE] = unit(line + math.pi / 2)
        read_sign(att, head, wires, *sides)


def unit(angle: float) -> Float[Tensor, "2"]:
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


def position_rows(wires: Wires) -> list[Row]:
    """From the half-planes at time t to the position t - 1 mod 2b, and the place in its block."""
    block = len(wires.half_planes)
    period, rows = 2 * block, []
    for t in range(period):
        angle = t if t % 2 == 0 else 2 - t  # in steps of pi/b: odd times run backwards
        sides = [(angle - head - 1) % period >= block for head in range(block)]
        hot = [group[side] for group, side in zip(wires.half_planes, sides, strict=True)]
        position = (t - 1) % period
        rows.append((hot, [wires.position[position], wires.place[position % block]]))
    return rows


def write_memory(att: Any, wires: Wires) -> None:
    """Layer 3: a ring of 2b slots for the last tokens; each head keeps it and reads one slot.

    A token overwrites the slot of its position. The beginning, whose position is the last one,
    writes itself to all slots at once.
    """
    size, block = att.r_k.shape[1], len(wires.current)
    for head, group in enumerate((*wires.before, *wires.current)):
        first = head * size
        for slot, channel in enumerate(wires.position):
            # Blocks fill the halves of the ring in turn: in the first half, head 0 reads slot b.
            read = (block + head + slot // block * block) % (2 * block)
            att.key.weight[first + slot, channel] = 1
            att.receptance.weight[first + read, channel] = 1
        att.key.weight[first : first + 2 * block - 1, wires.token[BEGIN]] = 1
        for row, (seen, told) in enumerate(zip(wires.token, group, strict=True), first):
            att.value.weight[row, seen] = 1
            att.output.weight[told, row] = 1
    # a0 is 0: a_max makes 2 of the 1/2, and the slot is emptied before it is filled.
    mean = 1 / size
    att.ln_x.weight.fill_(math.sqrt(mean - mean**2 + NORM_EPS * size))
    att.ln_x.bias.fill_(mean)


def factor_rows(plan: Plan, wires: Wires) -> list[Row]:
    """From the block before and the place to the factor of this token and the map that remains."""
    rows = []
    for tokens, place, factor, rest in plan.steps():
        hot = [group[token] for group, token in zip(wires.before, tokens, strict=True)]
        told = [group[image] for group, image in zip(wires.rest, rest, strict=True)]
        rows.append(([*hot, wires.place[place]], [wires.factor[plan.factors.index(factor)], *told]))
    return rows


def write_state(att: Any, wires: Wires, plan: Plan) -> None:
    """Layer 4: the state as a row of a Hadamard matrix, moved by one factor a token.

    Head p tells whether the map still to apply will bring it to p.
    """
    size, codes = att.r_k.shape[1], hadamard(plan.states)
    for f, factor in enumerate(plan.factors):
        key, removal = transition(factor, codes, plan.dfa.start)
        att.a1[wires.factor[f], f] = 1
        for head in range(plan.states):
            coded = slice(head * size, head * size + codes.shape[1])
            att.key.weight[coded, wires.factor[f]] = key
            att.a2[f, coded] = SURE * (removal - 1)
    for p in range(plan.states):
        coded = slice(p * size, p * size + codes.shape[1])
        for q, group in enumerate(wires.rest):
            att.receptance.weight[coded, group[p]] = 2 * codes[q]
        att.receptance.weight[coded, ONE] = -codes.sum(0)
        read_sign(att, p, wires, wires.state[p])


def hadamard(states: int) -> Float[Tensor, "n K"]:
    """Orthogonal rows of 1 and -1, one for each state; K is the next power of two."""
    codes = torch.ones(1, 1, dtype=torch.float64)
    while len(codes) < states:
        codes = torch.cat([torch.cat([codes, codes], 1), torch.cat([codes, -codes], 1)])
    return codes[:states]


def transition(
    factor: Factor, codes: Float[Tensor, "n K"], start: int
) -> tuple[Float[Tensor, "K"], Float[Tensor, "K"]]:
    """The key and the removal (0 or 2) that map code to code as `factor` maps state to state.

    A reflection along x - y swaps. To merge x into y, the code x is found and x - y taken away
    from it, which is x where they differ, twice. The key of the identity is not used for
    removal, so the beginning uses it to write.
    """
    x, y = codes[factor.x], codes[factor.y]
    match factor.kind:
        case "swap":
            return x - y, torch.full_like(x, 2)
        case "merge":
            return x, 2.0 * (x != y)
        case "identity":
            return codes[start], torch.zeros_like(x)


def verdict_rows(plan: Plan, wires: Wires) -> list[Row]:
    """From the state before this block and its tokens so far to yes or no."""
    rows = []
    for state, tokens, accepted in plan.ends():
        hot = [group[token] for group, token in zip(wires.current, tokens, strict=False)]
        hot.append(wires.place[len(tokens) - 1] if tokens else wires.token[BEGIN])
        rows.append(([wires.state[state], *hot], [wires.verdict[not accepted]]))
    return rows


def write_rows(ffn: Any, rows: Iterable[Row]) -> None:
    """A table as a channel mixing: a hidden unit for each row, 1 if all its channels are hot."""
    for unit, (hot, told) in enumerate(rows):
        ffn.key.weight[unit, hot] = 1
        ffn.key.weight[unit, ONE] = 1 - len(hot)
        ffn.value.weight[told, unit] = 1


def read_sign(att: Any, head: int, wires: Wires, yes: int, no: int | None = None) -> None:
    """Let a head remember the key of the beginning, LOUD and with both signs.

    What it then reads is (c, -c, 0 ...), of which the group norm leaves the sign of c.
    """
    size = att.r_k.shape[1]
    channels: Sequence[tuple[int, float, int | None]]
    channels = ((head * size, LOUD, yes), (head * size + 1, -LOUD, no))
    for row, value, told in channels:
        att.value.weight[row, wires.token[BEGIN]] = value
        att.ln_x.weight[row] = math.sqrt(2 / size) / 2
        att.ln_x.bias[row] = 0.5
        if told is not None:
            att.output.weight[told, row] = 1
