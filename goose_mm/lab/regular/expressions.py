"""Regular expressions, read into automata.

    ab      a, then b           a|b     either         (...)   grouping; () is the empty word
    a*      any number of a     a+      at least one   a?      none or one
    [a-cx]  one of these        [^ab]   any other      .       any symbol of the alphabet
    \\*      the character itself, if it is no letter and no digit

An expression matches whole words, as Python's `re.fullmatch`. What `re` would read otherwise is an
error: `\\d`, `{2}`, `^`, `$`, and stacked quantifiers; write `(a+)?`, for there `a+?` is not that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from goose_mm.lab.regular.automata import DFA, explore

SPECIAL = "()|*+?[]{}^$."


class Letters(NamedTuple):
    """One symbol: one of these, or with `others` one of those that are not listed."""

    listed: frozenset[str]
    others: bool = False


class Choice(NamedTuple):
    options: tuple[Sequence, ...]


class Repeat(NamedTuple):
    body: Sequence


Sequence = tuple[Letters | Choice | Repeat, ...]  # one after the other


def regex(pattern: str, alphabet: str | None = None) -> DFA:
    """The smallest automaton that accepts what `pattern` matches.

    `alphabet` is by default what the pattern names, sorted. ValueError for a pattern that cannot be
    read, or that needs a wider alphabet.
    """
    parser = Parser(pattern)
    expression = parser.choice()
    if parser.at < len(pattern):
        raise parser.error("unmatched ')'")
    if alphabet is None:
        if parser.others:
            raise ValueError(
                f"pattern {pattern!r}: '.' and [^...] need an alphabet; give it as the second "
                "argument"
            )
        alphabet = "".join(sorted(parser.named))
        if not alphabet:
            raise ValueError(f"pattern {pattern!r} names no symbol; give an alphabet")
    elif missing := parser.named - set(alphabet):
        raise ValueError(
            f"pattern {pattern!r} names {''.join(sorted(missing))!r}, which the alphabet "
            f"{alphabet!r} lacks; add it there"
        )

    def step(state: frozenset[Sequence], symbol: int) -> frozenset[Sequence]:
        character = alphabet[symbol]
        return frontier(
            rest
            for (head, *rest) in filter(None, state)
            if isinstance(head, Letters) and (character in head.listed) != head.others
        )

    return explore(alphabet, frontier([expression]), step, lambda state: () in state).minimise()


def frontier(sequences: Iterable[Iterable[Letters | Choice | Repeat]]) -> frozenset[Sequence]:
    """What can come next: these sequences, opened until each is empty or begins with a letter.

    Sequences are the continuations of the pattern (Antimirov's partial derivatives), finitely many.
    """
    waiting = [tuple(s) for s in sequences]
    seen = set(waiting)
    while waiting:
        match waiting.pop():
            case (Choice(options), *rest):
                opened = [(*option, *rest) for option in options]
            case (Repeat(body) as loop, *rest):
                opened = [(*body, loop, *rest), tuple(rest)]
            case _:
                continue
        for sequence in opened:
            if sequence not in seen:  # (a*)* would come back to itself without end
                seen.add(sequence)
                waiting.append(sequence)
    return frozenset(s for s in seen if not s or isinstance(s[0], Letters))


class Parser:
    """Recursive descent; `named` collects the symbols met, `others` whether '.' or [^...] was."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0
        self.named: set[str] = set()
        self.others = False

    def error(self, what: str) -> ValueError:
        return ValueError(f"pattern {self.pattern!r}: {what} at character {self.at}")

    def next(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self) -> str:
        if not self.next():
            raise self.error("it ends too early,")
        self.at += 1
        return self.pattern[self.at - 1]

    def choice(self) -> Sequence:
        options = [self.sequence()]
        while self.next() == "|":
            self.take()
            options.append(self.sequence())
        return options[0] if len(options) == 1 else (Choice(tuple(options)),)

    def sequence(self) -> Sequence:
        found: Sequence = ()
        while self.next() and self.next() not in "|)":
            item = self.atom()
            quantifier = self.next()
            if quantifier and quantifier in "*+?":
                self.take()
                if self.next() and self.next() in "*+?":
                    raise self.error("a second quantifier (use parentheses)")
                loop = Repeat(item)
                item = {"*": (loop,), "+": (*item, loop), "?": (Choice((item, ())),)}[quantifier]
            found += item
        return found

    def atom(self) -> Sequence:
        match self.take():
            case "(":
                inner = self.choice()
                if self.next() != ")":
                    raise self.error("missing ')'")
                self.take()
                return inner
            case "[":
                return (self.letters(),)
            case ".":
                self.others = True
                return (Letters(frozenset(), others=True),)
            case "\\":
                return (self.literal(self.escaped()),)
            case character if character in SPECIAL:
                self.at -= 1
                raise self.error(f"misplaced {character!r} (write \\{character} to match it)")
            case character:
                return (self.literal(character),)

    def literal(self, character: str) -> Letters:
        self.named.add(character)
        return Letters(frozenset(character))

    def letters(self) -> Letters:
        """The inside of [...], whose opening is behind."""
        others = self.next() == "^"
        if others:
            self.take()
            self.others = True
        listed: set[str] = set()
        while self.next() != "]":
            first = self.member()
            last = first
            if self.next() == "-" and self.pattern[self.at + 1 : self.at + 2] != "]":
                self.take()
                last = self.member()
            if last < first:
                raise self.error(f"the range {first}-{last} runs backwards")
            listed |= {chr(code) for code in range(ord(first), ord(last) + 1)}
        self.take()
        if not listed:
            raise self.error("empty [] (list at least one symbol)")
        self.named |= listed
        return Letters(frozenset(listed), others)

    def member(self) -> str:
        character = self.take()
        return self.escaped() if character == "\\" else character

    def escaped(self) -> str:
        """What a backslash stands before."""
        character = self.take()
        if character.isalnum():
            self.at -= 1
            raise self.error(f"unknown \\{character} (list the symbols, as in [0-9])")
        return character
