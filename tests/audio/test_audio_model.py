"""AudioRWKV-7: batched = single, windows = whole, and tags that people can use."""

import re

import numpy as np
import pytest
import soundfile
import torch

from goose_mm.audio import AudioRWKV7, Tag, model
from goose_mm.audio.patch import PatchEmbed
from goose_mm.config import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    ConfigError,
    load_recipe,
    model_part,
)

LABELS = ("bark", "rain", "tick")


def tagger(shift: str = "conv", stem: tuple[int, ...] = (4, 6), dropout: float = 0.0):
    torch.manual_seed(0)
    backbone = BackboneConfig(
        dim=32, num_layers=2, head_size=16, bidirectional=True, shift=shift, dropout=dropout
    )
    tagger = AudioRWKV7(
        AudioModel(backbone=backbone, audio=AudioConfig(stem=stem, labels=LABELS))
    ).eval()
    with torch.no_grad():  # the official initialisation makes every block the identity
        for parameter in tagger.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tagger


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return 0.3 * torch.rand(samples, generator=random) * torch.linspace(0.01, 1, samples)


@pytest.mark.parametrize("shift", ["conv", "token"])
@pytest.mark.parametrize("stem", [(), (4, 6)])
@torch.no_grad()
def test_batched_equals_single(shift, stem):
    net = tagger(shift, stem)
    lengths = torch.tensor([9001, 1, 390, 2960, 2961, 5555])
    batch = torch.full((len(lengths), 9001), 7.7)  # what lies beyond a clip must not matter
    singles = []
    for row, length in zip(batch, lengths.tolist(), strict=True):
        row[:length] = noise(length, seed=length)
        singles.append(net(row[None, :length]))
    torch.testing.assert_close(net(batch, lengths), torch.cat(singles), atol=2e-5, rtol=0)


@torch.no_grad()
def test_tokens_are_time_major_with_frequency_fastest():
    patch = PatchEmbed(AudioConfig(), 8, silence=-2.5)
    quiet = torch.zeros(1, 48, 64)
    loud = quiet.clone()
    loud[0, 40, 20] = 5.0  # third time column, second frequency row
    frames = torch.tensor([48])
    before, after = patch(quiet, frames), patch(loud, frames)
    assert after.grid == (3, 4)
    changed = (before.tokens != after.tokens).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [2 * 4 + 1]


@pytest.mark.parametrize("stem", [(), (4, 6)])
@torch.no_grad()
def test_a_partial_column_is_filled_with_silence_and_weighs_its_share(stem):
    patch = PatchEmbed(AudioConfig(stem=stem), 8, silence=-2.5)
    features = torch.randn(1, 20, 64)
    partial = patch(features, torch.tensor([20]))
    filled = torch.cat([features, torch.full((1, 12, 64), -2.5)], 1)
    torch.testing.assert_close(partial.tokens, patch(filled, torch.tensor([32])).tokens)
    assert partial.weight[0].tolist() == [1.0] * 4 + [0.25] * 4


@torch.no_grad()
def test_stem_never_looks_ahead():
    patch = PatchEmbed(AudioConfig(stem=(4, 6, 8)), 8, silence=-2.5)
    features = torch.randn(1, 64, 64)
    whole = patch(features, torch.tensor([64])).tokens
    begun = patch(features[:, :32], torch.tensor([32])).tokens
    torch.testing.assert_close(whole[:, : 2 * 4], begun)


@pytest.mark.parametrize("samples", [1, 400, 5000, 2 * 16 * 160, 2 * 16 * 160 + 240, 20_001])
@torch.no_grad()
def test_windows_have_the_frames_of_the_whole(monkeypatch, samples):
    monkeypatch.setattr(model, "WINDOW_COLUMNS", 2)
    net, x = tagger(), noise(samples)
    windows = [net.frontend(torch.from_numpy(w)[None])[0] for w in net._windows(x, 16000)]
    torch.testing.assert_close(torch.cat(windows), net.frontend(x[None])[0], atol=1e-5, rtol=0)
    assert max(map(len, windows)) <= 32


@torch.no_grad()
def test_pooling_over_windows_is_pooling_over_all_patches(monkeypatch):
    """With nothing mixed between patches, windows give the logits of the whole clip."""
    monkeypatch.setattr(model, "WINDOW_COLUMNS", 3)
    net, x = tagger(stem=()), noise(30_000)
    net.backbone.forward = lambda tokens, **_: (tokens, None)
    whole = net(x[None]).sigmoid()
    torch.testing.assert_close(net.probabilities([x]), whole, atol=1e-5, rtol=0)


