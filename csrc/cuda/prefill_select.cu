// Exact top-k selection of prefill rows: thresholds from a sample, fused scoring and collection, selection from the
// collected lists, and an exact repair of the rows whose list cannot decide. Operators at the end of the file.
#include "prefill_select.cuh"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "tensor_map.h"
#include "torch_op.h"

namespace misa::prefill {
namespace {

// ---------------------------------------------------------------- thresholds from samples

constexpr int kThresholdThreads = 256;
// How many standard deviations of a sampled rank lie between the rank aimed at and k.
constexpr float kSampleMargin = 5.0f;

// One block per slot: the sample that, up to sampling error, a few more than k keys of the row outrank. Keys outrank
// each other by score, then by position: a score that very many keys share (0, where no head is active) must not let
// all of them pass.
__global__ __launch_bounds__(kThresholdThreads) void threshold_kernel(const __grid_constant__ Params p) {
  extern __shared__ uint32_t keys[];
  __shared__ SelectScratch scratch;
  const int slot = blockIdx.x;
  for (int bin = threadIdx.x; bin < kSelectBins; bin += kThresholdThreads) scratch.bins[bin] = 0;
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  if (threadIdx.x == 0) {
    p.last_tie[slot] = INT32_MAX;
    if (slot == 0) *p.undecided_count = *p.arrived = 0;
  }
  const int visible = p.rows.visible[p.row_begin + slot];
  if (visible < p.scored_from || visible >= p.scored_to) return;
  if (visible <= p.keep_all || p.num_samples == 0) {
    if (threadIdx.x == 0) p.threshold[slot] = -INFINITY;
    return;
  }
  __syncthreads();
  // key 0 marks a sample the row does not see: no float has it
  const float* samples = p.samples + static_cast<int64_t>(slot) * p.num_samples;
  uint32_t count = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < p.num_samples; i += kThresholdThreads) {
    const float sample = samples[i];
    const bool seen = __float_as_uint(sample) != kInvalidSample;
    const uint32_t key = seen ? order_key(sample) : 0;
    keys[i] = key;
    count += seen;
    if (seen) atomicAdd(&scratch.bins[ScoreBins::of_any_scores().of(key)], 1u);
  }
  uint32_t valid;
  block_exclusive_sum<kThresholdThreads>(count, scratch.warp_sums, valid);
  const float expected = static_cast<float>(p.k) * valid / visible;
  const uint32_t rank = static_cast<uint32_t>(ceilf(expected + kSampleMargin * sqrtf(expected))) + 1;
  if (rank >= valid) {
    if (threadIdx.x == 0) p.threshold[slot] = -INFINITY;
    return;
  }
  choose_bin<kThresholdThreads>(rank, scratch);
  const Cut start = cut_of_bin(ScoreBins::of_any_scores(), rank, scratch);
  select_sync<kThresholdThreads>();
  const uint64_t cut = last_selected<kThresholdThreads>(
      start,
      [&](auto&& visit) {
#pragma unroll 4
        for (int i = threadIdx.x; i < p.num_samples; i += kThresholdThreads) {
          if (keys[i] != 0) visit((static_cast<uint64_t>(keys[i]) << 32) | (0xFFFFFFFFu - i));
        }
      },
      scratch);
  if (threadIdx.x == 0) {
    p.threshold[slot] = float_of_order_key(static_cast<uint32_t>(cut >> 32));
    p.last_tie[slot] = static_cast<int32_t>(position_of(cut));
  }
}

// ---------------------------------------------------------------- selection from the lists

constexpr int kMaxSplits = 32;
// Entries of a row that lists are kept for
constexpr int kMostEntries = 24576;
constexpr int kFinalThreads = 512;
// A thread of the final kernel takes so many entries of one list at a time
constexpr int kChunk = 8;
// Where a row's lists have room for up to so many entries, of which they mostly hold two thirds, a thread keeps one chunk
// of them in registers, else several
constexpr int kFewEntries = kFinalThreads * kChunk * 3 / 2;
constexpr int kMoreChunks = 3;
// Positions that have a bit each in shared memory at a time
constexpr int kWindow = 1 << 17;
constexpr int kWindowWords = kWindow / 32;
constexpr int kMostSelected = 16384;

struct FinalShared {
  SelectScratch scratch;
  alignas(16) uint32_t words[kWindowWords];
  uint32_t few_count;
  uint64_t cut;
};

// Neighbouring entries of list `split`; key 0: no entry. Positions are packed (see Splits), two a word.
template <int kCount>
struct Entries {
  uint32_t key[kCount];
  uint32_t packed[kCount / 2];
  uint32_t split;

