"""AudioRWKV-7: log-mel patches, a two-way RWKV-7, attention pooling, one sigmoid per tag.

No position in time is learned, the end of a clip is masked and pooling weighs a patch by the
real frames in it, so clips of any length go in, alone or in a batch. The logits of a clip are
the attention-weighted mean of the logits of its patches.
"""

# B clips, S samples, F frames, M mel bins, T patch tokens, C channels

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from goose_mm.audio import augment
from goose_mm.audio.decode import clip_name, peak_level, read_clip
from goose_mm.audio.frontend import KaldiFbank
from goose_mm.audio.patch import PatchEmbed
from goose_mm.backbone import RWKV7
from goose_mm.config import AudioModel, ConfigError
from goose_mm.kernels.autograd import without_autocast

WINDOW_COLUMNS = 188  # time columns read at once by the verbs: 30 s with the default patches
BATCH = 8  # windows
QUIET = -60.0  # dB of full scale; what stays below is said to be next to silent

log = logging.getLogger(__name__)


class Tag(NamedTuple):
    """A label and its independent probability (a sigmoid: scores do not sum to 1)."""

    label: str
    score: float


class Pooled(NamedTuple):
    """A stretch of sound as one vector, and the log of the attention it won altogether."""

    vector: Float[Tensor, "B C"]
    log_mass: Float[Tensor, " B"]


