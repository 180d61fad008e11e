"""Sound: decoding, Kaldi features, the AudioRWKV-7 tagger and its augmentation."""

from goose_mm.audio.decode import as_waveform, load_audio, read_blocks
from goose_mm.audio.frontend import KaldiFbank, StreamingFbank
from goose_mm.audio.model import AudioRWKV7, Tag

__all__ = [
    "AudioRWKV7",
    "KaldiFbank",
    "StreamingFbank",
    "Tag",
    "as_waveform",
    "load_audio",
    "read_blocks",
]
