// Exact selection by one block: the k largest of many distinct values, without sorting them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

namespace misa {

// Order-preserving image of a float: a < b iff key(a) < key(b); -0 equals +0 and every NaN is above +inf, as
// torch.sort has it.
__device__ __forceinline__ uint32_t order_key(float value) {
  if (isnan(value)) return 0xFFFFFFFFu;
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ __forceinline__ float float_of_order_key(uint32_t key) {
  return __uint_as_float(key ^ ((key >> 31) ? 0x80000000u : 0xFFFFFFFFu));
}

// A (score, position) pair as one number: a larger score first, of equal scores the lower position. Distinct
// positions make distinct numbers, which is what lets `kth_largest` be exact for any scores.
__device__ __forceinline__ uint64_t rank_value(float score, uint32_t position) {
  return (static_cast<uint64_t>(order_key(score)) << 32) | (0xFFFFFFFFu - position);
}

__device__ __forceinline__ uint32_t position_of(uint64_t rank_value) {
  return 0xFFFFFFFFu - static_cast<uint32_t>(rank_value);
}

constexpr int kSelectBinsLog2 = 11;
constexpr int kSelectBins = 1 << kSelectBinsLog2;

struct SelectScratch {
  alignas(16) uint32_t bins[kSelectBins];
  uint32_t warp_sums[32];
  uint32_t chosen_bin;
  uint32_t above;
  uint32_t inside;
  uint32_t least, most;
};

// Bins of scores for the first step of a search, ascending, by the upper bits of the order key. What lies beyond counts
// in the first bin or in the last.
struct ScoreBins {
  int shift, lowest;

  // For any scores: 1/64 octave from 2^-20 to 2^12.
  __device__ __forceinline__ static ScoreBins of_any_scores() {
    constexpr int kShift = 17;
    return {kShift, static_cast<int>((0x80000000u | (127 - 20) << 23) >> kShift)};
  }

  // For any scores, of either sign: 1/4 octave.
  __device__ __forceinline__ static ScoreBins of_all_scores() { return {32 - kSelectBinsLog2, 0}; }

  // For a cut that lies not far above `least`: 1/1024 octave from there on.
  __device__ __forceinline__ static ScoreBins above(float least) {
    constexpr int kShift = 13;
    return {kShift, static_cast<int>(order_key(least) >> kShift)};
  }

  __device__ __forceinline__ int of(uint32_t key) const {
    return min(max(static_cast<int>(key >> shift) - lowest, 0), kSelectBins - 1);
  }

  // The same for keys that do not lie below the first bin.
  __device__ __forceinline__ int of_not_below(uint32_t key) const {
    return static_cast<int>(min((key >> shift) - static_cast<uint32_t>(lowest), kSelectBins - 1u));
  }

  __device__ __forceinline__ uint32_t first_key(int bin) const { return max(static_cast<uint32_t>(begin(bin)), 1u); }
  __device__ __forceinline__ uint32_t last_key(int bin) const {
    return static_cast<uint32_t>(min(begin(bin + 1), static_cast<uint64_t>(1) << 32) - 1);
  }

  // The least key of a bin; of the one past the last, one more than any key.
  __device__ __forceinline__ uint64_t begin(int bin) const {
    if (bin == 0) return 0;
    if (bin == kSelectBins) return 1ull << 32;
    return static_cast<uint64_t>(lowest + bin) << shift;
  }
};

// A barrier of the block's first kThreads threads; the rest of the block takes no part in a selection.
template <int kThreads>
__device__ __forceinline__ void select_sync() {
  ptx::named_barrier_sync<7, kThreads>();
}

// Inclusive sum over a warp.
__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}

// Exclusive sum over the block's first kThreads threads, which all call it. `total` gets the sum of all.
template <int kThreads>
__device__ __forceinline__ uint32_t block_exclusive_sum(uint32_t value, uint32_t* warp_sums, uint32_t& total) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t inclusive = warp_inclusive_sum(value);
  if (lane == 31) warp_sums[warp] = inclusive;
  select_sync<kThreads>();
  const uint32_t sum = lane < kWarps ? warp_sums[lane] : 0;
  const uint32_t before = __reduce_add_sync(0xFFFFFFFFu, lane < warp ? sum : 0);
  total = __reduce_add_sync(0xFFFFFFFFu, sum);
  select_sync<kThreads>();
  return before + inclusive - value;
}

