// Scores of prefill rows on the FP8 tensor cores of Hopper, consumed on chip.
//
// A block holds a tile of query rows and streams key pages of 64 through shared memory. Keys are the 64 rows of a
// wgmma and (query, head) pairs its columns, permuted so that all heads of a query lie in columns of one thread: the
// sum over heads is private to a thread, and its order (ascending head) never depends on the tile.
//
//   warps 0..3, 4..7   two consumer warpgroups, 256 columns each, in two halves with accumulators of their own: while
//                      one half is summed on the CUDA cores, the tensor cores work on the other
//   warp 8             producer: pages by the copy engine through a ring of mbarriers
//                      (of samples: warps 8..11, key by key)
//   warps 9..11        move scores that passed their row's threshold from queues in shared memory to the rows' lists,
//                      so that the consumers never wait for an atomic or for global memory
//
// NOTES.md beside this file has the arithmetic behind the shapes.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"
#include "common/select.cuh"
#include "paged_rows.cuh"

namespace misa::prefill {

constexpr int kKeyBytes = kPageTokens * kHeadDim;
constexpr int kScaleBytes = kPageTokens * 4;
constexpr int kStages = 6;
constexpr int kGroups = 2;
constexpr int kGroupThreads = 128;
constexpr int kConsumerThreads = kGroups * kGroupThreads;
constexpr int kConsumerWarps = kConsumerThreads / 32;
constexpr int kWorkingThreads = kConsumerThreads + 32;  // consumers and the producer warp
constexpr int kThreads = kConsumerThreads + kGroupThreads;
constexpr int kCollectorWarps = (kThreads - kWorkingThreads) / 32;
// Of 168 for each thread: the queues' movers need theirs, without them the consumers can have more
constexpr int kConsumerRegisters = 232;
constexpr int kProducerRegisters = 40;
constexpr int kSampleConsumerRegisters = 224;
constexpr int kSampleProducerRegisters = 56;
constexpr int kColumns = 256;  // of a group
constexpr int kHalfColumns = kColumns / 2;
// A row that takes no part appends from here, past the end of any list.
constexpr uint32_t kClosedList = 0x80000000u;
// Of a queued entry's tag; the bits above it hold which of its thread's queries the score is of.
constexpr int kPositionBits = 28;
constexpr int kMostKeys = 1 << kPositionBits;
constexpr uint32_t kInvalidSample = 0xFFFFFFFFu;
constexpr uint32_t kNoMoreQueues = 0xFFFFFFFFu;
constexpr int kMovedTogether = 4;  // entries of a queue
constexpr int kMaxLaunchRows = 4096;
// Limits that the collector warps read are a group's. Where every lane arrives at barriers, for racecheck, each consumer
// warp has its own: the tool counts for an arrival only what the arriving warp has written itself.
constexpr bool kOwnLimits = ptx::kArrivalsOfWarp > 1;
constexpr int kLimitOwners = kOwnLimits ? kConsumerWarps : kGroups;

enum class Mode {
  kSample,   // scores of evenly spread keys, for a first threshold
  kCollect,  // keys at or above the row's threshold, appended to the row's list
  kDense,    // all scores, for rows whose list cannot decide
};

// How the positions of a split's keys, which are every splits-th page, fit into 16 bits, so that they are cheap to write:
// for splits = 2^shift * odd, bits 6 to 15 are those of page >> shift. Which multiple of 1024 is missing there follows
// from the remainder of the page by `odd`, which the split tells, if there are fewer than 1024 * splits pages.
struct Splits {
  uint32_t shift, odd;
  uint32_t reciprocal;  // 2^16 / odd, rounded up: exact for dividends below 2100
  uint32_t inverse;     // of 1024, modulo odd

  __device__ __forceinline__ uint32_t remainder(uint32_t value) const { return value - (value * reciprocal >> 16) * odd; }

  __device__ __forceinline__ uint16_t pack(uint32_t position) const {
    return static_cast<uint16_t>((position >> shift & ~(kPageTokens - 1u)) | position % kPageTokens);
  }

  // Where odd is 1
  __device__ __forceinline__ uint32_t unpack_even(uint32_t packed, uint32_t split) const {
    return (packed & ~(kPageTokens - 1u)) << shift | split * kPageTokens | packed % kPageTokens;
  }

  __device__ __forceinline__ uint32_t unpack(uint32_t packed, uint32_t split) const {
    const uint32_t low = packed / kPageTokens;
    const uint32_t missing = remainder(((split >> shift) + odd - remainder(low)) * inverse);
    const uint32_t page = (low + 1024 * missing) << shift | (split & ((1u << shift) - 1));
    return page * kPageTokens + packed % kPageTokens;
  }
};

struct Params {
  const uint8_t* q;  // [M, H, 128] e4m3; strides in bytes
  int64_t q_row_stride;
  int64_t q_head_stride;
  const float* gates;  // [M, H]
  int64_t gates_row_stride;
  const int32_t* heads;  // [M, heads_per_row], or null: heads 0 .. heads_per_row - 1
  int64_t heads_row_stride;
  int heads_per_row;

  IndexCache cache;
  Rows rows;

  // This launch has rows row_begin .. row_begin + num_rows; "slot" counts from row_begin.
  int row_begin;
  int num_rows;
  // Scored: scored_from <= visible < scored_to. Written at all: written_from <= visible < scored_to.
  int written_from;
  int scored_from;
  int scored_to;
  int k;
  int splits;  // blocks that share the keys of one tile: block s takes pages s, s + splits, ...

  float* threshold;    // [num_rows]
  int32_t* last_tie;   // [num_rows]: of keys that equal the threshold, those up to this sample's position are kept
  uint32_t* counts;    // [num_rows, splits]; more than list_capacity: the list overflowed
  uint32_t* list_scores;     // [num_rows, splits, list_capacity], bits of the scores
  uint16_t* list_positions;  // of the same shape, see Splits
  int list_capacity;         // a multiple of 16
  Splits in_splits;
  int split_step;      // the largest power of 2 below splits, or 1
  int keep_all;        // rows with at most so many visible keys need no threshold
  float* samples;      // [num_rows, num_samples]
  int num_samples;     // a multiple of 64; 0: nothing is sampled

