"""What vLLM says of a checkpoint before an engine is started on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Checkpoint:
    hf_config: Any
    """The Hugging Face text config."""
    max_model_len: int
    """Tokens that the model is made for."""
    encode: Callable[[str], list[int]]
    """Text to token ids, with the special tokens that the tokenizer adds by itself."""


def read_checkpoint(model: str, **options: Any) -> Checkpoint:
    """Read config and tokenizer of `model` as an engine with these arguments of `vllm.LLM` would.

    Raises:
        Exception: whatever vLLM raises on a model or an option it cannot take.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    config = EngineArgs(model=model, **options).create_model_config()
    tokenizer = cached_tokenizer_from_config(config)
    return Checkpoint(config.hf_text_config, config.max_model_len, lambda text: list(tokenizer.encode(text)))
