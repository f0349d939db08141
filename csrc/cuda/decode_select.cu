// Scores and top-k selection for few rows: one launch of one CTA per multiprocessor.
//
// Adjacent rows of one request are scored together, as one item. Items are cut into chunks of pages, so that every CTA
// gets one; only if there are more items than CTAs, CTAs work on several chunks in turn. Pages arrive by the copy
// engine in a ring of stages that runs on over the ends of chunks, so that keys arrive while the CTA selects. The
// warpgroups take pages in turn, and the scores stay in shared memory as order-preserving integers. When they fill it,
// only the best are kept and scoring goes on. CTAs that share a row select together (row_selection.cuh).
//
// Where heads are routed, that is done in the same launch, while the first pages arrive (decode_router.cuh).
#include <algorithm>
#include <atomic>
#include <random>

#include "common/ptx.cuh"
#include "common/select.cuh"
#include "decode_router.cuh"
#include "key_scores.cuh"
#include "row_selection.cuh"
#include "tensor_map.h"
#include "torch_op.h"

namespace misa {
namespace {

constexpr int kWarpgroups = 4;
constexpr int kThreads = 128 * kWarpgroups;
constexpr int kMaxRows = 1024;
constexpr int64_t kMostVisible = 1 << 25;  // keys; pages and sums of two counts of them stay in quotient's range
constexpr int kFewestPages = 8;  // of a chunk: two for each warpgroup
constexpr int kKeyTileBytes = kPageTokens * kHeadDim;
constexpr int kScaleTileBytes = kPageTokens * 4;
constexpr int kTileAlignment = 1024;
constexpr int kMostStages = 4 * kWarpgroups, kManyStages = 3 * kWarpgroups, kGoodStages = 2 * kWarpgroups;
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kPooledBlocks = 64;  // at a time, where a segment has no more
constexpr int kMoreKept = 512;  // keys besides the k best that a single row keeps after a round: no exact cut is needed
constexpr int kScratchWords = 2 * (kListedKeys + kMoreKept);

using Selection = RowSelection<kThreads>;
using Router = DecodeRouter<kThreads>;

struct SelectArguments {
  QueryHeads queries;
  IndexCache cache;
  Rows rows;
  int k;
  int visible_from, visible_to;
  int32_t* out;
  int64_t out_stride;
  int stages;         // a multiple of kWarpgroups, so that every stage belongs to one warpgroup
  int pool_words;     // for the keys of a chunk's rows
  int rows_per_item;  // at most
  bool row_is_slot;  // of the exchange
  RouteSettings route;
  Exchange exchange;

