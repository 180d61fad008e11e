"""Laws of groups, and words whose targets a plain loop gives as well."""

import itertools

import pytest
import torch

from goose_mm.lab.groups import Words, group, running_products, then

ORDERS = {"S5": 120, "A5": 60, "Z60": 60, "parity": 2, "S3": 6, "A4xZ5": 60}
CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_tables_are_groups(name, order):
    table = group(name).table
    everything = torch.arange(order)
    assert table.shape == (order, order)
    assert torch.equal(table[0], everything) and torch.equal(table[:, 0], everything)
    for line in (table, table.T):  # every row and column once through the group: inverses exist
        assert torch.equal(line.sort(1).values, everything.expand(order, -1))
    left = table[table]  # [g, h, k]: (g h) k
    right = table[everything[:, None, None], table]  # g (h k)
    assert torch.equal(left, right)


def test_the_table_multiplies_permutations():
    g = group("A4")
    for (i, first), (j, second) in itertools.product(enumerate(g.elements), repeat=2):
        assert g.elements[g.table[i, j]] == then(first, second)


def test_only_cyclic_groups_commute():
    commute = {name: torch.equal(group(name).table, group(name).table.T) for name in ORDERS}
    assert [name for name in ORDERS if commute[name]] == ["Z60", "parity"]


def test_swaps_of_s5_are_ten_and_generate_it():
    g = group("S5")
    swaps = g.generators("swaps")
    assert len(swaps) == 11 and swaps[0] == 0
    reached = {0}
    for _ in range(4):  # no permutation of five needs more than four swaps
        reached = {int(g.table[x, y]) for x in reached for y in swaps}
    assert len(reached) == 120


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
def test_targets_are_the_running_product(length):
    table = group("A5").table
    ids, targets = Words("A5", CPU)(5, length, seeded())
    assert ids.shape == targets.shape == (5, length)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        assert list(itertools.accumulate(row, lambda g, h: int(table[g, h]))) == wanted
    assert torch.equal(running_products(table, ids), targets)


def test_parity_counts_ones():
    ids, targets = Words("parity", CPU)(8, 50, seeded())
    assert torch.equal(ids.cumsum(1) % 2, targets)


def test_pauses_leave_the_model_time():
    task = Words("S3", CPU, pause=3)
    ids, targets = task(4, 16, seeded())
    assert task.vocab_size == 7
    assert torch.equal(ids.view(4, 4, 4)[:, :, 1:], torch.full((4, 4, 3), 6))
    assert (targets.view(4, 4, 4)[:, :, :3] == -100).all()
    assert torch.equal(targets[:, 3::4], running_products(group("S3").table, ids[:, ::4]))
    with pytest.raises(ValueError, match="multiple of 4"):
        task(4, 18, seeded())
    with pytest.raises(ValueError, match="give 0 or more"):
        Words("S3", CPU, pause=-1)


def test_words_follow_from_the_seed_and_use_all_letters():
    task = Words("S4", CPU, generators="swaps")
    same, again, other = (task(64, 20, seeded(s))[0] for s in (1, 1, 2))
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert sorted(same.unique().tolist()) == group("S4").generators("swaps")


@pytest.mark.parametrize("name", ["S9", "B5", "Z0", "", "A5x"])
def test_unknown_groups_are_named(name):
    with pytest.raises(ValueError, match=f"no group '{name[3:] if 'x' in name else name}'"):
        group(name)


def test_wrong_generators_are_named():
    with pytest.raises(ValueError, match='"all" or "swaps"'):
        Words("S5", CPU, generators="few")
    with pytest.raises(ValueError, match="no swap"):
        Words("A5", CPU, generators="swaps")
