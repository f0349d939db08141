"""Transient device memory: the one place where these kernels allocate it."""

import math

import torch

TRANSIENT_BYTES = 64 << 20
"""Upper bound of what one operation holds at a time; larger calls are cut into tiles of rows."""


def scratch(device: torch.device, *specs: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
    """Uninitialised tensors of the given (shape, dtype), all alive at the same time and until the next call."""
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in specs]


def spec_bytes(*specs: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Bytes that `scratch` takes for `specs`."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)
