"""MISA's router: S[t, j] = |w| * sum over complete pool blocks of relu(q_j . kbar), and the h best heads.

Pool blocks are added up in tiles of a fixed number of blocks, from block 0 on, whether one program runs over all
of them (prefill) or one program each takes a tile (decode). So a row gets the same bits, hence the same heads,
in every batch. Block means are rounded to bf16 for the matrix units.
"""

import torch
import triton
import triton.language as tl

from misa_vllm.index_cache import PAGE_TOKENS, means_view
from misa_vllm.kernels.triton.fp8 import (
    DIM,
    MEAN,
    PAGE,
    fp8_argument,
    fp8_unit,
    has_fp8_dot,
    load_fp8,
    multiprocessors,
)
from misa_vllm.kernels.triton.scratch import TRANSIENT_BYTES, scratch
from misa_vllm.kernels.triton.select import ordered_bits
from misa_vllm.rows import QueryRows

MATRIX_ROWS = 64  # the least number of rows (queries x heads) that Hopper's matrix instructions take
SCANNED_ROWS = 64
MIN_ROWS_TO_POOL = 8  # per request


def route_heads(
    q: torch.Tensor, gates: torch.Tensor, index_cache: torch.Tensor, rows: QueryRows, active_heads: int, pool_block: int
) -> torch.Tensor:
    """See `misa_vllm.kernels.Kernels.route_heads`."""
    means_view(index_cache)  # refuses pages that hold no mean
    count, heads = len(rows), q.shape[1]
    routed = torch.empty(count, active_heads, dtype=torch.int32, device=q.device)
    if count == 0:
        return routed
    native = has_fp8_dot(q.device)
    padded_heads = max(16, triton.next_power_of_2(heads))
    row_tile = max(1, MATRIX_ROWS // padded_heads)
    row_tiles = triton.cdiv(count, row_tile)
    block_tile = 16 if pool_block >= 256 else 64
    max_blocks = rows.max_visible // pool_block
    block_tiles = triton.cdiv(max_blocks, block_tile)
    # the interpreter's matrix product knows no bf16
    matrix_type = torch.float32 if q.device.type == "cpu" else torch.bfloat16
    requests = rows.block_table.shape[0]
    split = block_tiles > 1 and row_tiles < 2 * multiprocessors(q.device)
    # requests with few rows would pool their blocks for hardly any reuse
    pooled_first = (
        not split
        and block_tiles > 0
        and count > MIN_ROWS_TO_POOL * requests
        and requests * max_blocks * DIM.value * 2 <= TRANSIENT_BYTES
    )
    kbar, partial = scratch(
        q.device,
        ((requests, max_blocks, DIM.value) if pooled_first else (1,), matrix_type),
        ((count, block_tiles, padded_heads) if split else (1,), torch.float32),
    )
    addressing = (
        index_cache,
        index_cache.stride(0),
        rows.block_table,
        rows.block_table.stride(0),
        rows.request,
        rows.visible,
    )
    if pooled_first:
        _pool_kernel[(block_tiles, triton.cdiv(count, SCANNED_ROWS))](
            kbar,
            max_blocks,
            *addressing,
            count,
            BLOCKS=block_tile,
            PAGES=pool_block // PAGE_TOKENS,
            SCANNED=SCANNED_ROWS,
            num_warps=4,
        )
    _route_kernel[(block_tiles if split else 1, row_tiles)](
        fp8_argument(q, native),
        q.stride(0),
        q.stride(1),
        gates,
        gates.stride(0),
        kbar,
        max_blocks,
        *addressing,
        partial,
        block_tiles,
        routed,
        count,
        heads,
        active_heads,
        BLOCKS=block_tile,
        PAGES=pool_block // PAGE_TOKENS,
        ROWS=row_tile,
        HEADS=padded_heads,
        POOLED=pooled_first,
        SPLIT=split,
        NATIVE=native,
        num_warps=4,
        # the pages of a tile are in flight together anyway; buffering them in shared memory would leave one program
        num_stages=3 if pooled_first else 1,
    )
    if split:
        _finish_kernel[(count,)](
            partial,
            block_tiles,
            gates,
            gates.stride(0),
            rows.visible,
            routed,
            heads,
            active_heads,
            BLOCKS=block_tile,
            PAGES=pool_block // PAGE_TOKENS,
            HEADS=padded_heads,
            num_warps=4,
        )
    return routed


@triton.jit
def _block_means(cache, page_stride, pages, block, block_end, PAGES: tl.constexpr):
    """Means [blocks, 128] float32 of pool blocks `block`; zeros from `block_end` on."""
    dim = tl.arange(0, DIM)
    live = block < block_end
    total = tl.zeros((block.shape[0], DIM), tl.float32)
    for i in tl.static_range(PAGES):
        page = tl.load(pages + block * PAGES + i, mask=live, other=0).to(tl.int64)
        mean = (cache + page * page_stride + MEAN).to(tl.pointer_type(tl.float32))
        total += tl.load(mean[:, None] + dim[None, :], mask=live[:, None], other=0.0)
    return total / PAGES


@triton.jit
def _pool_kernel(
    kbar, max_blocks, cache, page_stride, block_table, block_table_stride, request, visible, rows,
    BLOCKS: tl.constexpr, PAGES: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    row = tl.program_id(1) * SCANNED + tl.arange(0, SCANNED)
    row_visible = tl.load(visible + row, mask=row < rows, other=0)
    row_request = tl.load(request + row, mask=row < rows, other=-1)
    next_visible = tl.load(visible + row + 1, mask=row + 1 < rows, other=0)
    next_request = tl.load(request + row + 1, mask=row + 1 < rows, other=-1)
    # a row leaves its blocks to the next row if that one covers them: the last of such a chain sees the most
    covered = (row_request == next_request) & (next_visible >= row_visible)
    owner = ((row < rows) & (covered == 0)).to(tl.int32)
    while tl.max(owner, axis=0) > 0:
        mine = tl.min(tl.where(owner > 0, row, rows), axis=0)
        blocks = tl.load(visible + mine) // (PAGES * PAGE)
        current = tl.load(request + mine).to(tl.int64)
        if tl.program_id(0) * BLOCKS < blocks:
            mean = _block_means(cache, page_stride, block_table + current * block_table_stride, block, blocks, PAGES)
            target = kbar + (current * max_blocks + block[:, None]) * DIM + tl.arange(0, DIM)[None, :]
            tl.store(target, mean, mask=(block < blocks)[:, None])
        owner = owner * (row != mine).to(tl.int32)


@triton.jit
def _store_top_heads(routed, row, live, score, active_heads, heads, HEADS: tl.constexpr):
    """Write the heads with the largest of score [rows, HEADS], ascending; of equal ones the lower."""
    head = tl.arange(0, HEADS)
    ordered = tl.where((head < heads)[None, :], ordered_bits(score), 0)
    ours = ordered[:, :, None]
    other = ordered[:, None, :]
    beaten_by = (other > ours) | ((other == ours) & (head[None, None, :] < head[None, :, None]))
    chosen = tl.sum(beaten_by.to(tl.int32), axis=2) < active_heads
    slot = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    head_id = tl.broadcast_to(head[None, :], slot.shape)
    tl.store(routed + row.to(tl.int64)[:, None] * active_heads + slot, head_id, mask=chosen & live[:, None])


@triton.jit
def _route_kernel(
    q, q_row_stride, q_head_stride, gates, gates_stride, kbar, max_blocks,
    cache, page_stride, block_table, block_table_stride, request, visible, partial, block_tiles, routed,
    rows, heads, active_heads,
    BLOCKS: tl.constexpr, PAGES: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, POOLED: tl.constexpr,
    SPLIT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, DIM)
    line = tl.arange(0, ROWS * HEADS)  # (row of the tile, head)
    row = tl.program_id(1) * ROWS + line // HEADS
    head = line % HEADS
    row_visible = tl.load(visible + row, mask=row < rows, other=0)
    row_request = tl.load(request + row, mask=row < rows, other=-1)
    row_blocks = row_visible // (PAGES * PAGE)
    pending = (row_blocks > 0).to(tl.int32)
    first_tile = tl.program_id(0)
    total = tl.zeros((ROWS * HEADS,), tl.float32)
    if tl.max(row_blocks, axis=0) > first_tile * BLOCKS:
        start = q + row.to(tl.int64) * q_row_stride + head * q_head_stride
        live = (row < rows) & (head < heads)
        query = load_fp8(start[:, None] + dim[None, :], live[:, None], NATIVE).to(tl.float32) * fp8_unit(NATIVE)
        query = query.to(kbar.dtype.element_ty)
        # one round per request that has rows in the tile
        while tl.max(pending, axis=0) > 0:
            mine = tl.min(tl.where(pending > 0, row, rows), axis=0)
            current = tl.load(request + mine)
            member = (pending > 0) & (row_request == current)
            blocks = tl.max(tl.where(member, row_blocks, 0), axis=0)
            end_tile = tl.cdiv(blocks, BLOCKS)
            if SPLIT:
                end_tile = tl.minimum(end_tile, first_tile + 1)
            for tile in range(first_tile, end_tile):
                block = tile * BLOCKS + tl.arange(0, BLOCKS)
                if POOLED:
                    source = kbar + (current.to(tl.int64) * max_blocks + block[:, None]) * DIM + dim[None, :]
                    mean = tl.load(source, mask=(block < blocks)[:, None], other=0.0)
                else:
                    pages = block_table + current.to(tl.int64) * block_table_stride
                    mean = _block_means(cache, page_stride, pages, block, blocks, PAGES).to(kbar.dtype.element_ty)
                product = tl.maximum(tl.dot(query, tl.trans(mean)), 0.0)
                complete = member[:, None] & (block[None, :] < row_blocks[:, None])
                total += tl.sum(tl.where(complete, product, 0.0), axis=1)
            pending = pending * (row_request != current).to(tl.int32)
        if SPLIT:
            target = partial + (row.to(tl.int64) * block_tiles + first_tile) * HEADS + head
            tl.store(target, total, mask=row_blocks > first_tile * BLOCKS)
    if not SPLIT:
        gate = tl.load(gates + row.to(tl.int64) * gates_stride + head, mask=(row < rows) & (head < heads), other=0.0)
        score = tl.where(row_blocks > 0, tl.abs(gate) * total, 0.0)
        tile_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        score = tl.reshape(score, (ROWS, HEADS))
        _store_top_heads(routed, tile_row, tile_row < rows, score, active_heads, heads, HEADS)


@triton.jit
def _finish_kernel(
    partial, block_tiles, gates, gates_stride, visible, routed, heads, active_heads,
    BLOCKS: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    blocks = tl.load(visible + row) // (PAGES * PAGE)
    head = tl.arange(0, HEADS)
    total = tl.zeros((HEADS,), tl.float32)
    for tile in range(tl.cdiv(blocks, BLOCKS)):
        total += tl.load(partial + (row.to(tl.int64) * block_tiles + tile) * HEADS + head)
    gate = tl.load(gates + row.to(tl.int64) * gates_stride + head, mask=head < heads, other=0.0)
    score = tl.where(blocks > 0, tl.abs(gate) * total, 0.0)
    tile_row = row + tl.arange(0, 1)
    _store_top_heads(routed, tile_row, tile_row >= 0, score[None, :], active_heads, heads, HEADS)