  __device__ bool scores(int visible) const {
    return visible > k && visible >= visible_from && visible < visible_to;
  }
};

struct Item {
  int row, rows, pages;
};

/// A CTA's part of an item. `begin`: the CTA's pages before it.
struct Chunk : RankOfRows {
  int first_page, pages, begin;
  int first_chunk;
  int item_pages;
  bool is_short;  // the ranks exchange keys
};

/// Of each of a chunk's rows in the pool: the positions of the keys that are kept from earlier rounds, then keys.
struct Room {
  int row_words, kept_words, capacity;
  int best_kept, most_kept;
  int next;  // where the keys and positions to be kept are gathered
};

__device__ __forceinline__ Room room_of(const SelectArguments& args, const Chunk& chunk, int rows) {
  Room room;
  room.best_kept = (args.k + 3) / 4 * 4;
  room.most_kept = room.best_kept + (rows == 1 ? kMoreKept : 0);
  const bool fits = chunk.pages * kPageTokens <= quotient(args.pool_words, rows) / kPageTokens * kPageTokens;
  const int next_words = fits || 2 * room.most_kept <= kScratchWords ? 0 : 2 * room.most_kept;
  room.next = next_words == 0 ? -kScratchWords : args.pool_words - next_words;  // the scratch precedes the pool
  room.row_words = chunk.is_short ? chunk.pages * kPageTokens
                                  : quotient(args.pool_words - next_words, rows) / kPageTokens * kPageTokens;
  room.kept_words = fits ? 0 : room.most_kept;
  room.capacity = (room.row_words - room.kept_words) / kPageTokens * kPageTokens;
  return room;
}

/// Shared by the block.
struct Plan {
  int items, chunks, pages;
  int number;  // of the chunk that is worked on
  bool is_feasible[4][kThreads / 32];
};

/// The first warp groups adjacent rows of one request into items; returns how many.
__device__ __forceinline__ int find_items(
    const SelectArguments& args, const int* visible, const int* request, Item* items) {
  const int lane = threadIdx.x, row_count = args.rows.count;
  int count = 0, run_before = 0;  // rows of the run that the rows before these end with
#pragma unroll 1
  for (int base = 0; base < row_count; base += 32) {
    const int row = base + lane;
    const bool scores = row < row_count && args.scores(visible[row]);
    const bool continues =
        scores && row > 0 && request[row] == request[row - 1] && args.scores(visible[row - 1]);
    const uint32_t starts = __ballot_sync(~0u, !continues) & ((2u << lane) - 1);
    const int place_in_run = starts != 0 ? lane - (31 - __clz(static_cast<int>(starts))) : run_before + lane;
    const bool is_first =
        scores && place_in_run == quotient(place_in_run, args.rows_per_item) * args.rows_per_item;
    const uint32_t firsts = __ballot_sync(~0u, is_first);
    if (is_first) {
      int rows = 1, most = visible[row];
#pragma unroll 1
      while (rows < args.rows_per_item && row + rows < row_count && request[row + rows] == request[row] &&
             args.scores(visible[row + rows])) {
        most = max(most, visible[row + rows]);
        ++rows;
      }
      items[count + __popc(firsts & ((1u << lane) - 1))] = {row, rows, ceil_div(most, kPageTokens)};
    }
    count += __popc(firsts);
    run_before = __shfl_sync(~0u, place_in_run, 31) + 1;
  }
  return count;
}

/// The pages of a chunk: the fewest with which every CTA gets at most one chunk, or an even share if that cannot be.
__device__ __forceinline__ int choose_chunk_pages(const Item* items, Plan& plan) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = plan.items;
  const int ctas = static_cast<int>(gridDim.x);
  int total = 0, most = 0, fewest = INT32_MAX;
#pragma unroll 1
  for (int i = lane; i < count; i += 32) {
    total += items[i].pages;
    most = max(most, items[i].pages);
    fewest = min(fewest, items[i].pages);
  }
  total = __reduce_add_sync(~0u, total);
  most = __reduce_max_sync(~0u, most);
  fewest = __reduce_min_sync(~0u, fewest);
  int low = max(ceil_div(total, ctas), kFewestPages);
  if (count > ctas) return low;
  if (fewest == most) return max(low, ceil_quotient(most, quotient(ctas, max(count, 1))));
  int high = max(most, low);  // does; below `low` nothing does
  constexpr int kWarps = kThreads / 32, kRounds = 2;
#pragma unroll 1
  for (int round = 0; round < kRounds && low < high; ++round) {
    const int step = ceil_div(high - low, kWarps);
    const int candidate = low + warp * step;
    int chunks = 0;
#pragma unroll 1
    for (int i = lane; i < count; i += 32) chunks += ceil_quotient(items[i].pages, candidate);
    chunks = __reduce_add_sync(~0u, chunks);
    if (lane == 0) plan.is_feasible[round][warp] = chunks <= ctas;
    __syncthreads();
    const uint32_t feasible = __ballot_sync(~0u, lane < kWarps && plan.is_feasible[round][lane]);
    const int first = feasible == 0 ? kWarps : __ffs(static_cast<int>(feasible)) - 1;
    if (first < kWarps) high = min(high, low + first * step);
    if (first > 0) low = min(high, low + (first - 1) * step + 1);
  }
  return high;
}

/// The first warp finds the CTA's chunks. An item has at most as many chunks as there are CTAs, so none is in it twice.
__device__ __forceinline__ void find_chunks(
    const SelectArguments& args, const int* request, const Item* items, int chunk_pages, Chunk* chunks, Plan& plan) {
  const int lane = threadIdx.x, ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
  int before = 0, split_before = 0;
#pragma unroll 1
  for (int base = 0; base < plan.items; base += 32) {
    const bool exists = base + lane < plan.items;
    const Item item = exists ? items[base + lane] : Item{0, 0, 0};
    const int ranks = ceil_quotient(item.pages, chunk_pages);
    const int inclusive = static_cast<int>(warp_inclusive_sum(static_cast<uint32_t>(ranks)));
    const int first = before + inclusive - ranks;
    const int start = first - quotient(first, ctas) * ctas;
    const int rank = cta - start + (cta < start ? ctas : 0);
    const uint32_t split = __ballot_sync(~0u, ranks > 1);
    if (rank < ranks) {
      const int first_page = rank * chunk_pages, keys = item.pages * kPageTokens;
      // all keys of one row besides a rank's part of every row: the same answer for each rank
      const bool is_short = ranks > 1 && keys <= kExchangedKeys &&
                            keys + chunk_pages * item.rows * kPageTokens <= args.pool_words;
      chunks[quotient(first + rank, ctas)] = {
          {item.row, item.rows, request[item.row], rank, ranks,
           args.row_is_slot ? item.row : kRowsPerItem * (split_before + __popc(split & ((1u << lane) - 1)))},
          first_page, min(chunk_pages, item.pages - first_page), 0, first, item.pages, is_short};
    }
    before += __shfl_sync(~0u, inclusive, 31);
    split_before += __popc(split);
  }
  __syncwarp();
  if (lane == 0) {
    const int count = before > cta ? ceil_quotient(before - cta, ctas) : 0;
    int pages = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      chunks[i].begin = pages;
      pages += chunks[i].pages;
    }
    plan.chunks = count;
    plan.number = 0;
    plan.pages = pages;
  }
}