  __device__ __forceinline__ uint32_t position(const Splits& in_splits, int i) const {
    return in_splits.unpack(packed[i / 2] >> i % 2 * 16 & 0xFFFF, split);
  }
};

// One block per slot: writes the row's selection, ascending, or lists the row as undecided if one of its lists
// overflowed or the threshold let fewer than k keys pass. A thread keeps its first kOwnChunks chunks of entries in
// registers; they are read again where there are more, or where one pass over them does not do.
template <int kOwnChunks>
__global__ __launch_bounds__(kFinalThreads, kOwnChunks == 1 ? 3 : 2) void final_kernel(const __grid_constant__ Params p) {
  // [k] positions, at last; before, the threads' own chunks (see own_bytes)
  extern __shared__ __align__(16) uint32_t chosen[];
  __shared__ FinalShared sh;
  const int lane = threadIdx.x % 32;
  const int slot = blockIdx.x;
  const int row = p.row_begin + slot;
  const auto clear_words = [&] {
#pragma unroll
    for (int i = threadIdx.x; i < kWindowWords / 4; i += kFinalThreads) {
      reinterpret_cast<uint4*>(sh.words)[i] = make_uint4(0, 0, 0, 0);
    }
  };
  clear_words();
  for (int i = threadIdx.x; i < kSelectBins / 4; i += kFinalThreads) {
    reinterpret_cast<uint4*>(sh.scratch.bins)[i] = make_uint4(0, 0, 0, 0);
  }
  if (threadIdx.x == 0) sh.few_count = 0;
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const uint32_t capacity = p.list_capacity;
  const int visible = p.rows.visible[row];
  // Lane s of every warp knows list s. Loaded together with what says whether there are any
  const uint32_t count = lane < p.splits ? p.counts[static_cast<int64_t>(slot) * p.splits + lane] : 0;
  const float threshold = p.threshold[slot];
  if (visible < p.written_from || visible >= p.scored_to) return;
  int32_t* out = p.out + row * p.out_row_stride;
  if (visible < p.scored_from) {
    for (int i = threadIdx.x; i < p.k; i += kFinalThreads) out[i] = i < visible ? i : -1;
    return;
  }

  const bool overflow = __any_sync(0xFFFFFFFFu, count > capacity);
  const uint32_t total = __reduce_add_sync(0xFFFFFFFFu, count);
  if (overflow || total < static_cast<uint32_t>(p.k)) {
    if (threadIdx.x == 0) p.undecided[atomicAdd(p.undecided_count, 1u)] = row;
    return;
  }

  const uint32_t chunks = (count + kChunk - 1) / kChunk;
  uint32_t chunks_end = chunks;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, chunks_end, offset);
    if (lane >= offset) chunks_end += other;
  }
  const uint32_t all_chunks = __shfl_sync(0xFFFFFFFFu, chunks_end, 31);
  // A warp loads together, of the chunks from `first` on, one a thread: the entries from `begin` on
  auto load = [&](uint32_t first, uint32_t begin, auto count_of) {
    constexpr int kCount = decltype(count_of)::value;
    Entries<kCount> entries{};
    const uint32_t chunk = first + threadIdx.x;
    for (int other = 0; other < p.splits - 1; ++other) {
      entries.split += chunk >= __shfl_sync(0xFFFFFFFFu, chunks_end, other);
    }
    const uint32_t size = __shfl_sync(0xFFFFFFFFu, count, entries.split);
    const uint32_t in_list =
        (chunk - __shfl_sync(0xFFFFFFFFu, chunks_end - chunks, entries.split)) * kChunk + begin;
    if (chunk >= all_chunks) return entries;
    const int64_t place = static_cast<int64_t>(slot * p.splits + entries.split) * capacity + in_list;
    load_words(entries.key, p.list_scores + place);
    load_words(entries.packed, reinterpret_cast<const uint32_t*>(p.list_positions + place));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      entries.key[i] = in_list + i < size ? order_key(__uint_as_float(entries.key[i])) : 0;
    }
    return entries;
  };
  // Calls visit(key, position of no arguments) for each
  auto visit_each = [&](const auto& entries, auto&& visit) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(entries.key) / sizeof(uint32_t)); ++i) {
      if (entries.key[i] != 0) visit(entries.key[i], [&] { return entries.position(p.in_splits, i); });
    }
  };
  const auto has_chunks = [&](uint32_t first) { return first + threadIdx.x - lane < all_chunks; };
  // Reads the chunks from `first` on, kCount entries at a time, and visits them
  auto for_each_read = [&](uint32_t first, auto count_of, auto&& visit) {
    constexpr int kCount = decltype(count_of)::value;
#pragma unroll 1
    for (; has_chunks(first); first += kFinalThreads) {
#pragma unroll 1
      for (int begin = 0; begin < kChunk; begin += kCount) {
        visit_each(load(first, begin, count_of), visit);
      }
    }
  };
  using WholeChunk = std::integral_constant<int, kChunk>;
  Entries<kChunk> own[kOwnChunks] = {};
  // Positions are needed late, and keys once more where the search is long: they wait in shared memory
  auto* const parked = reinterpret_cast<uint4*>(chosen) + threadIdx.x;
  auto parked_at = [&](int j, int part) -> uint4& { return parked[(3 * j + part) * kFinalThreads]; };
