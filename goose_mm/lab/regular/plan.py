"""What a four-layer recogniser must know of its automaton: lists of rows, no torch in here.

Words are cut into blocks of b symbols. While one block is read, the map of the block before it is
applied to the state, a factor a token; what a token looks up is written here as a row, "where all
of these channels are hot, switch on those".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from goose_mm.lab.regular.automata import DFA
from goose_mm.lab.regular.factors import (
    Factor,
    Map,
    apply,
    block_length,
    columns,
    factorise,
    word_map,
)

MOST_ROWS = 2**16  # of a table: as wide as this would be the channel mixing
BEGIN = 0  # id of the token before the first symbol; class c of symbols has id 1 + c

Row = tuple[list[int], list[int]]  # channels that must be hot, channels to switch on


@dataclass(frozen=True)
class Plan:
    """A minimal automaton over classes of symbols, and the length of its blocks.

    Args:
        dfa: minimal, and no two symbols act alike.
        classes: of each symbol of the original alphabet, its symbol here.
        block: b, so that b factors are enough for any b symbols.
    """

    dfa: DFA
    classes: dict[str, int]
    block: int

    @classmethod
    def of(cls, dfa: DFA) -> Plan:
        """ValueError if the tables, exponential in the block length, would be too long."""
        dfa = dfa.minimise()
        maps = columns(dfa)
        distinct = list(dict.fromkeys(maps))
        classes = {c: distinct.index(f) for c, f in zip(dfa.alphabet, maps, strict=True)}
        alphabet = "".join(dfa.alphabet[maps.index(f)] for f in distinct)
        rows = tuple(zip(*distinct, strict=True))
        merged = DFA(alphabet, rows, dfa.start, dfa.accepting)
        enough = max(1, dfa.states - 1)
        fitting = [b for b in range(1, 1 + enough) if cls(merged, classes, b).rows <= MOST_ROWS]
        block = block_length(merged, len(fitting))
        if block is None:
            raise ValueError(
                f"{dfa.states} states and {len(distinct)} kinds of symbols need blocks of more "
                f"than {len(fitting)} symbols, for which a table of {MOST_ROWS} rows is too "
                "short; give an automaton with fewer of either"
            )
        return cls(merged, classes, block)

    @property
    def states(self) -> int:
        return self.dfa.states

    @property
    def tokens(self) -> int:
        """Kinds of tokens: the beginning, and each class of symbols."""
        return 1 + len(self.dfa.alphabet)

    @property
    def rows(self) -> int:
        """Length of the longer of the two tables below."""
        symbols = self.tokens - 1
        words = sum(symbols**length for length in range(1, self.block + 1))
        return max(self.block * (symbols**self.block + 1), self.states * (words + 1))

    @cached_property
    def factors(self) -> list[Factor]:
        """Every factor that some token applies, the identity first."""
        used = {f for _, _, f, _ in self.steps()}
        return [Factor(), *sorted(used - {Factor()})]

    def steps(self) -> Iterator[tuple[tuple[int, ...], int, Factor, Map]]:
        """(tokens of the block before, place in this block, factor to apply, map still to apply).

        The block before the first symbol is all BEGIN and changes nothing.
        """
        words = product(range(len(self.dfa.alphabet)), repeat=self.block)
        maps = [(tuple(1 + s for s in word), word_map(self.dfa, word)) for word in words]
        maps.append(((BEGIN,) * self.block, tuple(range(self.states))))
        for tokens, images in maps:
            factors = factorise(images)
            factors += [Factor()] * (self.block - len(factors))
            for place, factor in enumerate(factors):
                yield tokens, place, factor, apply(factors[place + 1 :], self.states)

    def ends(self) -> Iterator[tuple[int, tuple[int, ...], bool]]:
        """(state before a block, tokens of it so far, whether the word may end here)."""
        for state in range(self.states):
            yield state, (), state in self.dfa.accepting
            for length in range(1, self.block + 1):
                for word in product(range(len(self.dfa.alphabet)), repeat=length):
                    after = word_map(self.dfa, word)[state]
                    yield state, tuple(1 + s for s in word), after in self.dfa.accepting
