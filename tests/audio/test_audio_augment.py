"""Augmentation: a function of its seed, and what it must not change."""

import pytest
import torch

from goose_mm.audio import KaldiFbank, augment
from goose_mm.config import AudioConfig

SILENCE, STD = KaldiFbank(AudioConfig()).silence, AudioConfig().std


def clips(batch: int = 3, samples: int = 4000):
    waveforms = torch.randn(batch, samples, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([4000, 2500, 1000])
    waveforms = waveforms.masked_fill(torch.arange(samples) >= lengths[:, None], 0)
    return waveforms, lengths, torch.eye(batch)


def everything(seed: int, strength: float):
    waveforms, lengths, targets = clips()
    plan = augment.Plan(
        {
            "waveform": waveforms,
            "partner": torch.tensor([1, 2, 0]),
            "ratio": torch.ones(3),
            "seed": torch.tensor(seed),
            "strength": torch.tensor(strength),
        }
    )
    noisy, _, _ = plan.sound(waveforms, lengths, targets)
    return noisy, plan.spectrum(KaldiFbank(AudioConfig())(noisy), SILENCE, STD)


def test_same_seed_same_batch_and_no_trace_in_the_global_generator():
    before = torch.get_rng_state()
    first, again, other = everything(1, 1.0), everything(1, 1.0), everything(2, 1.0)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_strength_zero_changes_nothing():
    waveforms, _, _ = clips()
    noisy, features = everything(1, 0.0)
    torch.testing.assert_close(noisy, waveforms)
    torch.testing.assert_close(features, KaldiFbank(AudioConfig())(waveforms))


def test_mixing_joins_sounds_tags_and_lengths():
    waveforms, lengths, targets = clips()
    partner, ratio = torch.tensor([1, 2, 0]), torch.tensor([0.5, 1.0, 0.6])
    mixed, length, target = augment.mix(waveforms, lengths, targets, partner, ratio)
    assert length.tolist() == [4000, 2500, 4000]
    assert target.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    torch.testing.assert_close(mixed[1], waveforms[1])
    part = mixed[0, 2600:] * torch.tensor(0.5).sqrt()  # only clip 0 sounds there
    torch.testing.assert_close(part, waveforms[0, 2600:] * 0.5, atol=1e-5, rtol=1e-4)
    loudness = augment.rms(mixed, length)
    assert 0.5 < loudness[0] / augment.rms(waveforms, lengths)[0] < 1.5


def test_mixing_with_silence_is_finite():
    waveforms, lengths, targets = torch.zeros(2, 100), torch.tensor([100, 100]), torch.eye(2)
    waveforms[0] = 0.5
    mixed, _, _ = augment.mix(
        waveforms, lengths, targets, torch.tensor([1, 0]), torch.tensor([0.5, 0.5])
    )
    assert mixed.isfinite().all() and mixed.abs().max() < 1


@pytest.mark.parametrize("seed", range(4))
def test_equaliser_leaves_silence_and_stays_in_range(seed):
    features = torch.rand(5, 20, 64)
    features[:, 5] = SILENCE
    random = torch.Generator().manual_seed(seed)
    got = augment.equalise(features, SILENCE, STD, random, 1.0)
    assert (got[:, 5] == SILENCE).all() and got.min() >= SILENCE
    most = (augment.GAIN + augment.EQUALISER) * augment.DB / STD
    change = (got - features)[:, 6:]
    assert 0 < change.abs().max() <= most
    torch.testing.assert_close(change, change[:, :1].expand_as(change), atol=1e-5, rtol=0)


def test_masks_are_stripes_of_zero_per_clip():
    features = torch.full((4, 100, 64), 2.0)
    got = augment.spec_augment(features, seed=3, strength=1.0)
    assert set(got.unique().tolist()) == {0.0, 2.0}
    empty = got == 0
    stripes = empty.all(1, keepdim=True) | empty.all(2, keepdim=True)
    assert torch.equal(empty, stripes)
    assert not torch.equal(got[0], got[1])
