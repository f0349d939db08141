// Exact top-k of rows whose keys are spread over several CTAs of a co-resident grid.
//
// The CTAs of a row ("ranks", in order of position) add up counts of their keys' digits in global memory, wait for one
// another, and all walk the same totals, as TopK does in a cluster. As soon as the digit that holds the k-th largest
// key holds few keys, the ranks list those and each finds the exact cut among them on its own: mostly two waits in all.
//
// A CTA takes part in at most two rows, with its first and its last keys. It works on both in step: it enters what it
// has into both before it waits for either, so that no chain of waits runs along the grid.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cluster_topk.cuh"
#include "common/select.cuh"

namespace misa {

constexpr int kExchangeDigits = 3;
constexpr int kListedKeys = 4096;

/// What the ranks of one row share. Zero before the launch.
struct RowShared {
  uint32_t counts[kExchangeDigits][1 << 11];
  uint32_t arrived[kExchangeDigits + 1];
  uint32_t listed;
  uint32_t unused[3];
};

/// In global memory; `rows` and `lists` have one entry per row that may be split, the others one per CTA.
struct Exchange {
  RowShared* rows;
  uint64_t (*lists)[kListedKeys];  // rank values (common/select.cuh) of the keys in the last digit
  uint32_t (*rank_counts)[2][2];   // [CTA][part]: keys above the last digit, keys in it
  uint32_t* kept_keys;             // [CTA][k] of the first part
  uint32_t* kept_positions;
};

/// A CTA's keys of one row. Index i is at position positions[i] if i < listed_positions, else at i + later_offset.
struct RowPart {
  const uint32_t* keys;
  const uint32_t* positions;
  int count, listed_positions, later_offset;
  int first_position;  // no key of this part lies before it, and none of an earlier rank's at or behind it
  int slot;            // of Exchange::rows
  int first_cta, ranks;
  bool is_later_part;  // of its CTA; the row's first rank holds it as its later part, all others as their first
  int32_t* out;
  int level;  // digits walked so far
  bool active, lists;
  uint32_t prefix, shift, remaining;

  __device__ uint32_t position(int i) const { return i < listed_positions ? positions[i] : i + later_offset; }
};

/// All threads of the CTA call each method together, with a part that lies in shared memory.
template <int kThreads>
class RowExchange {
 public:
  using Selection = TopK<kThreads, false>;
  using Shared = typename Selection::Shared;

  __device__ RowExchange(const Exchange& exchange, Shared& shared) : exchange_(exchange), shared_(shared) {}

  /// Enters the part's keys, whose first digits the CTA has counted. A block barrier must precede.
  __device__ void enter(const RowPart& part) {
    add_counts(part, 0);
    arrive(part, 0);
  }

  /// Takes the row one wait further: narrows the cut, or writes this part's selected positions and ends
  /// (part.active = false). `list` is room for kListedKeys values.
  __device__ void advance(RowPart& part, uint64_t* list) {
    const int level = part.level;
    wait(part, level);
    if (part.lists || level == kExchangeDigits) {
      part.lists ? finish_listed(part, list) : finish_ties(part);
      __syncthreads();
      if (threadIdx.x == 0) part.active = false;
      __syncthreads();
      return;
    }
    const auto* totals = reinterpret_cast<const uint4*>(exchange_.rows[part.slot].counts[level]);
    for (int i = threadIdx.x; i < Selection::kBins / 4; i += kThreads) {
      reinterpret_cast<uint4*>(shared_.totals)[i] = __ldcg(totals + i);
    }
    __syncthreads();
    Selection selection(shared_);
    selection.walk(shared_.totals, part.remaining);
    const uint32_t prefix = part.prefix | shared_.digit << part.shift;
    const uint32_t remaining = part.remaining - shared_.above;
    const bool lists = shared_.inside <= kListedKeys, tied = !lists && part.shift == 0;
    const uint32_t digit_shift = part.shift;
    const uint32_t lower_shift = max(0, static_cast<int>(digit_shift) - Selection::kDigitBits);
    const uint32_t next_shift = lists || tied ? digit_shift : lower_shift;
    __syncthreads();
    if (threadIdx.x == 0) {
      part.prefix = prefix;
      part.remaining = remaining;
      part.shift = next_shift;
      part.lists = lists;
      part.level = level + 1;
    }
    __syncthreads();
    if (lists || tied) {
      enter_last_digit(part);
    } else {
      selection.clear();
      __syncthreads();
      const uint32_t mask = (1u << (digit_shift - next_shift)) - 1;
      for (int i = threadIdx.x; i < part.count; i += kThreads) {
        const uint32_t key = part.keys[i];
        if (key >> digit_shift == prefix >> digit_shift) atomicAdd(&shared_.counts[(key >> next_shift) & mask], 1u);
      }
      __syncthreads();
      add_counts(part, level + 1);
    }
    arrive(part, level + 1);
  }

 private:
  const Exchange& exchange_;
  Shared& shared_;

  __device__ static uint32_t last_of_digit(const RowPart& part) { return part.prefix + ((1u << part.shift) - 1); }

  __device__ uint32_t* rank_counts(const RowPart& part, int rank) const {
    const bool is_later_part = rank == 0;
    return exchange_.rank_counts[part.first_cta + rank][is_later_part];
  }

