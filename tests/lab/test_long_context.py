"""Loss by position, pass keys and needles: what they report is what a direct reading says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import goose_mm
from goose_mm.cli import main
from goose_mm.lab import long_context

TEXT = "The old goose flew over the hill and the river, and nobody knew where it went. " * 40


@pytest.fixture(scope="module")
def model():
    return goose_mm.load("goose-tiny-text")


def test_losses_in_spans_are_those_of_one_reading(model, monkeypatch):
    monkeypatch.setattr(long_context, "SPAN", 7)
    found = long_context.losses(model, TEXT, 50, 2)
    ids = torch.tensor(model.tokenizer.encode(TEXT)[:50])
    with torch.inference_mode():
        logits, _ = model(F.pad(ids[:-1], (1, 0))[None])
    wanted = F.cross_entropy(logits[0].float(), ids, reduction="none")
    assert found.shape == (2, 50)
    torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=1e-4)


def test_repeated_text_is_learned_while_it_is_read(model):
    bins = long_context.loss_by_position(model, TEXT, 256)["bins"]
    assert [part["from"] for part in bins] == [0, 16, 32, 64, 128]
    assert bins[-1]["nats"] < bins[0]["nats"]


def test_the_key_is_told_at_its_depth_and_asked_for_at_the_end(model, monkeypatch):
    seen = []

    def likelihoods(model, contexts, keys):
        seen.extend(zip(contexts, keys, strict=True))
        return [(-1.0, True), (-5.0, False)] * (len(keys) // 2)

    monkeypatch.setattr(long_context, "loglikelihoods", likelihoods)
    rows = long_context.passkey(model, TEXT, [16, 40], depths=(0.0, 0.5), trials=2)
    assert [(row["length"], row["depth"]) for row in rows] == [
        (16, 0),
        (16, 0.5),
        (40, 0),
        (40, 0.5),
    ]
    assert all((row["found"], row["nats"], row["nats_unseen"]) == (1, 1, 5) for row in rows)
    decode = model.tokenizer.decode
    for context, key in seen[::2]:
        assert f"The pass key is{decode(key)}. Remember it." in decode(context[1:])
        assert decode(context).endswith(long_context.ASK)
    for context, key in seen[1::2]:
        assert decode(key) not in decode(context[1:])


def test_commands_write_what_they_print(tmp_path, capsys):
    book, out = tmp_path / "book.txt", str(tmp_path / "out")
    book.write_text(TEXT)
    assert main(["eval", "lab", "position", str(book), "--out", out, "--length", "64"]) == 0
    call = ["eval", "lab", "passkey", str(book), "--out", out, "--lengths", "16", "--trials", "1"]
    assert main(call) == 0
    rng = np.random.default_rng(0)
    for name in ("clip", "hay"):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * rng.standard_normal(16000), 16000)
    clips = [str(tmp_path / f"{name}.wav") for name in ("clip", "hay")]
    call = ["eval", "lab", "needle", *clips, "rain", "--out", out, "--seconds", "2"]
    assert main(call) == 0
    (row,) = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert row["seconds"] == 2 and 0 <= row["without"] <= 1
    assert main([*call[:5], "nothing", *call[6:]]) == 2
    assert "no label 'nothing'" in capsys.readouterr().err
    assert main(["eval", "lab", "position", str(book), "--out", out]) == 2
    assert "fewer than one piece" in capsys.readouterr().err
