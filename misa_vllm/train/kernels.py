"""The three products that training spends its time in, and which code computes them on this device.

Nothing here is chosen in silence: `choose` tries every candidate forward and backward against plain float32 on the
device, takes the first that is right, and returns a line about each for the log. On CPUs PyTorch's own code serves.
"""

import contextlib
import importlib.util

import torch
import torch.nn.functional as F

TRITON, BMM, SUM = "triton", "bmm with float32 sums", "sum"
FUSED, PLAIN = "fused", "plain"
BF16_TOLERANCE = 2.0**-5  # relative to the largest value: a few roundings of bf16, far from what a wrong mask gives

_scores_by = BMM
_masked_by = FUSED


def index_scores(q: torch.Tensor, k: torch.Tensor, gates: torch.Tensor, first: int) -> torch.Tensor:
    """I [M, N] float32 of q [M, H, D], k [N, D] and gates [M, H] float32; no gradient.

    Query m stands at position `first` + m; keys behind it score -inf.
    """
    if q.is_cuda and _scores_by == TRITON:
        from misa_vllm.train.triton_scores import index_scores as fused_scores

        return fused_scores(q, k, gates, first)
    products = torch.matmul(q, k.T).relu_()  # [M, H, N]
    if products.dtype == torch.float32:
        found = torch.bmm(gates.unsqueeze(1), products).squeeze(1)
    # sums in bf16 would make thousands of tokens tie
    elif q.is_cuda and _scores_by == BMM:
        found = torch.bmm(gates.to(products.dtype).unsqueeze(1), products, out_dtype=torch.float32).squeeze(1)
    else:
        found = products.mul_(gates.unsqueeze(-1)).sum(1, dtype=torch.float32)
    positions = torch.arange(k.shape[0], device=k.device)
    queries = torch.arange(first, first + q.shape[0], device=k.device)
    return found.masked_fill_(positions > queries.unsqueeze(1), -torch.inf)


def scored_at_once(heads: int, device: torch.device) -> int:
    """(query, key) pairs to score in one call: what takes about a gigabyte."""
    if device.type == "cuda" and _scores_by == TRITON:
        return 2**27
    return 2**29 // heads if device.type == "cuda" else 2**24 // heads


def differentiable_scores(q: torch.Tensor, k: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """I [M, N] with gradients and over all keys; sums in float32."""
    return torch.einsum("mh,mhn->mn", gates, torch.einsum("mhd,nd->mhn", q, k).relu().float())


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention [B, heads, N, D]; on GPUs by a kernel that keeps no (query, key) matrix, or not at all."""
    with _only("FLASH_ATTENTION", "EFFICIENT_ATTENTION") if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention [B, heads, M, D] with `mask` [B, 1, M, N], 0 or -inf, added to the logits."""
    if q.is_cuda and _masked_by == PLAIN:
        logits = (q @ k.mT).float() * q.shape[-1] ** -0.5 + mask
        return logits.softmax(-1).to(v.dtype) @ v
    with _only("EFFICIENT_ATTENTION") if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, q.shape[1], -1, -1))


def _only(*names: str):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([getattr(SDPBackend, name) for name in names])


# ---------------------------------------------------------------- choosing


def choose(device: torch.device, heads: int, index_heads: int, head_dim: int, index_dim: int) -> list[str]:
    """Take the first right code of each kind on `device`; returns what to log.

    Raises:
        RuntimeError: none of the candidates computes what it should; one line.
    """
    if device.type != "cuda":
        return ["kernels: PyTorch's for CPUs"]
    global _scores_by, _masked_by
    lines = []
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, k = normal(192, index_heads, index_dim), normal(1000, index_dim)
    gates = normal(192, index_heads, dtype=torch.float32) / index_heads
    # bf16 gates are part of what one candidate computes, so they may not count as its error
    gates = gates.bfloat16().float()
    right = torch.einsum("mh,mhn->mn", gates, torch.einsum("mhd,nd->mhn", q.float(), k.float()).relu())
    hidden = torch.arange(1000, device=device) > torch.arange(808, 1000, device=device).unsqueeze(1)

    def scores_are_right() -> float:
        found = index_scores(q, k, gates, 808)
        assert torch.equal(found.isinf(), hidden), "the causal mask is wrong"
        return ((found - right).masked_fill(hidden, 0).abs().max() / right.abs().max()).item()

    candidates = [TRITON] if importlib.util.find_spec("triton") else []
    for _scores_by in (*candidates, BMM, SUM):
        if _tried(f"index scores by {_scores_by}", scores_are_right, lines):
            break
    else:
        raise RuntimeError("no code for index scores works here: " + "; ".join(lines))

    q, k, v = (normal(2, heads, 256, head_dim).requires_grad_() for _ in range(3))
    allowed = torch.rand((2, 1, 256, 256), generator=generator, device=device) < 0.3
    causal = torch.ones(256, 256, dtype=torch.bool, device=device).tril()
    allowed = (allowed | torch.eye(256, dtype=torch.bool, device=device)) & causal
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16, device=device).masked_fill(~allowed, -torch.inf)

    def compared(attention, mask) -> float:
        worst = 0.0
        expected = _plain(q.float(), k.float(), v.float(), mask)
        expected = [expected, *torch.autograd.grad(expected.square().sum(), (q, k, v))]
        found = attention()
        found = [found, *torch.autograd.grad(found.float().square().sum(), (q, k, v))]
        for a, b in zip(found, expected, strict=True):
            worst = max(worst, ((a.float() - b.float()).abs().max() / b.float().abs().max()).item())
        return worst

    def masked_is_right() -> float:
        return compared(lambda: masked_attention(q, k, v, mask), mask)

    for _masked_by in (FUSED, PLAIN):
        if _tried(f"masked attention {_masked_by}", masked_is_right, lines):
            break
    else:
        raise RuntimeError("no code for masked attention works here: " + "; ".join(lines))
    causal_mask = torch.zeros(256, 256, device=device).masked_fill(~causal, -torch.inf)
    if not _tried("dense attention", lambda: compared(lambda: dense_attention(q, k, v), causal_mask), lines):
        raise RuntimeError("no flash or memory-efficient attention works here: " + lines[-1])
    return lines


def _plain(q, k, v, mask):
    return ((q @ k.mT) * q.shape[-1] ** -0.5 + mask.float()).softmax(-1) @ v


def _tried(name: str, measure, lines: list[str]) -> bool:
    try:
        error = measure()
    except Exception as failure:  # noqa: BLE001 - whatever a kernel's compiler or launch raises, the next is tried
        said = str(failure).splitlines() or [""]
        lines.append(f"{name}: FAILED, {type(failure).__name__}: {said[0]}")
        return False
    good = error < BF16_TOLERANCE
    lines.append(f"{name}: {'used' if good else 'WRONG'}, relative error {error:.1e}")
    return good
