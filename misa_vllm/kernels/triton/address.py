"""The request and the visible keys of every query of a step: one launch, whose inputs lie on the device."""

import torch
import triton
import triton.language as tl


def address_rows(starts: torch.Tensor, lengths: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `misa_vllm.kernels.Kernels.address_rows`."""
    request = torch.empty(tokens, dtype=torch.int32, device=starts.device)
    visible = torch.empty_like(request)
    requests = lengths.shape[0]
    # one program per request, one for the padding behind the last
    _address_kernel[(requests + 1,)](starts, lengths, request, visible, tokens, BLOCK=1024, num_warps=4)
    return request, visible


# a batch of any size runs the same code: a specialised one would be compiled in the middle of serving
@triton.jit(do_not_specialize=["tokens"])
def _address_kernel(starts, lengths, request, visible, tokens, BLOCK: tl.constexpr):
    current = tl.program_id(0)
    requests = tl.num_programs(0) - 1
    is_padding = current == requests
    first = tl.load(starts + current)
    end = tl.load(starts + current + 1, mask=is_padding == 0, other=tokens)
    length = tl.load(lengths + current, mask=is_padding == 0, other=0)
    for start in range(first, tl.minimum(end, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = (token < end) & (token < tokens)
        keys = tl.where(is_padding, 0, tl.maximum(length - (end - token) + 1, 0))
        tl.store(request + token, tl.minimum(current, requests - 1), mask=inside)
        tl.store(visible + token, keys, mask=inside)