#pragma unroll
  for (int j = 0; j < kOwnChunks; ++j) {
    if (!has_chunks(j * kFinalThreads)) continue;
    own[j] = load(j * kFinalThreads, 0, WholeChunk{});
    const auto& [key, packed, split] = own[j];
    parked_at(j, 0) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    parked_at(j, 1) = make_uint4(key[0], key[1], key[2], key[3]);
    parked_at(j, 2) = make_uint4(key[4], key[5], key[6], key[7]);
  }
  auto read_others = [&](auto&& visit) {
    for_each_read(kOwnChunks * kFinalThreads, std::integral_constant<int, 2>{}, visit);  // as registers are taken
  };
  auto for_each_entry = [&](auto&& visit) {
#pragma unroll
    for (int j = 0; j < kOwnChunks; ++j) {
      load_words(own[j].packed, reinterpret_cast<const uint32_t*>(&parked_at(j, 0)));
      visit_each(own[j], visit);
    }
    read_others(visit);
  };
  // The same, for passes of a search that may be many
  auto for_each_parked = [&](auto&& visit) {
#pragma unroll
    for (int j = 0; j < kOwnChunks; ++j) {
      if (!has_chunks(j * kFinalThreads)) continue;
      const uint4 packed = parked_at(j, 0), low = parked_at(j, 1), high = parked_at(j, 2);
      const Entries<kChunk> entries{{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w},
                                    {packed.x, packed.y, packed.z, packed.w},
                                    own[j].split};
      visit_each(entries, visit);
    }
    read_others(visit);
  };
  auto value_of = [](uint32_t key, uint32_t position) {
    return static_cast<uint64_t>(key) << 32 | (0xFFFFFFFFu - position);
  };

  // The cut lies not far above a threshold, as the lists keep little more than the k best. Without one they keep all keys
  const ScoreBins bins = isfinite(threshold) ? ScoreBins::above(threshold) : ScoreBins::of_all_scores();
  __syncthreads();  // bins are empty
  for_each_entry([&](uint32_t key, auto) { atomicAdd(&sh.scratch.bins[bins.of(key)], 1u); });
  __syncthreads();
  choose_bin<kFinalThreads>(p.k, sh.scratch);
  const Cut start = cut_of_bin(bins, p.k, sh.scratch);

  // A bit of each selected position
  auto set_bit = [&](uint32_t at) {
    if (at < kWindow) atomicOr(&sh.words[at / 32], 1u << at % 32);
  };
  uint64_t cut = start.low;
  if (start.inside <= kFewValues) {
    // Those of the bin are ranked among themselves; they wait where the bins were
    auto* const few = reinterpret_cast<uint64_t*>(sh.scratch.bins);
    const auto low = static_cast<uint32_t>(start.low >> 32), high = static_cast<uint32_t>(start.low + start.span >> 32);
    for_each_entry([&](uint32_t key, auto position) {
      if (key < low) return;
      const uint32_t at = position();
      if (key > high) {
        set_bit(at);
      } else {
        few[atomicAdd(&sh.few_count, 1u)] = value_of(key, at);
      }
    });
    __syncthreads();
    if (threadIdx.x < start.inside) {
      const uint64_t value = few[threadIdx.x];
      uint32_t larger = 0;
#pragma unroll 4
      for (uint32_t i = 0; i < start.inside; ++i) larger += few[i] > value;
      if (larger < start.need) set_bit(position_of(value));
      if (larger == start.need - 1) sh.cut = value;
    }
    __syncthreads();
    cut = sh.cut;
  } else {
    select_sync<kFinalThreads>();
    cut = end_search<kFinalThreads>(
        start,
        [&](auto&& visit) {
          for_each_parked([&](uint32_t key, auto position) { visit(value_of(key, position())); });
        },
        sh.scratch);
    for_each_parked([&](uint32_t key, auto position) {
      const uint32_t at = position();
      if (value_of(key, at) >= cut) set_bit(at);
    });
    __syncthreads();
  }

  // Ascending positions: a thread lists those of its own words behind those of the threads before it
  uint32_t earlier = 0;  // in earlier windows
