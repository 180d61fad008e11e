"""Deterministic finite automata: run, reverse, minimise, draw at random. No torch in here."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

Place = TypeVar("Place", bound=Hashable)


@dataclass(frozen=True)
class DFA:
    """A complete automaton: from every state every symbol leads to one state.

    Args:
        alphabet: the symbols, one character each.
        transitions: next states, `[state][symbol]` in the order of `alphabet`.
        start: the state before the first symbol.
        accepting: the states in which a word may end.

    Raises:
        ValueError: a repeated symbol, a row of the wrong length, a state that does not exist.
    """

    alphabet: str
    transitions: tuple[tuple[int, ...], ...]
    start: int
    accepting: frozenset[int]

    def __post_init__(self) -> None:
        if not self.alphabet or len(set(self.alphabet)) < len(self.alphabet):
            raise ValueError(f"the alphabet must be distinct characters, got {self.alphabet!r}")
        for state, row in enumerate(self.transitions):
            if len(row) != len(self.alphabet):
                raise ValueError(
                    f"state {state} has {len(row)} transitions; give one for each of the "
                    f"{len(self.alphabet)} symbols {self.alphabet!r}"
                )
        named = {self.start, *self.accepting, *(q for row in self.transitions for q in row)}
        if unknown := named - set(range(len(self.transitions))):
            raise ValueError(
                f"no state {min(unknown)}: transitions has {len(self.transitions)} rows, "
                "so states are numbered from 0 to one less than that"
            )

    @property
    def states(self) -> int:
        """How many there are."""
        return len(self.transitions)

    def symbol(self, character: str) -> int:
        """Its place in the alphabet. ValueError if it has none."""
        place = self.alphabet.find(character)
        if len(character) != 1 or place < 0:
            raise ValueError(f"{character!r} is no symbol of the alphabet {self.alphabet!r}")
        return place

    def run(self, word: str) -> int:
        """The state after `word`."""
        state = self.start
        for character in word:
            state = self.transitions[state][self.symbol(character)]
        return state

    def accepts(self, word: str) -> bool:
        return self.run(word) in self.accepting

    @cached_property
    def live(self) -> frozenset[int]:
        """States from which some word, the empty one included, leads to acceptance."""
        live = self.accepting
        while True:
            more = live | {q for q, row in enumerate(self.transitions) if live & set(row)}
            if more == live:
                return live
            live = more

    def reverse(self) -> DFA:
        """An automaton of the mirrored words; it may need up to `2 ** states` states."""

        def before(after: frozenset[int], symbol: int) -> frozenset[int]:
            return frozenset(q for q, row in enumerate(self.transitions) if row[symbol] in after)

        return explore(self.alphabet, self.accepting, before, lambda found: self.start in found)

    def minimise(self) -> DFA:
        """The smallest automaton of the same language, its states numbered as a search finds them.

        Moore's refinement: states stay together while no symbol tells their successors apart.
        Minimal automata of one language over one alphabet are equal.
        """
        group = [int(q in self.accepting) for q in range(self.states)]
        while True:
            looks = [
                (g, *(group[q] for q in row))
                for g, row in zip(group, self.transitions, strict=True)
            ]
            names = {look: name for name, look in enumerate(dict.fromkeys(looks))}
            if len(names) == len(set(group)):
                break
            group = [names[look] for look in looks]
        member = {g: q for q, g in enumerate(group)}  # any one stands for its group
        accepting = {group[q] for q in self.accepting}
        return explore(
            self.alphabet,
            group[self.start],
            lambda g, symbol: group[self.transitions[member[g]][symbol]],
            lambda g: g in accepting,
        )


def explore(
    alphabet: str,
    start: Place,
    step: Callable[[Place, int], Place],
    accepts: Callable[[Place], bool],
) -> DFA:
    """The automaton of all places that can be reached, numbered as they are found, start first."""
    number = {start: 0}
    places, transitions = [start], []
    for place in places:  # grows while it is read
        row = []
        for symbol in range(len(alphabet)):
            after = step(place, symbol)
            if after not in number:
                number[after] = len(places)
                places.append(after)
            row.append(number[after])
        transitions.append(tuple(row))
    return DFA(alphabet, tuple(transitions), 0, frozenset(number[p] for p in places if accepts(p)))


def random_dfa(rng: random.Random, states: int, symbols: int) -> DFA:
    """Uniform transitions and acceptance, drawn until every state is reached and told apart."""
    if states < 1 or not 1 <= symbols <= len(string.ascii_lowercase):
        raise ValueError(
            f"wanted {states} states and {symbols} symbols; give at least 1 state and "
            f"1 to {len(string.ascii_lowercase)} symbols"
        )
    while True:
        dfa = DFA(
            string.ascii_lowercase[:symbols],
            tuple(tuple(rng.randrange(states) for _ in range(symbols)) for _ in range(states)),
            0,
            frozenset(q for q in range(states) if rng.random() < 0.5),
        )
        if dfa.minimise().states == states:
            return dfa
