"""Each recall task, read by a plain loop, asks for what it says."""

import itertools

import pytest
import torch

from goose_mm.lab.sequence import (
    TASKS,
    UNSCORED,
    Texts,
    distinct,
    first_equal,
    fuzzy_recall,
    memorisation,
    mqar,
    recall,
    selective_copying,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(batch):
    return zip(*(t.tolist() for t in batch), strict=True)


@pytest.mark.parametrize("name", TASKS)
def test_texts_fit_their_vocabulary_and_follow_from_the_seed(name):
    task = Texts(name)
    (ids, targets), again, other = (task(16, 64, seeded(s)) for s in (1, 1, 2))
    assert ids.shape == targets.shape == (16, 64)
    assert ids.min() >= 0 and ids.max() < task.vocab_size
    due = targets[targets != UNSCORED]
    assert len(due) and due.min() >= 0 and due.max() < task.vocab_size
    assert torch.equal(ids, again[0]) and torch.equal(targets, again[1])
    assert not torch.equal(ids, other[0])


@pytest.mark.parametrize("pairs", [1, 5, 8])
def test_mqar_asks_every_key_once_for_its_value(pairs):
    for ids, targets in rows(mqar(20, 32, seeded(), vocab=40, pairs=pairs)):
        book = dict(zip(ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
        asked = {ids[t]: target for t, target in enumerate(targets) if target != UNSCORED}
        assert len(book) == pairs and asked == book
        assert all(0 < key < 20 <= value for key, value in book.items())
        assert targets[: 2 * pairs] == [UNSCORED] * 2 * pairs


def test_mqar_queries_come_early():
    _, targets = mqar(200, 256, seeded(), pairs=4)
    places = (targets != UNSCORED).nonzero()[:, 1].float()
    assert places.median() < 60  # 132 if they were spread evenly


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_recall_asks_for_values_of_known_keys(noise):
    batch = recall(20, 64, seeded(), vocab=16, noise_vocab=8 if noise else 0, noise=noise)
    for ids, targets in rows(batch):
        book, wanted = {}, []
        for key, value in zip(ids[::2], ids[1::2], strict=True):
            assert (key < 8 <= value < 16) or (key >= 16 and value >= 16)
            wanted += [value if key in book else UNSCORED, UNSCORED]
            if key < 8:
                assert book.setdefault(key, value) == value
        assert targets == wanted
    assert ((batch[0] >= 16).float().mean() - noise).abs() < 0.05


def test_noise_in_recall_is_never_asked():
    ids, targets = recall(20, 64, seeded(), vocab=16, noise_vocab=1, noise=0.5)
    assert (targets[ids >= 16] == UNSCORED).all()


def test_fuzzy_recall_asks_for_values_of_known_words():
    for ids, targets in rows(fuzzy_recall(20, 128, seeded(), vocab=7, motif=2)):
        words, book, t = split(ids, half=3), {}, 0
        for key, value in zip(words[::2], words[1::2], strict=False):
            known = key in book
            assert len(set(key)) == len(key) <= 2 and len(set(value)) == len(value) <= 2
            t += len(key)
            if t + len(value) < len(ids):  # the last pair may be cut off
                assert book.setdefault(key, value) == value
                asked = targets[t - 1 : t - 1 + len(value)]
                assert asked == (list(value) if known else [UNSCORED] * len(value))
            t += len(value)
        assert sum(x != UNSCORED for x in targets) > 10


def split(ids, half):
    """Words of keys and values in turn: a word ends where the other half of the tokens begins."""
    words = [[ids[0]]]
    for before, token in itertools.pairwise(ids):
        if (before < half) == (token < half):
            words[-1].append(token)
        else:
            words.append([token])
    return [tuple(word) for word in words]


def test_selective_copying_repeats_the_letters_in_order():
    for ids, targets in rows(selective_copying(20, 40, seeded(), vocab=10, count=6)):
        sign = ids.index(9)
        letters = [x for x in ids[:sign] if x != 8]
        assert sign == 33 and len(letters) == 6
        assert ids[sign + 1 :] == [8] * 6
        assert targets == [UNSCORED] * 34 + letters


def test_memorisation_has_one_answer_for_a_key_in_all_texts():
    ids, targets = memorisation(200, 32, seeded(), vocab=32)
    keys, values = ids[:, ::2].flatten().tolist(), targets[:, 1::2].flatten().tolist()
    pairs = set(zip(keys, values, strict=True))
    assert len(pairs) == len(dict(pairs)) == len({v for _, v in pairs}) == 15
    assert (ids[:, 1::2] == 31).all() and (targets[:, ::2] == UNSCORED).all()


def test_distinct_draws_by_weight_and_never_twice():
    weights = torch.tensor([1.0, 2.0, 5.0, 0.0])
    drawn = distinct((4000, 2), weights, seeded())
    assert (drawn[:, 0] != drawn[:, 1]).all() and drawn.max() == 2
    shares = drawn[:, 0].bincount() / 4000
    torch.testing.assert_close(shares, weights[:3] / 8, atol=0.03, rtol=0)


def test_first_equal_finds_the_first():
    assert first_equal(torch.tensor([[4, 7, 4, 7, 1]])).tolist() == [[0, 1, 0, 1, 4]]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (mqar, {"pairs": 9}, "length of 36"),
        (mqar, {"pairs": 4, "vocab": 8}, "vocabulary of 10"),
        (recall, {"noise": 0.5}, "noise_vocab"),
        (fuzzy_recall, {"motif": 9}, "vocab=18"),
        (selective_copying, {"count": 16}, "length=33"),
    ],
)
def test_what_does_not_fit_says_what_would(task, options, message):
    with pytest.raises(ValueError, match=message):
        task(2, 32, seeded(), **options)


def test_unknown_options_name_the_known_ones():
    with pytest.raises(ValueError, match="no option 'pears'; it has vocab, pairs, power"):
        Texts("mqar", pears=3)
