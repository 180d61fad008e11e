"""Checkpoints that are known and not read, called by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

ONLY = "only plain RWKV-7 text models are read"

# What a file is (and what to do), and patterns each of which fits the name of some tensor.
Kinds = dict[str, tuple[str, ...]]

ALIKE: Kinds = {  # they have the tensors of an RWKV-7 text model, or some of them, and more
    "an adapter; merge it into its base model first": (r"\.(lora_[AB]|bone|disha)\b",),
    "a state-tuned checkpoint; give the base model without time_state": (r"\.att\.time_state$",),
    f"a VisualRWKV-7 checkpoint; {ONLY}": (r"^rwkv\.blocks\.\d+\.att\.r_k$",),
    f"a VisualRWKV checkpoint of an older RWKV; {ONLY}": (r"^rwkv\.blocks\.\d+\.att\.",),
    f"a ModRWKV checkpoint; {ONLY}": (r"^(llm\.blocks\.\d+\.att\.|modality\.world_encoder\.)",),
    f"an RWKV-7a or RWKV-7b checkpoint (DeepEmbed); {ONLY}": (r"^blocks\.\d+\.(ffn\.s_emb|qkv\.)",),
    f"an RWKV-6 checkpoint; {ONLY}": (r"\.att\.time_maa",),
    f"an RWKV-5 checkpoint; {ONLY}": (r"\.att\.(time_faaaa|time_mix_g)$",),
    f"an RWKV-4 checkpoint; {ONLY}": (r"\.time_(first|decay)$",),
    f"an AudioRWKV checkpoint; {ONLY}": (
        r"^blocks\.\d+\.att\.(time_shift|gate)\.",
        r"\.att\.r_k$",
    ),
}
UNLIKE: Kinds = {
    "a Vision-RWKV model": (r"\.att\.spatial_(decay|first|mix)",),
    "the visual half of a VisualRWKV model": (r"^vit\.", r"^proj\."),
    "a vision or audio model of goose_mm (give the folder with its config.json)": (
        r"^(lm\.)?backbone\.blocks\.",
        r"^(projector|patch)\.",
    ),
    "another model of flash-linear-attention": (
        r"^model\.layers\.\d+\.attn\.",
        r"^model\.embeddings\.",
    ),
    "a segmentation model (SAM)": (r"^image_encoder\.", r"^(mask_decoder|prompt_encoder)\."),
    "an open_clip model (CLIP or SigLIP)": (r"^visual\.(trunk|transformer|conv1)\b",),
    "a CLIP or SigLIP model of transformers": (r"(^|\.)vision_model\.(encoder|embeddings)\.",),
    "a vision transformer of timm": (r"^blocks\.\d+\.attn\.qkv\.",),
    "a ViT or DINOv2 model of transformers": (r"(^|\.)embeddings\.patch_embeddings\.",),
    "a Whisper model": (r"(^|\.)encoder\.conv1\.", r"(^|\.)decoder\.layers\."),
    "a BERT-like model": (r"(^|\.)encoder\.layer\.\d+\.attention\.",),
    "a GPT-2 model": (r"(^|\.)h\.\d+\.attn\.c_attn\.",),
    "a GPT-NeoX model": (r"(^|\.)gpt_neox\.layers\.",),
    "a Mamba model": (r"\.mixer\.(A_log|in_proj)",),
    "a Transformer (LLaMA, Qwen, Mistral, ...)": (r"(^|\.)layers\.\d+\.self_attn\.",),
}


def refuse(names: Iterable[str]) -> None:
    """ValueError when these are the names of something that is only like a text model."""
    if what := _kind(ALIKE, list(names)):
        raise ValueError(f"this is {what}")


def unknown(names: Iterable[str], settings: Mapping[str, Any]) -> ValueError:
    """What can be said of names that are in no format that is read."""
    names = list(names)
    what = _kind(UNLIKE, names) or settings.get("model_type")
    return ValueError(
        f"this is no RWKV-7 text model: {len(names)} tensors, {', '.join(names[:3])} ..."
        + (f"; it looks like {what}" if what else "")
    )


def _kind(kinds: Kinds, names: list[str]) -> str:
    for what, patterns in kinds.items():
        if all(any(re.search(pattern, name) for name in names) for pattern in patterns):
            return what
    return ""
