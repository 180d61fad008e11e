"""Compiled automata, run by the ordinary backbone, never err."""

from __future__ import annotations

import random
import re

import pytest
import torch

from goose_mm.backbone import RWKV7
from goose_mm.lab.regular.automata import DFA, random_dfa
from goose_mm.lab.regular.expressions import regex
from goose_mm.lab.regular.factors import Factor
from goose_mm.lab.regular.layers import hadamard, transition
from goose_mm.lab.regular.plan import Plan
from goose_mm.lab.regular.recogniser import Recogniser, batches, compile_dfa, compile_regex
from goose_mm.lab.regular.report import check_random, verdicts


def random_words(dfa: DFA, *lengths: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(dfa.alphabet, k=length)) for length in lengths]


@pytest.mark.parametrize(("dtype", "seed"), [("float64", 1), ("float32", 2)])
def test_random_automata(dtype, seed):
    report = check_random(20, 1000, dtype, seed, words=1)
    assert report["errors"] == 0
    assert report["prefixes"] > 20_000
    assert 0.2 < report["accepted"] / report["prefixes"] < 0.8
    rough = 1e-3 if dtype == "float32" else 1e-11
    assert report["least logit"] == pytest.approx(1, abs=rough)
    assert report["code off by"] < rough
    assert report["angle off by"] < rough


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_words_of_mixed_lengths(kernel):
    dfa = random_dfa(random.Random(3), 5, 3)
    words = random_words(dfa, 0, 1, 2, 3, 150, 7, 0, 40)
    assert compile_dfa(dfa).accepts(words, kernel) == [dfa.accepts(w) for w in words]


def test_it_is_a_backbone_of_four_layers_without_training():
    model = compile_regex("(ab|ba)*c?")
    assert isinstance(model.backbone, RWKV7)
    assert len(model.backbone.blocks) == 4
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a|b)*abb", ["abb", "aababb", "ab", "abba", "", "babb"]),
        ("a*", ["", "a", "a" * 300]),
        ("[0-9]+(,[0-9]+)*", ["1", "10,20,3", "", ",", "1,,2", "1,"]),
        ("((a|b)(a|b))*", ["", "a", "ab", "aba" * 50]),
        ("(b*ab*ab*ab*ab*a)*b*", ["b", "aaaaa", "ababab", "aabaabab" * 20 + "b"]),
        ("-?(0|[1-9][0-9]*)", ["-0", "007", "1" * 100, "--1", "10"]),
    ],
)
def test_expressions(pattern, words):
    expected = [bool(re.fullmatch(pattern, word)) for word in words]
    assert compile_regex(pattern).accepts(words) == expected


def test_every_permutation_of_five():
    """Their word problem is complete for NC1: out of reach of transformers of constant depth."""
    dfa = DFA("sc", ((1, 1), (0, 2), (2, 3), (3, 4), (4, 0)), 0, frozenset({0}))
    words = random_words(dfa, *range(100, 120))
    assert compile_dfa(dfa).accepts(words) == [dfa.accepts(w) for w in words]


def test_no_reversal():
    """The fifth symbol is an a: 7 states, but 32 for the reversed words."""
    dfa = regex("....a.*", "ab")
    assert (dfa.states, dfa.reverse().minimise().states) == (7, 32)
    words = random_words(dfa, *range(20))
    assert compile_dfa(dfa).accepts(words) == [dfa.accepts(w) for w in words]


@pytest.mark.parametrize("accepting", [frozenset(), frozenset({0})])
def test_one_state(accepting):
    model = compile_dfa(DFA("ab", ((0, 0),), 0, accepting))
    assert model.accepts(["", "a", "abba"]) == [bool(accepting)] * 3


def test_in_pieces():
    """The state carries a recogniser from any token to the next."""
    dfa = random_dfa(random.Random(4), 4, 2)
    model, (word,) = compile_dfa(dfa), random_words(dfa, 60)
    ids, state, logits = model.encode([word]), None, []
    for piece in ids.split([1, 1, 20, 1, 38], dim=1):
        part, state = model(piece, state)
        logits.append(part)
    assert (torch.cat(logits, 1)[0] > 0).tolist() == verdicts(dfa, word)


def test_head_size():
    dfa = random_dfa(random.Random(5), 6, 2)
    words, model = random_words(dfa, 100, 200), compile_dfa(dfa, torch.float32, head_size=64)
    assert model.backbone.config.head_size == 64
    assert model.accepts(words) == [dfa.accepts(w) for w in words]
    with pytest.raises(ValueError, match="head_size=2 is too small"):
        compile_dfa(dfa, head_size=2)


def test_symbols_that_act_alike_are_one():
    plan = Plan.of(regex("[0-9]+(,[0-9]+)*"))
    assert plan.dfa.alphabet == ",0"
    assert plan.classes == {",": 0} | {digit: 1 for digit in "0123456789"}


def test_too_large():
    with pytest.raises(
        ValueError, match="12 states and 4 kinds of symbols need blocks of more than 6"
    ):
        compile_dfa(random_dfa(random.Random(0), 12, 4))


def test_what_is_no_word():
    model = compile_regex("ab")
    with pytest.raises(ValueError, match="'x' is no symbol of the alphabet 'ab'"):
        model.accepts(["a", "axb"])
    assert model.accepts([]) == []


def test_batches_keep_the_order():
    words = ["a" * n for n in (9000, 1, 2, 4000, 4000, 4500, 0, 9000)]
    cut = list(batches(words))
    assert [word for batch in cut for word in batch] == words
    assert [len(batch) for batch in cut] == [1, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("states", range(1, 9))
def test_transitions_move_codes_as_factors_move_states(states):
    """The update of the recurrence itself; merges are exact."""
    codes = hadamard(states)
    pairs = [(x, y) for x in range(states) for y in range(states) if x != y]
    factors = [Factor(), *(Factor(k, x, y) for k in ("swap", "merge") for x, y in pairs)]
    for factor in factors:
        key, removal = transition(factor, codes, 0)
        kappa = key / key.norm()
        moved = codes - (codes @ kappa)[:, None] * (kappa * removal)
        wanted = codes[[factor(q) for q in range(states)]]
        torch.testing.assert_close(moved, wanted, atol=1e-14, rtol=0)


def test_recogniser_is_an_ordinary_module():
    model = compile_regex("a*b", dtype=torch.float32)
    copy = Recogniser(model.symbols, model.backbone.config).eval()
    copy.load_state_dict(model.state_dict())
    assert copy.accepts(["ab", "aba"]) == [True, False]
