"""Statistics of the pages that a step wrote to, recomputed from the pages' keys (design, invariant 2)."""

import torch
import triton
import triton.language as tl

from misa_vllm.index_cache import means_view
from misa_vllm.kernels.triton.fp8 import DIM, MEAN, PAGE, SCALES, fp8_argument, fp8_unit, has_fp8_dot, load_fp8
from misa_vllm.reference import HALF_MAX

LARGEST = tl.constexpr(HALF_MAX)


def update_page_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `misa_vllm.kernels.Kernels.update_page_means`."""
    _update(index_cache, slot_mapping, signed=False)


def update_signed_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `misa_vllm.kernels.Kernels.update_signed_means`."""
    _update(index_cache, slot_mapping, signed=True)


def _update(index_cache: torch.Tensor, slot_mapping: torch.Tensor, signed: bool) -> None:
    means_view(index_cache)  # refuses pages that have no room for a statistic
    tokens = slot_mapping.shape[0]
    if tokens == 0:
        return
    native = has_fp8_dot(index_cache.device)
    _page_means_kernel[(tokens,)](
        fp8_argument(index_cache, native), index_cache.stride(0), slot_mapping, tokens,
        NATIVE=native, SIGNED=signed, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _page_means_kernel(cache, page_stride, slot_mapping, tokens, NATIVE: tl.constexpr, SIGNED: tl.constexpr):
    token = tl.program_id(0)
    slot = tl.load(slot_mapping + token)
    following = tl.load(slot_mapping + token + 1, mask=token + 1 < tokens, other=-1)
    last_of_page = (following != slot + 1) | (following % PAGE == 0)
    if (slot >= 0) & last_of_page:
        page = cache + (slot // PAGE) * page_stride
        count = slot % PAGE + 1
        token_in_page = tl.arange(0, PAGE)
        dim = tl.arange(0, DIM)
        # keys behind the last written one may be NaN, hence masks and not products with zero
        present = token_in_page < count
        keys = load_fp8(page + token_in_page[:, None] * DIM + dim[None, :], present[:, None], NATIVE).to(tl.float32)
        scales = tl.load((page + SCALES).to(tl.pointer_type(tl.float32)) + token_in_page, mask=present, other=0.0)
        keys *= (scales * fp8_unit(NATIVE))[:, None]
        statistic = page + MEAN
        if SIGNED:
            positive = tl.sum(tl.maximum(keys, 0.0), axis=0) / count.to(tl.float32)
            negative = tl.sum(tl.maximum(-keys, 0.0), axis=0) / count.to(tl.float32)
            halves = statistic.to(tl.pointer_type(tl.float16)) + dim
            tl.store(halves, tl.minimum(positive, LARGEST).to(tl.float16))
            tl.store(halves + DIM, tl.minimum(negative, LARGEST).to(tl.float16))
        else:
            tl.store(statistic.to(tl.pointer_type(tl.float32)) + dim, tl.sum(keys, axis=0) / count.to(tl.float32))
