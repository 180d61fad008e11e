"""Automata keep their languages through every change; any map is a product of few factors."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from goose_mm.lab.regular.automata import DFA, random_dfa
from goose_mm.lab.regular.factors import Factor, apply, block_length, columns, factorise, word_map

SEVENTH = DFA("ab", tuple(((q + 1) % 7, 0) for q in range(7)), 0, frozenset({3}))


def words(alphabet: str, longest: int) -> list[str]:
    return ["".join(w) for n in range(longest + 1) for w in product(alphabet, repeat=n)]


def random_table(rng: random.Random) -> DFA:
    """Unlike `random_dfa`, it may have states that are never reached, or that do the same."""
    n = rng.randint(1, 6)
    rows = tuple((rng.randrange(n), rng.randrange(n)) for _ in range(n))
    return DFA("ab", rows, rng.randrange(n), frozenset(q for q in range(n) if rng.random() < 0.4))


@pytest.mark.parametrize("seed", range(30))
def test_minimise_and_reverse(seed):
    dfa = random_table(random.Random(seed))
    small, mirror = dfa.minimise(), dfa.reverse()
    for word in words("ab", 8):
        assert dfa.accepts(word) == small.accepts(word) == mirror.accepts(word[::-1])
    assert small.states <= dfa.states
    assert small == small.minimise() == mirror.reverse().minimise()  # the one minimal automaton


@pytest.mark.parametrize("seed", range(30))
def test_live_states_lead_to_acceptance(seed):
    dfa = random_table(random.Random(seed))
    for state in range(dfa.states):
        at_state = DFA(dfa.alphabet, dfa.transitions, state, dfa.accepting)
        assert (state in dfa.live) == any(map(at_state.accepts, words("ab", dfa.states)))


def test_random_automata_are_minimal_and_repeatable():
    for states, symbols in product((1, 2, 6), (1, 2, 3)):
        dfa = random_dfa(random.Random(7), states, symbols)
        assert dfa.states == dfa.minimise().states == states
        assert len(dfa.alphabet) == symbols
        assert dfa == random_dfa(random.Random(7), states, symbols)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("aa", ((0, 0),), 0, frozenset()), "distinct characters"),
        (("", ((),), 0, frozenset()), "distinct characters"),
        (("ab", ((0,),), 0, frozenset()), "1 transitions; give one for each of the 2 symbols"),
        (("a", ((1,),), 0, frozenset()), "no state 1"),
        (("a", ((0,),), 0, frozenset({-1})), "no state -1"),
    ],
)
def test_what_is_no_automaton(arguments, message):
    with pytest.raises(ValueError, match=message):
        DFA(*arguments)


def test_what_is_no_symbol():
    for character in ("c", "", "ab"):
        with pytest.raises(ValueError, match="no symbol of the alphabet"):
            SEVENTH.symbol(character)
    with pytest.raises(ValueError, match="at least 1 state"):
        random_dfa(random.Random(0), 0, 2)


@pytest.mark.parametrize("states", range(1, 6))
def test_factors_compose_to_the_map(states):
    for images in product(range(states), repeat=states):
        factors = factorise(images)
        assert apply(factors, states) == images
        assert len(factors) <= states - 1
        assert all(f.kind != "identity" for f in factors)


def test_factors_as_matrices():
    rng = random.Random(0)
    for _ in range(50):
        images = tuple(rng.randrange(6) for _ in range(6))
        matrix = torch.eye(6, dtype=torch.float64)
        for factor in factorise(images):
            matrix = matrix @ factor.matrix(6)
        assert matrix.argmax(1).tolist() == list(images)
        assert matrix.sum().item() == 6
    assert Factor("swap", 0, 2).matrix(3).tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert Factor("merge", 0, 2).matrix(3).tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="3 is no state"):
        factorise([0, 3, 1])


def test_block_length():
    for seed in range(30):
        dfa = random_dfa(random.Random(seed), 5, 2)
        block = block_length(dfa)
        assert 1 <= block <= 4
        for length in range(1, block + 1):
            most = max(len(factorise(word_map(dfa, w))) for w in product(range(2), repeat=length))
            assert (most <= length) == (length == block)
    swap = DFA("ab", ((1, 0), (0, 1), (2, 2)), 0, frozenset({0}))
    assert block_length(swap) == 1
    assert columns(swap) == [(1, 0, 2), (0, 1, 2)]
    assert block_length(SEVENTH) == 6  # a cycle of 7 is 6 swaps