#pragma unroll 1
  for (uint32_t window = 0; window < static_cast<uint32_t>(visible); window += kWindow) {
    if (window > 0) {
      __syncthreads();
      clear_words();
      __syncthreads();
      // all anew, as chosen positions are where entries were
      for_each_read(0, std::integral_constant<int, 4>{}, [&](uint32_t key, auto position) {
        const uint32_t at = position();
        if (value_of(key, at) >= cut) set_bit(at - window);
      });
      __syncthreads();
    }
    int own_words = kWindowWords / kFinalThreads;
    while (own_words > 4 && visible - window <= 16 * own_words * kFinalThreads) own_words /= 2;
    auto four_words = [&](int i) { return *reinterpret_cast<const uint4*>(&sh.words[threadIdx.x * own_words + i]); };
    uint32_t sum = 0, all;
#pragma unroll 1
    for (int i = 0; i < own_words; i += 4) {
      const uint4 four = four_words(i);
      sum += __popc(four.x) + __popc(four.y) + __popc(four.z) + __popc(four.w);
    }
    uint32_t place = earlier + block_exclusive_sum<kFinalThreads>(sum, sh.scratch.warp_sums, all);
    earlier += all;
    if (sum == 0) continue;
#pragma unroll 1
    for (int i = 0; i < own_words; i += 4) {
      const uint4 four = four_words(i);
      const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t first = window + (threadIdx.x * own_words + i + j) * 32;
#pragma unroll 1
        for (uint32_t bits = words[j]; bits != 0; bits &= bits - 1) chosen[place++] = first + __ffs(bits) - 1;
      }
    }
  }
  __syncthreads();
#pragma unroll 2
  for (int i = threadIdx.x; i < p.k; i += kFinalThreads) out[i] = static_cast<int32_t>(chosen[i]);
}

constexpr int kUndecidedThreads = 512;

// Lists every scored row as undecided, for a k that lists are not kept for; the other rows are written.
__global__ __launch_bounds__(kUndecidedThreads) void undecided_kernel(const __grid_constant__ Params p) {
  const int slot = blockIdx.x;
  const int row = p.row_begin + slot;
  const int visible = p.rows.visible[row];
  const bool scored = visible >= p.scored_from && visible < p.scored_to;
  if (threadIdx.x == 0) {
    p.undecided[slot] = scored ? row : -1;
    if (slot == 0) {
      *p.undecided_count = p.num_rows;
      *p.arrived = 0;
    }
  }
  if (scored || visible < p.written_from || visible >= p.scored_to) return;
  int32_t* out = p.out + row * p.out_row_stride;
  for (int i = threadIdx.x; i < p.k; i += kUndecidedThreads) out[i] = i < visible ? i : -1;
}

// ---------------------------------------------------------------- plan: how a call is cut into launches

// Bytes of lists, samples or dense scores; a single row's dense scores may need more. 2048 rows have room for the lists
// of k = 2048, as long as four blocks share a row's keys
constexpr int64_t kRegionBytes = 60ll << 20;
constexpr int64_t kEntryBytes = sizeof(uint32_t) + sizeof(uint16_t);  // of a list: a score and a position
constexpr int64_t kMostOfSplit = 1 << 16;  // keys whose positions have 16 bits
constexpr int kMinSamples = 1024;
constexpr int kMaxSamples = 12288;
// Samples aimed at among the k best: 64 make lists of 1.6 k entries; k / 32 cost 1 / 32 of the scoring
constexpr int64_t kSampledBest = 64;
constexpr int64_t kSampledShare = 32;
// What a block does besides its pages (queries, pipeline fill), and a launch besides its blocks, in pages
constexpr int kItemOverheadPages = 6;
constexpr int kLaunchOverheadPages = 30;
// A list has room for so many standard deviations more than it is expected to get.
constexpr double kListMargin = 5.0;

struct Plan {
  int launch_rows;  // rows whose lists are collected by one launch
  int group_rows;   // rows whose thresholds are found together, of whole launches
  int splits;
  int sample_splits;
  int list_capacity;  // 0: no lists, every row goes through its dense scores
  int num_samples;
  int keep_all;
  int dense_rows;
  int64_t dense_stride;
};

