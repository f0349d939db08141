"""Loading of the compiled extensions, at first use and with one line that says why not."""

import functools
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent


class Extension:
    """A shared library beside the package's modules that registers operators under `torch.ops.misa_vllm`."""

    def __init__(self, title: str, file_name: str, traced: tuple[str, ...], not_built: str) -> None:
        """
        Args:
            title: what messages call its kernels.
            traced: its operators that a traced graph may hold; all their outputs are arguments.
            not_built: what is missing where the library is not there, and what to do.
        """
        self.title = title
        self.library = PACKAGE / file_name
        self.traced = traced
        self.not_built = not_built

    @functools.cached_property
    def failure(self) -> str | None:
        """Why the library cannot be used, or None once it is loaded."""
        if not self.library.exists():
            return self.not_built
        try:
            torch.ops.load_library(str(self.library))
        except OSError as error:
            return f"{self.library.name} does not load: {str(error).splitlines()[0]}"
        for name in self.traced:
            torch.library.register_fake(f"misa_vllm::{name}", lambda *args: None)  # there is nothing to make
        return None

    @property
    def operators(self):
        """The loaded operators. Raises RuntimeError where there are none."""
        if self.failure is not None:
            raise RuntimeError(f"{self.title} kernels: {self.failure}")
        return torch.ops.misa_vllm