/// The block's shared memory begins with it; scratch, pool, tiles of keys and chunks follow.
template <int kHeads>
struct Fixed {
  using Layout = HeadLayout<kHeads>;
  alignas(kTileAlignment) char query[Layout::kQueryBytes];
  char scale_tiles[kMostStages][kScaleTileBytes];
  Selection::Shared selection;
  alignas(8) uint64_t full[kMostStages], empty[kMostStages];
  int first_ids[kMostStages];  // each for the thread that wrote it
  int32_t routed_heads[Layout::kRows * kHeads];
  RowPart parts[Layout::kRows];
  Plan plan;
  Room room;
};

template <int kHeads, bool kRoutes>
__global__ void __launch_bounds__(kThreads, 1) decode_select_kernel(
    const __grid_constant__ CUtensorMap key_map, const __grid_constant__ SelectArguments args) {
  using Layout = HeadLayout<kHeads>;
  extern __shared__ __align__(1024) char shared[];
  auto& fixed = *reinterpret_cast<Fixed<kHeads>*>(shared);
  Plan& plan = fixed.plan;
  uint64_t *full = fixed.full, *empty = fixed.empty;
  const int stages = args.stages, k = args.k;
  auto* scratch = reinterpret_cast<uint32_t*>(shared + sizeof(fixed));
  auto* pool = scratch + kScratchWords;
  char* key_tiles = reinterpret_cast<char*>(pool + args.pool_words);
  auto* chunks = reinterpret_cast<Chunk*>(key_tiles + stages * kKeyTileBytes);

  if (threadIdx.x == 0) ptx::prefetch_tensor_map(&key_map);
  {
    int* visible = reinterpret_cast<int*>(pool);  // the pool is still unused
    int* request = visible + args.rows.count;
    auto* items = reinterpret_cast<Item*>(request + args.rows.count);
#pragma unroll 1
    for (int row = threadIdx.x; row < args.rows.count; row += kThreads) {
      visible[row] = args.rows.visible[row];
      request[row] = args.rows.request[row];
    }
    if (threadIdx.x < stages) {
      ptx::mbarrier_init(&full[threadIdx.x], 1);
      ptx::mbarrier_init(&empty[threadIdx.x], 4 * ptx::kArrivalsOfWarp);  // the stage's warpgroup
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      const int count = find_items(args, visible, request, items);
      if (threadIdx.x == 0) plan.items = count;
    } else {  // meanwhile a warp for each row asks for the ids of its pages, which are needed next
      const int row = static_cast<int>(blockIdx.x) * (kThreads / 32 - 1) + threadIdx.x / 32 - 1;
      if (row < args.rows.count) {
        constexpr int kLineIds = 32;
        const int32_t* ids = args.rows.block_table + request[row] * args.rows.table_stride;
#pragma unroll 1
        for (int page = threadIdx.x % 32 * kLineIds; page * kPageTokens < visible[row]; page += 32 * kLineIds) {
          ptx::prefetch_l2(ids + page);
        }
      }
    }
    __syncthreads();
    const int chunk_pages = choose_chunk_pages(items, plan);
    if (threadIdx.x < 32) find_chunks(args, request, items, chunk_pages, chunks, plan);
#pragma unroll 1
    for (int row = blockIdx.x; row < args.rows.count; row += gridDim.x) {
      const int seen = visible[row];
      if (seen > k || seen < args.visible_from || seen >= args.visible_to) continue;
#pragma unroll 1
      for (int i = threadIdx.x; i < k; i += kThreads) args.out[row * args.out_stride + i] = i < seen ? i : -1;
    }
    __syncthreads();
  }
  if (plan.chunks == 0) return;

  // pages are numbered from this CTA's first; a warpgroup takes every kWarpgroups-th
  const auto id_of = [&](int page, const Chunk* from) {
#pragma unroll 1
    while (page >= from->begin + from->pages) ++from;
    const Chunk& chunk = *from;
    return args.rows.block_table[chunk.request * args.rows.table_stride + chunk.first_page + page - chunk.begin];
  };
  const auto load_page = [&](int stage, int id) {
    ptx::mbarrier_arrive_expect_tx(&full[stage], kKeyTileBytes + kScaleTileBytes);
    ptx::tma_load_3d(key_tiles + stage * kKeyTileBytes, &key_map, 0, 0, id, &full[stage]);
    ptx::bulk_load(
        fixed.scale_tiles[stage], args.cache.page(id) + kScalesOffset, kScaleTileBytes, &full[stage]);
  };
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  const auto for_first_pages = [&](auto visit) {
    const int page = thread * kWarpgroups + warpgroup;
    if (thread < stages / kWarpgroups && page < plan.pages) visit(page);
  };
  if constexpr (kRoutes) {
    for_first_pages([&](int page) { fixed.first_ids[page] = id_of(page, chunks); });
  } else {
    for_first_pages([&](int page) { load_page(page, id_of(page, chunks)); });
  }

  const auto make_selection = [&](int zero) {
    return Selection(args.exchange, (&fixed.selection)[zero], reinterpret_cast<uint64_t*>(scratch + zero), pool + zero);
  };
  bool prepares = false;
#pragma unroll 1
  for (int number = 0; number < plan.chunks; ++number) {
    const Chunk& chunk = chunks[number];
    if (chunk.ranks == 1 || chunk.rank > 0) continue;
    const int keys = chunk.item_pages * kPageTokens;
    make_selection(0).prepare(
        chunk.slot, chunk.rows, chunk.first_chunk, chunk.ranks, chunk.is_short ? keys : 0,
        kRoutes ? Router::partial_words(keys) : 0);
    prepares = true;
  }
  if (prepares) {
    __syncthreads();
#pragma unroll 1
    for (int number = 0; number < plan.chunks; ++number) {
      const Chunk& chunk = chunks[number];
      if (chunk.ranks > 1 && chunk.rank == 0) make_selection(0).publish_prepared(chunk.slot, chunk.rows);
    }
  }
  const int key_of_thread = thread / 32 * 16 + thread % 32 / 4;
  const int row_of_lane = Layout::row_of_lane();
  while (true) {
    // not a copy, and its address is no invariant: registers are short
    const Chunk& chunk = reinterpret_cast<Chunk*>(key_tiles + ptx::opaque(stages) * kKeyTileBytes)[plan.number];
    const auto rows = [&] { return Layout::kRows == 1 ? 1 : chunk.rows; };
    const auto start_loads = [&] {  // after the first means, as they are needed first
      if (plan.number == 0) for_first_pages([&](int page) { load_page(page, fixed.first_ids[page]); });
    };
    const auto await = [&] {
      if (chunk.ranks > 1) make_selection(0).await_prepared(chunk.slot, rows());
    };
    if constexpr (kRoutes) {
      Router router(
          args.route, args.cache, args.rows, args.queries, args.exchange, reinterpret_cast<char*>(scratch));
      router.route(chunk, fixed.routed_heads, kHeads, start_loads, await);
      __syncthreads();
    }
    // routing needs the registers: the compiler must not see that addresses are the same for every chunk
    Selection selection = make_selection(ptx::opaque(0));
    const auto queries = [&] {
      QueryHeads from = args.queries.from_row(chunk.row);
      if constexpr (kRoutes) {
        from.heads = fixed.routed_heads;
        from.heads_stride = kHeads;
        from.count = args.route.active_heads;
      }
      return from;
    };
    // the warpgroup's first page in the chunk
    int page = chunk.begin + (warpgroup - chunk.begin & (kWarpgroups - 1));
    const int lap = quotient(page, stages);
    int stage = page - lap * stages;
    uint32_t parity = lap & 1;
    // the warpgroup's first warp holds the ids of the pages that get its stages next, a lane each
    int refills = 0;
    const auto load_ids = [&](int later) {
      const int refill = page + stages + kWarpgroups * (later + thread);
      return refill < plan.pages ? id_of(refill, &chunk) : 0;
    };
    int refill_ids = thread < 32 ? load_ids(0) : 0;
    store_query<kHeads>(fixed.query, queries(), rows());
    const bool has_result = Layout::has_result(rows());
    const int pages_before = chunk.first_page - chunk.begin;  // of the row, before the CTA's page 0
    // counted from the CTA's page 0
    const int visible = has_result ? args.rows.visible[chunk.row + row_of_lane] - pages_before * kPageTokens : 0;

    const bool counts = rows() == 1;
    if (threadIdx.x == 0) fixed.room = room_of(args, chunk, rows());
    if (threadIdx.x < Layout::kRows) fixed.parts[threadIdx.x].floor = 1;
    const Room& room = fixed.room;
    const auto positions_of = [&](int row) { return pool + row * room.row_words; };
    const auto keys_of = [&](int row) { return pool + row * room.row_words + room.kept_words; };
    if (counts) selection.clear();
    __syncthreads();
    const auto next_keys = [&] { return pool + room.next; };
    const auto next_positions = [&] { return pool + room.next + room.most_kept; };
    uint32_t* my_keys = keys_of(row_of_lane);

    const auto end = [&] { return chunk.begin + chunk.pages; };
    int held = 0;  // keys of each row kept from earlier rounds
    for (int round_first = chunk.begin;;) {
      const int round_last = min(end(), round_first + (room.capacity - held) / kPageTokens);
      float gate[Layout::kHeadsPerLane];  // anew in every round, as a selection needs the registers
      load_gates<kHeads>(gate, queries(), rows());
      const uint64_t tiles = ptx::swizzled_descriptor(key_tiles), operand = ptx::swizzled_descriptor(fixed.query);
      uint32_t* new_keys = my_keys + held - round_first * kPageTokens + key_of_thread;
      for (; page < round_last; page += kWarpgroups) {
        const auto* scales = reinterpret_cast<const float*>(fixed.scale_tiles[stage]);
        float d[Layout::kColumns / 2];
        ptx::mbarrier_wait(&full[stage], parity);
        start_tile<kHeads>(d, ptx::descriptor_after(tiles, stage * (kKeyTileBytes / 16)), operand);
        const float scale[2] = {scales[key_of_thread], scales[key_of_thread + 8]};
        const uint32_t floor = fixed.parts[0].floor;  // not kept, as registers are short
        ptx::wgmma_wait<0>();
        ptx::pin_registers(d);
        __syncwarp();
        ptx::mbarrier_arrive_warp(&empty[stage], thread % 32);
        if (thread < 32 && page + stages < plan.pages) {
          const int id = __shfl_sync(~0u, refill_ids, refills % 32);
          if (thread == 0) {
            ptx::mbarrier_wait(&empty[stage], parity);
            load_page(stage, id);
          }
          if (++refills % 16 == 0 && (thread & 16) == (refills - 1 & 16)) {  // the half that has been used
            refill_ids = load_ids(32 - (refills - 1 & 31));
          }
        }
        stage += kWarpgroups;
        if (stage >= stages) {
          stage = warpgroup;
          parity ^= 1;
        }

        float sum[2];
        sum_heads<kHeads>(sum, d, gate);
        if (has_result) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int place = page * kPageTokens + 8 * half;
            uint32_t key = order_key(sum[half] * scale[half]);
            key = place + key_of_thread < visible ? key : 0;
            new_keys[place] = key;
            if (counts) selection.count(key, floor);
          }
        }
      }
      const int filled = held + (round_last - round_first) * kPageTokens;
      const int padded = (filled + 3) / 4 * 4;
      const int first_position = (round_first - chunk.begin + chunk.first_page) * kPageTokens;
      if (threadIdx.x < rows()) {
        RowPart& part = fixed.parts[threadIdx.x];
        uint32_t* keys = keys_of(threadIdx.x);
#pragma unroll 1
        for (int i = filled; i < padded; ++i) keys[i] = 0;
        part.keys = static_cast<int>(keys - pool);
        part.positions = static_cast<int>(positions_of(threadIdx.x) - pool);
        part.count = padded;
        part.listed_positions = held;
        part.later_offset = first_position - held;
        part.out = args.out + (chunk.row + threadIdx.x) * args.out_stride;
        part.slot = chunk.slot + threadIdx.x;
        part.first_chunk = chunk.first_chunk;
        part.rank = chunk.rank;
        part.ranks = chunk.ranks;
        part.row_in_item = threadIdx.x;
      }
      __syncthreads();
      const bool is_last = round_last == end();
      if (!kRoutes && is_last && chunk.ranks > 1) {  // routing has needed the exchange before
        await();
        __syncthreads();
      }
      const int next_position = first_position + filled - held;  // what no key has, and none is behind it
      if (!is_last && counts) {
        const int kept = selection.drop_low(fixed.parts[0], k, room.most_kept, next_keys(), next_positions());
        if (kept <= room.most_kept) {
          for (int i = kept + threadIdx.x; i < room.most_kept; i += kThreads) {
            keys_of(0)[i] = 0;
            positions_of(0)[i] = next_position;
          }
          held = room.most_kept;
          round_first = round_last;
          __syncthreads();
          continue;
        }
      }
      const bool enters = is_last && chunk.ranks > 1 && !chunk.is_short;
      if (chunk.is_short) {
        for (int row = 0; row < rows(); ++row) selection.publish_keys(fixed.parts[row], first_position);
      }
      for (int row = 0; row < rows(); ++row) {
        RowPart& part = fixed.parts[row];
        uint32_t left_before = 0;
        if (chunk.is_short) {
          if (!counts) {
            selection.clear();
            __syncthreads();
          }
          const int all = chunk.item_pages * kPageTokens;
          uint32_t* all_keys = pool + rows() * room.row_words;
          selection.collect_keys(part, first_position, all, counts, all_keys);
          __syncthreads();
          if (threadIdx.x == 0) {
            left_before = selection.leave(part);
            part.keys = static_cast<int>(all_keys - pool);
            part.count = all;
            part.later_offset = 0;
          }
        } else if (!counts) {
          selection.count_all(part);
          __syncthreads();
        }
        if (enters) {
          selection.enter(part, k);
          continue;
        }
        // of a row whose keys have been collected, this rank writes what it scored
        const int first = chunk.is_short ? first_position : 0;
        const uint32_t own = chunk.is_short ? room.row_words : ~0u;
        const int selected = selection.select(part, k, [&](int place, int i) {
          if (static_cast<uint32_t>(i - first) >= own) return;
          const uint32_t position = selection.position(part, i);
          if (is_last) {
            part.out[place] = static_cast<int32_t>(position);
          } else {
            next_keys()[place] = selection.key(part, i);
            next_positions()[place] = position;
          }
        });
        __syncthreads();
        if (chunk.is_short && threadIdx.x == 0) selection.has_left(part, left_before);
        if (is_last) continue;
        for (int i = threadIdx.x; i < room.most_kept; i += kThreads) {
          const bool is_key = i < selected;
          keys_of(row)[i] = is_key ? next_keys()[i] : 0;
          positions_of(row)[i] = is_key ? next_positions()[i] : next_position;
        }
        if (counts) {
          selection.clear();
          __syncthreads();
          for (int i = threadIdx.x; i < selected; i += kThreads) selection.count(keys_of(row)[i]);
        }
        __syncthreads();
      }
      for (bool any = enters; any;) {
        any = false;
        for (int row = 0; row < rows(); ++row) {
          if (!fixed.parts[row].active) continue;
          selection.advance(fixed.parts[row], counts);
          any = true;
        }
      }
      if (is_last) break;
      held = room.most_kept;
      round_first = round_last;
    }
    if (plan.chunks == 1) break;
    __syncthreads();
    if (threadIdx.x == 0) ++plan.number;
    __syncthreads();
    if (plan.number == plan.chunks) break;
  }
}

