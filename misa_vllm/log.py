"""The package's logger, a child of vLLM's so that `VLLM_LOGGING_LEVEL` governs it."""

import logging

logger = logging.getLogger("vllm.misa")
