// Scores of prefill rows on the FP8 tensor cores of Hopper, consumed on chip.
//
// A block holds a tile of query rows and streams key pages of 64 through shared memory. Keys are the 64 rows of a
// wgmma and (query, head) pairs its columns, permuted so that all heads of a query lie in columns of one thread: the
// sum over heads is private to a thread, and its order (ascending head) never depends on the tile.
//
//   warps 0..3, 4..7   two consumer warpgroups, 256 columns each, as two halves of 128 so that the tensor cores work
//                      on one half while the CUDA cores sum the other
//   warp 8             producer: pages by the copy engine through a ring of mbarriers; its warpgroup is there only
//                      to give its registers to the consumers
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
constexpr int kWorkingThreads = kConsumerThreads + 32;  // consumers and the producer warp
constexpr int kThreads = kConsumerThreads + kGroupThreads;
constexpr int kConsumerRegisters = 240;
constexpr int kProducerRegisters = 24;
constexpr int kHalfColumns = 128;
constexpr int kHalfBytes = kHalfColumns * kHeadDim;
// A row that takes no part counts from here, past any capacity.
constexpr uint32_t kClosedList = 0x80000000u;
constexpr uint32_t kInvalidSample = 0xFFFFFFFFu;
constexpr int kMaxLaunchRows = 4096;

enum class Mode {
  kSample,   // scores of evenly spread keys, for a first threshold
  kCollect,  // keys at or above the row's threshold, appended to the row's list
  kDense,    // all scores, for rows whose list cannot decide
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
  uint32_t* counts;    // [num_rows, splits]; more than list_capacity: the list overflowed
  uint2* lists;        // [num_rows, splits, list_capacity] of (score bits, position)
  int list_capacity;
  int keep_all;        // rows with at most so many visible keys need no threshold
  float* samples;      // [num_rows, num_samples]
  int num_samples;     // a multiple of 64; 0: nothing is sampled

  uint32_t* undecided;        // [num_rows] 0 or 1
  uint32_t* undecided_count;  // [1]
  uint32_t* arrived;          // [1] blocks that reached a barrier of the grid
  float* dense;               // [dense_rows, dense_stride]
  int64_t dense_stride;
  int dense_rows;

  int32_t* out;
  int64_t out_row_stride;
};

template <int kHeads>
struct Tile {
  static_assert(kHeads == 4 || kHeads == 8 || kHeads == 16 || kHeads == 32 || kHeads == 64);
  static constexpr int kGroupQueries = 2 * kHalfColumns / kHeads;
  static constexpr int kQueries = kGroups * kGroupQueries;
  // A thread's columns are 64 of a group's 256: these many queries, of which each half of the columns has
  static constexpr int kThreadQueries = 64 / kHeads;
  static constexpr int kHalfQueries = kHeads == 64 ? 1 : kThreadQueries / 2;
  static constexpr int kHalfHeads = kHeads == 64 ? 32 : kHeads;
  // Scores above the threshold wait in a queue of the thread's own, which is emptied into the lists once a queue of
  // the warp holds kFullQueue; a page adds at most 2 kThreadQueries more.
  static constexpr int kFullQueue = 8;
  static constexpr int kQueue = kFullQueue + 2 * kThreadQueries;
};

template <int kHeads>
struct Shared {
  using T = Tile<kHeads>;
  alignas(1024) uint8_t q[kGroups][2][kHalfBytes];
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
  alignas(16) float threshold[T::kQueries];
  alignas(16) uint32_t count[T::kQueries];
  alignas(16) int32_t limit[T::kQueries];
  alignas(16) float gates[kGroups][4][64];
  // (score bits, page << 5 | query << 1 | key row / 8 % 2) of a thread's queue
  uint2 queue[T::kQueue][kConsumerThreads];
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

template <Mode kMode>
__device__ __forceinline__ int tiles_of_split(const Params& p, int visible, int split) {
  const int pages = kMode == Mode::kSample ? p.num_samples / kPageTokens : (visible + kPageTokens - 1) / kPageTokens;
  return (pages - split + p.splits - 1) / p.splits;
}

// Appends (score, tag) to the thread's queue unless the score is below the threshold; a NaN is not below anything.
// Two predicated instructions: in about half of all warps some lane appends, so a branch would be taken and split.
__device__ __forceinline__ void append(uint32_t& queue_end, float score, float threshold, uint32_t tag) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.geu.f32 p, %1, %2;\n"
      "@p st.shared.v2.b32 [%0], {%1, %3};\n"
      "@p add.u32 %0, %0, %4;\n}\n"
      : "+r"(queue_end)
      : "f"(score), "f"(threshold), "r"(tag), "n"(kConsumerThreads * sizeof(uint2))
      : "memory");
}