// The bounds of the values that decide a selection.
struct Cut {
  uint64_t low;  // every value >= low is selected, once the search has ended
  uint64_t span;  // the search goes on inside [low, low + span]
  uint32_t need;  // how many of the values in there are selected
  bool done;
  uint32_t inside = 0xFFFFFFFFu;  // how many values are in there, once a step has counted them
};

// Finds the bin that holds the `need`-th largest of the counted values: the results lie in `chosen_bin`, `above` and
// `inside` for all of the block's first kThreads threads, which take part. Returns how many values were counted. A
// barrier must precede, and another one the next change of the bins.
template <int kThreads>
__device__ __forceinline__ uint32_t choose_bin(uint32_t need, SelectScratch& scratch) {
  constexpr int kScanThreads = 256;
  constexpr int kBinsPerThread = kSelectBins / kScanThreads;
  uint32_t sum = 0;
  // opaque: a loop around this would keep all that follows from it in registers
  const int top = ptx::opaque(kSelectBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread);
  if (threadIdx.x < kScanThreads) {
#pragma unroll
    for (int i = 0; i < kBinsPerThread; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(&scratch.bins[top - i - 3]);
      sum += four.x + four.y + four.z + four.w;
    }
  }
  uint32_t total;
  uint32_t above = block_exclusive_sum<kThreads>(sum, scratch.warp_sums, total);
  if (threadIdx.x < kScanThreads && above < need && above + sum >= need) {
    // one thread: the counts are read again, not to take registers of all
    int bin = top;
    uint32_t inside = scratch.bins[bin];
#pragma unroll 1
    while (above + inside < need) {
      above += inside;
      inside = scratch.bins[--bin];
    }
    scratch.chosen_bin = bin;
    scratch.above = above;
    scratch.inside = inside;
  }
  select_sync<kThreads>();
  return total;
}

// The cut of rank values after a first step by `bins` of their upper halves that are not 0. choose_bin comes before.
__device__ __forceinline__ Cut cut_of_bin(const ScoreBins& bins, uint32_t need, const SelectScratch& scratch) {
  const int bin = static_cast<int>(scratch.chosen_bin);
  const uint64_t begin = max(bins.begin(bin), static_cast<uint64_t>(1)), end = bins.begin(bin + 1);
  Cut cut{begin << 32, ((end - begin) << 32) - 1, need - scratch.above, false, scratch.inside};
  cut.done = cut.inside == cut.need;
  return cut;
}

// One step of a search from the top by 2^11 bins over [low, low + span]: narrows the cut to the bin that holds the
// `need`-th largest value. for_each(visit) calls visit(value) for this thread's share of the values; the range holds
// at least `need` values. The block's first kThreads threads take part.
template <int kThreads, typename ForEach>
__device__ __forceinline__ Cut narrow_cut(Cut cut, ForEach&& for_each, SelectScratch& scratch) {
  static_assert(kThreads % 32 == 0);
  const int span_bits = cut.span == 0 ? 1 : 64 - __clzll(static_cast<long long>(cut.span));
  const int shift = max(0, span_bits - kSelectBinsLog2);
  for (int bin = threadIdx.x; bin < kSelectBins; bin += kThreads) scratch.bins[bin] = 0;
  select_sync<kThreads>();
  for_each([&](uint64_t value) {
    const uint64_t offset = value - cut.low;
    if (value >= cut.low && offset <= cut.span) atomicAdd(&scratch.bins[offset >> shift], 1u);
  });
  select_sync<kThreads>();
  choose_bin<kThreads>(cut.need, scratch);
  cut.low += static_cast<uint64_t>(scratch.chosen_bin) << shift;
  cut.span = (1ull << shift) - 1;
  cut.need -= scratch.above;
  cut.inside = scratch.inside;
  cut.done = cut.inside == cut.need || shift == 0;
  select_sync<kThreads>();
  return cut;
}

