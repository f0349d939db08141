"""The package's logger, a child of vLLM's so that `VLLM_LOGGING_LEVEL` governs it."""

import functools
import logging

logger = logging.getLogger("vllm.misa")


@functools.cache
def info_once(message: str) -> None:
    """Log a line that every layer would repeat."""
    logger.info(message)