enum Barrier { kItemBarrier = 1, kConsumerBarrier, kGroupBarrier };  // one kGroupBarrier + g per group; 7: selection

__device__ __forceinline__ void sync_item() { ptx::named_barrier_sync<kItemBarrier, kWorkingThreads>(); }

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
  // Column 128 half + 8 i + 2 c + e belongs to the threads with lane % 4 = c, which count it as their column
  // 32 half + 2 i + e: head (that % kHeads) of their query (that / kHeads).
  for (int item = thread; item < 2 * kHalfColumns * kChunks; item += kGroupThreads) {
    const int chunk = item % kChunks, column = item / kChunks;
    const int half = column / kHalfColumns, n = column % kHalfColumns;
    const int c = n % 8 / 2, own = half * 32 + n / 8 * 2 + n % 2;
    const int head = own % kHeads;
    const int row = sh.row[group * T::kGroupQueries + own / kHeads * 4 + c];
    uint4 value = make_uint4(0, 0, 0, 0);
    float gate = 0.0f;
    if (row >= 0 && head < p.heads_per_row) {
      const int source = p.heads != nullptr ? p.heads[row * p.heads_row_stride + head] : head;
      value = *reinterpret_cast<const uint4*>(p.q + row * p.q_row_stride + source * p.q_head_stride + chunk * 16);
      if (chunk == 0) gate = p.gates[row * p.gates_row_stride + source];
    }
    *reinterpret_cast<uint4*>(&sh.q[group][half][n * kHeadDim + ((chunk ^ (n % 8)) * 16)]) = value;
    if (chunk == 0) sh.gates[group][c][own] = gate;
  }
}

template <int kHeads, Mode kMode>
__device__ __forceinline__ void produce(const CUtensorMap* map, const Params& p, int split, RingCursor& ring,
                                        Shared<kHeads>& sh) {
  const int lane = threadIdx.x % 32;
  for (int word = 0; word < (Tile<kHeads>::kQueries + 31) / 32; ++word) {
    for (uint32_t bits = sh.leaders[word]; bits != 0; bits &= bits - 1) {
      const int leader = word * 32 + __ffs(bits) - 1;
      const int visible = sh.leader_visible[leader];
      const int32_t* pages = p.rows.block_table + sh.request[leader] * p.rows.table_stride;
      const int tiles = tiles_of_split<kMode>(p, visible, split);
      if constexpr (kMode == Mode::kSample) {
        const uint64_t step = sample_step(visible, p.num_samples);
        int position[2], page[2];
        auto look_up = [&](int t) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            position[i] = sample_position((split + t * p.splits) * kPageTokens + lane + 32 * i, step);
            page[i] = pages[position[i] / kPageTokens];
          }
        };
        if (tiles > 0) look_up(0);
        for (int t = 0; t < tiles; ++t) {
          ptx::mbarrier_wait(&sh.empty[ring.stage], ring.phase ^ 1);
          if (lane == 0) ptx::mbarrier_arrive_expect_tx(&sh.full[ring.stage], kKeyBytes);
          __syncwarp();
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int r = lane + 32 * i, token = position[i] % kPageTokens;
            ptx::tma_load_3d(&sh.keys[ring.stage][r * kHeadDim], map, 0, token, page[i], &sh.full[ring.stage]);
            ptx::cp_async<4>(&sh.scales[ring.stage][r],
                             p.cache.data + page[i] * p.cache.page_stride + kScalesOffset + token * 4);
          }
          ptx::cp_async_mbarrier_arrive(&sh.full[ring.stage]);
          if (t + 1 < tiles) look_up(t + 1);
          ring.advance();
        }
      } else {
        for (int begin = 0; begin < tiles; begin += 32) {
          const int batch = min(32, tiles - begin);
          const int own_page = lane < batch ? pages[split + (begin + lane) * p.splits] : 0;
          for (int t = 0; t < batch; ++t) {
            const int page = __shfl_sync(0xFFFFFFFFu, own_page, t);
            if (lane == 0) {
              ptx::mbarrier_wait(&sh.empty[ring.stage], ring.phase ^ 1);
              ptx::mbarrier_arrive_expect_tx(&sh.full[ring.stage], kKeyBytes + kScaleBytes);
              ptx::tma_load_3d(sh.keys[ring.stage], map, 0, 0, page, &sh.full[ring.stage]);
              ptx::bulk_load(sh.scales[ring.stage], p.cache.data + page * p.cache.page_stride + kScalesOffset,
                             kScaleBytes, &sh.full[ring.stage]);
            }
            __syncwarp();
            ring.advance();
          }
        }
      }
    }
  }
}