  int32_t* undecided;         // [undecided_count] rows, or -1
  uint32_t* undecided_count;  // [1]
  uint32_t* arrived;          // [1] blocks that reached a barrier of the grid
  float* dense;               // [dense_rows, dense_stride]
  uint32_t dense_stride;  // dense_rows * dense_stride is below 2^32
  int dense_rows;

  int32_t* out;
  int64_t out_row_stride;
};

template <int kHeads>
struct Tile {
  static_assert(kHeads == 4 || kHeads == 8 || kHeads == 16 || kHeads == 32 || kHeads == 64);
  static constexpr int kGroupQueries = kColumns / kHeads;
  static constexpr int kQueries = kGroups * kGroupQueries;
  // A thread's columns are 64 of a group's 256, 32 of each half's 128
  static constexpr int kThreadQueries = 64 / kHeads;
  // Scores above the threshold wait in a queue of the thread's own. A warp hands its queues over once one of them
  // holds kFullQueue, which is looked at after every kCheckedQueries queries: those add at most 2 each.
  static constexpr int kFullQueue = 8;
  static constexpr int kCheckedQueries = kThreadQueries < 8 ? kThreadQueries : 8;
  static constexpr int kMostQueued = kFullQueue - 1 + 2 * kCheckedQueries;
  static constexpr int kQueue = (kMostQueued + kMovedTogether - 1) / kMovedTogether * kMovedTogether;
};

template <int kHeads>
struct Shared {
  using T = Tile<kHeads>;
  alignas(1024) uint8_t q[kGroups][kColumns * kHeadDim];
  alignas(1024) uint8_t keys[kStages][kKeyBytes];
  alignas(128) float scales[kStages][kPageTokens];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  // Of each row of the tile; row -1 takes no part. Rows of one request share the leader, its lowest row.
  int32_t row[T::kQueries];
  int32_t request[T::kQueries];
  int32_t visible[T::kQueries];
  int32_t leader[T::kQueries];
  int32_t leader_visible[T::kQueries];
  uint32_t leaders[(T::kQueries + 31) / 32];
  // Of each row, ordered so that the rows of one thread are neighbours
  // Each warp's own thresholds of its group's rows; from tie_limit on, keys have to pass the next larger number.
  alignas(16) float threshold[kConsumerWarps][T::kGroupQueries];
  float next_threshold[T::kQueries];
  int32_t tie_limit[T::kQueries];
  // Places count through all lists
  uint32_t next_place[T::kQueries];
  uint32_t list_end[kLimitOwners * T::kGroupQueries];
  int32_t limit[kLimitOwners * T::kGroupQueries];
  alignas(16) float gates[kGroups][4][64];
  // Two queues of each thread, filled in turn, of (score bits, query << kPositionBits | position). Those of a warp
  // change hands together. Selections use the place when nothing is collected.
  union {
    uint2 queue[2][T::kQueue][kConsumerThreads];
    SelectScratch scratch;
  };
  uint32_t queue_length[2][kConsumerThreads];
  uint64_t handed[2][kConsumerWarps];
  uint64_t emptied[2][kConsumerWarps];
  uint32_t queues_handed[kConsumerWarps];   // the consumers' count
  uint32_t queues_emptied[kConsumerWarps];  // the collector warps' own
  uint32_t unused_count[32];
  int32_t item;  // of the consumers
};

// The copy ring's position; producer and consumers step through it alike.
struct RingCursor {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Sample x of num_samples over `visible` keys: one key of each of as many equal strata, at a hashed place in it so
// that no period of the text can hide from the sample. `step` is visible / num_samples as 32.32 fixed point.
__device__ __forceinline__ uint64_t sample_step(int visible, int num_samples) {
  return (static_cast<uint64_t>(visible) << 32) / static_cast<uint32_t>(num_samples);
}

__device__ __forceinline__ int sample_position(int x, uint64_t step) {
  const uint32_t from = static_cast<uint32_t>((x * step) >> 32);
  const uint32_t to = static_cast<uint32_t>(((x + 1) * step) >> 32);
  const uint32_t hash = (static_cast<uint32_t>(x) * 0x9E3779B1u) ^ (static_cast<uint32_t>(x) * 0x85EBCA6Bu >> 13);
  return static_cast<int>(from + __umulhi(hash, to - from));
}

// How many samples lie before the position `limit`.
__device__ __forceinline__ int samples_below(int limit, uint64_t step, int num_samples) {
  int x = static_cast<int>(min(static_cast<uint64_t>(num_samples), (static_cast<uint64_t>(limit) << 32) / step));
  while (x < num_samples && sample_position(x, step) < limit) ++x;
  while (x > 0 && sample_position(x - 1, step) >= limit) --x;
  return x;
}

// Neighbouring words (uint32_t or float), in as few loads as their number allows.
template <typename Word, int kCount>
__device__ __forceinline__ void load_words(Word (&to)[kCount], const Word* from) {
  using Four = std::conditional_t<std::is_same_v<Word, float>, float4, uint4>;
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const Four four = *reinterpret_cast<const Four*>(from + i);
      to[i] = four.x;
      to[i + 1] = four.y;
      to[i + 2] = four.z;
      to[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

// The least number that is larger; an infinity or NaN itself.
__device__ __forceinline__ float next_larger(float value) {
  return isfinite(value) ? float_of_order_key(order_key(value) + 1) : value;
}

// Pages of keys or samples, of which block `split` takes every splits-th.
template <Mode kMode>
__device__ __forceinline__ int pages_of(const Params& p, int visible) {
  return kMode == Mode::kSample ? p.num_samples / kPageTokens : (visible + kPageTokens - 1) / kPageTokens;
}

// The least leader from `from` on, or the tile's number of rows.
template <int kHeads>
__device__ __forceinline__ int next_leader(const Shared<kHeads>& sh, int from) {
  constexpr int kQueries = Tile<kHeads>::kQueries;
  while (from < kQueries) {
    const uint32_t bits = sh.leaders[from / 32] >> from % 32;
    if (bits != 0) return from + __ffs(bits) - 1;
    from = (from / 32 + 1) * 32;
  }
  return kQueries;
}

// Appends (score, tag) to the thread's queue unless the score is below the threshold; a NaN is not below anything.
// Predicated, for in about half of all warps some lane appends; the queue's end is a chain of single additions.
__device__ __forceinline__ void append(uint32_t& queue_end, float score, float threshold, uint32_t tag) {
  ptx::append_if_not_less<kConsumerThreads * static_cast<uint32_t>(sizeof(uint2))>(queue_end, score, threshold, tag);
}

// The queue that a thread fills, one of its two.
template <int kHeads>
struct Queue {
  using T = Tile<kHeads>;
  static constexpr uint32_t kStep = kConsumerThreads * sizeof(uint2);

  uint32_t end;
  uint32_t full;

  __device__ __forceinline__ explicit Queue(Shared<kHeads>& sh) { start(sh, sh.queues_handed[threadIdx.x / 32]); }

  __device__ __forceinline__ void start(Shared<kHeads>& sh, uint32_t handed) {
    end = ptx::smem_address(&sh.queue[handed % 2][0][threadIdx.x]);
    full = end + T::kFullQueue * kStep;
  }

  __device__ __forceinline__ void hand_over_if_full(Shared<kHeads>& sh) {
    if (__any_sync(0xFFFFFFFFu, end >= full)) hand_over(sh, (end - full + T::kFullQueue * kStep) / kStep);
  }

  __device__ __forceinline__ void hand_over_rest(Shared<kHeads>& sh) {
    hand_over(sh, (end - full + T::kFullQueue * kStep) / kStep);
    // all are free when the one handed over last is
    const uint32_t last = sh.queues_handed[threadIdx.x / 32] - 1;
    ptx::mbarrier_wait(&sh.emptied[last % 2][threadIdx.x / 32], last / 2 % 2);
  }

  __device__ __forceinline__ void hand_over(Shared<kHeads>& sh, uint32_t length) {
    const int warp = threadIdx.x / 32;
    const uint32_t handed = sh.queues_handed[warp];
    sh.queue_length[handed % 2][threadIdx.x] = length;
    __syncwarp();
    ptx::mbarrier_arrive_warp(&sh.handed[handed % 2][warp], threadIdx.x % 32);
    if (threadIdx.x % 32 == 0) sh.queues_handed[warp] = handed + 1;
    __syncwarp();
    // the other queue, handed over before this one, must be free
    ptx::mbarrier_wait(&sh.emptied[(handed + 1) % 2][warp], (handed + 1) / 2 % 2 ^ 1);
    start(sh, handed + 1);
  }
};

// Moves one queue of each thread of a consumer warp to the lists of their rows. False if there are no more queues.
template <int kHeads>
__device__ __forceinline__ bool empty_queues(const Params& p, int consumer_warp, int which, Shared<kHeads>& sh) {
  using T = Tile<kHeads>;
  const int lane = ptx::opaque(static_cast<int>(threadIdx.x)) % 32, c = lane % 4;
  const int thread = consumer_warp * 32 + lane;
  const uint32_t length = sh.queue_length[which][thread];
  const uint32_t longest = __reduce_max_sync(0xFFFFFFFFu, length);
  if (longest == kNoMoreQueues) return false;
  const int first = thread / kGroupThreads * T::kGroupQueries + c * T::kThreadQueries;
  const uint2* queue = &sh.queue[which][0][thread];
  const int first_limit = kOwnLimits ? consumer_warp * T::kGroupQueries + c * T::kThreadQueries : first;
  auto query_of = [](uint32_t tag) { return (tag >> kPositionBits) % T::kThreadQueries; };
  auto position_of = [](uint32_t tag) { return tag % (1u << kPositionBits); };
#pragma unroll 1
  for (uint32_t begin = 0; begin < longest; begin += kMovedTogether) {
    // No branch between the loads: a queue's memory past its end holds anything, which names some row all the same
    uint32_t tag[kMovedTogether], place[kMovedTogether], taken = 0;
#pragma unroll
    for (int i = 0; i < kMovedTogether; ++i) tag[i] = queue[(begin + i) * kConsumerThreads].y;
#pragma unroll
    for (int i = 0; i < kMovedTogether; ++i) {
      const bool seen = position_of(tag[i]) < static_cast<uint32_t>(sh.limit[first_limit + query_of(tag[i])]);
      taken |= static_cast<uint32_t>(seen & (begin + i < length)) << i;
    }
    // Atomics are never predicated: not to branch around each, lanes without an entry count in a word of their own
#pragma unroll
    for (int i = 0; i < kMovedTogether; ++i) {
      place[i] = atomicAdd((taken >> i & 1) != 0 ? &sh.next_place[first + query_of(tag[i])] : &sh.unused_count[lane], 1u);
    }
    // Scores are loaded late, for lack of registers
#pragma unroll
    for (int i = 0; i < kMovedTogether; ++i) {
      const bool stores = (place[i] < sh.list_end[first_limit + query_of(tag[i])]) & ((taken >> i & 1) != 0);
      ptx::store_if(stores, p.list_positions + place[i], p.in_splits.pack(position_of(tag[i])));
      ptx::store_if(stores, p.list_scores + place[i], queue[(begin + i) * kConsumerThreads].x);
    }
  }
  return true;
}

// What the collector warps do until the consumers have handed over their last queues.
template <int kHeads>
__device__ __forceinline__ void empty_all_queues(const Params& p, Shared<kHeads>& sh) {
  int working;
  do {
    working = 0;
    bool idle = true;
#pragma unroll 1
    for (int warp = ptx::opaque(static_cast<int>(threadIdx.x)) / 32 - kWorkingThreads / 32; warp < kConsumerWarps;
         warp += kCollectorWarps) {
      const uint32_t emptied = sh.queues_emptied[warp];
      if (emptied == kNoMoreQueues) continue;
      ++working;
      // one decision of the whole warp: nothing promises that its lanes find the same
      const bool is_handed = ptx::mbarrier_test(&sh.handed[emptied % 2][warp], emptied / 2 % 2);
      if (!__all_sync(0xFFFFFFFFu, is_handed)) continue;
      const bool more = empty_queues(p, warp, emptied % 2, sh);
      __syncwarp();
      ptx::mbarrier_arrive_warp(&sh.emptied[emptied % 2][warp], threadIdx.x % 32);
      if (threadIdx.x % 32 == 0) sh.queues_emptied[warp] = more ? emptied + 1 : kNoMoreQueues;
      __syncwarp();
      idle = false;
    }
    if (idle) __nanosleep(50);
  } while (working > 0);
}

// One kGroupBarrier + g per group
enum Barrier { kItemBarrier = 1, kConsumerBarrier, kGroupBarrier };
static_assert(kGroupBarrier + kGroups <= 7, "7 is the barrier of selections");

template <Mode kMode>
__device__ __forceinline__ void sync_item() {
  ptx::named_barrier_sync<kItemBarrier, kMode == Mode::kSample ? kThreads : kWorkingThreads>();
}

__device__ __forceinline__ void sync_consumers() { ptx::named_barrier_sync<kConsumerBarrier, kConsumerThreads>(); }

__device__ __forceinline__ void sync_group(int group) {
  static_assert(kGroups == 2);
  if (group == 0) {
    ptx::named_barrier_sync<kGroupBarrier, kGroupThreads>();
  } else {
    ptx::named_barrier_sync<kGroupBarrier + 1, kGroupThreads>();
  }
}

// Fills the per-row part of `sh` for one tile. All consumers call it; `rows` maps slots to rows (null:
// slot + row_begin).
template <int kHeads>
__device__ __forceinline__ void load_rows(const Params& p, const int32_t* rows, int num_rows, int tile,
                                          Shared<kHeads>& sh) {
  constexpr int kQueries = Tile<kHeads>::kQueries;
  const int i = threadIdx.x;
  const int slot = tile * kQueries + i;
  int row = -1, request = 0, visible = 0;
  if (i < kQueries) {
    if (slot < num_rows) {
      row = rows != nullptr ? rows[slot] : p.row_begin + slot;
    }
    if (row >= 0) {
      visible = p.rows.visible[row];
      request = p.rows.request[row];
      if (visible < p.scored_from || visible >= p.scored_to) row = -1;
    }
    sh.row[i] = row;
    sh.request[i] = request;
    sh.visible[i] = row < 0 ? 0 : visible;
    sh.leader_visible[i] = 0;
  }
  if (i < (kQueries + 31) / 32) sh.leaders[i] = 0;
  sync_consumers();
  if (i < kQueries) {
    int leader = -1;
    if (row >= 0) {
      leader = 0;
      while (sh.row[leader] < 0 || sh.request[leader] != request) ++leader;
      atomicMax(&sh.leader_visible[leader], visible);
      if (leader == i) atomicOr(&sh.leaders[i / 32], 1u << (i % 32));
    }
    sh.leader[i] = leader;
  }
}

// Gathers the queries and gates of the group's columns; absent heads and rows get zeros, which add nothing.
template <int kHeads>
__device__ __forceinline__ void load_queries(const Params& p, int group, int thread, Shared<kHeads>& sh) {
  using T = Tile<kHeads>;
  constexpr int kChunks = kHeadDim / 16;
  constexpr int kColumnStep = kGroupThreads / kChunks;
  constexpr int kOwnColumns = kColumns / kColumnStep;
  // Column 8 i + 2 c + e belongs to the threads with lane % 4 = c, which count it as their column 2 i + e: head
  // (that % kHeads) of their query (that / kHeads).
  auto own_of = [](int column) { return column / 8 * 2 + column % 2; };
  // row * H + head, or -1: a loop of its own, so that all loads of one kind are in flight together
  auto source_of = [&](int column, int& row) {
    const int own = own_of(column), head = own % kHeads;
    row = sh.row[group * T::kGroupQueries + own / kHeads * 4 + column % 8 / 2];
    if (row < 0 || head >= p.heads_per_row) return -1;
    return p.heads != nullptr ? p.heads[row * p.heads_row_stride + head] : head;
  };
  const int chunk = thread % kChunks;
  int row[kOwnColumns], source[kOwnColumns];
#pragma unroll
  for (int i = 0; i < kOwnColumns; ++i) source[i] = source_of(thread / kChunks + i * kColumnStep, row[i]);
  static_assert(kColumns == 2 * kGroupThreads);
  float gate[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int gate_row;
    const int head = source_of(thread + i * kGroupThreads, gate_row);
    gate[i] = head < 0 ? 0.0f : p.gates[gate_row * p.gates_row_stride + head];
  }
#pragma unroll
  for (int i = 0; i < kOwnColumns; ++i) {
    const int column = thread / kChunks + i * kColumnStep;
    void* to = &sh.q[group][column * kHeadDim + ((chunk ^ (column % 8)) * 16)];
    if (source[i] < 0) {
      *static_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    } else {
      ptx::cp_async<16>(to, p.q + row[i] * p.q_row_stride + source[i] * p.q_head_stride + chunk * 16);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int column = thread + i * kGroupThreads;
    sh.gates[group][column % 8 / 2][own_of(column)] = gate[i];
  }
  ptx::cp_async_wait_all();
}

// The producer warp's part of an item.
template <int kHeads, Mode kMode>
__device__ __forceinline__ void produce(const CUtensorMap* map, const Params& p, int split, RingCursor& ring,
                                        Shared<kHeads>& sh) {
  const int lane = threadIdx.x % 32;
  for (int leader = next_leader(sh, 0); leader < Tile<kHeads>::kQueries; leader = next_leader(sh, leader + 1)) {
    const int32_t* table = p.rows.block_table + sh.request[leader] * p.rows.table_stride;
    const int pages = pages_of<kMode>(p, sh.leader_visible[leader]);
    for (int begin = split; begin < pages; begin += 32 * p.splits) {
      const int own = begin + lane * p.splits;
      const int own_page = own < pages ? table[own] : 0;
#pragma unroll 1
      for (int i = 0; i < 32 && begin + i * p.splits < pages; ++i) {
        const int page = __shfl_sync(0xFFFFFFFFu, own_page, i);
        if (lane == 0) {
          ptx::mbarrier_wait(&sh.empty[ring.stage], ring.phase ^ 1);
          ptx::mbarrier_arrive_expect_tx(&sh.full[ring.stage], kKeyBytes + kScaleBytes);
          ptx::tma_load_3d(sh.keys[ring.stage], map, 0, 0, page, &sh.full[ring.stage]);
          ptx::bulk_load(sh.scales[ring.stage], p.cache.data + page * p.cache.page_stride + kScalesOffset, kScaleBytes,
                         &sh.full[ring.stage]);
        }
        __syncwarp();
        ring.advance();
      }
    }
  }
}

// The same for samples: single keys, which the four warps behind the consumers copy, 8 lanes a key.
template <int kHeads>
__device__ __forceinline__ void produce_samples(const Params& p, int split, RingCursor& ring, Shared<kHeads>& sh) {
  constexpr int kChunks = kHeadDim / 16;
  constexpr int kRowStep = kGroupThreads / kChunks;
  constexpr int kOwnRows = kPageTokens / kRowStep;
  constexpr int kInFlight = kStages / 2;  // pages
  const int thread = threadIdx.x - kConsumerThreads;
  const int first_row = thread / kChunks, chunk = thread % kChunks;
  for (int leader = next_leader(sh, 0); leader < Tile<kHeads>::kQueries; leader = next_leader(sh, leader + 1)) {
    const int32_t* table = p.rows.block_table + sh.request[leader] * p.rows.table_stride;
    const int visible = sh.leader_visible[leader];
    const uint64_t step = sample_step(visible, p.num_samples);
    const int pages = pages_of<Mode::kSample>(p, visible);
    int position[kOwnRows], page[kOwnRows];
    auto look_up = [&](int unit) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        position[i] = sample_position(unit * kPageTokens + first_row + i * kRowStep, step);
        page[i] = table[position[i] / kPageTokens];
      }
    };
    RingCursor landed = ring;
    int issued = 0;
    auto land = [&] {
      ptx::cp_async_wait<kInFlight - 1>();
      ptx::fence_proxy_async();
      ptx::mbarrier_arrive(&sh.full[landed.stage]);
      landed.advance();
    };
    if (split < pages) look_up(split);
#pragma unroll 1
    for (int unit = split; unit < pages; unit += p.splits) {
      ptx::mbarrier_wait(&sh.empty[ring.stage], ring.phase ^ 1);
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        const int row = first_row + i * kRowStep, token = position[i] % kPageTokens;
        const uint8_t* from = p.cache.data + page[i] * p.cache.page_stride;
        ptx::cp_async<16>(&sh.keys[ring.stage][row * kHeadDim + (chunk ^ row % 8) * 16],
                          from + token * kHeadDim + chunk * 16);
        if (chunk == 0) ptx::cp_async<4>(&sh.scales[ring.stage][row], from + kScalesOffset + token * 4);
      }
      ptx::cp_async_commit();
      ring.advance();
      if (++issued >= kInFlight) land();
      if (unit + p.splits < pages) look_up(unit + p.splits);
    }
    // A page has landed once kInFlight - 1 groups follow its own: empty ones where there were no more pages
    for (int group = issued; group < kInFlight - 1; ++group) ptx::cp_async_commit();
    for (int left = min(issued, kInFlight - 1); left > 0; --left) {
      ptx::cp_async_commit();
      land();
    }
  }
}

// What a thread of a consumer group adds up: its keys are key_row and key_row + 8 of a page, its queries those of the
// lanes with its lane % 4.
template <int kHeads, Mode kMode>
struct Summation {
  using T = Tile<kHeads>;
  // A half holds whole queries, or half the heads of one
  static constexpr int kHalfQueries = T::kThreadQueries > 1 ? T::kThreadQueries / 2 : 1;
  static constexpr int kHalfHeads = T::kThreadQueries > 1 ? kHeads : kHeads / 2;

