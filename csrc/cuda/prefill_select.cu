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
// Entries of a row that the final kernel holds in shared memory
constexpr int kMostEntries = 24576;
// Up to so many of them, several blocks share a multiprocessor
constexpr int kFewEntries = 8192;
constexpr int kFinalThreads = 512;
constexpr int kManyFinalThreads = 1024;
// Positions that have a bit each in shared memory at a time
constexpr int kWindow = 1 << 17;
constexpr int kWindowWords = kWindow / 32;
// Bits of a window are counted in 16 bits
constexpr int kMostSelected = 16384;

struct FinalShared {
  union {
    SelectScratch scratch;
    struct {
      alignas(8) uint16_t bits_before[kWindowWords];
      uint32_t window_sums[32];
    };
  };
  alignas(16) uint32_t words[kWindowWords];
  uint32_t few_count;
};

// One block per slot: writes the row's selection, ascending, or lists the row as undecided if one of its lists
// overflowed or the threshold let fewer than k keys pass.
template <int kBlockThreads>
__global__ __launch_bounds__(kBlockThreads, kBlockThreads == kFinalThreads ? 3 : 1)
void final_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) uint32_t entries[];
  __shared__ FinalShared sh;
  const int lane = threadIdx.x % 32;
  const int slot = blockIdx.x;
  const int row = p.row_begin + slot;
  for (int i = threadIdx.x; i < kWindowWords / 4; i += kBlockThreads) {
    reinterpret_cast<uint4*>(sh.words)[i] = make_uint4(0, 0, 0, 0);
  }
  for (int i = threadIdx.x; i < kSelectBins / 4; i += kBlockThreads) {
    reinterpret_cast<uint4*>(sh.scratch.bins)[i] = make_uint4(0, 0, 0, 0);
  }
  if (threadIdx.x == 0) sh.few_count = 0;
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const int visible = p.rows.visible[row];
  if (visible < p.written_from || visible >= p.scored_to) return;
  int32_t* out = p.out + row * p.out_row_stride;
  if (visible < p.scored_from) {
    for (int i = threadIdx.x; i < p.k; i += kBlockThreads) out[i] = i < visible ? i : -1;
    return;
  }

  // Lane s of every warp knows list s
  const uint32_t capacity = p.list_capacity;
  const uint32_t count = lane < p.splits ? p.counts[static_cast<int64_t>(slot) * p.splits + lane] : 0;
  const float threshold = p.threshold[slot];
  const bool overflow = __any_sync(0xFFFFFFFFu, count > capacity);
  const uint32_t total = __reduce_add_sync(0xFFFFFFFFu, count);
  if (overflow || total < static_cast<uint32_t>(p.k)) {
    if (threadIdx.x == 0) p.undecided[atomicAdd(p.undecided_count, 1u)] = row;
    return;
  }

  // A thread takes eight entries of one list at a time. In shared memory lists are multiples of as many; what fills them
  // up is no entry.
  constexpr uint32_t kNowhere = 0xFFFFFFFFu;  // past any window
  uint32_t* const keys = entries;
  uint32_t* const positions = entries + p.splits * capacity;
  const uint32_t chunks = (count + 7) / 8;
  uint32_t chunks_end = chunks;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, chunks_end, offset);
    if (lane >= offset) chunks_end += other;
  }
  const uint32_t all_chunks = __shfl_sync(0xFFFFFFFFu, chunks_end, 31), stored = 8 * all_chunks;
  // The cut lies not far above a threshold, as the lists keep little more than the k best
  const ScoreBins bins = isfinite(threshold) ? ScoreBins::above(threshold) : ScoreBins::of_any_scores();
  __syncthreads();  // bins are empty
  for (uint32_t first = 0; first < all_chunks; first += kBlockThreads) {
    const uint32_t chunk = first + threadIdx.x;
    uint32_t split = 0;
    for (int other = 0; other < p.splits - 1; ++other) split += chunk >= __shfl_sync(0xFFFFFFFFu, chunks_end, other);
    const uint32_t size = __shfl_sync(0xFFFFFFFFu, count, split);
    const uint32_t in_list = (chunk - __shfl_sync(0xFFFFFFFFu, chunks_end - chunks, split)) * 8;
    if (chunk >= all_chunks) break;
    const int64_t place = static_cast<int64_t>(slot * p.splits + split) * capacity + in_list;
    const auto* scores = reinterpret_cast<const uint4*>(p.list_scores + place);
    const uint4 low = scores[0], high = scores[1];
    const uint4 pairs = *reinterpret_cast<const uint4*>(p.list_positions + place);
    uint32_t key[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    uint32_t position[8] = {pairs.x & 0xFFFF, pairs.x >> 16, pairs.y & 0xFFFF, pairs.y >> 16,
                            pairs.z & 0xFFFF, pairs.z >> 16, pairs.w & 0xFFFF, pairs.w >> 16};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool exists = in_list + i < size;
      key[i] = exists ? order_key(__uint_as_float(key[i])) : 0;
      position[i] = exists ? p.in_splits.unpack(position[i], split) : kNowhere;
      if (exists) atomicAdd(&sh.scratch.bins[bins.of(key[i])], 1u);
    }
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      *reinterpret_cast<uint4*>(keys + 8 * chunk + i) = make_uint4(key[i], key[i + 1], key[i + 2], key[i + 3]);
      *reinterpret_cast<uint4*>(positions + 8 * chunk + i) =
          make_uint4(position[i], position[i + 1], position[i + 2], position[i + 3]);
    }
  }
  __syncthreads();
  choose_bin<kBlockThreads>(p.k, sh.scratch);
  const Cut start = cut_of_bin(bins, p.k, sh.scratch);

  // A bit of each selected position; an entry that is not selected gets a position past any window
  auto value_at = [&](uint32_t i) { return (static_cast<uint64_t>(keys[i]) << 32) | (0xFFFFFFFFu - positions[i]); };
  auto set_bit = [&](uint32_t at) {
    if (at < kWindow) atomicOr(&sh.words[at / 32], 1u << at % 32);
  };
  if (!start.done && start.inside <= kFewValues) {
    // Those of the bin are ranked among themselves; until then they wait where the bins were
    auto* const few = reinterpret_cast<uint64_t*>(sh.scratch.bins);
    uint32_t* const few_entries = sh.scratch.bins + 2 * kFewValues;
#pragma unroll 2
    for (uint32_t i = threadIdx.x; i < stored; i += kBlockThreads) {
      const uint64_t value = value_at(i), offset = value - start.low;
      if (value < start.low) {
        positions[i] = kNowhere;
      } else if (offset <= start.span) {
        const uint32_t place = atomicAdd(&sh.few_count, 1u);
        few[place] = value;
        few_entries[place] = i;
      } else {
        set_bit(position_of(value));
      }
    }
    __syncthreads();
    if (threadIdx.x < start.inside) {
      const uint64_t own = few[threadIdx.x];
      uint32_t larger = 0;
#pragma unroll 4
      for (uint32_t i = 0; i < start.inside; ++i) larger += few[i] > own;
      if (larger < start.need) {
        set_bit(position_of(own));
      } else {
        positions[few_entries[threadIdx.x]] = kNowhere;
      }
    }
  } else {
    select_sync<kBlockThreads>();
    const uint64_t cut = end_search<kBlockThreads>(
        start,
        [&](auto&& visit) {
#pragma unroll 2
          for (uint32_t i = threadIdx.x; i < stored; i += kBlockThreads) visit(value_at(i));
        },
        sh.scratch);
    for (uint32_t i = threadIdx.x; i < stored; i += kBlockThreads) {
      const uint64_t value = value_at(i);
      if (value < cut) {
        positions[i] = kNowhere;
      } else {
        set_bit(position_of(value));
      }
    }
  }

  // Ascending positions: a selected one comes behind as many as there are bits before its own
  constexpr int kOwnWords = kWindowWords / kBlockThreads;
  static_assert(kOwnWords % 4 == 0 && kMostSelected <= 0xFFFF);
  uint32_t earlier = 0;  // in earlier windows
  for (uint32_t window = 0; window < static_cast<uint32_t>(visible); window += kWindow) {
    if (window > 0) {
      __syncthreads();
      for (int i = threadIdx.x; i < kWindowWords; i += kBlockThreads) sh.words[i] = 0;
      __syncthreads();
      for (uint32_t i = threadIdx.x; i < stored; i += kBlockThreads) set_bit(positions[i] - window);
    }
    __syncthreads();
    auto own_words = [&](int i) { return *reinterpret_cast<const uint4*>(&sh.words[threadIdx.x * kOwnWords + i]); };
    uint32_t sum = 0, all;
#pragma unroll
    for (int i = 0; i < kOwnWords; i += 4) {
      const uint4 four = own_words(i);
      sum += __popc(four.x) + __popc(four.y) + __popc(four.z) + __popc(four.w);
    }
    uint32_t before = block_exclusive_sum<kBlockThreads>(sum, sh.window_sums, all);
#pragma unroll
    for (int i = 0; i < kOwnWords; i += 4) {
      const uint4 four = own_words(i);
      const uint32_t second = before + __popc(four.x), third = second + __popc(four.y);
      const uint32_t fourth = third + __popc(four.z);
      *reinterpret_cast<uint2*>(&sh.bits_before[threadIdx.x * kOwnWords + i]) =
          make_uint2(before | second << 16, third | fourth << 16);
      before = fourth + __popc(four.w);
    }
    __syncthreads();
    // The selection takes the place of the entries' keys
#pragma unroll 2
    for (uint32_t i = threadIdx.x; i < stored; i += kBlockThreads) {
      const uint32_t position = positions[i], at = position - window;
      if (at < kWindow) {
        const uint32_t lower = sh.words[at / 32] & ((1u << at % 32) - 1);
        keys[earlier + sh.bits_before[at / 32] + __popc(lower)] = position;
      }
    }
    earlier += all;
  }
  __syncthreads();
#pragma unroll 2
  for (int i = threadIdx.x; i < p.k; i += kBlockThreads) out[i] = static_cast<int32_t>(keys[i]);
}

// Lists every scored row as undecided, for a k that lists are not kept for; the other rows are written.
__global__ __launch_bounds__(kFinalThreads) void undecided_kernel(const __grid_constant__ Params p) {
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
  for (int i = threadIdx.x; i < p.k; i += kFinalThreads) out[i] = i < visible ? i : -1;
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

void launch_final(const Params& p, cudaStream_t stream) {
  const int entries = p.list_capacity * p.splits;
  const size_t shared = entries * 2 * sizeof(uint32_t);
  if (entries <= kFewEntries) {
    launch(final_kernel<kFinalThreads>, p.num_rows, kFinalThreads, shared, stream, kOverlaps, p);
  } else {
    launch(final_kernel<kManyFinalThreads>, p.num_rows, kManyFinalThreads, shared, stream, kOverlaps, p);
  }
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
        launch_final(p, stream);
      }
    } else {
      launch_simple("prefill selection", undecided_kernel, dim3(group.num_rows), kFinalThreads, stream, group);
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
