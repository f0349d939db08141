"""The three products that training spends its time in, and which code computes them on this device.

Nothing here is chosen in silence: `choose` runs every candidate forward and backward against plain float32 on the
device, takes the fastest of those that are right, and returns a line about each for the log. On CPUs PyTorch's own
code serves.
"""

import contextlib
import importlib.util
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

TRITON, BMM, SUM = "triton", "bmm with float32 sums", "sum"
FUSED, PLAIN = "memory-efficient", "plain"
CUDNN, FLASH, EFFICIENT = "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"
BF16_TOLERANCE = 2.0**-5  # relative to the largest value: a few roundings of bf16, far from what a wrong mask gives
TIMED_KEYS = 16384  # of the attention whose time decides
TIMED_RUNS = 3

# what `choose` found; None: PyTorch's own choice
_scores_by: tuple[str, tuple[int, int, int] | None] = (SUM, None)
_masked_by: str | None = None
_dense_by: str | None = None


# ---------------------------------------------------------------- the products


def index_scores(q: torch.Tensor, k: torch.Tensor, gates: torch.Tensor, first: int) -> torch.Tensor:
    """I [M, N] float32 of q [M, H, D], k [N, D] and gates [M, H] float32; no gradient.

    Query m stands at position `first` + m; keys behind it score -inf.
    """
    kind, tile = _scores_by
    if kind == TRITON:
        from misa_vllm.train.triton_scores import index_scores as fused_scores

        return fused_scores(q, k, gates, first, tile)
    products = torch.matmul(q, k.T).relu_()  # [M, H, N]
    if products.dtype == torch.float32:
        found = torch.bmm(gates.unsqueeze(1), products).squeeze(1)
    # sums in bf16 would make thousands of tokens tie
    elif kind == BMM:
        found = torch.bmm(gates.to(products.dtype).unsqueeze(1), products, out_dtype=torch.float32).squeeze(1)
    else:
        found = products.mul_(gates.unsqueeze(-1)).sum(1, dtype=torch.float32)
    positions = torch.arange(k.shape[0], device=k.device)
    queries = torch.arange(first, first + q.shape[0], device=k.device)
    return found.masked_fill_(positions > queries.unsqueeze(1), -torch.inf)


def scored_at_once(heads: int, device: torch.device) -> int:
    """(query, key) pairs to score in one call: what takes about a gigabyte."""
    if device.type != "cuda":
        return 2**24 // heads
    return 2**27 if _scores_by[0] == TRITON else 2**29 // heads