// Narrows a cut to the keys (upper halves) that values in it have, and to positions below `positions`: where very many
// keys are alike, a search goes on among few positions.
template <int kThreads, typename ForEach>
__device__ __forceinline__ Cut narrow_to_keys(Cut cut, uint32_t positions, ForEach&& for_each, SelectScratch& scratch) {
  if (threadIdx.x == 0) {
    scratch.least = 0xFFFFFFFFu;
    scratch.most = 0;
  }
  uint32_t least = 0xFFFFFFFFu, most = 0;
  for_each([&](uint64_t value) {
    if (value < cut.low || value - cut.low > cut.span) return;
    least = min(least, static_cast<uint32_t>(value >> 32));
    most = max(most, static_cast<uint32_t>(value >> 32));
  });
  least = __reduce_min_sync(0xFFFFFFFFu, least);
  most = __reduce_max_sync(0xFFFFFFFFu, most);
  select_sync<kThreads>();
  if (threadIdx.x % 32 == 0) {
    atomicMin(&scratch.least, least);
    atomicMax(&scratch.most, most);
  }
  select_sync<kThreads>();
  const uint64_t first = static_cast<uint64_t>(scratch.least) << 32 | (0u - positions);
  const uint64_t last = static_cast<uint64_t>(scratch.most) << 32 | 0xFFFFFFFFu;
  cut.low = first;
  cut.span = last - first;
  return cut;
}

constexpr uint32_t kFewValues = 128;

// Ends a search whose cut holds at most kFewValues values, by ranking those against each other.
template <int kThreads, typename ForEach>
__device__ __forceinline__ uint64_t rank_few(const Cut& cut, ForEach&& for_each, SelectScratch& scratch) {
  static_assert(kFewValues <= kThreads && (kFewValues + 1) * sizeof(uint64_t) <= sizeof(scratch.bins));
  auto* few = reinterpret_cast<uint64_t*>(scratch.bins);
  if (threadIdx.x == 0) scratch.inside = 0;
  select_sync<kThreads>();
  for_each([&](uint64_t value) {
    const uint64_t offset = value - cut.low;
    if (value >= cut.low && offset <= cut.span) few[atomicAdd(&scratch.inside, 1u)] = value;
  });
  select_sync<kThreads>();
  if (threadIdx.x < cut.inside) {
    const uint64_t own = few[threadIdx.x];
    uint32_t larger = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < cut.inside; ++i) larger += few[i] > own;
    if (larger == cut.need - 1) few[kFewValues] = own;
  }
  select_sync<kThreads>();
  const uint64_t low = few[kFewValues];
  select_sync<kThreads>();
  return low;
}

// Ends a search: the smallest value of the cut that is selected. `for_each` as in `narrow_cut`.
template <int kThreads, typename ForEach>
__device__ __forceinline__ uint64_t end_search(Cut cut, ForEach&& for_each, SelectScratch& scratch) {
  while (!cut.done) {
    if (cut.inside <= kFewValues) return rank_few<kThreads>(cut, for_each, scratch);
    cut = narrow_cut<kThreads>(cut, for_each, scratch);
  }
  return cut.low;
}

// As end_search after a first step, but returns the `need`-th largest value itself, not a bound below it.
template <int kThreads, typename ForEach>
__device__ __forceinline__ uint64_t last_selected(Cut cut, ForEach&& for_each, SelectScratch& scratch) {
  while (cut.inside > kFewValues) cut = narrow_cut<kThreads>(cut, for_each, scratch);
  return rank_few<kThreads>(cut, for_each, scratch);
}

// The smallest value `low` such that exactly k of the distinct values in [low, high] are >= it: the block selects
// values >= low. `for_each` as in `narrow_cut`; there are at least k values in [low, high].
template <int kThreads, typename ForEach>
__device__ __forceinline__ uint64_t kth_largest(uint64_t low, uint64_t high, uint32_t k, ForEach&& for_each,
                                                SelectScratch& scratch) {
  return end_search<kThreads>(Cut{low, high - low, k, false}, for_each, scratch);
}

}  // namespace misa