  const Params& p;
  Shared<kHeads>& sh;
  int first_limit;  // of the thread's queries
  int first_slot;  // its queries are 4 slots apart
  uint32_t row_stride;
  const float (&gates)[64];
  float carried[2];  // of a query whose other heads are in the next half
  float scale[2];
  uint32_t position;
  int key_row;

  __device__ __forceinline__ void take_page(int page, int stage) {
    scale[0] = sh.scales[stage][key_row];
    scale[1] = sh.scales[stage][key_row + 8];
    position = page * kPageTokens + key_row;
  }

  // From `page` on, rows whose last tie lies before it take larger scores only.
  __device__ __forceinline__ void raise_thresholds(int page, int group, int warp) {
    __syncwarp();  // the last page's thresholds have been read
#pragma unroll
    for (int i = threadIdx.x % 32; i < T::kGroupQueries; i += 32) {
      const int own = group * T::kGroupQueries + i;
      if (page * kPageTokens >= sh.tie_limit[own]) sh.threshold[warp][i] = sh.next_threshold[own];
    }
    __syncwarp();
  }

  // Adds up one half of the columns for the keys at `position` and `position` + 8, and hands on the finished scores.
  // `threshold`: the warp's, of the thread's first query.
  template <int kHalf>
  __device__ __forceinline__ void add(const float (&dots)[64], const float* threshold, Queue<kHeads>& queue) {
    constexpr bool kFinishes = kHalfHeads == kHeads || kHalf == 1;
    constexpr int kChecked = T::kCheckedQueries < kHalfQueries ? T::kCheckedQueries : kHalfQueries;
#pragma unroll
    for (int checked = 0; checked < kHalfQueries; checked += kChecked) {
      const int first_query = kHalf * T::kThreadQueries / 2 + checked;
      float limits[kChecked];
      if constexpr (kMode == Mode::kCollect && kFinishes) load_words(limits, threshold + first_query);
#pragma unroll
      for (int i = 0; i < kChecked; ++i) {
        const int query = first_query + i;
        float score[2];
#pragma unroll
        for (int head = 0; head < kHalfHeads; ++head) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int own = (checked + i) * kHalfHeads + head;
            const float gate = gates[kHalf * 32 + own];
            const float positive = fmaxf(dots[own / 2 * 4 + 2 * r + own % 2], 0.0f);
            if (head == 0) {
              score[r] = kHalfHeads != kHeads && kHalf == 1 ? fmaf(gate, positive, carried[r]) : gate * positive;
            } else {
              score[r] = fmaf(gate, positive, score[r]);
            }
          }
        }
        if constexpr (!kFinishes) {
          carried[0] = score[0];
          carried[1] = score[1];
        } else if constexpr (kMode == Mode::kCollect) {
          // Keys that the row does not see may pass as well: whoever empties the queue drops them
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            append(queue.end, score[r] * scale[r], limits[i],
                   (static_cast<uint32_t>(query) << kPositionBits) + position + 8 * r);
          }
        } else {
          const int limit = sh.limit[first_limit + query];
          float* const to = kMode == Mode::kSample ? p.samples : p.dense;
          const uint32_t at = (first_slot + query * 4) * row_stride + position;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const bool seen = static_cast<int>(position) + 8 * r < limit;
            if constexpr (kMode == Mode::kSample) {
              if (limit >= 0) to[at + 8 * r] = seen ? score[r] * scale[r] : __uint_as_float(kInvalidSample);
            } else {
              if (seen) to[at + 8 * r] = score[r] * scale[r];
            }
          }
        }
      }
      if constexpr (kMode == Mode::kCollect) {
        if (kHalf == 1 || (checked + kChecked) % T::kCheckedQueries == 0) queue.hand_over_if_full(sh);
      }
    }
  }
};

