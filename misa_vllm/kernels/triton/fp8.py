"""FP8 e4m3 operands on every GPU: native where the matrix units take them, exact fp16 elsewhere."""

import functools

import torch
import triton
import triton.language as tl

from misa_vllm.index_cache import INDEX_HEAD_DIM, MEAN_OFFSET, PAGE_TOKENS, SCALES_OFFSET

DIM = tl.constexpr(INDEX_HEAD_DIM)
PAGE = tl.constexpr(PAGE_TOKENS)
SCALES = tl.constexpr(SCALES_OFFSET)
MEAN = tl.constexpr(MEAN_OFFSET)


@functools.cache
def has_fp8_dot(device: torch.device) -> bool:
    """Whether the matrix units of `device` multiply FP8 e4m3 (NVIDIA sm_89 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors `device` has; 1 for the interpreter on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def fp8_argument(x: torch.Tensor, native: bool) -> torch.Tensor:
    """FP8 (or raw uint8) values as the pointer type that `load_fp8` expects."""
    return x.view(torch.float8_e4m3fn if native else torch.uint8)


@triton.jit
def load_fp8(pointers, mask, NATIVE: tl.constexpr):
    """Dot operands from `pointers`: FP8 values, or fp16 holding value / 256 (see `fp8_unit`)."""
    values = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0 if NATIVE else 0)
    if not NATIVE:
        bits = values.to(tl.uint16)
        # e4m3 bits moved under fp16's exponent keep their value up to the difference of the biases, 2**(15 - 7)
        values = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return values


@triton.jit
def fp8_unit(NATIVE: tl.constexpr):
    """What one operand of `load_fp8` must be multiplied with to get its value."""
    return 1.0 if NATIVE else 256.0