int padded_heads(int64_t heads) {
  int padded = 4;
  while (padded < heads) padded *= 2;
  return padded;
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Pages one multiprocessor goes through if `splits` blocks share each tile.
int64_t split_time(int64_t tiles, int64_t pages, int splits, int multiprocessors) {
  return ceil_div(tiles * splits, multiprocessors) * (ceil_div(pages, splits) + kItemOverheadPages);
}

int best_splits(int64_t tiles, int64_t pages, int multiprocessors, int64_t least = 1) {
  int best = static_cast<int>(std::min<int64_t>(least, kMaxSplits));
  for (int splits = best + 1; splits <= kMaxSplits; ++splits) {
    if (split_time(tiles, pages, splits, multiprocessors) < split_time(tiles, pages, best, multiprocessors)) {
      best = splits;
    }
  }
  return best;
}

Plan make_plan(int64_t rows, int64_t heads, int64_t k, int64_t max_visible, int multiprocessors) {
  const int64_t tile_rows = kGroups * kColumns / padded_heads(heads);
  const int64_t pages = std::max<int64_t>(1, ceil_div(max_visible, kPageTokens));
  const int64_t dense_stride = pages * kPageTokens;
  // Of a sample of n keys, k n / N belong to the k best of N, give or take the root of that
  const int64_t wanted = std::max(ceil_div(kSampledBest * max_visible, k), max_visible / kSampledShare);
  const int64_t samples =
      round_up(std::min<int64_t>(std::max<int64_t>(wanted, kMinSamples), kMaxSamples), kPageTokens);
  const double best_sampled = static_cast<double>(k) * samples / std::max<int64_t>(max_visible, 1);
  const double rank = best_sampled + kSampleMargin * std::sqrt(best_sampled);
  const double kept = k * rank / best_sampled;

  Plan best{};
  int64_t best_time = INT64_MAX;
  const int64_t all_tiles = ceil_div(rows, tile_rows);
  for (int64_t tiles = std::min<int64_t>(all_tiles, kMaxLaunchRows / tile_rows); tiles >= 1; --tiles) {
    Plan plan{};
    plan.launch_rows = static_cast<int>(tiles * tile_rows);
    plan.splits = best_splits(tiles, pages, multiprocessors, ceil_div(pages * kPageTokens, kMostOfSplit));
    const int64_t all_of_split = ceil_div(pages, plan.splits) * kPageTokens;
    // the sampled rank varies, and so does what a split gets of the keys above it
    const double share = kept / plan.splits;
    const double deviation = std::sqrt(share * share / rank + share);
    const int64_t capacity = round_up(static_cast<int64_t>(share + kListMargin * deviation), 16);
    plan.num_samples = capacity < all_of_split ? static_cast<int>(samples) : 0;
    plan.list_capacity = static_cast<int>(std::min(capacity, all_of_split));
    if (static_cast<int64_t>(plan.list_capacity) * plan.splits > kMostEntries || k > kMostSelected ||
        all_of_split > kMostOfSplit) {
      plan.list_capacity = plan.num_samples = 0;
    }
    const int64_t row_bytes = std::max<int64_t>(
        static_cast<int64_t>(plan.list_capacity) * plan.splits * kEntryBytes, plan.num_samples * sizeof(float));
    if (row_bytes * plan.launch_rows > kRegionBytes) continue;
    const int64_t time = ceil_div(all_tiles, tiles) *
                         (split_time(tiles, pages, plan.splits, multiprocessors) + kLaunchOverheadPages);
    if (time >= best_time) continue;
    best_time = time;
    const auto sample_bytes = static_cast<int64_t>(plan.num_samples * sizeof(float));
    const int64_t sampled_rows = sample_bytes == 0 ? kMaxLaunchRows : kRegionBytes / sample_bytes;
    const int64_t together = std::max<int64_t>(1, std::min<int64_t>(sampled_rows, kMaxLaunchRows) / plan.launch_rows);
    plan.group_rows = static_cast<int>(together * plan.launch_rows);
    const int64_t sampled_tiles = std::min(all_tiles, together * tiles);
    plan.sample_splits = best_splits(sampled_tiles, plan.num_samples / kPageTokens, multiprocessors);
    plan.keep_all = plan.list_capacity / kPageTokens * plan.splits * kPageTokens;
    plan.dense_stride = dense_stride;
    int64_t dense_rows = std::max<int64_t>(1, kRegionBytes / (dense_stride * static_cast<int64_t>(sizeof(float))));
    dense_rows = std::min<int64_t>(plan.launch_rows, dense_rows);
    if (dense_rows > tile_rows) dense_rows = dense_rows / tile_rows * tile_rows;
    plan.dense_rows = static_cast<int>(dense_rows);
    best = plan;
  }
  return best;
}

Splits splits_of(int splits) {
  Splits made{0, static_cast<uint32_t>(splits), 0, 0};
  while (made.odd % 2 == 0) {
    made.odd /= 2;
    ++made.shift;
  }
  made.reciprocal = ((1u << 16) + made.odd - 1) / made.odd;
  while (1024 * made.inverse % made.odd != 1 % made.odd) ++made.inverse;
  return made;
}

// Every layer of a step asks for the same plan, and making one takes longer than a launch.
const Plan& cached_plan(int64_t rows, int64_t heads, int64_t k, int64_t max_visible, int multiprocessors) {
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int>;
  thread_local Key key{-1, 0, 0, 0, 0};
  thread_local Plan plan;
  const Key wanted{rows, heads, k, max_visible, multiprocessors};
  if (wanted != key) {
    plan = make_plan(rows, heads, k, max_visible, multiprocessors);
    key = wanted;
  }
  return plan;
}

// Where a launch's arrays lie in the workspace.
struct Layout {
  int64_t threshold, last_tie, counts, undecided, bytes;
};

Layout workspace_layout(int64_t max_visible) {
  Layout layout;
  layout.threshold = std::max<int64_t>(kRegionBytes, round_up(max_visible, kPageTokens) * sizeof(float));
  layout.last_tie = layout.threshold + kMaxLaunchRows * sizeof(float);
  layout.counts = layout.last_tie + kMaxLaunchRows * sizeof(int32_t);
  layout.undecided = layout.counts + kMaxLaunchRows * kMaxSplits * sizeof(uint32_t);
  layout.bytes = layout.undecided + (kMaxLaunchRows + 2) * sizeof(uint32_t);
  return layout;
}

// ---------------------------------------------------------------- launches

int multiprocessor_count(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return count;
}

template <typename... Args>
void launch(void (*kernel)(Args...), int blocks, int threads, size_t shared, cudaStream_t stream,
            cudaLaunchAttributeID attribute, const std::common_type_t<Args>&... args) {
  cudaLaunchAttribute attrs[1]{};
  attrs[0].id = attribute;
  if (attribute == cudaLaunchAttributeCooperative) {
    attrs[0].val.cooperative = 1;
  } else {
    attrs[0].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attrs;
  config.numAttrs = 1;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
             "shared memory of the prefill kernels");
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "prefill selection");
}