def test_long_clips_are_read_in_windows(monkeypatch):
    monkeypatch.setattr(model, "WINDOW_COLUMNS", 4)
    scores = tagger().probabilities([noise(100_000)])
    assert scores.shape == (1, 3) and scores.isfinite().all()


def test_tags_of_files_and_arrays(tmp_path):
    net, x = tagger(), noise(16_000)
    soundfile.write(tmp_path / "a.wav", x.numpy(), 16000, subtype="FLOAT")
    tags = net.tag(tmp_path / "a.wav")
    assert {tag.label for tag in tags} == set(LABELS) and isinstance(tags[0], Tag)
    assert tags == sorted(tags, key=lambda tag: -tag.score)
    want = net(x[None]).sigmoid()[0].tolist()
    for tag in tags:
        assert tag.score == pytest.approx(want[LABELS.index(tag.label)], abs=1e-6)
    assert tags == net.tag(str(tmp_path / "a.wav")) == net.tag(x.numpy(), 16000) == net.tag(x)
    assert net.tag(x, top_k=1) == tags[:1]
    assert net.tag(torch.stack([x, x]), 44100, top_k=9) != tags


def test_tag_many_equals_tag_one_by_one(tmp_path):
    net = tagger()
    many = [noise(n, seed=n) for n in (16_000, 50, 1, 9000)] * 3
    for together, clip in zip(net.tag_many(many), many, strict=True):
        for a, b in zip(together, net.tag(clip), strict=True):
            assert a.label == b.label and a.score == pytest.approx(b.score, abs=1e-5)
    assert net.tag_many([]) == []


def test_broken_input_is_one_clear_line():
    net = tagger()
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        net.tag(noise(100), top_k=0)
    with pytest.raises(ValueError, match="3 of 3 samples are NaN"):
        net.tag(np.full(3, np.nan))
    with pytest.raises(FileNotFoundError, match="no such file"):
        net.tag("nowhere.wav")


def test_tagging_leaves_the_training_mode_alone():
    net = tagger(dropout=0.5).train()
    assert net.tag(noise(4000)) == net.tag(noise(4000)) and net.training


def test_half_precision_tags():
    net, x = tagger(), noise(8000)
    want = net.probabilities([x])
    torch.testing.assert_close(net.bfloat16().probabilities([x]), want, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("peak", "said"), [(0.0, "is silent"), (1e-4, r"is next to silent \(peak -80 dB\)"), (2e-3, "")]
)
def test_near_silence_is_remarked(caplog, peak, said):
    tagger().tag(peak * torch.sin(torch.arange(80_000)))
    assert len(caplog.messages) == bool(said)
    assert re.search(said, caplog.text)


def test_overfits_two_clips():
    net = tagger().train()
    batch = {
        "waveform": torch.stack([noise(4800), torch.sin(torch.arange(4800) * 0.3)]),
        "length": torch.tensor([4800, 4000]),
        "target": torch.eye(3)[:2],
        "partner": torch.tensor([1, 0]),
        "ratio": torch.tensor([1.0, 1.0]),
        "seed": torch.tensor(5),
        "strength": torch.tensor(0.2),
    }
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss, metrics = net.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0] and metrics["accuracy"] == 1


def test_evaluation_loss_is_not_augmented():
    net = tagger()
    batch = {
        "waveform": noise(4000)[None],
        "length": torch.tensor([4000]),
        "target": torch.eye(3)[:1],
    }
    extra = {"seed": torch.tensor(1), "strength": torch.tensor(1.0)}
    assert torch.equal(net.loss(batch)[0], net.loss(batch | extra)[0])


@pytest.mark.parametrize(
    "audio",
    [
        AudioConfig(),
        AudioConfig(labels=("a", "a")),
        AudioConfig(labels=("a",), patch_freq=24),
        AudioConfig(labels=("a",), stem=(4,) * 5),
    ],
)
def test_impossible_configurations(audio):
    with pytest.raises(ConfigError, match="audio"):
        AudioRWKV7(AudioModel(backbone=BackboneConfig(dim=64, num_layers=1), audio=audio))


def test_shipped_recipe_fits_its_budget():
    net = AudioRWKV7(model_part(load_recipe("audio_tiny")))
    assert sum(p.numel() for p in net.parameters()) <= 2.5e6  # 5 MB in 16 bits
    assert len(net.labels) == 10


def test_the_meta_device_gives_shapes():
    assert tagger().to("meta")(torch.zeros(2, 9001, device="meta")).shape == (2, len(LABELS))