// Starts the products of the page in a stage with one half of the group's columns. Descriptors are made anew each time,
// as registers are scarce.
template <int kHalf, int kHeads>
__device__ __forceinline__ void start_half(float (&dots)[64], int group, int stage, const Shared<kHeads>& sh) {
  const uint64_t keys = ptx::swizzled_descriptor(sh.keys[stage]);
  const uint64_t queries = ptx::swizzled_descriptor(sh.q[ptx::opaque(group)] + kHalf * kHalfColumns * kHeadDim);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kHeadDim / 32; ++k) {
    ptx::wgmma_m64k32<kHalfColumns>(
        dots, ptx::descriptor_after(keys, k * 2), ptx::descriptor_after(queries, k * 2), k != 0);
  }
  ptx::wgmma_commit();
}

template <int kHeads, Mode kMode>
__device__ __forceinline__ void consume(const Params& p, RingCursor& ring, Shared<kHeads>& sh) {
  using T = Tile<kHeads>;
  // of a lane for all, so that descriptors are computed in uniform registers
  const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / kGroupThreads, 0);
  const int thread = threadIdx.x % kGroupThreads;
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int c = lane % 4;
  const int key_row = thread / 32 * 16 + lane / 4;  // and key_row + 8

  // read anew each time, as registers are scarce
  auto split_of = [&] { return sh.item % p.splits; };
  auto tile_of = [&] { return sh.item / p.splits; };
  float gates[64];
  load_words(gates, sh.gates[group][c]);
  const int limits = (kOwnLimits ? warp : group) * T::kGroupQueries;  // where its owner's begin
  Summation<kHeads, kMode> sum{
      p, sh, limits + c * T::kThreadQueries, tile_of() * T::kQueries + group * T::kGroupQueries + c,
      kMode == Mode::kSample ? static_cast<uint32_t>(p.num_samples) : p.dense_stride, gates, {}, {}, 0, key_row};
  const float* const threshold = sh.threshold[warp] + c * T::kThreadQueries;
  // Calls work(query of the group, whether this thread does it for the group), so that each limit is written by its owner
  auto for_each_query = [&](auto&& work) {
    if constexpr (kOwnLimits) {
      for (int query = lane; query < T::kGroupQueries; query += 32) work(query, warp % (kGroupThreads / 32) == 0);
    } else {
      if (thread < T::kGroupQueries) work(thread, true);
    }
  };

  for (int leader = next_leader(sh, 0); leader < T::kQueries; leader = next_leader(sh, leader + 1)) {
    const int pages = pages_of<kMode>(p, sh.leader_visible[leader]);
    const uint64_t step = kMode == Mode::kSample ? sample_step(sh.leader_visible[leader], p.num_samples) : 0;

    for_each_query([&](int query, bool is_of_group) {
      const int from = group * T::kGroupQueries + query;
      const int own = query % 4 * T::kThreadQueries + query / 4;
      const int to = group * T::kGroupQueries + own;
      const int to_limit = limits + own;
      const bool member = sh.leader[from] == leader;
      if constexpr (kMode == Mode::kSample) {
        sh.limit[to_limit] = member ? samples_below(sh.visible[from], step, p.num_samples) : -1;
      } else {
        sh.limit[to_limit] = member ? sh.visible[from] : 0;
      }
      if constexpr (kMode == Mode::kCollect) {
        const int slot = tile_of() * T::kQueries + from;
        if (is_of_group) {
          const int tie = member ? p.last_tie[slot] : INT32_MAX;
          sh.tie_limit[to] =
              tie == INT32_MAX ? tie : sample_position(tie, sample_step(sh.leader_visible[leader], p.num_samples)) + 1;
          const float found = member ? p.threshold[slot] : INFINITY;
          sh.next_threshold[to] = next_larger(found);
#pragma unroll
          for (int i = 0; i < kGroupThreads / 32; ++i) sh.threshold[group * (kGroupThreads / 32) + i][own] = found;
        }
        const uint32_t list = static_cast<uint32_t>(slot * p.splits + split_of()) * p.list_capacity;
        if (is_of_group) sh.next_place[to] = member ? list : kClosedList;
        sh.list_end[to_limit] = list + p.list_capacity;
      }
    });
    sync_group(group);

    Queue<kHeads> queue(sh);
    // Two pages in a turn, since ptxas lets no products be under way from one turn to the next. Elsewhere registers are
    // scarcer than time.
    constexpr int kPagesTogether = kMode == Mode::kCollect ? 2 : 1;
    float first_half[64] = {}, second_half[64] = {};  // ptxas keeps room for values it thinks may be read
#pragma unroll 1
    for (int page = split_of(); page < pages; page += kPagesTogether * p.splits) {
      const bool has_other = kPagesTogether == 2 && page + p.splits < pages;
      ptx::mbarrier_wait(&sh.full[ring.stage], ring.phase);
      start_half<0>(first_half, group, ring.stage, sh);
      start_half<1>(second_half, group, ring.stage, sh);
      if constexpr (kMode == Mode::kCollect) sum.raise_thresholds(page, group, warp);
      sum.take_page(page, ring.stage);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(first_half);
      sum.template add<0>(first_half, threshold, queue);
      uint64_t* const empty = &sh.empty[ring.stage];
      ring.advance();
      if (has_other) {
        ptx::mbarrier_wait(&sh.full[ring.stage], ring.phase);
        start_half<0>(first_half, group, ring.stage, sh);
        ptx::wgmma_wait<1>();
        ptx::pin_registers(second_half);
        ptx::mbarrier_arrive_warp(empty, lane);
        sum.template add<1>(second_half, threshold, queue);
        start_half<1>(second_half, group, ring.stage, sh);
        if constexpr (kMode == Mode::kCollect) sum.raise_thresholds(page + p.splits, group, warp);
        sum.take_page(page + p.splits, ring.stage);
        ptx::wgmma_wait<1>();
        ptx::pin_registers(first_half);
        sum.template add<0>(first_half, threshold, queue);
        uint64_t* const other_empty = &sh.empty[ring.stage];
        ring.advance();
        ptx::wgmma_wait<0>();
        ptx::pin_registers(second_half);
        ptx::mbarrier_arrive_warp(other_empty, lane);
        sum.template add<1>(second_half, threshold, queue);
      } else {
        ptx::wgmma_wait<0>();
        ptx::pin_registers(second_half);
        ptx::mbarrier_arrive_warp(empty, lane);
        sum.template add<1>(second_half, threshold, queue);
      }
    }
    if constexpr (kMode == Mode::kCollect) queue.hand_over_rest(sh);

    sync_group(group);
    if constexpr (kMode == Mode::kCollect) {
      for_each_query([&](int query, bool is_of_group) {
        const int from = group * T::kGroupQueries + query;
        if (is_of_group && sh.leader[from] == leader) {
          const int own = query % 4 * T::kThreadQueries + query / 4;
          p.counts[(tile_of() * T::kQueries + from) * p.splits + split_of()] =
              sh.next_place[group * T::kGroupQueries + own] -
              (sh.list_end[limits + own] - p.list_capacity);
        }
      });
    }
  }
}