// ---------------------------------------------------------------- launch

int64_t align(int64_t bytes) { return (bytes + 15) / 16 * 16; }

/// Where the exchange lies in the workspace, and how long that is. A split item has fewer pages than the others of at
/// least its number of CTAs, so there are fewer of them than CTAs.
struct Workspace {
  int64_t slots, rows, buffers, counts, partials, bytes;

  Workspace(int64_t row_count, int64_t ctas, int64_t partial_words) {
    slots = std::min(row_count, kRowsPerItem * ctas);
    rows = 0;
    buffers = align(rows + slots * static_cast<int64_t>(sizeof(RowShared)));
    counts = align(buffers + slots * static_cast<int64_t>(sizeof(RowBuffers)));
    partials = align(counts + (row_count + ctas) * kRowsPerItem * 2 * 4);
    bytes = align(partials + slots * partial_words * 4);
  }
};

int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return count;
}

template <int kHeads, bool kRoutes>
void launch(SelectArguments args, int requests, int max_visible, cudaStream_t stream) {
  using Layout = HeadLayout<kHeads>;
  const int row_count = args.rows.count;
  const int row_pages = std::max(1, (max_visible + kPageTokens - 1) / kPageTokens);
  const int64_t useful_ctas = static_cast<int64_t>(row_count) * ((row_pages + kFewestPages - 1) / kFewestPages);
  const int ctas = static_cast<int>(std::min<int64_t>(multiprocessors(), useful_ctas));

  const int other_bytes = static_cast<int>(sizeof(Fixed<kHeads>)) + kScratchWords * 4 +
                          (row_count / ctas + 2) * static_cast<int>(sizeof(Chunk));
  const auto pool_with = [&](int stages) {
    return (kMaxSharedBytes - other_bytes - stages * kKeyTileBytes) / kTileAlignment * kTileAlignment / 4;
  };
  const auto can_route = [&](int stages, int segments_at_once) {
    return !kRoutes || Router::lay_out(args.route, segments_at_once, Layout::kRows) <=
                           4 * (kScratchWords + pool_with(stages));
  };
  // room for the kept keys of a chunk's rows, and for a fair number of new ones
  constexpr int kFewestNewKeys = 32 * kPageTokens;
  const int best_kept = (args.k + 3) / 4 * 4;
  const auto can_hold = [&](int stages, int rows) {
    const int most_kept = best_kept + (rows == 1 ? kMoreKept : 0);
    const int next_words = 2 * most_kept <= kScratchWords ? 0 : 2 * most_kept;
    return (pool_with(stages) - next_words) / rows / kPageTokens * kPageTokens >= 2 * most_kept + kFewestNewKeys;
  };
  // As many stages as cover the latency of memory, unless with fewer the keys fit at once. More cover a wait, too.
  const int likely_rows = std::min(Layout::kRows, (row_count + requests - 1) / requests);
  const int items = (row_count + likely_rows - 1) / likely_rows;
  const int likely_ranks = std::max(1, ctas / items);
  const int64_t likely_words =
      static_cast<int64_t>((row_pages + likely_ranks - 1) / likely_ranks) * kPageTokens * likely_rows;
  args.stages = kManyStages;
  if (pool_with(kMostStages) >= likely_words) {
    args.stages = kMostStages;
  } else if (pool_with(kManyStages) < likely_words && pool_with(kGoodStages) >= likely_words) {
    args.stages = kGoodStages;
  }
  const auto suffices = [&](int stages) { return can_hold(stages, 1) && can_route(stages, 1); };
  while (args.stages > kWarpgroups && !suffices(args.stages)) args.stages -= kWarpgroups;
  STD_TORCH_CHECK(
      suffices(args.stages), "select_tokens: k = ", args.k, " is too large for this kernel, choose at most 8192");
  int segments_at_once = std::max(1, kPooledBlocks / std::max(1, args.route.segment_blocks));
  while (!can_route(args.stages, segments_at_once)) --segments_at_once;
  args.rows_per_item = Layout::kRows;
  while (!can_hold(args.stages, args.rows_per_item)) --args.rows_per_item;
  args.pool_words = pool_with(args.stages);

  const auto kernel = decode_select_kernel<kHeads, kRoutes>;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes), "select_tokens");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kMaxSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;  // its CTAs wait for one another
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, key_page_map(args.cache), args), "select_tokens");
}