def differentiable_scores(q: torch.Tensor, k: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """I [M, N] with gradients of q [M, H, D], gates [M, H] and keys: k [N, D], or [M, N, D] of each query's own.

    Sums are in float32, also under autocast, which would round each score to bf16's eight bits.
    """
    products = torch.einsum("mhd,nd->mhn" if k.dim() == 2 else "mhd,mnd->mhn", q, k)
    with torch.autocast(q.device.type, enabled=False):
        return torch.einsum("mh,mhn->mn", gates.float(), products.relu().float())


def attention_logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q @ k^T scaled, [heads, M, N] float32 of q [heads, M, D] and k [heads, N, D], not rounded in between."""
    with torch.autocast(q.device.type, enabled=False):
        return torch.bmm(q.float(), k.float().mT) * q.shape[-1] ** -0.5


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention [B, heads, N, D], on GPUs by a kernel that keeps no (query, key) matrix."""
    with _only(_dense_by):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention [B, heads, M, D] with `mask` [B, 1, M, N], 0 or -inf, added to the logits."""
    if _masked_by == PLAIN:
        logits = (q @ k.mT).float() * q.shape[-1] ** -0.5 + mask
        return logits.softmax(-1).to(v.dtype) @ v
    with _only(EFFICIENT if _masked_by else None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, q.shape[1], -1, -1))


def _only(name: str | None):
    if name is None:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, name))


# ---------------------------------------------------------------- choosing


def choose(
    device: torch.device, heads: int, index_heads: int, head_dim: int, index_dim: int, topk: int, force: bool = False
) -> list[str]:
    """Take the fastest right code of each kind on `device`; returns what to log.

    force: try the candidates on CPUs too (for tests).

    Raises:
        RuntimeError: none of the candidates computes what it should; one line.
    """
    if device.type != "cuda" and not force:
        return ["kernels: PyTorch's for CPUs"]
    lines: list[str] = []
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    _choose_scores(normal, index_heads, index_dim, lines)
    _choose_masked(normal, heads, head_dim, topk, lines)
    _choose_dense(normal, heads, head_dim, lines)
    return lines


def _choose_scores(normal, heads: int, dim: int, lines: list[str]) -> None:
    q, k = normal(192, heads, dim), normal(1000, dim)
    gates = normal(192, heads, dtype=torch.float32) / heads
    # bf16 gates are part of what one candidate computes, so they may not count as its error
    gates = gates.bfloat16().float()
    right = torch.einsum("mh,mhn->mn", gates, torch.einsum("mhd,nd->mhn", q.float(), k.float()).relu())
    hidden = torch.arange(1000, device=k.device) > torch.arange(808, 1000, device=k.device).unsqueeze(1)
    timed = normal(1024 if k.is_cuda else 16, heads, dim), normal(8192 if k.is_cuda else 64, dim)
    timed_gates = normal(timed[0].shape[0], heads, dtype=torch.float32)

    def use(candidate) -> None:
        global _scores_by
        _scores_by = candidate

    def error() -> float:
        found = index_scores(q, k, gates, 808)
        assert torch.equal(found.isinf(), hidden), "the causal mask is wrong"
        return ((found - right).masked_fill(hidden, 0).abs().max() / right.abs().max()).item()

    candidates = {}
    if importlib.util.find_spec("triton"):
        from misa_vllm.train.triton_scores import TILES

        candidates = {f"triton, tiles of {tile[0]} x {tile[1]}": (TRITON, tile) for tile in TILES}
    candidates |= {BMM: (BMM, None), SUM: (SUM, None)}
    _take("index scores", candidates, use, error, lambda: index_scores(*timed, timed_gates, timed[1].shape[0]), lines)


def _choose_masked(normal, heads: int, head_dim: int, topk: int, lines: list[str]) -> None:
    queries, keys, few = 192, 1024, 24
    q, k, v = _as_in_the_model(normal, 2, heads, (queries, keys, keys), head_dim)
    # few keys of many, as in use: whole tiles of a kernel have none, for some rows all the first ones
    order = normal(2, 1, queries, keys, dtype=torch.float32)
    order[:, :, ::3, : keys // 2] -= 100.0
    mask = _mask_of(order, few, torch.bfloat16)
    times = keys if not q.is_cuda else TIMED_KEYS
    timed = _as_in_the_model(normal, 1, heads, (times // 16, times, times), head_dim)
    timed_mask = _mask_of(normal(1, 1, times // 16, times), min(topk, times), torch.bfloat16)

    def use(candidate) -> None:
        global _masked_by
        _masked_by = candidate

    _take(
        "attention to the selected", {name: name for name in (FUSED, PLAIN)}, use,
        lambda: _worst_error(lambda *x: masked_attention(*x, mask), (q, k, v), mask),
        lambda: _forward_and_back(lambda *x: masked_attention(*x, timed_mask), timed), lines,
    )  # fmt: skip


def _choose_dense(normal, heads: int, head_dim: int, lines: list[str]) -> None:
    q, k, v = _as_in_the_model(normal, 2, heads, (384,) * 3, head_dim)
    causal = torch.ones(384, 384, dtype=torch.bool, device=q.device).tril()
    mask = torch.zeros(384, 384, device=q.device).masked_fill(~causal, -torch.inf)
    timed = _as_in_the_model(normal, 1, heads, (TIMED_KEYS if q.is_cuda else 64,) * 3, head_dim)

    def use(candidate) -> None:
        global _dense_by
        _dense_by = candidate

    _take(
        "attention to all", {name: name for name in (CUDNN, FLASH, EFFICIENT)}, use,
        lambda: _worst_error(dense_attention, (q, k, v), mask),
        lambda: _forward_and_back(dense_attention, timed), lines,
    )  # fmt: skip


def _take(
    what: str, candidates: dict, use: Callable, error: Callable[[], float], work: Callable, lines: list[str]
) -> None:
    """Leave the fastest right candidate in use."""
    fastest = None
    for name, candidate in candidates.items():
        use(candidate)
        try:
            wrong_by = error()
            seconds = _seconds(work) if wrong_by < BF16_TOLERANCE else 0.0
        except Exception as failure:  # noqa: BLE001 - whatever a kernel's compiler or launch raises, the next is tried
            said = str(failure).splitlines() or [""]
            lines.append(f"{what} by {name}: FAILED, {type(failure).__name__}: {said[0][:120]}")
            continue
        right = wrong_by < BF16_TOLERANCE  # not NaN either
        lines.append(f"{what} by {name}: {f'{seconds * 1e3:.2f} ms' if right else 'WRONG'}, error {wrong_by:.1e}")
        if right and (fastest is None or seconds < fastest[0]):
            fastest = seconds, name, candidate
    if fastest is None:
        raise RuntimeError(f"no code for {what} works here: " + "; ".join(lines[-len(candidates) :]))
    use(fastest[2])
    lines.append(f"{what}: {fastest[1].upper()} is used")


def _seconds(work: Callable) -> float:
    """Time of one run; the first warms up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    work()
    wait()
    began = time.perf_counter()
    for _ in range(TIMED_RUNS):
        work()
    wait()
    return (time.perf_counter() - began) / TIMED_RUNS


def _as_in_the_model(normal, batch: int, heads: int, lengths: tuple[int, int, int], head_dim: int):
    """q, k and v [B, heads, N, D] with the strides they have there, where heads lie side by side."""
    return [normal(batch, length, heads, head_dim).transpose(1, 2).requires_grad_() for length in lengths]


def _mask_of(order: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """0 at the `count` largest entries of each row of `order`, -inf elsewhere."""
    mask = torch.full_like(order, -torch.inf, dtype=dtype)
    return mask.scatter_(-1, order.topk(count, dim=-1).indices, 0.0)


def _worst_error(attention: Callable, inputs, mask: torch.Tensor) -> float:
    """Of the result and the gradients, relative to the largest value; NaN if one is."""
    q, k, v = (x.float() for x in inputs)
    expected = ((q @ k.mT) * q.shape[-1] ** -0.5 + mask.float()).softmax(-1) @ v
    expected = [expected, *torch.autograd.grad(expected.square().sum(), inputs)]
    found = attention(*inputs)
    found = [found, *torch.autograd.grad(found.float().square().sum(), inputs)]
    errors = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(found, expected, strict=True)]
    return torch.stack(errors).max().item()  # max keeps a NaN


def _forward_and_back(attention: Callable, inputs) -> None:
    torch.autograd.grad(attention(*inputs).float().sum(), inputs)
