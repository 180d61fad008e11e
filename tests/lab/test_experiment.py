"""Baselines keep their promises; one small experiment from end to end."""

import json

import pytest
import torch

from goose_mm.config import BackboneConfig, ConfigError, from_dict
from goose_mm.lab.baselines import SequenceModel, diagonal_scan, rotate
from goose_mm.lab.experiment import Experiment, compare, draw, run, scores, shortest_texts

SMALL = BackboneConfig(dim=16, num_layers=2, head_size=8, a_max=2.0)
MIXERS = ["rwkv7", "transformer", "diagonal"]


def trained_looking(mixer):
    """A model none of whose parameters is zero any more."""
    torch.manual_seed(0)
    model = SequenceModel(mixer, SMALL, 11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("mixer", MIXERS)
def test_models_are_causal_and_see_the_past(mixer):
    model = trained_looking(mixer)
    ids = torch.randint(11, (2, 12))
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 11
    difference = (model(ids) - model(changed)).abs().amax((0, 2))
    assert difference[:5].max() < 1e-5 and difference[5:].min() > 1e-4


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_is_set_and_learns(mixer):
    model = trained_looking(mixer)
    ids = torch.randint(11, (2, 12))
    model.loss({"ids": ids, "targets": ids})[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert parameter.isfinite().all(), name


def test_models_of_one_width_and_depth_are_of_one_size():
    config = BackboneConfig(dim=128, num_layers=2)
    sizes = [
        sum(p.numel() for p in SequenceModel(mixer, config, 120).parameters()) for mixer in MIXERS
    ]
    assert max(sizes) < 1.3 * min(sizes)


@pytest.mark.parametrize("length", [1, 2, 5, 16, 23])
def test_the_diagonal_scan_is_the_loop(length):
    gate = 2 * torch.rand(3, length, 4, dtype=torch.float64) - 1
    x = torch.randn_like(gate)
    h, wanted = torch.zeros(3, 4, dtype=torch.float64), []
    for t in range(length):
        h = gate[:, t] * h + x[:, t]
        wanted.append(h)
    torch.testing.assert_close(diagonal_scan(gate, x), torch.stack(wanted, dim=1))


def test_rotary_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8).expand(-1, -1, -1, 6, -1)
    products = rotate(q) @ rotate(k).transpose(2, 3)
    for distance in range(-5, 6):
        diagonal = products[0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_the_loss_leaves_out_what_is_not_due():
    model = trained_looking("diagonal")
    ids = torch.randint(11, (2, 6))
    targets = torch.full_like(ids, -100)
    targets[0, 3] = 4
    loss, metrics = model.loss({"ids": ids, "targets": targets})
    torch.testing.assert_close(loss, -model(ids)[0, 3].log_softmax(-1)[4])
    assert metrics["accuracy"] in (0, 1)


def test_scores_by_hand():
    right = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 1]]).bool()
    due = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 1]]).bool()
    got = scores(right, due)
    assert got["token"] == pytest.approx(5 / 6) and got["text"] == 0.5
    assert got["at"] == [0.5, 1.0, None, 1.0] and got["up_to"] == [0.5] * 4


def test_the_length_is_reached_half_way():
    e = Experiment(length=64, start_length=8)
    assert [e.shortest(p) for p in (0.0, 0.16, 0.17, 0.34, 0.5, 1.0)] == [8, 8, 16, 32, 64, 64]
    firsts = {n: Experiment(length=n).first_length for n in (1, 8, 15, 48, 64, 100)}
    assert firsts == {1: 1, 8: 8, 15: 15, 48: 12, 64: 8, 100: 25}
    with pytest.raises(ConfigError, match="give 1 or more"):
        Experiment(length=0)


@pytest.mark.parametrize(("length", "pause", "first"), [(48, 2, 12), (24, 7, 24), (64, 3, 8)])
def test_the_first_texts_hold_whole_elements(length, pause, first):
    e = Experiment(task="S3", options={"pause": pause}, length=length)
    _, task = e.build(torch.device("cpu"))
    assert shortest_texts(task, e, torch.Generator()) == first


def test_unknown_keys_name_the_known_ones():
    with pytest.raises(ConfigError, match="known keys: task, options, mixer"):
        from_dict(Experiment, {"depth": 3})


TINY = {
    "task": "parity", "layers": 1, "dim": 32, "head_size": 32, "length": 8, "start_length": 4,
    "steps": 600, "batch_size": 64, "lr": 5e-3, "test_texts": 100, "tested": [1, 2],
}  # fmt: skip


def test_parity_is_learned_and_carries_to_longer_texts(tmp_path):
    # ten of ten seeds learn it so: processors round differently, and less would be luck
    robust = {"dim": 64, "length": 16, "steps": 800, "grow_at": 0.9}
    result = run({**TINY, **robust}, tmp_path, seed=1, quiet=True)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [t["length"] for t in result["tests"]] == [16, 32]
    assert all(t["token"] > 0.95 for t in result["tests"])
    assert all(len(t["at"]) == len(t["up_to"]) == t["length"] for t in result["tests"])
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["length"] == 4 and steps[-1]["length"] == 16
    draw([result], tmp_path / "one.svg")
    assert "<svg" in (tmp_path / "one.svg").read_text()


def test_tests_that_cannot_be_end_a_run_before_its_training(tmp_path):
    with pytest.raises(ValueError, match="length of 64"):
        run({**TINY, "task": "mqar", "options": {"vocab": 24}, "tested": [1, 8]}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_same_seed_gives_the_same_result(tmp_path):
    short = {**TINY, "steps": 20, "mixer": "diagonal"}
    first, second, other = (
        run(short, tmp_path / str(i), seed=seed, quiet=True)["tests"]
        for i, seed in enumerate((1, 1, 2))
    )
    assert first == second != other


def test_compare_runs_and_draws_every_model(tmp_path):
    results = compare({**TINY, "steps": 2}, tmp_path, layers=(1,))
    assert [r["name"] for r in results] == [
        "rwkv7, a_max 2", "rwkv7, a_max 1", "transformer", "diagonal, a_max 1",
    ]  # fmt: skip
    assert (tmp_path / "rwkv7-2-L1-0" / "result.json").exists()
    assert "<svg" in (tmp_path / "accuracy.svg").read_text()


def test_workers_change_nothing_but_the_time(tmp_path):
    short, mixers = {**TINY, "steps": 20}, [("diagonal", 1.0)]
    one, two = (
        compare(short, tmp_path / str(n), mixers=mixers, layers=(1,), workers=n)[0]["tests"]
        for n in (1, 2)
    )
    assert one == two


def test_training_starts_with_the_shortest_texts_a_task_has():
    generator = torch.Generator().manual_seed(0)
    for task, wanted in (("recall", 8), ("selective_copying", 64)):
        e = from_dict(Experiment, {"task": task, "length": 128})
        _, texts = e.build(torch.device("cpu"))
        before = generator.get_state()
        assert shortest_texts(texts, e, generator) == wanted
        assert torch.equal(generator.get_state(), before)
