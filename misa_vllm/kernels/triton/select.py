"""The k best tokens of every row: exact for any scores, deterministic, in bounded memory and without a score matrix.

The scores of a sample of a row's tokens give a threshold that somewhat more than k tokens reach. Scoring then
keeps only those (`score.py`), and the k best are taken from them exactly. Where that fails (fewer than k kept, or
more than there was room for), the row is scored again into a buffer and selected from all its scores. So the
sample decides the time and never the result.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from misa_vllm.kernels.triton.fp8 import DIM, PAGE, fp8_unit, load_fp8
from misa_vllm.kernels.triton.score import (
    LIST_KEYS,
    MAX_ROW_TILE,
    MAX_SPLITS,
    QUARTERS,
    Tiling,
    collect_scores,
    load_queries,
    load_scales,
    sample_scores,
    sampled_token,
    score_arguments,
    score_options,
    sum_heads,
    tile_rows,
)
from misa_vllm.kernels.triton.scratch import TRANSIENT_BYTES, scratch
from misa_vllm.reference import NO_TOKEN
from misa_vllm.rows import QueryRows

NONE = tl.constexpr(NO_TOKEN)
UNBOUNDED = 2**31 - 1
MIN_ROW_SLOTS = 6144  # list entries per row, at least: twice what k = 2048 is expected to keep, less for luck
MIN_TAKEN_SLOTS = 8192  # entries that the final selection holds in registers, at least
SAMPLE_STRIDE = 32
MAX_SAMPLE = 16384
FEW_LISTS = 64  # lists of a row that are searched in fewer steps
TAKE_REGISTERS = 64  # of 512 threads: two programs to a multiprocessor
SAFETY = tl.constexpr(4.5)  # standard deviations between the estimated threshold and the one that yields k


class Plan(NamedTuple):
    """Sizes of one selection; the memory of the lists also holds the samples (before) and scores (after)."""

    rows: int
    """Rows selected at a time."""
    tiling: Tiling
    list_slots: int
    stride: int
    """Every how many tokens one is sampled."""
    sample: int
    """Sampled tokens of a row, at most."""
    taken_slots: int
    unsampled: int
    """Up to that many visible tokens, every score is kept."""
    repair_programs: int
    repair_stride: int
    """Scores of a row that is selected from all of them, at most."""
    pool_words: int
    """Size of the shared memory in words of 4 bytes."""

    @property
    def specs(self):
        return (
            ((self.pool_words,), torch.float32),
            ((self.rows, self.tiling.lists), torch.int32),
            ((self.rows,), torch.float32),
            ((self.rows,), torch.int32),
        )


def plan_selection(
    device: torch.device, rows: int, requests: int, max_visible: int, k: int, active_heads: int
) -> Plan:
    """How `select_tokens` cuts and sizes its work."""
    taken_slots = max(MIN_TAKEN_SLOTS, 2 * triton.next_power_of_2(k))
    row_slots = max(MIN_ROW_SLOTS, taken_slots * 3 // 4)
    pages = triton.cdiv(max_visible, PAGE.value)
    stride = max(SAMPLE_STRIDE, triton.cdiv(max_visible, MAX_SAMPLE))
    sample = max(16, triton.next_power_of_2(triton.cdiv(max_visible, stride)))
    least_words = max(2 * row_slots, sample)
    most = max(1, TRANSIENT_BYTES // (4 * least_words + 1024))
    unit = MAX_ROW_TILE if most >= MAX_ROW_TILE else 1
    tiles = triton.cdiv(rows, most // unit * unit)
    part = min(rows, triton.cdiv(triton.cdiv(rows, tiles), unit) * unit)
    tiling = tile_rows(device, part, requests, pages, active_heads)
    every_key = triton.cdiv(pages, tiling.splits) * LIST_KEYS
    room = (TRANSIENT_BYTES // part - 4 * (tiling.lists + 2)) // (8 * tiling.lists)
    list_slots = min(every_key, max(room, triton.cdiv(row_slots, tiling.lists)))
    words = part * max(2 * tiling.lists * list_slots, sample)
    aligned = pages * PAGE.value
    return Plan(
        part,
        tiling,
        list_slots,
        stride,
        sample,
        taken_slots,
        min(taken_slots, tiling.splits * (list_slots // LIST_KEYS) * PAGE.value),
        max(1, min(part, words // aligned)),
        aligned,
        max(words, aligned),
    )


def workspace_bytes(max_rows: int, max_visible: int, k: int) -> int:
    """Bytes of transient memory that `select_tokens` takes for up to that many rows, visible tokens and k."""
    pages = triton.cdiv(max_visible, PAGE.value)
    splits = min(pages, MAX_SPLITS)
    # the pages of a row, rounded up for each of its splits
    row_bytes = (pages + splits) * PAGE.value * 8 + (splits * QUARTERS.value + 2) * 4
    return min(TRANSIENT_BYTES, max_rows * row_bytes)


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
    if len(rows) == 0:
        return
    visible_to = UNBOUNDED if visible_to is None else visible_to
    max_visible = min(rows.max_visible, visible_to - 1)
    scored_from = max(visible_from, k + 1)
    if max_visible < scored_from:
        _take_all_kernel[(len(rows),)](
            rows.visible, out, out.stride(0), visible_from, visible_to, k, BLOCK=1024, num_warps=4
        )
        return
    active_heads = q.shape[1] if heads is None else heads.shape[1]
    plan = plan_selection(q.device, len(rows), rows.block_table.shape[0], max_visible, k, active_heads)
    pool, list_counts, thresholds, failed = scratch(q.device, *plan.specs)
    for start in range(0, len(rows), plan.rows):
        tile = slice(start, start + plan.rows)
        operands = (q[tile], gates[tile], None if heads is None else heads[tile], index_cache, rows[tile])
        _select_tile(
            operands, plan, k, out[tile], visible_from, scored_from, visible_to, pool, list_counts, thresholds, failed
        )


def _select_tile(
    operands, plan, k, out, visible_from, scored_from, visible_to, pool, list_counts, thresholds, failed
):  # fmt: skip
    q, _, heads, _, rows = operands
    tiling = plan.tiling._replace(row_tiles=triton.cdiv(len(rows), plan.tiling.row_tile))
    filtered_from = max(scored_from, plan.unsampled + 1)
    if plan.repair_stride >= filtered_from:
        samples = pool[: len(rows) * plan.sample].view(len(rows), plan.sample)
        sample_scores(*operands, tiling, samples, plan.stride, filtered_from, visible_to)
        _threshold_kernel[(len(rows),)](
            samples,
            plan.stride,
            rows.visible,
            thresholds,
            filtered_from,
            visible_to,
            k,
            SAMPLE=plan.sample,
            num_warps=max(1, min(16, plan.sample // 256)),
        )
    lists = pool[: 2 * len(rows) * tiling.lists * plan.list_slots].view(torch.int64)
    collect_scores(
        *operands, tiling, thresholds, filtered_from, lists, plan.list_slots, list_counts, scored_from, visible_to
    )
    _take_best_kernel[(len(rows),)](
        lists,
        plan.list_slots,
        list_counts,
        tiling.lists,
        rows.visible,
        failed,
        out,
        out.stride(0),
        visible_from,
        visible_to,
        k,
        SLOTS=plan.taken_slots,
        LISTS=FEW_LISTS if tiling.lists <= FEW_LISTS else MAX_SPLITS * QUARTERS.value,
        maxnreg=TAKE_REGISTERS,
        num_warps=max(4, min(32, plan.taken_slots // 512)),
    )
    one_row = Tiling(1, len(rows), 1, tiling.padded_heads)
    _repair_kernel[(plan.repair_programs,)](
        *score_arguments(*operands),
        failed,
        pool,
        plan.repair_stride,
        out,
        out.stride(0),
        k,
        **score_options(q, heads, one_row),
        BLOCK=1024,
        num_stages=3,
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
def kth_largest(ordered, present, k, TOLERANCE: tl.constexpr):
    """A lower bound of the k-th largest of uint32 values that no value between it and the k-th largest exceeds.

    So exactly k values reach the bound, or the bound is the k-th largest and several are equal to it. With a
    TOLERANCE the bound may lie lower by that much. Zeros count as absent; `present` >= k says how many do not.
    """
    # bisection between values that do occur: those of one row differ in few leading bits
    high = tl.max(ordered, axis=0)
    low = tl.min(tl.where(ordered == 0, 0xFFFFFFFF, ordered).to(tl.uint32), axis=0)
    reached = present
    while (high - low > TOLERANCE) & (reached != k):
        middle = high - ((high - low) >> 1)
        count = tl.sum((ordered >= middle).to(tl.int32), axis=0)
        enough = count >= k
        reached = tl.where(enough, count, reached)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _threshold_kernel(samples, stride, visible, thresholds, sampled_from, sampled_to, k, SAMPLE: tl.constexpr):
    row = tl.program_id(0)
    count = tl.load(visible + row)
    if (count >= sampled_from) & (count < sampled_to):
        index = tl.arange(0, SAMPLE)
        taken = sampled_token(index, stride) < count
        sampled = tl.sum(taken.to(tl.int32), axis=0)
        # the rank in the sample that lies SAFETY deviations below the expected rank of the k-th best token
        expected = sampled.to(tl.float32) * k / count
        root = 0.5 * (tl.sqrt(4.0 * expected + SAFETY * SAFETY) + SAFETY)
        rank = tl.ceil(root * root).to(tl.int32)
        threshold = float("-inf")
        if rank < sampled:
            score = tl.load(samples + row.to(tl.int64) * SAMPLE + index, mask=taken, other=0.0)
            ordered = tl.where(taken, ordered_bits(score), 0).to(tl.uint32)
            threshold = float_of_bits(kth_largest(ordered, sampled, rank, 1 << 12))
        tl.store(thresholds + row, threshold)


@triton.jit
def _take_all(out, count, k, BLOCK: tl.constexpr):
    """All tokens 0 .. count - 1, then NONE up to k."""
    for start in range(0, k, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(out + token, tl.where(token < count, token, NONE), mask=token < k)


@triton.jit
def _take_all_kernel(visible, out, out_stride, visible_from, visible_to, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(visible + row)
    if (count >= visible_from) & (count < visible_to):
        _take_all(out + row * out_stride, count, k, BLOCK)


@triton.jit
def _take_best_kernel(
    lists, list_slots, list_counts, list_total, visible, failed, out, out_stride, visible_from, visible_to, k,
    SLOTS: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(visible + row)
    out += row * out_stride
    fails = count < 0
    if (count >= visible_from) & (count < visible_to):
        if count <= k:
            _take_all(out, count, k, SLOTS)
        else:
            ends = list_counts + row * list_total
            index = tl.arange(0, LISTS)
            counts = tl.load(ends + index, mask=index < list_total, other=0)
            end = tl.cumsum(counts, axis=0)
            found = tl.sum(counts, axis=0)
            fails = (tl.max(counts, axis=0) > list_slots) | (found < k) | (found > SLOTS)
            if not fails:
                # a slot finds its list by bisection, which reads what other threads have written
                tl.debug_barrier()
                tl.store(ends + index, end, mask=index < list_total)
                tl.debug_barrier()
                lists += row * list_total * list_slots
                if found <= SLOTS // 2:
                    _take_best_of_lists(lists, list_slots, ends, list_total, found, out, k, SLOTS // 2, LISTS)
                else:
                    _take_best_of_lists(lists, list_slots, ends, list_total, found, out, k, SLOTS, LISTS)
    tl.store(failed + row, fails.to(tl.int32))


@triton.jit
def _take_best_of_lists(
    lists, list_slots, ends, list_total, found, out, k, SLOTS: tl.constexpr, LISTS: tl.constexpr
):  # fmt: skip
    slot = tl.arange(0, SLOTS)
    filled = slot < found
    which = tl.zeros((SLOTS,), tl.int32)
    for i in tl.static_range(32):
        if (LISTS >> (i + 1)) > 0:
            last = which + ((LISTS >> (i + 1)) - 1)
            end = tl.load(ends + last, mask=filled & (last < list_total), other=SLOTS)
            which += tl.where(end <= slot, LISTS >> (i + 1), 0)
    start = tl.load(ends + which - 1, mask=filled & (which > 0), other=0)
    entry = tl.load(lists + which.to(tl.int64) * list_slots + (slot - start), mask=filled, other=0)
    position = entry.to(tl.int32)
    score = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    ordered = tl.where(filled, ordered_bits(score), 0).to(tl.uint32)
    best = best_mask(ordered, position, found, k)
    tl.store(out + tl.cumsum(best.to(tl.int32), axis=0) - 1, position, mask=best)


@triton.jit
def best_mask(ordered, position, present, k):
    """Which entries are the k best: the larger bits, of equal bits the earlier position; zero bits never."""
    kth = kth_largest(ordered, present, k, 0)
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
def _repair_kernel(
    q, q_row_stride, q_head_stride, gates, gates_stride, heads, heads_stride,
    cache, page_stride, block_table, block_table_stride, request, visible, rows, active_heads,
    failed, scores, scores_stride, out, out_stride, k,
    ROUTED: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    scores += tl.program_id(0).to(tl.int64) * scores_stride
    token = tl.arange(0, PAGE)
    dim = tl.arange(0, DIM)
    first_of_tile = tl.arange(0, PADDED_ROWS) == 0
    for turn in range(tl.cdiv(rows - tl.program_id(0), tl.num_programs(0))):
        row = tl.program_id(0) + turn * tl.num_programs(0)
        if tl.load(failed + row) != 0:
            query, gate = load_queries(
                q, q_row_stride, q_head_stride, gates, gates_stride, heads, heads_stride, row, row + 1,
                active_heads, ROUTED, HEADS, PADDED_ROWS, NATIVE,
            )  # fmt: skip
            query = tl.trans(query)
            count = tl.load(visible + row)
            pages = block_table + tl.load(request + row).to(tl.int64) * block_table_stride
            for tile in range(tl.cdiv(count, PAGE)):
                page = cache + tl.load(pages + tile).to(tl.int64) * page_stride
                keys = load_fp8(page + token[:, None] * DIM + dim[None, :], None, NATIVE)
                scales = tl.load(load_scales(page, token))
                score = sum_heads(tl.dot(keys, query), gate, HEADS, PADDED_ROWS)
                score = score * (scales * (fp8_unit(NATIVE) * fp8_unit(NATIVE)))[:, None]
                target = scores + tile * PAGE + token
                tl.store(tl.broadcast_to(target[:, None], score.shape), score, mask=first_of_tile[None, :])
            tl.debug_barrier()
            _take_best_of_all(scores, count, out + row.to(tl.int64) * out_stride, k, BLOCK)
            tl.debug_barrier()


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