// Scores all (tile, split) items of `num_rows` rows, the grid's blocks taking them in turn: the producer's part and
// the consumers' part of it.
template <int kHeads, Mode kMode>
__device__ __forceinline__ void produce_items(const CUtensorMap* map, const Params& p, int num_rows, RingCursor& ring,
                                              Shared<kHeads>& sh) {
  const int tiles = (num_rows + Tile<kHeads>::kQueries - 1) / Tile<kHeads>::kQueries;
  for (int item = blockIdx.x; item < tiles * p.splits; item += gridDim.x) {
    sync_item<kMode>();  // the consumers are done with the last item
    sync_item<kMode>();  // and have loaded this one
    if constexpr (kMode == Mode::kSample) {
      produce_samples(p, item % p.splits, ring, sh);
    } else {
      produce<kHeads, kMode>(map, p, item % p.splits, ring, sh);
    }
  }
}

template <int kHeads, Mode kMode>
__device__ __forceinline__ void consume_items(const Params& p, const int32_t* rows, int num_rows, RingCursor& ring,
                                              Shared<kHeads>& sh) {
  const int tiles = (num_rows + Tile<kHeads>::kQueries - 1) / Tile<kHeads>::kQueries;
  const int group = threadIdx.x / kGroupThreads;
  for (int item = blockIdx.x; item < tiles * p.splits; item = sh.item + gridDim.x) {
    sync_item<kMode>();
    if (threadIdx.x == 0) sh.item = item;
    load_rows<kHeads>(p, rows, num_rows, item / p.splits, sh);
    load_queries<kHeads>(p, group, threadIdx.x % kGroupThreads, sh);
    ptx::fence_proxy_async();
    sync_item<kMode>();
    // Thresholds are the previous kernel's, and the lists lie where it reads its samples
    if constexpr (kMode == Mode::kCollect) ptx::wait_for_previous_kernel();
    consume<kHeads, kMode>(p, ring, sh);
  }
  if constexpr (kMode == Mode::kCollect) {
    Queue<kHeads>(sh).hand_over(sh, kNoMoreQueues);
  }
}