/// No two launches have the same one, and what lies in a workspace by chance is hardly ever one.
uint64_t next_signature() {
  static std::atomic<uint64_t> launches{
      static_cast<uint64_t>(std::random_device{}()) << 32 | static_cast<uint64_t>(std::random_device{}())};
  uint64_t value = launches += 0x9E3779B97F4A7C15ull;
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9ull;
  value = (value ^ value >> 27) * 0x94D049BB133111EBull;
  return (value ^ value >> 31) | 1;
}

int64_t partial_words_of(int64_t max_visible) {
  return Router::partial_words(static_cast<int>(std::min<int64_t>(max_visible, 1 << 30)));
}

int64_t decode_workspace_bytes(int64_t row_count) { return Workspace(row_count, multiprocessors(), 0).bytes; }

int64_t decode_route_workspace_bytes(int64_t row_count, int64_t max_visible) {
  return Workspace(row_count, multiprocessors(), partial_words_of(max_visible)).bytes;
}

/// What both operators check and fill in.
SelectArguments arguments_of(
    const Tensor& q, const Tensor& gates, const Tensor& index_cache, bool needs_means, const Tensor& block_table,
    const Tensor& request, const Tensor& visible, int64_t k, const Tensor& out, int64_t visible_from,
    int64_t visible_to, const Tensor& workspace, int64_t partial_words) {
  SelectArguments args = {};
  args.cache = index_cache_of(index_cache, needs_means);
  args.rows = rows_of(block_table, request, visible);
  args.queries = query_heads(q, gates, args.rows);
  check_tensor(out, "out", ScalarType::Int, 2);
  STD_TORCH_CHECK(
      out.size(0) == args.rows.count && k >= 1 && out.size(1) >= k, "out must be [", args.rows.count, ", at least k = ",
      k, "]");
  STD_TORCH_CHECK(
      args.rows.count <= kMaxRows, "decode_select takes at most ", kMaxRows, " rows, not ", args.rows.count,
      ": use prefill_select");
  const Workspace layout(args.rows.count, multiprocessors(), partial_words);
  check_tensor(workspace, "workspace", ScalarType::Byte, 1);
  STD_TORCH_CHECK(
      workspace.size(0) >= layout.bytes && reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16 == 0,
      "workspace: ", layout.bytes, " bytes at a multiple of 16 are needed, it has ", workspace.size(0));
  auto* base = static_cast<uint8_t*>(workspace.data_ptr());
  args.exchange.rows = reinterpret_cast<RowShared*>(base + layout.rows);
  args.exchange.buffers = reinterpret_cast<RowBuffers*>(base + layout.buffers);
  args.exchange.counts = reinterpret_cast<uint32_t (*)[kRowsPerItem][2]>(base + layout.counts);
  args.exchange.partials = reinterpret_cast<uint32_t*>(base + layout.partials);
  args.exchange.partial_words = static_cast<int>(partial_words);
  args.exchange.signature = next_signature();
  args.row_is_slot = args.rows.count <= layout.slots;
  args.k = static_cast<int>(k);
  args.visible_from = static_cast<int>(visible_from);
  args.visible_to = static_cast<int>(std::min<int64_t>(visible_to, INT32_MAX));
  args.out = static_cast<int32_t*>(out.data_ptr());
  args.out_stride = out.stride(0);
  return args;
}

