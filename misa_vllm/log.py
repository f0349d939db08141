"""The package's logger, a child of vLLM's so that `VLLM_LOGGING_LEVEL` governs it."""

import functools
import logging
import sys

logger = logging.getLogger("vllm.misa")


@functools.cache
def info_once(message: str) -> None:
    """Log a line that every layer would repeat."""
    logger.info(message)


def print_as_one_line(error_type: type[Exception]) -> None:
    """Print an `error_type` that ends the process as its one line instead of a traceback."""
    if getattr(sys.excepthook, "misa", False):
        return
    previous = sys.excepthook

    def hook(kind, error, traceback):
        if issubclass(kind, error_type):
            print(f"misa: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    hook.misa = True
    sys.excepthook = hook