template <int kHeads, Mode kMode>
__device__ __forceinline__ Shared<kHeads>& init_shared(uint8_t* raw, const CUtensorMap* map) {
  auto& sh = *reinterpret_cast<Shared<kHeads>*>(raw);
  if (threadIdx.x < kConsumerWarps) {
    sh.queues_handed[threadIdx.x] = 0;
    sh.queues_emptied[threadIdx.x] = 0;
    for (int which = 0; which < 2; ++which) {
      ptx::mbarrier_init(&sh.handed[which][threadIdx.x], ptx::kArrivalsOfWarp);
      ptx::mbarrier_init(&sh.emptied[which][threadIdx.x], ptx::kArrivalsOfWarp);
    }
  }
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(map);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&sh.full[stage], kMode == Mode::kSample ? kGroupThreads : 1);
      ptx::mbarrier_init(&sh.empty[stage], kConsumerThreads / 32 * ptx::kArrivalsOfWarp);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  return sh;
}

// Samples, collects or writes all scores. `map`: boxes of one page.
template <int kHeads, Mode kMode>
__global__ __launch_bounds__(kThreads, 1) void score_kernel(const __grid_constant__ CUtensorMap map,
                                                            const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& sh = init_shared<kHeads, kMode>(raw, &map);
  // A call's inputs are there when its first kernels are, so the collecting kernel may read them before it waits.
  if constexpr (kMode != Mode::kCollect) ptx::wait_for_previous_kernel();
  RingCursor ring;
  if (threadIdx.x >= kConsumerThreads) {
    ptx::set_fewer_registers<kMode == Mode::kSample ? kSampleProducerRegisters : kProducerRegisters>();
    if (threadIdx.x < kWorkingThreads || kMode == Mode::kSample) {
      produce_items<kHeads, kMode>(&map, p, p.num_rows, ring, sh);
    } else if constexpr (kMode == Mode::kCollect) {
      empty_all_queues(p, sh);
    }
    ptx::let_next_kernel_start();
  } else {
    ptx::set_more_registers<kMode == Mode::kSample ? kSampleConsumerRegisters : kConsumerRegisters>();
    consume_items<kHeads, kMode>(p, nullptr, p.num_rows, ring, sh);
  }
}

