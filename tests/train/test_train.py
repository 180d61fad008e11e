"""Laws of training: resume is exact, groups follow the official recipe, runs can be stopped."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from goose_mm.config import (
    BackboneConfig,
    TextConfig,
    TextData,
    TextRecipe,
    TrainConfig,
    load_recipe,
    recipe_names,
)
from goose_mm.hub import build_model, load
from goose_mm.text.model import max_logit_penalty
from goose_mm.train.loop import train
from goose_mm.train.optim import learning_rate, parameter_group

STORY = (
    "The goose went to the river. The river was wide, and the goose was small. {} geese swam.\n\n"
)


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for name, count in [("first", 60), ("second", 60), ("last", 6)]:
        story = "".join(STORY.format(i) for i in range(count))
        (folder / f"{name}.txt").write_text(story)
    return folder


def recipe(books, **train_settings) -> TextRecipe:
    settings = {"steps": 6, "batch_size": 2, "warmup": 2, "ema": 0.9, **train_settings}
    return TextRecipe(
        backbone=BackboneConfig(dim=64, num_layers=2, dropout=0.1),
        text=TextConfig(vocab_size=300, tokenizer="bpe"),
        data=TextData(path=str(books), held_out=("last",), length=16),
        train=TrainConfig(**settings),
    )


def weights(folder):
    return load(folder).state_dict()


def test_six_steps_are_three_and_three(books, tmp_path):
    r = recipe(books, accumulate=2)
    train(r, tmp_path / "whole", device="cpu", quiet=True)
    train(r, tmp_path / "parts", device="cpu", until=3, quiet=True)
    train(r, tmp_path / "parts", device="cpu", quiet=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    a, b = ((tmp_path / d / "metrics.jsonl").read_text() for d in ("whole", "parts"))
    assert [json.loads(x) for x in a.splitlines()] == [json.loads(x) for x in b.splitlines()]


def test_training_learns_and_scores_in_bits_per_byte(books, tmp_path):
    r = recipe(books, steps=60, lr=5e-3, batch_size=8)
    untrained = build_model(r)
    scores = train(r, tmp_path, device="cpu", quiet=True)
    model = load(tmp_path)
    assert not torch.equal(model.head.weight, untrained.head.weight)
    assert 0 < scores["bits_per_byte"] < 2.5  # 300 words of one story; 8 bits before training
    assert isinstance(model.generate("The goose", max_new_tokens=5, temperature=0.0), str)


def test_sigterm_saves_and_the_run_goes_on(books, tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(
        'model = "text"\n[backbone]\ndim = 64\nnum_layers = 1\n[text]\nvocab_size = 300\n'
        'tokenizer = "bpe"\n[data]\nlength = 16\n[train]\nsteps = 100000\nbatch_size = 1\n'
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "goose_mm", "train", str(toml), "--data.path", str(books)]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert b"run the same command to go on" in errors
    assert load(out) is not None and metrics.exists() and (out / "resume.pt").exists()


def test_another_recipe_does_not_continue_a_run(books, tmp_path):
    train(recipe(books, steps=1), tmp_path, device="cpu", quiet=True)
    with pytest.raises(ValueError, match="another recipe"):
        train(recipe(books, steps=2, lr=1.0), tmp_path, device="cpu", quiet=True)


def test_an_interrupted_save_leaves_the_old_one(books, tmp_path, monkeypatch):
    train(recipe(books), tmp_path, device="cpu", until=2, quiet=True)
    before = (tmp_path / "resume.pt").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        train(recipe(books), tmp_path, device="cpu", until=4, quiet=True)
    assert (tmp_path / "resume.pt").read_bytes() == before


@pytest.mark.parametrize("file", ["resume.pt", "model.safetensors", "metrics.jsonl"])
def test_a_full_disk_leaves_the_last_checkpoint(books, tmp_path, file):
    """Whichever file meets it first; and the run goes on as if nothing had happened."""
    # what resuming needs is the larger file, unless little of the model is trained
    part = ("head.",) if file == "model.safetensors" else ()
    r = recipe(books, save_every=2, trainable=part)
    train(r, tmp_path / "whole", device="cpu", quiet=True)
    out = tmp_path / "parts"
    train(r, out, device="cpu", until=2, quiet=True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[file]) - 1, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            train(r, out, device="cpu", quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value.filename).endswith(file)
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.pop("metrics.jsonl") and before.pop("metrics.jsonl") and after == before
    train(r, out, device="cpu", quiet=True)
    whole, parts = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    a, b = ((tmp_path / d / "metrics.jsonl").read_text() for d in ("whole", "parts"))
    assert a == b


def test_half_a_line_of_metrics_is_dropped(books, tmp_path):
    train(recipe(books), tmp_path, device="cpu", until=2, quiet=True)
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 3, "lo')
    train(recipe(books), tmp_path, device="cpu", until=2, quiet=True)
    assert metrics.read_text() == whole


def test_a_damaged_checkpoint_is_named(books, tmp_path):
    train(recipe(books), tmp_path, device="cpu", until=1, quiet=True)
    path = tmp_path / "resume.pt"
    for content in (path.read_bytes()[:1000], b"", b"what"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"resume\.pt is damaged; remove it"):
            train(recipe(books), tmp_path, device="cpu", quiet=True)


def test_groups_are_the_official_ones():
    def short(name):
        return re.sub(r"^backbone\.blocks\.\d+\.", "", name)

    model = build_model(recipe(""))
    got = {n: parameter_group(n, p) for n, p in model.named_parameters()}
    decayed = {short(n) for n, (_, decays) in got.items() if decays}
    assert decayed == {
        "emb.weight", "head.weight", "att.receptance.weight", "att.key.weight", "att.value.weight",
        "att.output.weight", "ffn.key.weight", "ffn.value.weight",
    }  # fmt: skip
    assert {short(n) for n, (factor, _) in got.items() if factor == 2} == {"att.w0"}


def test_learning_rate_warms_up_and_ends_at_the_final_rate():
    c = TrainConfig(steps=100, warmup=10, lr=1.0, lr_final=0.1)
    rates = [learning_rate(s, c) for s in range(101)]
    assert rates[0] == pytest.approx(0.01) and rates[100] == pytest.approx(0.1)
    assert max(rates) == rates[10] and rates[10:] == sorted(rates[10:], reverse=True)


def test_max_logit_penalty_has_the_official_gradient():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    penalty = max_logit_penalty(logits)
    (3 * penalty).backward()
    expected = torch.zeros_like(logits)
    top, place = logits.detach().max(-1, keepdim=True)
    expected.scatter_(-1, place, top * 1e-4 / 6 * 3)
    assert penalty.item() == 0
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads(name):
    assert load_recipe(name).train.steps > 0


def test_only_named_parts_are_trained(books, tmp_path):
    r = recipe(books, trainable=("head.",), steps=2)
    before = None
    train(r, tmp_path, device="cpu", until=1, quiet=True)
    before = weights(tmp_path)
    train(r, tmp_path, device="cpu", quiet=True)
    after = weights(tmp_path)
    changed = {k for k in after if not torch.equal(before[k], after[k])}
    assert changed == {"head.weight"}
    with pytest.raises(ValueError, match="matches no parameter"):
        train(replace(r, train=replace(r.train, trainable=("nose",))), tmp_path / "b", quiet=True)
