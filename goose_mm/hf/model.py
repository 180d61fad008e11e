"""RWKV7LM behind the interface of transformers: `from_pretrained`, `generate`, a Trainer's loss."""

# B batch, T tokens, C channels, V vocabulary

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import can_return_tuple

from goose_mm.backbone.init import uninitialised
from goose_mm.hf.cache import RWKV7Cache
from goose_mm.hf.configuration import IGNORED, RWKV7Config
from goose_mm.hub import open_model
from goose_mm.text.model import RWKV7LM, max_logit_penalty


class RWKV7ForCausalLM(PreTrainedModel, GenerationMixin):
    """`lm` is the model itself. Padding, on either side, is what `attention_mask` says it is: it
    touches no state. There are no attentions to return, and no gradient checkpointing; assisted
    decoding, which takes tokens back, is refused by `generate`.
    """

    config_class = RWKV7Config
    config: RWKV7Config  # type: ignore[bad-override]
    base_model_prefix = "lm"
    main_input_name = "input_ids"
    _is_stateful = True
    _tied_weights_keys = {"lm.head.weight": "lm.emb.weight"}  # noqa: RUF012

    def __init__(self, config: RWKV7Config, lm: RWKV7LM | None = None) -> None:
        super().__init__(config)
        if lm is None:
            with uninitialised():  # `_init_weights` sets those that are not loaded
                lm = RWKV7LM(config.goose())
        else:
            lm._is_hf_initialized = True  # type: ignore[bad-argument-type]
        self.lm = lm
        self.post_init()

    @classmethod
    def from_goose(cls, model: str | os.PathLike[str] | RWKV7LM) -> RWKV7ForCausalLM:
        """A text model of ours, or anything `goose_mm.load` makes one of, on the CPU in fp32.

        A model that is given is shared, not copied. Raises as `goose_mm.load` does, and
        ValueError for a model of another kind.
        """
        lm = model if isinstance(model, RWKV7LM) else open_model(os.fspath(model), "text", "cpu")
        tied = lm.head.weight is lm.emb.weight
        return cls(RWKV7Config.of(lm.config, tie_word_embeddings=tied), lm).eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.emb

    def set_input_embeddings(self, value: Any) -> None:
        self.lm.emb = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.lm.config = self.config.goose()  # as many rows as there are now
        return embeddings

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        if module is self.lm:  # a start is given to the stack as a whole, and once
            super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Give the weights of `lm` that were not loaded their official start."""
        if module is not self.lm:  # a table being resized
            return super()._init_weights(module)
        absent = {
            name: parameter
            for name, parameter in self.lm.named_parameters()
            if not getattr(parameter, "_is_hf_initialized", False)
        }
        if absent:
            with local_torch_dtype(torch.float32):  # orthogonal matrices are not drawn in 16 bits
                start = dict(RWKV7LM(self.config.goose()).named_parameters())
            for name, parameter in absent.items():
                parameter.copy_(start[name])

    def _prepare_cache_for_generation(  # type: ignore[bad-override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        prepare: Any = super()._prepare_cache_for_generation
        prepare(generation_config, model_kwargs, *args)  # checks what the user gave
        if generation_config.use_cache is not False:
            model_kwargs.setdefault("past_key_values", RWKV7Cache())

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B,T,V] after every token of `input_ids` [B,T] or `inputs_embeds` [B,T,C].

        `attention_mask` [B,T], or [B,T before and now], is 0 at padding. `past_key_values` is an
        `RWKV7Cache`, which is moved on. `labels` [B,T] are the ids themselves, -100 where nothing
        is to be predicted; the loss is that of `RWKV7LM.loss`. `output_hidden_states` gives what
        enters every layer and what leaves the last norm, L+1 times [B,T,C]. ValueError for
        anything else.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError("RWKV-7 is recurrent: it has no attentions to output")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not isinstance(past_key_values, RWKV7Cache | None):
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values must be a goose_mm.hf.RWKV7Cache, not a {kind}")
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None
        cache = past_key_values or (RWKV7Cache() if use_cache else None)

        x = self.lm.emb(input_ids) if inputs_embeds is None else inputs_embeds
        mask = real_tokens(attention_mask, *x.shape[:2])
        layers: list[Tensor] | None = [] if output_hidden_states else None
        hidden, state = self.lm.backbone(x, cache and cache.state, mask=mask, entered=layers)
        if cache is not None:
            cache.advance(state, x.shape[1])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm.head(hidden[:, kept])
        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            hidden_states=None if layers is None else (*layers, hidden),
        )

    def _loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        """Cross-entropy as transformers counts it, and L2Wrap on the tokens that count."""
        loss = self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
        )
        counted = labels[:, 1:] != IGNORED
        if not counted.any():
            return loss
        penalty = max_logit_penalty(logits[:, :-1][counted][None].float())
        if (items := kwargs.get("num_items_in_batch")) is not None:  # this batch is a part of it
            penalty = penalty * (counted.sum() / items)
        return loss + penalty


def real_tokens(attention_mask: Tensor | None, rows: int, length: int) -> Tensor | None:
    """Which of the newest tokens [B,T] are no padding; None: all. ValueError on other shapes."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or len(attention_mask) != rows or attention_mask.shape[1] < length:
        shape = list(attention_mask.shape)
        raise ValueError(f"attention_mask is {shape}, for tokens [{rows}, {length}] it must cover")
    mask = attention_mask[:, -length:].bool()
    traced = torch.compiler.is_compiling()  # a graph must not depend on what a mask holds
    return mask if traced or not mask.all() else None