// Its blocks may start before the previous kernel has ended: they wait for it where they need it.
constexpr cudaLaunchAttributeID kOverlaps = cudaLaunchAttributeProgrammaticStreamSerialization;
// Its blocks all run at the same time.
constexpr cudaLaunchAttributeID kTogether = cudaLaunchAttributeCooperative;

template <int kOwnChunks>
void launch_final(const Params& p, cudaStream_t stream) {
  const size_t own_bytes = kFinalThreads * kOwnChunks * kChunk * (sizeof(uint32_t) + sizeof(uint16_t));
  const size_t shared = std::max(own_bytes, p.k * sizeof(uint32_t));
  launch(final_kernel<kOwnChunks>, p.num_rows, kFinalThreads, shared, stream, kOverlaps, p);
}

template <int kHeads>
void run(const Params& common, const Plan& plan, int64_t rows, const CUtensorMap& page_map, int multiprocessors,
         cudaStream_t stream) {
  constexpr int kTileRows = Tile<kHeads>::kQueries;
  constexpr size_t kShared = sizeof(Shared<kHeads>);
  for (int64_t begin = 0; begin < rows; begin += plan.group_rows) {
    Params group = common;
    group.row_begin = static_cast<int>(begin);
    group.num_rows = static_cast<int>(std::min<int64_t>(plan.group_rows, rows - begin));
    if (plan.list_capacity > 0) {
      if (group.num_samples > 0) {
        group.splits = plan.sample_splits;
        const int items = static_cast<int>(ceil_div(group.num_rows, kTileRows)) * group.splits;
        launch(score_kernel<kHeads, Mode::kSample>, std::min(items, multiprocessors), kThreads, kShared, stream,
               kOverlaps, page_map, group);
      }
      launch(threshold_kernel, group.num_rows, kThresholdThreads, group.num_samples * sizeof(uint32_t), stream,
             kOverlaps, group);
      for (int first = 0; first < group.num_rows; first += plan.launch_rows) {
        Params p = common;
        p.row_begin = group.row_begin + first;
        p.num_rows = std::min(plan.launch_rows, group.num_rows - first);
        p.threshold += first;
        p.last_tie += first;
        const int items = static_cast<int>(ceil_div(p.num_rows, kTileRows)) * p.splits;
        launch(score_kernel<kHeads, Mode::kCollect>, std::min(items, multiprocessors), kThreads, kShared, stream,
               kOverlaps, page_map, p);
        if (p.list_capacity * p.splits <= kFewEntries) {
          launch_final<1>(p, stream);
        } else {
          launch_final<kMoreChunks>(p, stream);
        }
      }
    } else {
      launch_simple("prefill selection", undecided_kernel, dim3(group.num_rows), kUndecidedThreads, stream, group);
    }
    group.splits =
        best_splits(ceil_div(group.dense_rows, kTileRows), group.dense_stride / kPageTokens, multiprocessors);
    launch(repair_kernel<kHeads>, multiprocessors, kThreads, kShared, stream, kTogether, page_map, group);
  }
}