// Sum over one half's heads of gate * relu(dot), continuing from `sums` where a query spans both halves.
template <int kHeads, bool kContinue>
__device__ __forceinline__ void sum_heads(const float (&dots)[64], const float (&gates)[32],
                                          float (&sums)[Tile<kHeads>::kHalfQueries][2]) {
  using T = Tile<kHeads>;
#pragma unroll
  for (int b = 0; b < T::kHalfQueries; ++b) {
#pragma unroll
    for (int head = 0; head < T::kHalfHeads; ++head) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int own = b * T::kHalfHeads + head;
        const float dot = fmaxf(dots[own / 2 * 4 + 2 * r + own % 2], 0.0f);
        if (!kContinue && head == 0) {
          sums[b][r] = gates[own] * dot;
        } else {
          sums[b][r] = fmaf(gates[own], dot, sums[b][r]);
        }
      }
    }
  }
}

template <int kHeads, Mode kMode>
__device__ __forceinline__ void consume(const Params& p, int tile, int split, RingCursor& ring, Shared<kHeads>& sh) {
  using T = Tile<kHeads>;
  const int group = threadIdx.x / kGroupThreads;
  const int thread = threadIdx.x % kGroupThreads;
  const int lane = threadIdx.x % 32;
  const int c = lane % 4;
  const int key_row = thread / 32 * 16 + lane / 4;  // and key_row + 8
  const int first = group * T::kGroupQueries + c * T::kThreadQueries;
  const int first_slot = tile * T::kQueries + group * T::kGroupQueries + c;  // the thread's queries are 4 slots apart

  float gates[2][32];
#pragma unroll
  for (int own = 0; own < 64; ++own) gates[own / 32][own % 32] = sh.gates[group][c][own];

  const uint64_t q_descriptor = ptx::swizzled_descriptor(sh.q[group]);
  const uint64_t key_descriptor = ptx::swizzled_descriptor(sh.keys);
  float dots[2][64];

  auto issue = [&](int half, int stage) {
    ptx::pin_registers(dots[half]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 32; ++step) {
      ptx::wgmma_m64n128k32(dots[half], key_descriptor + stage * (kKeyBytes >> 4) + step * 2,
                            q_descriptor + half * (kHalfBytes >> 4) + step * 2, step != 0);
    }
    ptx::wgmma_commit();
  };

  for (int word = 0; word < (T::kQueries + 31) / 32; ++word) {
    for (uint32_t bits = sh.leaders[word]; bits != 0; bits &= bits - 1) {
      const int leader = word * 32 + __ffs(bits) - 1;
      const int tiles = tiles_of_split<kMode>(p, sh.leader_visible[leader], split);
      const uint64_t step = kMode == Mode::kSample ? sample_step(sh.leader_visible[leader], p.num_samples) : 0;

      int all_visible = INT32_MAX;  // keys below it are visible to every row of this request in the group
      for (int i = lane; i < T::kGroupQueries; i += 32) {
        const int from = group * T::kGroupQueries + i;
        if (sh.leader[from] == leader) all_visible = min(all_visible, sh.visible[from]);
      }
      all_visible = __reduce_min_sync(0xFFFFFFFFu, all_visible);
      if (thread < T::kGroupQueries) {
        const int from = group * T::kGroupQueries + thread;
        const int to = group * T::kGroupQueries + thread % 4 * T::kThreadQueries + thread / 4;
        const bool member = sh.leader[from] == leader;
        sh.limit[to] = member ? sh.visible[from] : 0;
        if constexpr (kMode == Mode::kCollect) {
          sh.threshold[to] = member ? p.threshold[tile * T::kQueries + from] : INFINITY;
          sh.count[to] = member ? 0 : kClosedList;
        }
      }
      sync_group(group);

      const uint32_t queue_begin = ptx::smem_address(&sh.queue[0][threadIdx.x]);
      constexpr uint32_t kQueueStep = sizeof(sh.queue[0]);
      uint32_t queue_end = queue_begin;
      // Moves the warp's queues to the lists of their rows
      auto empty_queue = [&] {
        const int length = (queue_end - queue_begin) / kQueueStep;
        const int longest = __reduce_max_sync(0xFFFFFFFFu, length);
#pragma unroll 1
        for (int i = 0; i < longest; ++i) {
          if (i < length) {
            const uint2 entry = sh.queue[i][threadIdx.x];
            const int query = entry.y / 2 % 16;
            const uint32_t place = atomicAdd(&sh.count[first + query], 1u);
            if (place < static_cast<uint32_t>(p.list_capacity)) {
              const uint32_t list = ((first_slot + query * 4) * p.splits + split) * p.list_capacity;
              p.lists[list + place] = make_uint2(entry.x, entry.y / 32 * kPageTokens + key_row + entry.y % 2 * 8);
            }
          }
        }
        queue_end = queue_begin;
      };
      // Consumes the scores of one half: sums[b] of the thread's query first_query + b, for the two keys
      auto finish = [&](int first_query, float (&sums)[T::kHalfQueries][2], const float (&scale)[2], int t) {
        const int unit = split + t * p.splits;
        if constexpr (kMode == Mode::kCollect) {
          const bool some_invisible = (unit + 1) * kPageTokens > all_visible;
#pragma unroll
          for (int b = 0; b < T::kHalfQueries; ++b) {
            const int query = first_query + b;
            const float threshold = sh.threshold[first + query];
            if (some_invisible) {
              const int limit = sh.limit[first + query];
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                const bool seen = unit * kPageTokens + key_row + 8 * r < limit;
                append(queue_end, seen ? sums[b][r] * scale[r] : -INFINITY, seen ? threshold : INFINITY,
                       unit * 32 + query * 2 + r);
              }
            } else {
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                append(queue_end, sums[b][r] * scale[r], threshold, unit * 32 + query * 2 + r);
              }
            }
          }
        } else {
#pragma unroll
          for (int b = 0; b < T::kHalfQueries; ++b) {
            const int limit = sh.limit[first + first_query + b];
            const int slot = first_slot + (first_query + b) * 4;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int x = unit * kPageTokens + key_row + 8 * r;
              const float score = sums[b][r] * scale[r];
              if constexpr (kMode == Mode::kSample) {
                const bool seen = sample_position(x, step) < limit;
                if (limit > 0) p.samples[static_cast<uint32_t>(slot * p.num_samples + x)] = seen ? score : __uint_as_float(kInvalidSample);
              } else {
                if (x < limit) p.dense[static_cast<int64_t>(slot) * p.dense_stride + x] = score;
              }
            }
          }
        }
      };

      // While the tensor cores work on one half of the columns, the scores of the other half are summed and looked
      // at; the second half of a page is looked at under the first half of the next.
      float sums[T::kHalfQueries][2];
      float scale[2];
      auto load_page = [&] {
        ptx::mbarrier_wait(&sh.full[ring.stage], ring.phase);
        issue(0, ring.stage);
      };
      auto first_half = [&](int t) {
        scale[0] = sh.scales[ring.stage][key_row];
        scale[1] = sh.scales[ring.stage][key_row + 8];
        ptx::wgmma_wait<0>();
        ptx::pin_registers(dots[0]);
        issue(1, ring.stage);
        sum_heads<kHeads, false>(dots[0], gates[0], sums);
        if constexpr (kHeads < 64) finish(0, sums, scale, t);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(dots[1]);
        if (lane == 0) ptx::mbarrier_arrive(&sh.empty[ring.stage]);
        ring.advance();
      };
      auto second_half = [&](int t) {
        sum_heads<kHeads, kHeads == 64>(dots[1], gates[1], sums);
        finish(kHeads < 64 ? T::kHalfQueries : 0, sums, scale, t);
        if constexpr (kMode == Mode::kCollect) {
          if (__any_sync(0xFFFFFFFFu, queue_end >= queue_begin + T::kFullQueue * kQueueStep)) empty_queue();
        }
      };
      if (tiles > 0) {
        load_page();
        first_half(0);
        for (int t = 1; t < tiles; ++t) {
          load_page();
          second_half(t - 1);
          first_half(t);
        }
        second_half(tiles - 1);
        if constexpr (kMode == Mode::kCollect) empty_queue();
      }

      sync_group(group);
      if constexpr (kMode == Mode::kCollect) {
        if (thread < T::kGroupQueries) {
          const int from = group * T::kGroupQueries + thread;
          if (sh.leader[from] == leader) {
            p.counts[(tile * T::kQueries + from) * p.splits + split] =
                sh.count[group * T::kGroupQueries + thread % 4 * T::kThreadQueries + thread / 4];
          }
        }
      }
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
    sync_item();  // the consumers are done with the last item
    sync_item();  // and have loaded this one
    produce<kHeads, kMode>(map, p, item % p.splits, ring, sh);
  }
}

