"""The definitions of DSA, MISA, hierarchical MISA and HISA in plain fp32 torch.

Every kernel of this package is tested against this file, and it is the path that runs (and says so) where no
kernel was built. It favours being read over being fast: keys are gathered to one dense matrix per request.

Symbols follow the papers: M queries, N keys, H index heads, D = 128 dimensions.

    q      [M, H, D]  index queries; their FP8 scale is folded into the gates
    gates  [M, H]     w[t, j], may be negative
    keys   [N, D]     dequantised index keys of one request
    visible [M]       keys a query may see: its position + 1

Sources: DSA, DeepSeek-V3.2 report eq. 1-2; MISA, arXiv 2605.07363; HISA, arXiv 2603.28458.
"""

import torch

from misa_vllm.index_cache import PAGE_TOKENS, keys_view, means_view, scales_view, signed_means_view
from misa_vllm.rows import QueryRows

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
HALF_MAX = torch.finfo(torch.float16).max
NO_TOKEN = -1


# ---------------------------------------------------------------- index keys


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 e4m3 values [..., D] and their power-of-two scales [...] float32 (UE8M0), as vLLM stores index keys."""
    amax = x.float().abs().amax(dim=-1).clamp(min=1e-4)
    mantissa, exponent = torch.frexp(amax / FP8_MAX)  # mantissa in [0.5, 1)
    exponent = exponent - (mantissa == 0.5).int()
    # built from its bits: exp2 of a whole number is not always exact, nor the same in vectors and in their tails
    scale = ((exponent + 127) << 23).to(torch.int32).view(torch.float32)
    return (x.float() / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def write_index_keys(k: torch.Tensor, index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Quantise k [T, D] and store token i at slot `slot_mapping[i]` (page * 64 + offset; negative: skip)."""
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    values, scale = quantize_fp8(k[: slot_mapping.shape[0]][written])
    page, offset = slots // PAGE_TOKENS, slots % PAGE_TOKENS
    keys_view(index_cache).view(torch.uint8)[page, offset] = values.view(torch.uint8)
    scales_view(index_cache)[page, offset] = scale