  __device__ void add_counts(const RowPart& part, int level) {
    uint32_t* totals = exchange_.rows[part.slot].counts[level];
    for (int bin = threadIdx.x; bin < Selection::kBins; bin += kThreads) {
      const uint32_t count = shared_.counts[bin];
      if (count > 0) atomicAdd(totals + bin, count);
    }
  }

  /// Publishes all that the CTA wrote before.
  __device__ void arrive(const RowPart& part, int level) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&exchange_.rows[part.slot].arrived[level], 1u);
    }
  }

  __device__ void wait(const RowPart& part, int level) {
    if (threadIdx.x == 0) {
      const uint32_t* arrived = &exchange_.rows[part.slot].arrived[level];
      uint32_t count;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
      } while (count < static_cast<uint32_t>(part.ranks));
      __threadfence();
    }
    __syncthreads();
  }

  /// Tells how many keys lie above the last digit and in it, and lists the latter if they are few.
  __device__ void enter_last_digit(const RowPart& part) {
    Selection selection(shared_);
    const uint32_t low = part.prefix, high = last_of_digit(part);
    const auto above = [&](int i) { return part.keys[i] > high; };
    const auto inside = [&](int i) { return part.keys[i] >= low && part.keys[i] <= high; };
    const auto none = [](int) { return false; };
    const auto before = selection.tally(part.count, above, inside);
    if (threadIdx.x == 0) {
      uint32_t* counts = exchange_.rank_counts[blockIdx.x][part.is_later_part];
      counts[0] = before.all_above;
      counts[1] = before.all_inside;
      shared_.total = part.lists ? atomicAdd(&exchange_.rows[part.slot].listed, before.all_inside) : 0;
    }
    __syncthreads();
    if (part.lists) {
      uint64_t* list = exchange_.lists[part.slot] + shared_.total + before.inside;
      selection.place(part.count, inside, none, 0, 0, 0, [&](int place, int i) {
        list[place] = static_cast<uint64_t>(part.keys[i]) << 32 | (0xFFFFFFFFu - part.position(i));
      });
    }
  }

  /// Sum over the block; all threads get it.
  __device__ uint32_t block_sum(uint32_t value) {
    value = __reduce_add_sync(~0u, value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared_.warp_sums[0][threadIdx.x / 32] = value;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    return __reduce_add_sync(~0u, lane < Selection::kWarps ? shared_.warp_sums[0][lane] : 0);
  }

  __device__ uint32_t earlier_ranks(const RowPart& part, int which) const {
    uint32_t sum = 0;
    for (int rank = threadIdx.x; part.first_cta + rank < blockIdx.x; rank += kThreads) {
      sum += __ldcg(rank_counts(part, rank) + which);
    }
    return sum;
  }

  __device__ void finish_listed(const RowPart& part, uint64_t* list) {
    static_assert(sizeof(SelectScratch) <= sizeof(Shared::counts) + sizeof(Shared::totals));
    Selection selection(shared_);
    const int listed = static_cast<int>(__ldcg(&exchange_.rows[part.slot].listed));
    for (int i = threadIdx.x; i < listed; i += kThreads) list[i] = __ldcg(exchange_.lists[part.slot] + i);
    __syncthreads();
    const uint64_t low = static_cast<uint64_t>(part.prefix) << 32;
    const uint64_t high = static_cast<uint64_t>(last_of_digit(part)) << 32 | 0xFFFFFFFFu;
    auto& scratch = *reinterpret_cast<SelectScratch*>(shared_.counts);
    const auto for_each = [&](auto visit) {
      for (int i = threadIdx.x; i < listed; i += kThreads) visit(list[i]);
    };
    const uint64_t cut = kth_largest<kThreads>(low, high, part.remaining, for_each, scratch);
    uint32_t earlier = earlier_ranks(part, 0);
    for_each([&](uint64_t value) {
      earlier += value >= cut && position_of(value) < static_cast<uint32_t>(part.first_position);
    });
    earlier = block_sum(earlier);
    __syncthreads();
    const auto selected = [&](int i) {
      return (static_cast<uint64_t>(part.keys[i]) << 32 | (0xFFFFFFFFu - part.position(i))) >= cut;
    };
    const auto none = [](int) { return false; };
    const auto before = selection.tally(part.count, selected, none);
    selection.place(part.count, selected, none, 0, earlier + before.above, 0, [&](int place, int i) {
      part.out[place] = static_cast<int32_t>(part.position(i));
    });
  }

  /// More equal keys than a list holds: of those the first in order of position are selected.
  __device__ void finish_ties(const RowPart& part) {
    Selection selection(shared_);
    const uint32_t key = part.prefix;
    const uint32_t above_before = block_sum(earlier_ranks(part, 0));
    const uint32_t inside_before = block_sum(earlier_ranks(part, 1));
    __syncthreads();
    const auto above = [&](int i) { return part.keys[i] > key; };
    const auto inside = [&](int i) { return part.keys[i] == key; };
    const auto before = selection.tally(part.count, above, inside);
    selection.place(
        part.count, above, inside, part.remaining, above_before + before.above, inside_before + before.inside,
        [&](int place, int i) { part.out[place] = static_cast<int32_t>(part.position(i)); });
  }
};

}  // namespace misa