template <int kHeads, Mode kMode>
__device__ __forceinline__ void consume_items(const Params& p, const int32_t* rows, int num_rows, RingCursor& ring,
                                              Shared<kHeads>& sh) {
  const int tiles = (num_rows + Tile<kHeads>::kQueries - 1) / Tile<kHeads>::kQueries;
  for (int item = blockIdx.x; item < tiles * p.splits; item += gridDim.x) {
    sync_item();
    load_rows<kHeads>(p, rows, num_rows, item / p.splits, sh);
    load_queries<kHeads>(p, threadIdx.x / kGroupThreads, threadIdx.x % kGroupThreads, sh);
    ptx::fence_proxy_async();
    sync_item();
    consume<kHeads, kMode>(p, item / p.splits, item % p.splits, ring, sh);
  }
}

template <int kHeads, Mode kMode>
__device__ __forceinline__ Shared<kHeads>& init_shared(uint8_t* raw, const CUtensorMap* map) {
  auto& sh = *reinterpret_cast<Shared<kHeads>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(map);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&sh.full[stage], kMode == Mode::kSample ? 33 : 1);
      ptx::mbarrier_init(&sh.empty[stage], kConsumerThreads / 32);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  return sh;
}

// Samples or collects. `map`: boxes of one key (kSample) or one page.
template <int kHeads, Mode kMode>
__global__ __launch_bounds__(kThreads, 1) void score_kernel(const __grid_constant__ CUtensorMap map,
                                                            const __grid_constant__ Params p) {
  extern __shared__ uint8_t raw[];
  auto& sh = init_shared<kHeads, kMode>(raw, &map);
  RingCursor ring;
  if (threadIdx.x >= kConsumerThreads) {
    ptx::set_fewer_registers<kProducerRegisters>();
    if (threadIdx.x < kWorkingThreads) produce_items<kHeads, kMode>(&map, p, p.num_rows, ring, sh);
  } else {
    ptx::set_more_registers<kConsumerRegisters>();
    consume_items<kHeads, kMode>(p, nullptr, p.num_rows, ring, sh);
  }
}