// The k best of a row's dense scores, ascending. All consumers call it.
__device__ __forceinline__ void select_dense(const float* scores, int visible, int k, int32_t* out,
                                             SelectScratch& scratch) {
  auto for_each = [&](auto&& visit) {
    for (int i = threadIdx.x; i < visible; i += kConsumerThreads) visit(rank_value(scores[i], i));
  };
  const uint64_t cut = kth_largest<kConsumerThreads>(0, ~0ull, k, for_each, scratch);
  // each warp writes a contiguous range of positions, after counting it
  constexpr int kWarps = kConsumerThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int share = (visible + kWarps * 32 - 1) / (kWarps * 32) * 32;
  const int begin = warp * share, end = min(visible, begin + share);
  uint32_t own = 0, total;
  for (int i = begin + lane; i < end; i += 32) own += rank_value(scores[i], i) >= cut;
  uint32_t place = block_exclusive_sum<kConsumerThreads>(own, scratch.warp_sums, total);
  place = __shfl_sync(0xFFFFFFFFu, place, 0);
  for (int first = begin; first < end; first += 32) {
    const int i = first + lane;
    const bool chosen = i < end && rank_value(scores[i], i) >= cut;
    const uint32_t ballot = __ballot_sync(0xFFFFFFFFu, chosen);
    if (chosen) out[place + __popc(ballot & ((1u << lane) - 1))] = i;
    place += __popc(ballot);
  }
  sync_consumers();
}