// Calls `work` with the template argument for `heads` columns per query.
template <typename Work>
void for_heads(int heads, Work&& work) {
  switch (heads) {
    case 4:
      return work(std::integral_constant<int, 4>{});
    case 8:
      return work(std::integral_constant<int, 8>{});
    case 16:
      return work(std::integral_constant<int, 16>{});
    case 32:
      return work(std::integral_constant<int, 32>{});
    default:
      return work(std::integral_constant<int, 64>{});
  }
}

// ---------------------------------------------------------------- operators

Params make_params(const Tensor& q, const Tensor& gates, const std::optional<Tensor>& heads, const Tensor& index_cache,
                   const Tensor& block_table, const Tensor& request, const Tensor& visible) {
  Params p{};
  p.cache = index_cache_of(index_cache, false);
  p.rows = rows_of(block_table, request, visible);
  p.heads_per_row = check_queries(q, gates, p.rows);
  if (heads.has_value()) {
    check_tensor(*heads, "heads", ScalarType::Int, 2);
    STD_TORCH_CHECK(heads->size(0) == p.rows.count && heads->size(1) >= 1 && heads->size(1) <= p.heads_per_row,
                    "heads must be [", p.rows.count, ", h] with h from 1 to ", p.heads_per_row);
    p.heads = static_cast<const int32_t*>(heads->data_ptr());
    p.heads_row_stride = heads->stride(0);
    p.heads_per_row = static_cast<int>(heads->size(1));
  }
  p.q = static_cast<const uint8_t*>(q.data_ptr());
  p.q_row_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.gates = static_cast<const float*>(gates.data_ptr());
  p.gates_row_stride = gates.stride(0);
  return p;
}

// Bytes of workspace that `prefill_select` needs for any number of rows that see at most `max_visible` keys.
int64_t workspace_bytes(int64_t max_visible) { return workspace_layout(max_visible).bytes; }

