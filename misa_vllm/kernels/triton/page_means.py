"""Means of the pages that a step wrote to, recomputed from the pages' keys (design, invariant 2)."""

import torch
import triton
import triton.language as tl

from misa_vllm.index_cache import means_view
from misa_vllm.kernels.triton.fp8 import DIM, MEAN, PAGE, SCALES, fp8_argument, fp8_unit, has_fp8_dot, load_fp8


def update_page_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `misa_vllm.kernels.Kernels.update_page_means`."""
    means_view(index_cache)  # refuses pages that have no room for a mean
    tokens = slot_mapping.shape[0]
    if tokens == 0:
        return
    native = has_fp8_dot(index_cache.device)
    _page_means_kernel[(tokens,)](
        fp8_argument(index_cache, native), index_cache.stride(0), slot_mapping, tokens, NATIVE=native, num_warps=4
    )


@triton.jit
def _page_means_kernel(cache, page_stride, slot_mapping, tokens, NATIVE: tl.constexpr):
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
        total = tl.sum(keys * (scales * fp8_unit(NATIVE))[:, None], axis=0)
        tl.store((page + MEAN).to(tl.pointer_type(tl.float32)) + dim, total / count.to(tl.float32))
