"""Log-mel features: equal to Kaldi's, and streamed = offline."""

import kaldi_native_fbank
import numpy as np
import pytest
import torch
from torchaudio.compliance import kaldi

from goose_mm.audio import KaldiFbank, StreamingFbank
from goose_mm.config import AudioConfig

RAW = {"mean": 0.0, "std": 1.0}


def sound(samples: int, seed: int = 0) -> torch.Tensor:
    """Noise on a rising tone, with an offset and a silent stretch."""
    random = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / 16000
    x = 0.3 * torch.sin(2000 * time * time) + 0.05 * torch.randn(samples, generator=random) + 0.1
    x[samples // 3 : samples // 2] = 0
    return x


@pytest.mark.parametrize(
    "config",
    [
        AudioConfig(**RAW),
        AudioConfig(**RAW, num_mel_bins=40, low_freq=100.0, high_freq=7000.0),
        AudioConfig(**RAW, sample_rate=32000, num_mel_bins=128, low_freq=50.0, high_freq=14000.0),
        AudioConfig(**RAW, sample_rate=8000, num_mel_bins=23, frame_shift_ms=12.5),
        AudioConfig(**RAW, sample_rate=11025, num_mel_bins=40),  # 275.625 and 110.25 samples
        AudioConfig(**RAW, sample_rate=22050, frame_length_ms=32.0),  # 705.6 and 220.5
    ],
)
@pytest.mark.parametrize("samples", [999, 16001])
def test_equals_torchaudio(config, samples):
    x = sound(samples)
    want = kaldi.fbank(
        x[None],
        sample_frequency=config.sample_rate,
        num_mel_bins=config.num_mel_bins,
        low_freq=config.low_freq,
        high_freq=config.high_freq,
        frame_length=config.frame_length_ms,
        frame_shift=config.frame_shift_ms,
        window_type="hanning",
        htk_compat=True,
        use_energy=False,
        dither=0.0,
    )
    got = KaldiFbank(config)(x[None])[0]
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-3


@pytest.mark.parametrize("rate", [16000, 11025, 22050])
def test_equals_kaldi_native(rate):
    x = sound(8000) + 0.01 * sound(8000, seed=1)
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither, options.frame_opts.window_type = 0.0, "hanning"
    options.frame_opts.samp_freq = rate
    options.mel_opts.num_bins = 64
    oracle = kaldi_native_fbank.OnlineFbank(options)
    oracle.accept_waveform(rate, x.tolist())
    want = np.stack([oracle.get_frame(i) for i in range(oracle.num_frames_ready)])
    config = AudioConfig(**RAW, sample_rate=rate)
    got = KaldiFbank(config)(x[None])[0].numpy()
    assert got.shape == want.shape and np.abs(got - want).max() < 5e-3


@pytest.mark.parametrize("sizes", [[1], [7], [160], [400], [3999], [1, 5000, 2, 399, 401]])
def test_streamed_equals_offline(sizes):
    x = sound(4000)
    stream, pieces, at, turn = StreamingFbank(AudioConfig()), [], 0, 0
    while at < len(x):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.push(x[at : at + size]))
        assert len(stream.tail) < 400
        at, turn = at + size, turn + 1
    pieces.append(stream.finish())
    want = KaldiFbank(AudioConfig())(x[None])[0]
    torch.testing.assert_close(torch.cat(pieces), want, atol=1e-5, rtol=0)


def test_short_sound_is_one_frame():
    x = sound(50)
    whole = KaldiFbank(AudioConfig())(x[None])[0]
    stream = StreamingFbank(AudioConfig())
    assert len(stream.push(x)) == 0
    torch.testing.assert_close(stream.finish(), whole)
    assert len(whole) == 1 and len(stream.finish()) == 0


def test_frame_counts_agree_with_the_frames():
    fbank = KaldiFbank(AudioConfig())
    for samples in (1, 399, 400, 559, 560, 5000):
        frames = fbank(torch.zeros(1, samples)).shape[1]
        assert fbank.num_frames(torch.tensor([samples])).tolist() == [frames]


def test_silence_is_the_floor_and_never_nan():
    fbank = KaldiFbank(AudioConfig())
    torch.testing.assert_close(fbank(torch.zeros(1, 4000)), torch.full((1, 23, 64), fbank.silence))


def test_features_stay_in_fp32_in_a_half_precision_model():
    fbank, x = KaldiFbank(AudioConfig()), sound(4000)[None]
    want = fbank(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fbank.bfloat16()(x), want, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (AudioConfig(num_mel_bins=128), "empty filters"),
        (AudioConfig(low_freq=9000.0), "low_freq=9000"),
        (AudioConfig(high_freq=9000.0), "high_freq=9000"),
    ],
)
def test_impossible_filters(config, says):
    with pytest.raises(ValueError, match=says):
        KaldiFbank(config)


def test_filters_made_during_inference_serve_training_too():
    config, x = AudioConfig(num_mel_bins=31), sound(2000).requires_grad_()
    with torch.inference_mode(), torch.device("meta"):
        fbank = KaldiFbank(config)
    fbank(x[None]).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
