"""Our regular expressions match what Python's do."""

from __future__ import annotations

import random
import re

import pytest

from goose_mm.lab.regular.expressions import regex

ALPHABET = "abc"


def random_pattern(rng: random.Random, depth: int) -> str:
    """Something valid in both dialects."""
    kinds = ["letter", "letter", "class"]
    kinds += ["join", "join", "choice", "star", "plus", "maybe", "empty"] if depth else []

    def inner() -> str:
        return random_pattern(rng, depth - 1)

    match rng.choice(kinds):
        case "letter":
            return rng.choice(ALPHABET)
        case "class":
            return rng.choice(["[ab]", "[^b]", ".", "[a-c]", "[^a-b]", "[bc]"])
        case "join":
            return inner() + inner() + inner()
        case "choice":
            return f"({inner()}|{inner()}|{inner()})"
        case "star":
            return f"({inner()})*"
        case "plus":
            return f"({inner()})+"
        case "maybe":
            return f"({inner()})?"
        case _:
            return "()"


@pytest.mark.parametrize("seed", range(60))
def test_the_same_as_python(seed):
    rng = random.Random(seed)
    pattern = random_pattern(rng, 4)
    dfa = regex(pattern, ALPHABET)
    assert dfa == dfa.minimise()
    for _ in range(300):
        word = "".join(rng.choices(ALPHABET, k=rng.randint(0, 9)))
        assert dfa.accepts(word) == bool(re.fullmatch(pattern, word)), (pattern, word)


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("a|", ["", "a"], ["aa"]),
        ("(a*)*", ["", "aaa"], []),
        ("(a*|a)+a", ["a", "aaa"], [""]),
        (r"\.\**", [".", ".**"], ["", "*"]),
        (r"[\]\-a-]+", ["a]-", "]"], [""]),
        (r"\\|\(", ["\\", "("], ["\\("]),
        ("[0-9]+(,[0-9]+)*", ["7", "10,99"], ["", ",1", "1,,2"]),
        ("-?[1-9]", ["-1", "9"], ["-", "--1"]),
    ],
)
def test_by_hand(pattern, inside, outside):
    dfa = regex(pattern)
    assert all(map(dfa.accepts, inside))
    assert not any(map(dfa.accepts, outside))
    for word in inside + outside:
        assert dfa.accepts(word) == bool(re.fullmatch(pattern, word))


def test_the_alphabet():
    assert regex("ba*").alphabet == "ab"
    assert regex("", "x").accepts("")
    assert not regex("a", "ab").accepts("b")
    assert regex("[^a]", "abc").accepts("c")


@pytest.mark.parametrize(
    ("pattern", "alphabet", "message"),
    [
        ("a.", None, "need an alphabet"),
        ("()", None, "names no symbol"),
        ("abc", "ab", "names 'c', which the alphabet 'ab' lacks"),
        ("(a", None, "missing '\\)' at character 2"),
        ("a)", None, "unmatched '\\)' at character 1"),
        ("*a", None, "misplaced '\\*'"),
        ("a*?", None, "a second quantifier"),
        ("a{2}", None, "misplaced '{'"),
        ("^a$", None, "misplaced '\\^'"),
        (r"\d", None, r"unknown \\d .* at character 1"),
        ("[]", None, "empty \\[\\]"),
        ("[b-a]", None, "runs backwards"),
        ("[a", None, "ends too early"),
        ("a\\", None, "ends too early"),
    ],
)
def test_what_cannot_be_read(pattern, alphabet, message):
    with pytest.raises(ValueError, match=message):
        regex(pattern, alphabet)