struct RepairShared {
  SelectScratch scratch;
  int32_t rows[kMaxLaunchRows];
  int num_rows;
};

// The k best of a row's dense scores, ascending. All consumers call it.
__device__ __forceinline__ void select_dense(const float* scores, int visible, int k, int32_t* out,
                                             RepairShared& repair) {
  auto for_each = [&](auto&& visit) {
    for (int i = threadIdx.x; i < visible; i += kConsumerThreads) visit(rank_value(scores[i], i));
  };
  const uint64_t cut = kth_largest<kConsumerThreads>(0, ~0ull, k, for_each, repair.scratch);
  // each warp writes a contiguous range of positions, after counting it
  constexpr int kWarps = kConsumerThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int share = (visible + kWarps * 32 - 1) / (kWarps * 32) * 32;
  const int begin = warp * share, end = min(visible, begin + share);
  uint32_t own = 0, total;
  for (int i = begin + lane; i < end; i += 32) own += rank_value(scores[i], i) >= cut;
  uint32_t place = block_exclusive_sum<kConsumerThreads>(own, repair.scratch.warp_sums, total);
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
__device__ __forceinline__ void sync_grid_consumers(uint32_t* arrived, uint32_t& target) {
  sync_consumers();
  target += gridDim.x;
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (*reinterpret_cast<volatile uint32_t*>(arrived) < target) __nanosleep(100);
    __threadfence();
  }
  sync_consumers();
}