def read_index_keys(index_cache: torch.Tensor, pages: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` keys of the request whose pages are `pages` [W], dequantised: [count, D] float32."""
    tokens = torch.arange(count, device=index_cache.device)
    page, offset = pages[tokens // PAGE_TOKENS].long(), tokens % PAGE_TOKENS
    values = keys_view(index_cache).view(torch.uint8)[page, offset].view(torch.float8_e4m3fn)
    return values.float() * scales_view(index_cache)[page, offset].unsqueeze(-1)


# ---------------------------------------------------------------- statistics


def update_page_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Recompute the mean of every page that a step wrote to, from the page's keys.

    slot_mapping [T] int64: the step's slots in token order, negative for padding. A page's tokens are those up
    to the last one the step wrote in it: sequences grow at their end, so nothing behind that is valid.
    """
    for page, keys in _written_pages(index_cache, slot_mapping):
        means_view(index_cache)[page] = keys.mean(dim=0)


def update_signed_means(index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Recompute mean_positive's statistic of every page that a step wrote to; arguments as in `update_page_means`."""
    for page, keys in _written_pages(index_cache, slot_mapping):
        signed_means_view(index_cache)[page] = signed_means(keys).clamp(max=HALF_MAX).to(torch.float16)


def signed_means(keys: torch.Tensor) -> torch.Tensor:
    """The means of relu(k) and of relu(-k) over keys [N, D]: [2, D] float32."""
    return torch.stack([keys.float().relu().mean(dim=0), (-keys.float()).relu().mean(dim=0)])


def _written_pages(index_cache: torch.Tensor, slot_mapping: torch.Tensor):
    """Yield (page number, its dequantised keys up to the last slot written) of every page that a step wrote to."""
    slots = slot_mapping.tolist()
    for i, slot in enumerate(slots):
        following = slots[i + 1] if i + 1 < len(slots) else -1
        last_of_page = following != slot + 1 or following % PAGE_TOKENS == 0
        if slot >= 0 and last_of_page:
            page = torch.tensor([slot // PAGE_TOKENS], device=index_cache.device)
            yield slot // PAGE_TOKENS, read_index_keys(index_cache, page, slot % PAGE_TOKENS + 1)


def pool_page_means(page_means: torch.Tensor, pool_block: int) -> torch.Tensor:
    """Means [blocks, ...] of whole pool blocks, from the page means [pages, ...]; a trailing part is dropped."""
    pages_per_block = pool_block // PAGE_TOKENS
    blocks = page_means.shape[0] // pages_per_block
    return page_means[: blocks * pages_per_block].unflatten(0, (blocks, pages_per_block)).mean(dim=1)


# ---------------------------------------------------------------- routing and scores


def router_scores(q: torch.Tensor, gates: torch.Tensor, kbar: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """S [M, H] = |w| * sum over the first `blocks[m]` pool blocks of relu(q . kbar)."""
    scores = torch.einsum("mhd,bd->mbh", q.float(), kbar.float()).relu()
    complete = torch.arange(kbar.shape[0], device=q.device) < blocks.unsqueeze(1)
    return gates.float().abs() * scores.masked_fill(~complete.unsqueeze(-1), 0.0).sum(dim=1)


def signed_scores(q: torch.Tensor, gates: torch.Tensor, signed: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """mean_positive's S [M, H] = |w| * sum over the first `blocks[m]` pool blocks of relu(q) . p + relu(-q) . n.

    signed [blocks, 2, D]: p and n, a block's means of relu(k) and of relu(-k). S is linear in them, so a row needs
    their sums only.
    """
    sums = torch.nn.functional.pad(signed.float().cumsum(dim=0), (0, 0, 0, 0, 1, 0))[blocks.long()]
    positive, negative = sums.unbind(dim=1)
    products = torch.einsum("mhd,md->mh", q.float().relu(), positive)
    return gates.float().abs() * (products + torch.einsum("mhd,md->mh", (-q.float()).relu(), negative))


def top_heads(router_score: torch.Tensor, active_heads: int) -> torch.Tensor:
    """A(t) [M, h] int32, ascending: the heads with the largest S; of equal heads the lower wins."""
    order = torch.sort(router_score, dim=1, descending=True, stable=True).indices
    return order[:, :active_heads].sort(dim=1).values.to(torch.int32)


def token_scores(q: torch.Tensor, gates: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """I [M, N] = sum over heads of w * relu(q . k), over the heads given."""
    out = torch.zeros(q.shape[0], keys.shape[0], device=q.device)
    for head in range(q.shape[1]):  # one head at a time keeps the memory at M * N
        out += gates[:, head, None].float() * (q[:, head].float() @ keys.float().T).relu()
    return out


def take_heads(q: torch.Tensor, gates: torch.Tensor, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [M, h, D] and gates [M, h] of the routed heads [M, h]."""
    heads = heads.long()
    return q.float().gather(1, heads.unsqueeze(-1).expand(-1, -1, q.shape[-1])), gates.float().gather(1, heads)


# ---------------------------------------------------------------- selection


def top_tokens(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    """The k best visible tokens of each row, [M, k] int32 ascending, padded with -1 at the end.

    A row with at most k visible tokens selects them all. Of tokens with equal score the earlier wins.
    scores [M, N]; entries at or past `visible` are ignored, whatever they hold.
    """
    rows, count = scores.shape
    positions = torch.arange(count, device=scores.device)
    scores = scores.masked_fill(positions >= visible.unsqueeze(1), -torch.inf)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    # an infinitely low score of a visible token still precedes every invisible token: positions break the tie
    chosen = order.masked_fill(order >= visible.unsqueeze(1), count).sort(dim=1).values
    out = torch.full((rows, k), NO_TOKEN, dtype=torch.int32, device=scores.device)
    out[:, : chosen.shape[1]] = chosen.masked_fill(chosen == count, NO_TOKEN).to(torch.int32)
    return out


def dsa(q: torch.Tensor, gates: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    """DSA: the k best tokens by the score of all heads, [M, k] int32."""
    return top_tokens(token_scores(q, gates, keys), visible, k)


def route(q, gates, keys, visible, active_heads: int, pool_block: int) -> torch.Tensor:
    """MISA's router on dense keys: A(t) [M, h] int32. Block b counts once its last token is visible."""
    blocks = keys.shape[0] // pool_block
    kbar = keys[: blocks * pool_block].unflatten(0, (blocks, pool_block)).mean(dim=1)
    return top_heads(router_scores(q, gates, kbar, visible // pool_block), active_heads)


def misa(q, gates, keys, visible, k: int, active_heads: int, pool_block: int) -> torch.Tensor:
    """MISA: the k best tokens by the score of the routed heads, [M, k] int32.

    Rows that see no complete pool block keep all heads.
    """
    heads = route(q, gates, keys, visible, active_heads, pool_block)
    routed = token_scores(*take_heads(q, gates, heads), keys)
    scores = torch.where((visible >= pool_block).unsqueeze(1), routed, token_scores(q, gates, keys))
    return top_tokens(scores, visible, k)


def rerank(q, gates, keys, candidates: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of each row's candidate tokens [M, C] (-1: none) by the score of all heads, [M, k] int32."""
    is_candidate = torch.zeros(q.shape[0], keys.shape[0] + 1, dtype=torch.bool, device=q.device)
    is_candidate.scatter_(1, candidates.long().masked_fill(candidates < 0, keys.shape[0]), True)
    is_candidate = is_candidate[:, :-1]
    scores = token_scores(q, gates, keys)
    # compact every row's candidates to the front so that "visible" can say how many there are
    order = torch.sort(is_candidate, dim=1, descending=True, stable=True).indices
    local = top_tokens(scores.gather(1, order), is_candidate.sum(dim=1), k)
    tokens = order.gather(1, local.clamp(min=0).long()).masked_fill(local < 0, keys.shape[0]).sort(dim=1).values
    return tokens.masked_fill(tokens == keys.shape[0], NO_TOKEN).to(torch.int32)


def hierarchical(q, gates, keys, visible, k: int, active_heads: int, pool_block: int, candidates: int) -> torch.Tensor:
    """Hierarchical MISA: the `candidates` best by routed heads, of those the k best by all heads, [M, k] int32."""
    return rerank(q, gates, keys, misa(q, gates, keys, visible, candidates, active_heads, pool_block), k)


def hisa(q, gates, keys, visible, k: int, pool_block: int = 128, blocks: int = 64) -> torch.Tensor:
    """HISA: the `blocks` best blocks by the all-head score of their means, then DSA inside them, [M, k] int32.

    The first and the newest block always count among the best; the newest one's mean is over its visible keys.
    """
    out = torch.full((q.shape[0], k), NO_TOKEN, dtype=torch.int32, device=q.device)
    for m, count in enumerate(visible.tolist()):
        if count == 0:
            continue
        parts = keys[:count].split(pool_block)
        kbar = torch.stack([part.mean(dim=0) for part in parts])
        block_score = token_scores(q[m : m + 1], gates[m : m + 1], kbar)[0]
        block_score[0] = block_score[-1] = torch.inf
        best = block_score.topk(min(blocks, len(parts))).indices.sort().values
        tokens = torch.cat([torch.arange(b * pool_block, min((b + 1) * pool_block, count)) for b in best.tolist()])
        out[m] = rerank(q[m : m + 1], gates[m : m + 1], keys, tokens.to(keys.device).unsqueeze(0), k)[0]
    return out


# ---------------------------------------------------------------- the same over the paged cache
#
# The signatures of `misa_vllm.kernels.Kernels`; each loops over the requests of the rows.


def _requests(rows: QueryRows):
    """Yield (row numbers, pages, number of keys) of every request that has a row with visible keys."""
    for request in rows.request[rows.visible > 0].unique().tolist():
        members = torch.nonzero((rows.request == request) & (rows.visible > 0)).flatten()
        yield members, rows.block_table[request], int(rows.visible[members].max())


def address_rows(starts: torch.Tensor, lengths: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `misa_vllm.kernels.Kernels.address_rows`."""
    token = torch.arange(tokens, dtype=torch.int32, device=starts.device)
    request = torch.searchsorted(starts[1:], token, right=True, out_int32=True).clamp_(max=len(lengths) - 1)
    to_end = starts[1:][request] - token
    visible = torch.where(to_end > 0, lengths[request] - to_end + 1, 0).clamp_(min=0)
    return request, visible.to(torch.int32)


def route_heads(
    q: torch.Tensor, gates: torch.Tensor, index_cache: torch.Tensor, rows: QueryRows, active_heads: int, pool_block: int
) -> torch.Tensor:
    """See `misa_vllm.kernels.Kernels.route_heads`."""
    out = torch.arange(active_heads, dtype=torch.int32, device=q.device).repeat(len(rows), 1)
    for members, pages, count in _requests(rows):
        full_pages = pages[: count // PAGE_TOKENS].long()
        kbar = pool_page_means(means_view(index_cache)[full_pages], pool_block)
        score = router_scores(q[members], gates[members], kbar, rows.visible[members] // pool_block)
        out[members] = top_heads(score, active_heads)
    return out


def route_heads_by_signs(
    q: torch.Tensor, gates: torch.Tensor, index_cache: torch.Tensor, rows: QueryRows, active_heads: int, pool_block: int
) -> torch.Tensor:
    """See `misa_vllm.kernels.Kernels.route_heads_by_signs`."""
    out = torch.arange(active_heads, dtype=torch.int32, device=q.device).repeat(len(rows), 1)
    for members, pages, count in _requests(rows):
        blocks = rows.visible[members] // pool_block
        members, blocks = members[blocks > 0], blocks[blocks > 0]
        if len(members):
            full_pages = pages[: count // PAGE_TOKENS].long()
            signed = pool_page_means(signed_means_view(index_cache)[full_pages].float(), pool_block)
            out[members] = top_heads(signed_scores(q[members], gates[members], signed, blocks), active_heads)
    return out


def select_tokens(
    q: torch.Tensor,
    gates: torch.Tensor,
    heads: torch.Tensor | None,
    index_cache: torch.Tensor,
    rows: QueryRows,
    k: int,
    out: torch.Tensor,
    visible_from: int = 0,
    visible_to: int | None = None,
) -> None:
    """See `misa_vllm.kernels.Kernels.select_tokens`."""
    for members, pages, count in _requests(rows):
        members = members[_in_range(rows.visible[members], visible_from, visible_to)]
        if not len(members):
            continue
        keys = read_index_keys(index_cache, pages, count)
        row_q, row_gates = q[members], gates[members]
        if heads is not None:
            row_q, row_gates = take_heads(row_q, row_gates, heads[members])
        out[members, :k] = top_tokens(token_scores(row_q, row_gates, keys), rows.visible[members], k)
    if visible_from <= 0:
        out[rows.visible == 0, :k] = NO_TOKEN


def rerank_tokens(
    q: torch.Tensor,
    gates: torch.Tensor,
    candidates: torch.Tensor,
    index_cache: torch.Tensor,
    rows: QueryRows,
    k: int,
    out: torch.Tensor,
    visible_from: int = 0,
    visible_to: int | None = None,
) -> None:
    """See `misa_vllm.kernels.Kernels.rerank_tokens`."""
    for members, pages, count in _requests(rows):
        members = members[_in_range(rows.visible[members], visible_from, visible_to)]
        if len(members):
            keys = read_index_keys(index_cache, pages, count)
            out[members, :k] = rerank(q[members], gates[members], keys, candidates[members], k)
    if visible_from <= 0:
        out[rows.visible == 0, :k] = NO_TOKEN


def _in_range(visible: torch.Tensor, visible_from: int, visible_to: int | None) -> torch.Tensor:
    in_range = visible >= visible_from
    return in_range if visible_to is None else in_range & (visible < visible_to)


def sparse_mla_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: QueryRows,
    tokens: torch.Tensor,
    scale: float,
    kv_lora_rank: int,
) -> torch.Tensor:
    """Absorbed MLA over the selected tokens only (DeepSeek-V3.2 report, section 2; MQA mode).

    q [M, heads, kv_lora_rank + rope] in the latent space; kv_cache [num_pages, 64, kv_lora_rank + rope];
    tokens [M, k] int32 positions in the row's request, -1 for none. Returns [M, heads, kv_lora_rank] in q's
    dtype; a row without a token gives zeros. Softmax and sums are fp32.
    """
    out = torch.zeros(q.shape[0], q.shape[1], kv_lora_rank, device=q.device)
    for m in range(q.shape[0]):
        positions = tokens[m][tokens[m] >= 0].long()
        if len(positions):
            pages = rows.block_table[int(rows.request[m])][positions // PAGE_TOKENS].long()
            kv = kv_cache[pages, positions % PAGE_TOKENS].float()
            probabilities = torch.softmax(q[m].float() @ kv.T * scale, dim=-1)
            out[m] = probabilities @ kv[:, :kv_lora_rank]
    return out.to(q.dtype)