template <bool kRoutes>
void launch_heads(const SelectArguments& args, int heads, int64_t requests, int64_t max_visible, cudaStream_t stream) {
  STD_TORCH_CHECK(
      max_visible <= kMostVisible, "decode_select: rows may see at most ", kMostVisible, " keys, not ", max_visible);
  const auto launch_some = heads <= 8    ? launch<8, kRoutes>
                           : heads <= 16 ? launch<16, kRoutes>
                           : heads <= 32 ? launch<32, kRoutes>
                                         : launch<64, kRoutes>;
  launch_some(args, static_cast<int>(requests), static_cast<int>(max_visible), stream);
}

void decode_select(
    Tensor q, Tensor gates, std::optional<Tensor> heads, Tensor index_cache, Tensor block_table, Tensor request,
    Tensor visible, int64_t max_visible, int64_t k, Tensor out, int64_t visible_from, int64_t visible_to,
    Tensor workspace) {
  SelectArguments args = arguments_of(
      q, gates, index_cache, false, block_table, request, visible, k, out, visible_from, visible_to, workspace, 0);
  if (heads.has_value()) {
    check_tensor(*heads, "heads", ScalarType::Int, 2);
    STD_TORCH_CHECK(
        heads->size(0) == args.rows.count && heads->size(1) >= 1 && heads->size(1) <= args.queries.count,
        "heads must be [", args.rows.count, ", h] with h from 1 to ", args.queries.count);
    args.queries.heads = static_cast<const int32_t*>(heads->data_ptr());
    args.queries.heads_stride = heads->stride(0);
    args.queries.count = static_cast<int>(heads->size(1));
  }
  if (args.rows.count == 0) return;
  launch_heads<false>(args, args.queries.count, block_table.size(0), max_visible, current_stream(q));
}

