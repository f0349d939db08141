// Exact top-k of keys that lie in the shared memory of a cluster's CTAs.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/select.cuh"

namespace misa {

constexpr int kMaxClusterCtas = 16;

/// Radix selection over order-preserving uint32 keys; key 0 means "none" and is never selected. All CTAs of the
/// cluster (or, with kCluster = false, one CTA on its own) and all their threads call each method together.
///
/// The k-th largest key is found digit by digit from the top: each CTA counts its keys by digit, the counts are
/// reduced over the cluster, and all CTAs walk the same totals. Of keys equal to the last one taken, those of lower
/// CTA rank, then lower index, are selected: no step depends on timing.
template <int kThreads, bool kCluster>
class TopK {
 public:
  static constexpr int kDigitBits = 11;
  static constexpr int kBins = 1 << kDigitBits;
  static constexpr int kFirstShift = 32 - kDigitBits;
  static constexpr int kWarps = kThreads / 32;

  struct alignas(16) Shared {
    uint32_t counts[kBins];  // this CTA's keys by digit
    uint32_t totals[kBins];  // the cluster's
    uint32_t warp_sums[2][kWarps];
    uint32_t cta_counts[kMaxClusterCtas][2];
    uint32_t digit, above, inside, total;
  };

  /// The selected keys: all above the cut, and the first `ties` of those in it.
  struct Cut {
    uint32_t low, high;  // the keys in the cut, both ends included
    uint32_t ties;
    uint32_t selected;

    __device__ bool above(uint32_t key) const { return key > high; }
    __device__ bool inside(uint32_t key) const { return key >= low && key <= high; }
  };

  __device__ explicit TopK(Shared& shared) : shared_(shared) {}

  /// Before the first `count`; a block barrier must follow.
  __device__ void clear() {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared_.counts[bin] = 0;
  }

  /// Counts a key by its first digit.
  __device__ void count(uint32_t key) {
    if (key != 0) atomicAdd(&shared_.counts[key >> kFirstShift], 1u);
  }

  /// The cut that selects min(k, all) keys. Every key must have been counted.
  __device__ Cut find(const uint32_t* keys, int key_count, uint32_t k) {
    uint32_t prefix = 0, remaining = k;
    int shift = kFirstShift;
    while (true) {
      reduce_counts();
      walk(totals(), remaining);
      if (shift == kFirstShift && shared_.total <= k) {
        return {1u, ~0u, shared_.total, shared_.total};
      }
      prefix |= shared_.digit << shift;
      remaining -= shared_.above;
      if (shared_.inside == remaining || shift == 0) break;
      const int upper = shift;
      const int bits = min(shift, kDigitBits);
      shift -= bits;
      clear();
      __syncthreads();
      for (int i = threadIdx.x; i < key_count; i += kThreads) {
        const uint32_t key = keys[i];
        if (key >> upper == prefix >> upper) atomicAdd(&shared_.counts[(key >> shift) & ((1u << bits) - 1)], 1u);
      }
    }
    return {prefix, prefix + ((1u << shift) - 1), remaining, k};
  }

  /// Of a block's items, those before this warp's and all of them.
  struct Tally {
    uint32_t above, inside;
    uint32_t all_above, all_inside;
  };

  /// Counts the items i < count for which above(i), or inside(i), holds. A block barrier must precede.
  template <typename Above, typename Inside>
  __device__ Tally tally(int count, Above above, Inside inside) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t above_count = 0, inside_count = 0;
    for (int i = first_of_warp(count) + lane; i < last_of_warp(count); i += 32) {
      above_count += above(i);
      inside_count += inside(i);
    }
    above_count = __reduce_add_sync(~0u, above_count);
    inside_count = __reduce_add_sync(~0u, inside_count);
    if (lane == 0) {
      shared_.warp_sums[0][warp] = above_count;
      shared_.warp_sums[1][warp] = inside_count;
    }
    __syncthreads();
    above_count = lane < kWarps ? shared_.warp_sums[0][lane] : 0;
    inside_count = lane < kWarps ? shared_.warp_sums[1][lane] : 0;
    return {
        __reduce_add_sync(~0u, lane < warp ? above_count : 0), __reduce_add_sync(~0u, lane < warp ? inside_count : 0),
        __reduce_add_sync(~0u, above_count), __reduce_add_sync(~0u, inside_count)};
  }

  /// Calls take(place, index) for every item above, and for those inside while there were fewer than `ties`: places
  /// ascend with the index from above_before + min(inside_before, ties), which count the items before this warp's.
  template <typename Above, typename Inside, typename Take>
  __device__ void place(
      int count, Above above, Inside inside, uint32_t ties, uint32_t above_before, uint32_t inside_before, Take take) {
    const int lane = threadIdx.x % 32;
    const int last = last_of_warp(count);
    const uint32_t lower_lanes = (1u << lane) - 1;
    for (int base = first_of_warp(count); base < last; base += 32) {
      const int i = base + lane;
      const uint32_t above_lanes = __ballot_sync(~0u, i < last && above(i));
      const uint32_t inside_lanes = __ballot_sync(~0u, i < last && inside(i));
      if ((above_lanes | inside_lanes) == 0) continue;
      const uint32_t tie = inside_before + __popc(inside_lanes & lower_lanes);
      if ((above_lanes >> lane & 1) || ((inside_lanes >> lane & 1) && tie < ties)) {
        take(above_before + __popc(above_lanes & lower_lanes) + min(tie, ties), i);
      }
      above_before += __popc(above_lanes);
      inside_before += __popc(inside_lanes);
    }
  }