class AudioRWKV7(nn.Module):
    """Audio tagger (AudioRWKV, arXiv 2509.02167, with the changes docs/audio.md lists)."""

    def __init__(self, config: AudioModel):
        super().__init__()
        self.config = config
        audio, dim = config.audio, config.backbone.dim
        if not audio.labels or len(set(audio.labels)) < len(audio.labels):
            raise ConfigError(f"audio.labels must name every tag once, got {list(audio.labels)}")
        self.frontend = KaldiFbank(audio)
        self.patch = PatchEmbed(audio, dim, self.frontend.silence)
        self.backbone = RWKV7(config.backbone)
        self.dropout = nn.Dropout(config.backbone.dropout)
        self.attention = nn.Parameter(torch.zeros(dim))  # zero: the plain mean, to begin with
        self.head = nn.Linear(dim, len(audio.labels))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.constant_(self.head.bias, -math.log(len(audio.labels)))  # most tags are absent

    @property
    def labels(self) -> tuple[str, ...]:
        return self.config.audio.labels

    def forward(
        self, waveforms: Float[Tensor, "B S"], lengths: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B labels"]:
        """Logits in fp32 of mono waveforms at `config.audio.sample_rate`, full scale 1.0.

        `lengths` in samples; what lies beyond them is ignored. Memory grows with S: `tag` and
        `probabilities` read long recordings in windows.
        """
        return self._logits(self._pool(*self._features(waveforms, lengths)).vector)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean binary cross-entropy and the share of clips whose best tag is one of theirs.

        `batch` holds "waveform" [B,S], "length" [B] in samples and "target" [B,labels] in 0..1;
        in training also "partner", "ratio", "seed" and "strength", which augment it.
        """
        waveforms, lengths, targets = batch["waveform"], batch["length"], batch["target"]
        plan = augment.Plan(batch) if self.training and "seed" in batch else None
        if plan:
            waveforms, lengths, targets = plan.sound(waveforms, lengths, targets)
        features, frames = self._features(waveforms, lengths)
        if plan:
            features = plan.spectrum(features, self.frontend.silence, self.config.audio.std)
        logits = self._logits(self._pool(features, frames).vector)
        best = logits.argmax(1, keepdim=True)
        metrics = {"accuracy": (targets.gather(1, best) > 0.5).float().mean()}
        return F.binary_cross_entropy_with_logits(logits, targets.float()), metrics

    def tag(self, clip: Any, sample_rate: int | None = None, top_k: int = 5) -> list[Tag]:
        """The `top_k` most likely tags of a recording, best first.

        `clip` is anything `goose_mm.audio.read_clip` takes: a path, the bytes of a file, an open
        file, an example of `datasets`, or samples with their `sample_rate` (None: the model's
        own). Recordings of any length are read in windows of 30 s in constant memory; attention
        pooling runs over all of them. Raises FileNotFoundError or ValueError for what cannot be
        read; logs a warning when it is damaged, its channels cancel or it is next to silent.
        """
        return self.tag_many([clip], sample_rate, top_k)[0]

    def tag_many(
        self, clips: Iterable[Any], sample_rate: int | None = None, top_k: int = 5
    ) -> list[list[Tag]]:
        """`tag` for many clips, in batches; the same tags as one by one."""
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        rows = self.probabilities(clips, sample_rate).tolist()
        tagged = ([Tag(*pair) for pair in zip(self.labels, row, strict=True)] for row in rows)
        return [sorted(tags, key=lambda tag: -tag.score)[:top_k] for tags in tagged]

    @torch.inference_mode()
    def probabilities(
        self, clips: Iterable[Any], sample_rate: int | None = None
    ) -> Float[Tensor, "n labels"]:
        """Sigmoid scores of every label for every clip, on the CPU."""
        return self.logits(clips, sample_rate).sigmoid()

    @torch.inference_mode()
    def logits(
        self, clips: Iterable[Any], sample_rate: int | None = None
    ) -> Float[Tensor, "n labels"]:
        """The same before the sigmoid, which rounds scores near 0 and 1 together."""
        windows = (
            (index, window)
            for index, clip in enumerate(clips)
            for window in self._windows(clip, sample_rate)
        )
        training = self.training
        self.eval()
        try:
            parts: list[list[Pooled]] = []
            while some := list(islice(windows, BATCH)):
                indices, sounds = zip(*some, strict=True)
                for index, *pooled in zip(indices, *self._pool_batch(sounds), strict=True):
                    if index == len(parts):
                        parts.append([])
                    parts[index].append(Pooled(*pooled))
            if not parts:
                return torch.zeros(0, len(self.labels))
            return self._logits(torch.stack([_merge(clip) for clip in parts])).cpu()
        finally:
            self.train(training)

    def _pool_batch(self, sounds: Sequence[np.ndarray]) -> Pooled:
        lengths = torch.tensor([len(sound) for sound in sounds])
        padded = torch.zeros(len(sounds), int(lengths.max()))
        for row, sound in zip(padded, sounds, strict=True):
            row[: len(sound)] = torch.from_numpy(sound)
        device = self.head.weight.device
        return self._pool(*self._features(padded.to(device), lengths.to(device)))

    def _windows(self, clip: Any, sample_rate: int | None) -> Iterator[np.ndarray]:
        """A clip in stretches that together have exactly the frames of the whole."""
        rate = self.config.audio.sample_rate
        given = rate if sample_rate is None else sample_rate
        step = WINDOW_COLUMNS * self.config.audio.patch_time * self.frontend.hop
        size = step - self.frontend.hop + self.frontend.window
        held, started, level = np.zeros(0, np.float32), False, -math.inf
        for block in read_clip(clip, given, rate):
            level = max(level, peak_level(block))
            held = np.concatenate([held, block])
            while len(held) >= size:
                yield held[:size]
                held, started = held[step:], True
        if level < QUIET:
            heard = f"next to silent (peak {level:.0f} dB)" if math.isfinite(level) else "silent"
            log.warning("%s is %s: its tags mean little", clip_name(clip), heard)
        if not started or len(held) >= self.frontend.window:
            yield held

    def _features(
        self, waveforms: Float[Tensor, "B S"], lengths: Int[Tensor, " B"] | None
    ) -> tuple[Float[Tensor, "B F M"], Int[Tensor, " B"]]:
        samples = waveforms.shape[1]
        if lengths is None:
            lengths = torch.full((len(waveforms),), samples, device=waveforms.device)
        beyond = torch.arange(samples, device=waveforms.device) >= lengths[:, None]
        return self.frontend(waveforms.masked_fill(beyond, 0)), self.frontend.num_frames(lengths)

    def _pool(self, features: Float[Tensor, "B F M"], frames: Int[Tensor, " B"]) -> Pooled:
        patches = self.patch(features, frames)
        hidden, _ = self.backbone(patches.tokens, mask=patches.mask, grid=patches.grid)
        with without_autocast(hidden.device):
            hidden = hidden.float().masked_fill(~patches.mask[..., None], 0)
            score = hidden @ self.attention.float() + patches.weight.log()
            vector = (score.softmax(1)[:, None] @ hidden)[:, 0]
        return Pooled(vector, score.logsumexp(1))

    def _logits(self, vectors: Float[Tensor, "B C"]) -> Float[Tensor, "B labels"]:
        with without_autocast(vectors.device):
            weight, bias = self.head.weight.float(), self.head.bias.float()
            return F.linear(self.dropout(vectors), weight, bias)


def _merge(parts: list[Pooled]) -> Float[Tensor, " C"]:
    """Pool over stretches as if their patches had been pooled together."""
    vectors, masses = (torch.stack(column) for column in zip(*parts, strict=True))
    return masses.softmax(0) @ vectors
