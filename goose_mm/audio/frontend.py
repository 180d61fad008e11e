"""Kaldi log-mel features: batched on any device, and streamed sample by sample.

The recipe is Kaldi's `compute-fbank-feats` as the Audio Spectrogram Transformer uses it: frames
of 25 ms every 10 ms that never look past the end (snip_edges), each with its mean removed,
pre-emphasis 0.97 and a symmetric Hann window; power spectrum; triangular filters on the HTK mel
scale; natural log with Kaldi's floor; waveforms scaled to +-1. Every step belongs to one frame,
so it streams exactly. Equal to torchaudio.compliance.kaldi.fbank (tests/audio).
"""

# B clips, S samples, F frames, M mel bins

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from goose_mm.config import AudioConfig
from goose_mm.kernels.autograd import without_autocast

PREEMPHASIS = 0.97
FLOOR = 1.1920928955078125e-07  # float32 epsilon, as in Kaldi


class KaldiFbank(nn.Module):
    """Waveforms to normalised log-mel frames, always computed in float32."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.config = config
        self.window = _samples(config.frame_length_ms, config.sample_rate)
        self.hop = _samples(config.frame_shift_ms, config.sample_rate)
        _constants(config, torch.device("cpu"))  # says now what is wrong with the configuration

    @property
    def silence(self) -> float:
        """The normalised feature of digital silence."""
        return (math.log(FLOOR) - self.config.mean) / self.config.std

    def num_frames(self, samples: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Frames in so many samples; never less than one (short clips are padded)."""
        return ((samples - self.window).clamp(min=0) // self.hop) + 1

    def forward(self, waveforms: Float[Tensor, "B S"]) -> Float[Tensor, "B F M"]:
        """Features (log-mel - mean) / std of whole frames; a clip under 25 ms becomes one frame."""
        missing = self.window - waveforms.shape[1]
        if missing > 0:
            waveforms = nn.functional.pad(waveforms, (0, missing))
        frames = waveforms.float().unfold(1, self.window, self.hop)
        return (self._log_mel(frames) - self.config.mean) / self.config.std

    def _log_mel(self, frames: Float[Tensor, "B F window"]) -> Float[Tensor, "B F M"]:
        window, mel = _constants(self.config, frames.device)
        with without_autocast(frames.device):
            frames = frames - frames.mean(-1, keepdim=True)
            previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
            spectrum = torch.fft.rfft((frames - PREEMPHASIS * previous) * window, 2 * len(mel))
            power = spectrum.real.square() + spectrum.imag.square()
            return (power[..., :-1] @ mel).clamp(min=FLOOR).log()


class StreamingFbank:
    """`KaldiFbank` for sound that arrives in pieces: any pieces give the frames of the whole.

    Holds no more than the samples that later frames still need.
    """

    def __init__(self, config: AudioConfig):
        self.fbank = KaldiFbank(config)
        self.tail = torch.zeros(0)
        self.frames = 0

    def push(self, samples: Float[Tensor, " n"]) -> Float[Tensor, "k M"]:
        """The frames that these samples complete, none to many."""
        self.tail = torch.cat([self.tail.to(samples.device), samples.float()])
        ready = (len(self.tail) - self.fbank.window) // self.fbank.hop + 1
        if ready < 1:
            return samples.new_zeros(0, self.fbank.config.num_mel_bins, dtype=torch.float32)
        features = self.fbank(self.tail[None])[0]
        self.tail = self.tail[ready * self.fbank.hop :].clone()
        self.frames += ready
        return features

    def finish(self) -> Float[Tensor, "k M"]:
        """The one padded frame of a stream that was shorter than a frame, else nothing."""
        tail, self.tail = self.tail, self.tail[:0]
        if self.frames or not len(tail):
            return tail.new_zeros(0, self.fbank.config.num_mel_bins)
        self.frames = 1
        return self.fbank(tail[None])[0]


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept for calls that differentiate
def _constants(config: AudioConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hann window [W] and mel filters [fft / 2, M]; no buffers, so `model.half()` spares them."""
    rate, bins = config.sample_rate, config.num_mel_bins
    length = _samples(config.frame_length_ms, rate)
    fft = 1 << (length - 1).bit_length()
    low, high = config.low_freq, config.high_freq or rate / 2
    if not 0 <= low < high <= rate / 2:
        raise ValueError(
            f"audio.low_freq={low} and high_freq={high} must rise within 0..{rate / 2:g} Hz"
        )
    exact = {"dtype": torch.float64, "device": "cpu"}
    edges = torch.linspace(_mel(low), _mel(high), bins + 2, **exact)
    points = [_mel(i * rate / fft) for i in range(fft // 2)]
    mels = torch.tensor(points, **exact)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (mels - left) / (centre - left), (right - mels) / (right - centre)
    filters = torch.minimum(rise, fall).clamp(min=0)
    if empty := int((filters.sum(0) == 0).sum()):
        raise ValueError(
            f"audio.num_mel_bins={bins} leaves {empty} empty filters with a {fft}-point FFT at "
            f"{rate} Hz; use fewer bins or a higher sample rate"
        )
    window = torch.hann_window(length, periodic=False, **exact)
    return window.float().to(device), filters.float().to(device)


def _samples(milliseconds: float, rate: int) -> int:
    return int(rate * 0.001 * milliseconds)  # Kaldi cuts a part of a sample off


def _mel(hertz: float) -> float:
    return 1127.0 * math.log(1.0 + hertz / 700.0)