void decode_route_select(
    Tensor q, Tensor gates, Tensor index_cache, Tensor block_table, Tensor request, Tensor visible,
    int64_t max_visible, int64_t active_heads, int64_t pool_block, int64_t k, Tensor out, int64_t visible_from,
    Tensor workspace, std::optional<Tensor> routed) {
  SelectArguments args = arguments_of(
      q, gates, index_cache, true, block_table, request, visible, k, out, visible_from, INT32_MAX, workspace,
      partial_words_of(max_visible));
  STD_TORCH_CHECK(
      active_heads >= 1 && active_heads <= args.queries.count, "active_heads must be 1 to ", args.queries.count,
      ", it is ", active_heads);
  STD_TORCH_CHECK(
      pool_block >= kPageTokens && pool_block % kPageTokens == 0, "pool_block must be a multiple of ", kPageTokens,
      ", it is ", pool_block);
  args.route.heads = args.queries.count;
  args.route.active_heads = static_cast<int>(active_heads);
  args.route.pool_block = static_cast<int>(pool_block);
  args.route.segment_blocks = segment_blocks_of(args.route.pool_block);
  args.route.pages_per_block = args.route.pool_block / kPageTokens;
  args.route.head_groups = ceil_div(args.route.heads, 16);
  if (routed.has_value()) {
    check_tensor(*routed, "routed", ScalarType::Int, 2);
    STD_TORCH_CHECK(
        routed->size(0) == args.rows.count && routed->size(1) == active_heads && routed->is_contiguous(),
        "routed must be contiguous [", args.rows.count, ", ", active_heads, "]");
    args.route.routed = static_cast<int32_t*>(routed->data_ptr());
  }
  if (args.rows.count == 0) return;
  launch_heads<true>(args, args.route.active_heads, block_table.size(0), max_visible, current_stream(q));
}

}  // namespace
}  // namespace misa

