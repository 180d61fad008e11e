"""Models small enough to check against the definition, in float64."""

from __future__ import annotations

import torch

from goose_mm.config import BackboneConfig, TextConfig, TextModel
from goose_mm.text import RWKV7LM, BPETokenizer


def text_model(corpus: list[str]) -> RWKV7LM:
    """A random text model, no weight of which is 0, with 300 tokens of a corpus."""
    tokenizer = BPETokenizer.train(corpus, 300)
    torch.manual_seed(0)
    config = TextModel(
        backbone=BackboneConfig(dim=64, num_layers=2),
        text=TextConfig(vocab_size=tokenizer.vocab_size, tokenizer="bpe"),
    )
    lm = RWKV7LM(config, tokenizer).double().eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return lm
