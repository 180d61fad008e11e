"""The text model as Hugging Face transformers knows models: a shell, no second implementation.

Importing this package imports transformers, and makes its Auto classes know ours.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from goose_mm.hf.cache import RWKV7Cache
from goose_mm.hf.configuration import RWKV7Config
from goose_mm.hf.model import RWKV7ForCausalLM
from goose_mm.hf.tokenizer import GooseTokenizer

__all__ = ["GooseTokenizer", "RWKV7Cache", "RWKV7Config", "RWKV7ForCausalLM"]

AutoConfig.register(RWKV7Config.model_type, RWKV7Config)
AutoModelForCausalLM.register(RWKV7Config, RWKV7ForCausalLM)
AutoTokenizer.register(RWKV7Config, tokenizer_class=GooseTokenizer)