  /// Calls take(place, index) once for every selected key: places 0 .. selected - 1 ascend with (CTA rank, index).
  template <typename Take>
  __device__ void emit(const uint32_t* keys, int key_count, const Cut& cut, Take take) {
    const auto above = [&](int i) { return cut.above(keys[i]); };
    const auto inside = [&](int i) { return cut.inside(keys[i]); };
    Tally before = tally(key_count, above, inside);
    if constexpr (kCluster) {
      auto cluster = cooperative_groups::this_cluster();
      const int ranks = cluster.num_blocks(), rank = cluster.block_rank(), lane = threadIdx.x % 32;
      if (threadIdx.x < ranks) {
        uint32_t(*counts)[2] = cluster.map_shared_rank(shared_.cta_counts, lane);
        counts[rank][0] = before.all_above;
        counts[rank][1] = before.all_inside;
      }
      cluster.sync();
      before.above += __reduce_add_sync(~0u, lane < rank ? shared_.cta_counts[lane][0] : 0);
      before.inside += __reduce_add_sync(~0u, lane < rank ? shared_.cta_counts[lane][1] : 0);
    }
    place(key_count, above, inside, cut.ties, before.above, before.inside, take);
  }

  /// Finds the digit that holds the `remaining`-th largest of the keys counted in totals[kBins]; a block barrier must
  /// precede. The results lie in `digit`, `above`, `inside` and `total`, for all threads.
  __device__ void walk(const uint32_t* totals, uint32_t remaining) {
    walk_loaded([&](int bin) { return *reinterpret_cast<const uint4*>(totals + bin); }, remaining);
  }

  /// The same; load(bin) returns the totals of four bins.
  template <typename Load>
  __device__ void walk_loaded(Load load, uint32_t remaining) {
    constexpr int kPerThread = kBins / kThreads;
    static_assert(kPerThread % 4 == 0);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int top = kBins - kPerThread * (threadIdx.x + 1);  // this thread's lowest bin; threads go from the top down
    uint32_t bin[kPerThread], sum = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; i += 4) {
      const uint4 four = load(top + i);
      bin[i] = four.x;
      bin[i + 1] = four.y;
      bin[i + 2] = four.z;
      bin[i + 3] = four.w;
      sum += four.x + four.y + four.z + four.w;
    }
    const uint32_t inclusive = warp_inclusive_sum(sum);
    if (lane == 31) shared_.warp_sums[0][warp] = inclusive;
    __syncthreads();
    const uint32_t warp_sum = lane < kWarps ? shared_.warp_sums[0][lane] : 0;
    uint32_t above = __reduce_add_sync(~0u, lane < warp ? warp_sum : 0) + inclusive - sum;
    const uint32_t total = __reduce_add_sync(~0u, warp_sum);
    if (threadIdx.x == 0) shared_.total = total;
    if (above < remaining && above + sum >= remaining) {
#pragma unroll
      for (int i = kPerThread - 1; i >= 0; --i) {
        if (above < remaining && above + bin[i] >= remaining) {
          shared_.digit = top + i;
          shared_.above = above;
          shared_.inside = bin[i];
        }
        above += bin[i];
      }
    }
    __syncthreads();
  }

 private:
  Shared& shared_;

  __device__ static int warp_share(int count) { return (count + 32 * kWarps - 1) / (32 * kWarps) * 32; }
  __device__ static int first_of_warp(int count) { return threadIdx.x / 32 * warp_share(count); }
  __device__ static int last_of_warp(int count) { return min(first_of_warp(count) + warp_share(count), count); }

  __device__ const uint32_t* totals() const { return kCluster ? shared_.totals : shared_.counts; }

  /// Sums the counts over the cluster: CTA r sums the r-th part of the bins and gives it to all.
  __device__ void reduce_counts() {
    if constexpr (kCluster) {
      auto cluster = cooperative_groups::this_cluster();
      const int ranks = cluster.num_blocks();
      const int part = kBins / ranks;
      const int first = part * cluster.block_rank();
      cluster.sync();
      for (int bin = first + threadIdx.x; bin < first + part; bin += kThreads) {
        uint32_t total = 0;
#pragma unroll 8
        for (int rank = 0; rank < ranks; ++rank) total += cluster.map_shared_rank(shared_.counts, rank)[bin];
        for (int rank = 0; rank < ranks; ++rank) cluster.map_shared_rank(shared_.totals, rank)[bin] = total;
      }
      cluster.sync();
    } else {
      __syncthreads();
    }
  }
};

}  // namespace misa
