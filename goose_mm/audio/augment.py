"""Training-time augmentation as batched tensor operations, on whatever device the batch is.

Clips arrive cropped, rolled and resampled (goose_mm/data/clips.py). Here two clips become one
sound with both their tags, noise of a random colour covers digital silence, a random gain and
equaliser act on the log-mel spectrum, and SpecAugment masks stripes of it. `strength` scales
all but the mixing; random numbers come from a seed, so a batch can be made again exactly.
"""

# B clips, S samples, F frames, M mel bins

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

NOISE_SHARE = 0.5  # of the clips get noise
NOISE_SNR = (5.0, 45.0)  # dB below the clip
GAIN = 8.0  # +- dB
EQUALISER = 8.0  # +- dB at each of EQ_POINTS, linear between them
EQ_POINTS = 5
TIME_MASKS, TIME_MASK = 2, 0.16  # count, longest as a share of the frames
FREQ_MASKS, FREQ_MASK = 2, 0.20  # count, widest as a share of the mel bins
DB = math.log(10) / 10  # one decibel in nats of power


class Plan:
    """What a batch of goose_mm.data.clips asks for, in the two places where it applies."""

    def __init__(self, batch: dict[str, Tensor]):
        self.partner, self.ratio = batch["partner"], batch["ratio"]
        self.seed, self.strength = int(batch["seed"]), float(batch["strength"])
        self.random = torch.Generator(batch["waveform"].device).manual_seed(self.seed)

    def sound(
        self,
        waveforms: Float[Tensor, "B S"],
        lengths: Int[Tensor, " B"],
        targets: Float[Tensor, "B labels"],
    ) -> tuple[Float[Tensor, "B S"], Int[Tensor, " B"], Float[Tensor, "B labels"]]:
        """Mixed and noisy waveforms, with their lengths and targets."""
        waveforms, lengths, targets = mix(waveforms, lengths, targets, self.partner, self.ratio)
        return add_noise(waveforms, lengths, self.random, self.strength), lengths, targets

    def spectrum(
        self, features: Float[Tensor, "B F M"], silence: float, std: float
    ) -> Float[Tensor, "B F M"]:
        """Equalised and masked features."""
        features = equalise(features, silence, std, self.random, self.strength)
        return spec_augment(features, self.seed, self.strength)


def mix(
    waveforms: Float[Tensor, "B S"],
    lengths: Int[Tensor, " B"],
    targets: Float[Tensor, "B labels"],
    partner: Int[Tensor, " B"],
    ratio: Float[Tensor, " B"],
) -> tuple[Float[Tensor, "B S"], Int[Tensor, " B"], Float[Tensor, "B labels"]]:
    """Each clip with its `partner` in the batch, brought to equal loudness, then ratio : 1-ratio.

    Both sounds are in the result, so it carries the tags of both (between-class learning, arXiv
    1711.10282, with multi-hot targets). A ratio of 1 leaves a clip as it is.
    """
    loudness = rms(waveforms, lengths)
    balance = (loudness / loudness[partner]).clamp(0.1, 10.0)
    other = waveforms[partner] * (balance * (1 - ratio))[:, None]
    mixed = (waveforms * ratio[:, None] + other) / torch.hypot(ratio, 1 - ratio)[:, None]
    is_mixed = ratio < 1
    lengths = torch.where(is_mixed, torch.maximum(lengths, lengths[partner]), lengths)
    both = torch.maximum(targets, targets[partner])
    return mixed, lengths, torch.where(is_mixed[:, None], both, targets)


def add_noise(
    waveforms: Float[Tensor, "B S"],
    lengths: Int[Tensor, " B"],
    generator: torch.Generator,
    strength: float,
) -> Float[Tensor, "B S"]:
    """Stationary noise, white to brown, on some of the clips."""
    batch, samples = waveforms.shape
    chance, snr, colour = _uniform((3, batch), generator)
    noise = torch.randn(batch, samples, generator=generator, device=waveforms.device)
    spectrum = torch.fft.rfft(noise)
    frequency = torch.arange(1, spectrum.shape[1] + 1, device=waveforms.device)
    noise = torch.fft.irfft(spectrum * frequency ** -colour[:, None], n=samples)
    decibels = NOISE_SNR[0] + (NOISE_SNR[1] - NOISE_SNR[0]) * snr
    level = rms(waveforms, lengths) * 10 ** (-decibels / 20) * (chance < NOISE_SHARE * strength)
    return waveforms + noise / noise.std(dim=1, keepdim=True).clamp(min=1e-9) * level[:, None]


def equalise(
    features: Float[Tensor, "B F M"],
    silence: float,
    std: float,
    generator: torch.Generator,
    strength: float,
) -> Float[Tensor, "B F M"]:
    """A random gain and a random smooth filter; digital silence stays silent."""
    batch, _, bins = features.shape
    gain, *points = _uniform((1 + EQ_POINTS, batch), generator) * 2 - 1
    curve = torch.nn.functional.interpolate(
        torch.stack(points, dim=1)[:, None], size=bins, mode="linear", align_corners=True
    )
    decibels = (GAIN * gain[:, None, None] + EQUALISER * curve) * strength
    filtered = (features + decibels * (DB / std)).clamp(min=silence)
    return torch.where(features <= silence + 1e-4, features, filtered)


def spec_augment(
    features: Float[Tensor, "B F M"], seed: int, strength: float
) -> Float[Tensor, "B F M"]:
    """SpecAugment (arXiv 1904.08779): stripes of each clip set to 0, the mean of the features."""
    from torchaudio.transforms import SpecAugment

    _, frames, bins = features.shape
    transform = SpecAugment(
        n_time_masks=TIME_MASKS,
        time_mask_param=round(TIME_MASK * frames * strength),
        n_freq_masks=FREQ_MASKS,
        freq_mask_param=round(FREQ_MASK * bins * strength),
        iid_masks=True,
        zero_masking=True,
    )
    devices = [features.device] if features.is_cuda else []
    with torch.random.fork_rng(devices):  # torchaudio draws from the global generator
        torch.manual_seed(seed)
        return transform(features.mT).mT


def rms(waveforms: Float[Tensor, "B S"], lengths: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Root mean square over each clip's own length; never 0, so that it can divide."""
    return (waveforms.square().sum(1) / lengths).sqrt().clamp(min=1e-4)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)
