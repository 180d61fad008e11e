"""RWKV-7 as a language model: embedding, backbone, head, and the verbs people use."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from goose_mm.backbone import RWKV7, State
from goose_mm.backbone.init import initialise_vocabulary
from goose_mm.config import TextModel
from goose_mm.text.generate import LanguageModel, Sampling, complete, stream_text
from goose_mm.text.tokenizer import Tokenizer

MAX_LOGIT_PENALTY = 1e-4  # L2Wrap of the official recipe: keeps the largest logit near zero


class RWKV7LM(LanguageModel):
    """Next-token model. `forward` is a pure function of ids and state.

    Without a tokenizer it works on ids alone, and `no_tokenizer` says why that is.
    """

    no_tokenizer = ""

    def __init__(self, config: TextModel, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.emb = nn.Embedding(config.text.vocab_size, config.backbone.dim)
        self.backbone = RWKV7(config.backbone)
        self.head = nn.Linear(config.backbone.dim, config.text.vocab_size, bias=False)
        initialise_vocabulary(self.emb.weight, self.head.weight)

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        state: State | None = None,
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        cu_seqlens: Int[Tensor, "S_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "B T V"], State]:
        """Logits after every token, and the state after the last; `mask` False is padding."""
        hidden, state = self.backbone(self.emb(ids), state, mask=mask, cu_seqlens=cu_seqlens)
        return self.head(hidden), state

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of `batch["ids"]` [B, T+1] in nats a token, plus L2Wrap."""
        ids = batch["ids"]
        logits, _ = self(ids[:, :-1])
        logits = logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return loss + max_logit_penalty(logits), {"loss": loss.detach()}

    def generate(
        self, prompt: str | list[str], sampling: Sampling | None = None, **settings: object
    ) -> str | list[str]:
        """Continue a prompt, or a batch of prompts at once (the same answers as one by one).

        `settings` are fields of `Sampling`: max_new_tokens, temperature, top_p, top_k,
        presence_penalty, frequency_penalty, stop, seed. Returns the continuation alone.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        texts = complete(self, prompts, sampling or Sampling(**settings))  # type: ignore[arg-type]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(
        self, prompt: str, sampling: Sampling | None = None, **settings: object
    ) -> Iterator[str]:
        """Yield the continuation piece by piece, never half a character."""
        yield from stream_text(self, prompt, sampling or Sampling(**settings))  # type: ignore[arg-type]


def max_logit_penalty(logits: Float[Tensor, "B T V"]) -> Tensor:
    """Zero in value; its gradient pulls the largest logit of every token towards zero.

    The gradient, max_logit * 1e-4 / (B*T) at the argmax, is that of half the squared maximum.
    """
    penalty = 0.5 * MAX_LOGIT_PENALTY * logits.amax(-1).square().mean()
    return penalty - penalty.detach()
