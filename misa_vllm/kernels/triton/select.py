"""The k best tokens of every row: exact for any scores, deterministic, in bounded memory.

A tile of rows is scored into a buffer (`score.py`). Every 32nd score of a row estimates a threshold that
somewhat more than k tokens reach; those are collected into the row's lists, and the k best are taken from the
lists exactly. A row whose estimate failed (fewer than k collected, or a list too short) is selected from all its
scores by the program that finds this out. So the estimate decides the time and never the result.
"""

import torch
import triton
import triton.language as tl

from misa_vllm.kernels.triton.score import score_tokens
from misa_vllm.kernels.triton.scratch import TRANSIENT_BYTES, scratch, spec_bytes
from misa_vllm.reference import NO_TOKEN
from misa_vllm.rows import QueryRows

NONE = tl.constexpr(NO_TOKEN)
UNBOUNDED = 2**31 - 1
LISTS = 16  # per row, filled by one program each
MIN_LIST_SLOTS = 8192  # per row over all its lists; rows that see no more than that need no threshold
SAMPLE_STRIDE = 32
MAX_SAMPLE = 16384
SCORE_ALIGNMENT = 64
SAFETY = tl.constexpr(4.5)  # standard deviations between the estimated threshold and the one that yields k


def list_slots(k: int) -> int:
    """Slots of all lists of one row: room for the survivors expected for k plus their spread."""
    return max(MIN_LIST_SLOTS, 2 * triton.next_power_of_2(k))


def _specs(rows: int, max_visible: int, k: int):
    slots = list_slots(k)
    return (
        ((rows, triton.cdiv(max_visible, SCORE_ALIGNMENT) * SCORE_ALIGNMENT), torch.float32),
        ((rows, slots), torch.float32),
        ((rows, slots), torch.int32),
        ((rows, LISTS), torch.int32),
        ((rows,), torch.float32),
    )