// All consumers of all blocks wait for each other; every block must be resident. `arrived` only counts up.
__device__ __forceinline__ void sync_grid_consumers(uint32_t* arrived, uint32_t times_before) {
  sync_consumers();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    const uint32_t target = (times_before + 1) * gridDim.x;
    while (*reinterpret_cast<volatile uint32_t*>(arrived) < target) __nanosleep(100);
    __threadfence();
  }
  sync_consumers();
}

// Decides the rows that `undecided` lists, from all their scores, as many rows at a time as the workspace holds.
// Almost always there are none and the blocks leave at once. Launched cooperatively.
template <int kHeads>
__global__ __launch_bounds__(kThreads, 1) void repair_kernel(const __grid_constant__ CUtensorMap map,
                                                             const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  // Read anew each time, for registers are scarce
  auto num_rows = [&] { return static_cast<int>(*p.undecided_count); };
  if (num_rows() == 0) return;
  auto& sh = init_shared<kHeads, Mode::kDense>(raw, &map);
  RingCursor ring;
  if (threadIdx.x >= kConsumerThreads) {
    ptx::set_fewer_registers<kProducerRegisters>();
    if (threadIdx.x < kWorkingThreads) {
      for (int begin = 0; begin < num_rows(); begin += p.dense_rows) {
        produce_items<kHeads, Mode::kDense>(&map, p, min(p.dense_rows, num_rows() - begin), ring, sh);
      }
    }
  } else {
    ptx::set_more_registers<kConsumerRegisters>();
    for (int begin = 0; begin < num_rows(); begin += p.dense_rows) {
      consume_items<kHeads, Mode::kDense>(p, p.undecided + begin, min(p.dense_rows, num_rows() - begin), ring, sh);
      sync_grid_consumers(p.arrived, begin / p.dense_rows * 2);
      for (int i = blockIdx.x; i < min(p.dense_rows, num_rows() - begin); i += gridDim.x) {
        const int row = p.undecided[begin + i];
        if (row < 0) continue;
        select_dense(p.dense + static_cast<uint32_t>(i) * p.dense_stride, p.rows.visible[row], p.k,
                     p.out + row * p.out_row_stride, sh.scratch);
      }
      sync_grid_consumers(p.arrived, begin / p.dense_rows * 2 + 1);
    }
  }
}

}  // namespace misa::prefill