void prefill_select(Tensor q, Tensor gates, std::optional<Tensor> heads, Tensor index_cache, Tensor block_table,
                    Tensor request, Tensor visible, int64_t max_visible, int64_t k, Tensor out, int64_t visible_from,
                    int64_t visible_to, Tensor workspace) {
  Params p = make_params(q, gates, heads, index_cache, block_table, request, visible);
  check_tensor(out, "out", ScalarType::Int, 2);
  check_tensor(workspace, "workspace", ScalarType::Byte, 1);
  const int64_t rows = p.rows.count;
  STD_TORCH_CHECK(max_visible <= kMostKeys, "prefill_select: rows may see at most ", kMostKeys, " keys, not ",
                  max_visible);
  STD_TORCH_CHECK(k >= 1 && out.size(0) == rows && out.size(1) >= k, "out must be [", rows, ", at least k = ", k, "]");
  if (rows == 0) return;
  const int multiprocessors = multiprocessor_count(q.get_device_index());
  const Plan& plan = cached_plan(rows, p.heads_per_row, k, max_visible, multiprocessors);
  const Layout layout = workspace_layout(max_visible);
  STD_TORCH_CHECK(workspace.size(0) >= layout.bytes && reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16 == 0,
                  "workspace: ", layout.bytes, " bytes at a multiple of 16 are needed, it has ", workspace.size(0));
  auto* base = static_cast<uint8_t*>(workspace.data_ptr());
  p.written_from = static_cast<int>(visible_from);
  p.scored_from = static_cast<int>(std::min<int64_t>(std::max(visible_from, k + 1), INT32_MAX));
  p.scored_to = static_cast<int>(std::min<int64_t>(visible_to, INT32_MAX));
  p.k = static_cast<int>(k);
  p.splits = plan.splits;
  p.threshold = reinterpret_cast<float*>(base + layout.threshold);
  p.last_tie = reinterpret_cast<int32_t*>(base + layout.last_tie);
  p.counts = reinterpret_cast<uint32_t*>(base + layout.counts);
  p.undecided = reinterpret_cast<int32_t*>(base + layout.undecided);
  p.undecided_count = reinterpret_cast<uint32_t*>(p.undecided + kMaxLaunchRows);
  p.arrived = p.undecided_count + 1;
  p.list_scores = reinterpret_cast<uint32_t*>(base);
  p.list_positions = reinterpret_cast<uint16_t*>(
      p.list_scores + static_cast<int64_t>(plan.launch_rows) * plan.splits * plan.list_capacity);
  p.list_capacity = plan.list_capacity;
  p.in_splits = splits_of(plan.splits);
  p.keep_all = plan.keep_all;
  p.samples = reinterpret_cast<float*>(base);
  p.num_samples = plan.num_samples;
  p.dense = reinterpret_cast<float*>(base);
  p.dense_stride = static_cast<uint32_t>(plan.dense_stride);
  p.dense_rows = plan.dense_rows;
  p.out = static_cast<int32_t*>(out.data_ptr());
  p.out_row_stride = out.stride(0);
  const CUtensorMap page_map = key_page_map(p.cache);
  const cudaStream_t stream = current_stream(q);
  for_heads(padded_heads(p.heads_per_row), [&](auto padded) {
    run<decltype(padded)::value>(p, plan, rows, page_map, multiprocessors, stream);
  });
}

// The scores themselves, out [M, N] float32; keys a row does not see are left as they are. For tests: the bits are
// those that `prefill_select` ranks.
void prefill_scores(Tensor q, Tensor gates, std::optional<Tensor> heads, Tensor index_cache, Tensor block_table,
                    Tensor request, Tensor visible, Tensor out) {
  Params p = make_params(q, gates, heads, index_cache, block_table, request, visible);
  check_tensor(out, "out", ScalarType::Float, 2);
  const int64_t rows = p.rows.count;
  STD_TORCH_CHECK(out.size(0) == rows, "out must have ", rows, " rows");
  if (rows == 0) return;
  p.num_rows = static_cast<int>(rows);
  p.scored_from = 1;
  p.scored_to = static_cast<int>(std::min<int64_t>(out.size(1), INT32_MAX - 1)) + 1;
  p.splits = 4;
  STD_TORCH_CHECK(rows * out.stride(0) <= UINT32_MAX, "out must have fewer than 2^32 elements");
  p.dense = static_cast<float*>(out.data_ptr());
  p.dense_stride = static_cast<uint32_t>(out.stride(0));
  const CUtensorMap page_map = key_page_map(p.cache);
  for_heads(padded_heads(p.heads_per_row), [&](auto padded) {
    constexpr int kHeads = decltype(padded)::value;
    const int64_t items = ceil_div(rows, Tile<kHeads>::kQueries) * p.splits;
    const int blocks = static_cast<int>(std::min<int64_t>(items, multiprocessor_count(q.get_device_index())));
    launch(score_kernel<kHeads, Mode::kDense>, blocks, kThreads, sizeof(Shared<kHeads>), current_stream(q), kOverlaps,
           page_map, p);
  });
}

}  // namespace
}  // namespace misa::prefill

STABLE_TORCH_LIBRARY_FRAGMENT(misa_vllm, library) {
  library.def(
      "prefill_select(Tensor q, Tensor gates, Tensor? heads, Tensor index_cache, Tensor block_table, Tensor request, "
      "Tensor visible, int max_visible, int k, Tensor(a!) out, int visible_from, int visible_to, "
      "Tensor(b!) workspace) -> ()");
  library.def(
      "prefill_scores(Tensor q, Tensor gates, Tensor? heads, Tensor index_cache, Tensor block_table, Tensor request, "
      "Tensor visible, Tensor(a!) out) -> ()");
  library.def("prefill_workspace_bytes(int max_visible) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CUDA, library) {
  library.impl("prefill_select", TORCH_BOX(&misa::prefill::prefill_select));
  library.impl("prefill_scores", TORCH_BOX(&misa::prefill::prefill_scores));
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CompositeExplicitAutograd, library) {
  library.impl("prefill_workspace_bytes", TORCH_BOX(&misa::prefill::workspace_bytes));
}
