"""Sound: decoding, Kaldi features, the AudioRWKV-7 tagger and its augmentation."""

from goose_mm.audio.decode import as_waveform, load_audio, peak_level, read_blocks, read_clip
from goose_mm.audio.frontend import KaldiFbank, StreamingFbank
from goose_mm.audio.model import AudioRWKV7, Tag

__all__ = [
    "AudioRWKV7",
    "KaldiFbank",
    "StreamingFbank",
    "Tag",
    "as_waveform",
    "load_audio",
    "peak_level",
    "read_blocks",
    "read_clip",
]