// Decides the rows that `undecided` marks, from all their scores, as many rows at a time as the workspace holds.
// Almost always there are none and the blocks leave at once. Launched cooperatively.
template <int kHeads>
__global__ __launch_bounds__(kThreads, 1) void repair_kernel(const __grid_constant__ CUtensorMap map,
                                                             const __grid_constant__ Params p) {
  extern __shared__ uint8_t raw[];
  if (*p.undecided_count == 0) return;
  auto& sh = init_shared<kHeads, Mode::kDense>(raw, &map);
  auto& repair = *reinterpret_cast<RepairShared*>(&sh + 1);
  if (threadIdx.x < kConsumerThreads) {
    uint32_t found = 0;
    for (int begin = 0; begin < p.num_rows; begin += kConsumerThreads) {
      const int slot = begin + threadIdx.x;
      const bool marked = slot < p.num_rows && p.undecided[slot] != 0;
      uint32_t total;
      const uint32_t before = block_exclusive_sum<kConsumerThreads>(marked, repair.scratch.warp_sums, total);
      if (marked) repair.rows[found + before] = p.row_begin + slot;
      found += total;
    }
    if (threadIdx.x == 0) repair.num_rows = static_cast<int>(found);
  }
  __syncthreads();
  const int num_rows = repair.num_rows;
  RingCursor ring;
  if (threadIdx.x >= kConsumerThreads) {
    ptx::set_fewer_registers<kProducerRegisters>();
    if (threadIdx.x < kWorkingThreads) {
      for (int begin = 0; begin < num_rows; begin += p.dense_rows) {
        produce_items<kHeads, Mode::kDense>(&map, p, min(p.dense_rows, num_rows - begin), ring, sh);
      }
    }
  } else {
    ptx::set_more_registers<kConsumerRegisters>();
    uint32_t arrivals = 0;
    for (int begin = 0; begin < num_rows; begin += p.dense_rows) {
      const int rows = min(p.dense_rows, num_rows - begin);
      consume_items<kHeads, Mode::kDense>(p, repair.rows + begin, rows, ring, sh);
      sync_grid_consumers(p.arrived, arrivals);
      for (int i = blockIdx.x; i < rows; i += gridDim.x) {
        const int row = repair.rows[begin + i];
        select_dense(p.dense + i * p.dense_stride, p.rows.visible[row], p.k, p.out + row * p.out_row_stride, repair);
      }
      sync_grid_consumers(p.arrived, arrivals);
    }
  }
}

}  // namespace misa::prefill