STABLE_TORCH_LIBRARY_FRAGMENT(misa_vllm, m) {
  m.def("decode_workspace_bytes(int rows) -> int");
  m.def("decode_route_workspace_bytes(int rows, int max_visible) -> int");
  m.def(
      "decode_select(Tensor q, Tensor gates, Tensor? heads, Tensor index_cache, Tensor block_table, Tensor request, "
      "Tensor visible, int max_visible, int k, Tensor(a!) out, int visible_from, int visible_to, "
      "Tensor(b!) workspace) -> ()");
  m.def(
      "decode_route_select(Tensor q, Tensor gates, Tensor index_cache, Tensor block_table, Tensor request, "
      "Tensor visible, int max_visible, int active_heads, int pool_block, int k, Tensor(a!) out, int visible_from, "
      "Tensor(b!) workspace, Tensor(c!)? routed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CompositeExplicitAutograd, m) {
  m.impl("decode_workspace_bytes", TORCH_BOX(&misa::decode_workspace_bytes));
  m.impl("decode_route_workspace_bytes", TORCH_BOX(&misa::decode_route_workspace_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CUDA, m) {
  m.impl("decode_select", TORCH_BOX(&misa::decode_select));
  m.impl("decode_route_select", TORCH_BOX(&misa::decode_route_select));
}