def _rows_per_tile(max_visible: int, k: int) -> int:
    rows = TRANSIENT_BYTES // spec_bytes(*_specs(1, max_visible, k))
    return max(1, rows // 16 * 16 if rows >= 16 else rows)


def workspace_bytes(max_rows: int, max_visible: int, k: int) -> int:
    """Bytes of transient memory that `select_tokens` takes for up to that many rows, visible tokens and k."""
    return spec_bytes(*_specs(min(max_rows, _rows_per_tile(max_visible, k)), max_visible, k))


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
    visible_to = UNBOUNDED if visible_to is None else visible_to
    max_visible = min(rows.max_visible, visible_to - 1)
    scored_from = max(visible_from, k + 1)
    scoring = max_visible >= scored_from
    slots = list_slots(k)
    tile_rows = _rows_per_tile(max_visible, k) if scoring else max(1, len(rows))
    specs = _specs(min(tile_rows, len(rows)), max_visible, k) if scoring else _specs(1, 1, 1)
    scores, list_scores, list_positions, list_counts, thresholds = scratch(q.device, *specs)
    for start in range(0, len(rows), tile_rows):
        tile = slice(start, start + tile_rows)
        part = rows[tile]
        if scoring:
            score_tokens(
                q[tile],
                gates[tile],
                None if heads is None else heads[tile],
                index_cache,
                part,
                scores,
                scored_from,
                visible_to,
            )
            _threshold_kernel[(len(part),)](
                scores,
                scores.stride(0),
                part.visible,
                thresholds,
                scored_from,
                visible_to,
                k,
                slots,
                SAMPLE_STRIDE,
                SAMPLE=min(MAX_SAMPLE, max(16, triton.next_power_of_2(triton.cdiv(max_visible, SAMPLE_STRIDE)))),
                num_warps=8,
            )
            _collect_kernel[(LISTS, len(part))](
                scores,
                scores.stride(0),
                part.visible,
                thresholds,
                list_scores,
                list_positions,
                list_counts,
                scored_from,
                visible_to,
                LIST_SLOTS=slots // LISTS,
                LISTS=LISTS,
                num_warps=4,
            )
        take_best(
            list_scores,
            list_positions,
            list_counts,
            part.visible,
            k,
            out[tile],
            visible_from,
            visible_to,
            scores=scores,
        )


def take_best(
    list_scores: torch.Tensor,
    list_positions: torch.Tensor,
    list_counts: torch.Tensor,
    visible: torch.Tensor,
    k: int,
    out: torch.Tensor,
    visible_from: int,
    visible_to: int,
    scores: torch.Tensor | None,
) -> None:
    """The k best entries of each row's lists, into out[:, :k].

    list_scores float32 and list_positions int32 [M, slots], slots a power of two; list_counts [M, lists] int32:
    filled slots of each of a row's lists, which are equally long; a count above that length says that the list
    overflowed. scores [M, >= max visible] float32: what such a row is selected from.
    """
    slots = list_scores.shape[1]
    _take_best_kernel[(visible.shape[0],)](
        list_scores,
        list_positions,
        list_positions.stride(0),
        list_counts,
        visible,
        scores,
        scores.stride(0),
        out,
        out.stride(0),
        visible_from,
        visible_to,
        k,
        SLOTS=slots,
        LISTS=list_counts.shape[1],
        num_warps=max(4, min(32, slots // 512)),
    )


@triton.jit
def ordered_bits(score):
    """uint32 in the order of the float32 scores: -0 equals 0, NaN is the largest, and none is 0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(score == score, ordered, 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def float_of_bits(ordered):
    """The inverse of `ordered_bits`."""
    bits = (ordered ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _threshold_kernel(
    scores, scores_stride, visible, thresholds, scored_from, scored_to, k, slots, min_stride, SAMPLE: tl.constexpr
):
    row = tl.program_id(0)
    count = tl.load(visible + row)
    if (count >= scored_from) & (count < scored_to):
        stride = tl.maximum(min_stride, tl.cdiv(count, SAMPLE))
        sampled = tl.cdiv(count, stride)
        # the rank in the sample that lies SAFETY deviations below the expected rank of the k-th best token
        expected = sampled.to(tl.float32) * k / count
        root = 0.5 * (tl.sqrt(4.0 * expected + SAFETY * SAFETY) + SAFETY)
        rank = tl.ceil(root * root).to(tl.int32)
        threshold = float("-inf")
        if (count > slots) & (rank < sampled):
            index = tl.arange(0, SAMPLE)
            # a shifting offset inside the stride: periodic contexts must not resonate with the sample
            token = tl.minimum(index * stride + (index * 7919) % stride, count - 1)
            score = tl.load(scores + row.to(tl.int64) * scores_stride + token, mask=index < sampled, other=0.0)
            ordered = tl.where(index < sampled, ordered_bits(score), 0)
            threshold = float_of_bits(_kth_largest(ordered, rank, 12))
        tl.store(thresholds + row, threshold)


@triton.jit
def _kth_largest(ordered, k, LOWEST_BIT: tl.constexpr):
    """The k-th largest of uint32 values, low bits below LOWEST_BIT cleared; zeros count as absent."""
    found = tl.full((), 0, tl.uint32)
    for step in range(32 - LOWEST_BIT):
        candidate = found | (tl.full((), 0x80000000, tl.uint32) >> step)
        enough = tl.sum((ordered >= candidate).to(tl.int32), axis=0) >= k
        found = tl.where(enough, candidate, found)
    return found


@triton.jit
def _collect_kernel(
    scores, scores_stride, visible, thresholds, list_scores, list_positions, list_counts, scored_from, scored_to,
    LIST_SLOTS: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    count = tl.load(visible + row)
    if (count >= scored_from) & (count < scored_to):
        threshold = tl.load(thresholds + row)
        base = row * (LISTS * LIST_SLOTS) + part * LIST_SLOTS
        filled = 0
        # lists take turns in short stretches of the context, so that a cluster of good tokens fills all of them
        for start in range(part * LIST_SLOTS, count, LISTS * LIST_SLOTS):
            token = start + tl.arange(0, LIST_SLOTS)
            score = tl.load(scores + row * scores_stride + token, mask=token < count, other=0.0)
            survives = (token < count) & ((score < threshold) == 0)  # a NaN counts as the best, as in torch.sort
            slot = filled + tl.cumsum(survives.to(tl.int32), axis=0) - 1
            stored = survives & (slot < LIST_SLOTS)
            tl.store(list_scores + base + slot, score, mask=stored)
            tl.store(list_positions + base + slot, token, mask=stored)
            filled += tl.sum(survives.to(tl.int32), axis=0)
        tl.store(list_counts + row * LISTS + part, filled)


@triton.jit
def _take_best_kernel(
    list_scores, list_positions, positions_stride, list_counts, visible, scores, scores_stride, out, out_stride,
    visible_from, visible_to, k, SLOTS: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(visible + row)
    out += row * out_stride
    if (count >= visible_from) & (count < visible_to):
        if count <= k:
            for start in range(0, k, SLOTS):
                token = start + tl.arange(0, SLOTS)
                tl.store(out + token, tl.where(token < count, token, NONE), mask=token < k)
        else:
            LIST_SLOTS: tl.constexpr = SLOTS // LISTS
            counts = tl.load(list_counts + row * LISTS + tl.arange(0, LISTS))
            failed = (tl.max(counts, axis=0) > LIST_SLOTS) | (tl.sum(counts, axis=0) < k)
            if failed:
                _take_best_of_all(scores + row * scores_stride, count, out, k, SLOTS)
            else:
                slot = tl.arange(0, SLOTS)
                filled = tl.load(list_counts + row * LISTS + slot // LIST_SLOTS) > slot % LIST_SLOTS
                score = tl.load(list_scores + row * SLOTS + slot, mask=filled, other=0.0)
                position = tl.load(list_positions + row * positions_stride + slot, mask=filled, other=0)
                ordered = tl.where(filled, ordered_bits(score), 0)
                best = best_mask(ordered, position, k)
                tl.store(out + tl.cumsum(best.to(tl.int32), axis=0) - 1, position, mask=best)


@triton.jit
def best_mask(ordered, position, k):
    """Which entries are the k best: the larger bits, of equal bits the earlier position; zero bits never."""
    kth = _kth_largest(ordered, k, 0)
    equal = ordered == kth
    missing = k - tl.sum((ordered > kth).to(tl.int32), axis=0)
    # the position of the last equal entry that is still taken: the largest p with fewer than `missing` before it
    last = 0x7FFFFFFF
    if tl.sum(equal.to(tl.int32), axis=0) > missing:
        last = 0
        for step in range(31):
            candidate = last | (0x40000000 >> step)
            fewer = tl.sum((equal & (position < candidate)).to(tl.int32), axis=0) < missing
            last = tl.where(fewer, candidate, last)
    return (ordered > kth) | (equal & (position <= last))


@triton.jit
def _take_best_of_all(scores, count, out, k, BLOCK: tl.constexpr):
    """The k best of `count` > k scores, ascending, by as many passes over them as a score has bits."""
    index = tl.arange(0, BLOCK)
    kth = tl.full((), 0, tl.uint32)
    for step in range(32):
        candidate = kth | (tl.full((), 0x80000000, tl.uint32) >> step)
        at_least = 0
        for start in range(0, count, BLOCK):
            token = start + index
            score = tl.load(scores + token, mask=token < count, other=0.0)
            at_least += tl.sum(((token < count) & (ordered_bits(score) >= candidate)).to(tl.int32), axis=0)
        kth = tl.where(at_least >= k, candidate, kth)
    above = 0
    for start in range(0, count, BLOCK):
        token = start + index
        score = tl.load(scores + token, mask=token < count, other=0.0)
        above += tl.sum(((token < count) & (ordered_bits(score) > kth)).to(tl.int32), axis=0)
    equal_left = k - above
    written = 0
    for start in range(0, count, BLOCK):
        token = start + index
        score = tl.load(scores + token, mask=token < count, other=0.0)
        ordered = tl.where(token < count, ordered_bits(score), 0)
        equal = ordered == kth
        equal_rank = tl.cumsum(equal.to(tl.int32), axis=0)
        best = (ordered > kth) | (equal & (equal_rank <= equal_left))
        tl.store(out + written + tl.cumsum(best.to(tl.int32), axis=0) - 1, token, mask=best)
        written += tl.sum(best.to(tl.int32), axis=0)
        equal_left -= tl.sum(equal.to(tl.int32), axis=0)
