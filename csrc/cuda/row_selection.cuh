// Exact top-k of rows whose keys lie in the shared memory of one CTA, or of several CTAs of a co-resident grid.
//
// A histogram of the keys' first digits tells in which narrow range the k-th largest key lies. The few keys of that
// range are listed, the exact cut is found among them, and one pass over all keys writes what is selected in order of
// position. The CTAs that share a row ("ranks", in order of position) add up their histograms in global memory, wait
// for one another, merge their lists, which are waited for entry by entry, and each find the same cut. There are more
// waits if the range holds more keys than a list. Of a short row every rank gets all keys, and each selects alone.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cluster_topk.cuh"
#include "common/ptx.cuh"
#include "common/select.cuh"

namespace misa {

constexpr int kRowsPerItem = 4;  // rows of one request that are scored together, at most
constexpr int kListedKeys = 2048;
constexpr int kRankedKeys = 256;  // are ranked against each other, more are searched by digits
constexpr int kDigits = 1 << 11;
constexpr int kMaxLevels = 4;  // histograms until a range is a single key: the first, and 30 bits by 11 each

// First digits: negative keys by octave, positive ones from 2^-18 to 2^10 by 1/64 octave. As k is mostly far below the
// number of keys, the k-th largest score is positive, and such a range holds one key in a thousand.
constexpr uint32_t kPositiveKeys = 0x80000000u;
constexpr int kNegativeDigits = 256, kPositiveDigits = kDigits - kNegativeDigits;
constexpr int kFineBits = 17;
constexpr int kSmallestFine = (127 - 18) << 6;

__device__ __forceinline__ int first_digit(uint32_t key) {
  if (key < kPositiveKeys) return static_cast<int>(key >> 23);
  const int fine = static_cast<int>((key - kPositiveKeys) >> kFineBits) - kSmallestFine + 1;
  return kNegativeDigits + min(max(fine, 0), kPositiveDigits - 1);
}

/// Keys low .. high, of which the `need` largest are selected along with all keys above `high`. `inside`: how many
/// there are.
struct KeyRange {
  uint32_t low, high, need, inside;

  __device__ static KeyRange of_first_digit(uint32_t digit) {
    if (digit < kNegativeDigits) return {max(digit << 23, 1u), (digit << 23) + ((1u << 23) - 1), 0, 0};
    const uint32_t fine = digit - kNegativeDigits;
    const uint32_t end = kPositiveKeys + ((fine + kSmallestFine) << kFineBits);
    return {
        fine == 0 ? kPositiveKeys : end - (1u << kFineBits), fine == kPositiveDigits - 1 ? ~0u : end - 1, 0, 0};
  }

  __device__ int shift() const { return max(0, 21 - __clz(static_cast<int>(high - low))); }
  __device__ bool holds(uint32_t key) const { return key >= low && key <= high; }
  __device__ KeyRange part(uint32_t digit) const {
    const uint32_t first = low + (digit << shift());
    return {first, first + min(high - first, (1u << shift()) - 1), 0, 0};  // the last part must not wrap: it holds NaN
  }
  __device__ bool is_tied() const { return inside > kListedKeys; }
  __device__ bool is_narrow() const { return !is_tied() || low == high; }
};

/// What the ranks of one row share. It may hold anything before the launch: rank 0 clears it and then writes the
/// launch's signature, without which no rank touches it or the row's other buffers. The last rank to finish takes the
/// signature away, as a graph replays its launches with the signatures that they were captured with.
struct RowShared {
  uint32_t counts[kDigits];
  uint32_t arrived[kMaxLevels + 1];
  uint32_t listed, finished, unused;
  alignas(16) uint64_t signature;
};
static_assert(sizeof(RowShared) % 16 == 0 && offsetof(RowShared, signature) % 16 == 0);

struct RowBuffers {
  uint32_t more_counts[2][kDigits];
  uint64_t list[kListedKeys];  // rank values (common/select.cuh)

  /// In their place, of a short row.
  __device__ uint32_t* keys() { return more_counts[0]; }
};
constexpr int kExchangedKeys = sizeof(RowBuffers) / sizeof(uint32_t);

/// In global memory.
struct Exchange {
  RowShared* rows;                      // [slots]
  RowBuffers* buffers;                  // [slots]
  uint32_t (*counts)[kRowsPerItem][2];  // [chunks]: keys above the range, keys in it; 1 more than they are
  uint32_t* partials;                   // [slots, partial_words], the routers' (decode_router.cuh)
  int partial_words;
  uint64_t signature;                   // of this launch: no other has it
};

/// Words that ranks pass on without a barrier are 0 until they are written, and never 0 then.
__device__ __forceinline__ uint32_t written_key(uint32_t key) { return key == 0 ? ~1u : key; }  // ~1 is no order key
__device__ __forceinline__ uint32_t read_key(uint32_t word) { return word == ~1u ? 0 : word; }

template <typename Word>
__device__ __forceinline__ Word wait_for_word(const Word* pointer) {
  Word word;
  do {
    word = ptx::load_relaxed(pointer);
  } while (word == 0);
  return word;
}

__device__ __forceinline__ bool are_written(const uint4& four) {
  return four.x != 0 && four.y != 0 && four.z != 0 && four.w != 0;
}

__device__ __forceinline__ uint4 wait_for_words(const uint32_t* words) {
  uint4 four;
  do {
    four = ptx::load_relaxed(reinterpret_cast<const uint4*>(words));
  } while (!are_written(four));
  return four;
}

/// A CTA's keys of one row, ascending in position; key 0 means "none". Index i is at the i-th position listed if
/// i < listed_positions, else at i + later_offset. Lies in shared memory.
struct RowPart {
  int keys, positions;  // where they begin in the pool, keys at a multiple of 4
  int count;  // a multiple of 4
  int listed_positions, later_offset;
  int32_t* out;
  // of a row with several ranks
  int slot, first_chunk, rank, ranks, row_in_item;
  int level;  // waits so far
  uint32_t floor;  // of the keys that are counted: no smaller one is among the k best
  bool active, is_narrow;
  KeyRange range;
  uint32_t above_of_warp[32];
};

/// All threads of the CTA call each method together.
template <int kThreads>
class RowSelection {
 public:
  using Digits = TopK<kThreads, false>;
  static_assert(Digits::kBins == kDigits);
  static constexpr int kWarps = kThreads / 32;

  struct Shared {
    typename Digits::Shared digits;
    uint32_t listed, list_start;
    uint32_t earlier[2][kWarps];  // keys of earlier ranks above the range, and in it
  };

  /// `list`: room for kListedKeys values, unused between calls. `pool`: where the parts' keys lie, in shared memory.
  __device__ RowSelection(const Exchange& exchange, Shared& shared, uint64_t* list, uint32_t* pool)
      : exchange_(exchange), shared_(shared), digits_(shared.digits), list_(list), pool_(pool) {}

  __device__ uint32_t key(const RowPart& part, int i) const { return pool_[part.keys + i]; }
  __device__ uint4 four_keys(const RowPart& part, int i) const {
    return *reinterpret_cast<const uint4*>(pool_ + part.keys + i);
  }
  __device__ uint32_t position(const RowPart& part, int i) const {
    return i < part.listed_positions ? pool_[part.positions + i] : i + part.later_offset;
  }

  /// Before the first `count`; a block barrier must follow.
  __device__ void clear() { digits_.clear(); }

  /// Counts a key by its first digit, if it is not below `floor`.
  __device__ void count(uint32_t key, uint32_t floor = 1) {
    if (key >= floor) atomicAdd(&shared_.digits.counts[first_digit(key)], 1u);
  }

  /// Counts all keys of a part.
  __device__ void count_all(const RowPart& part) {
    clear();
    __syncthreads();
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < part.count; i += 4 * kThreads) {
      const uint4 keys = four_keys(part, i);
      count(keys.x);
      count(keys.y);
      count(keys.z);
      count(keys.w);
    }
  }

  /// Drops, in order, keys of a part that cannot be among its k best; its keys must have been counted, and the counts
  /// are those of the kept keys afterwards, which are at least part.floor. Returns how many they are, at least
  /// min(k, all): if that were more than `room`, nothing is changed and the return value is larger than `room`. Keys
  /// and positions are gathered in two places of the pool with `room` words each. Block barriers must precede and
  /// follow.
  __device__ int drop_low(RowPart& part, uint32_t k, int room, uint32_t* kept_keys, uint32_t* kept_positions) {
    digits_.walk(shared_.digits.counts, k);
    uint32_t low = part.floor, kept = shared_.digits.total;
    if (kept > k) {
      const int digit = static_cast<int>(shared_.digits.digit);
      kept = shared_.digits.above + shared_.digits.inside;
      if (kept > static_cast<uint32_t>(room)) return static_cast<int>(kept);
      low = max(low, KeyRange::of_first_digit(digit).low);
      for (int i = threadIdx.x; i < digit; i += kThreads) shared_.digits.counts[i] = 0;
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = first_of_warp(part.count), last = last_of_warp(part.count);
    uint32_t mine = 0;
#pragma unroll 4
    for (int i = first + 4 * lane; i < last; i += 128) {
      const uint4 four = four_keys(part, i);
      mine += (four.x >= low) + (four.y >= low) + (four.z >= low) + (four.w >= low);
    }
    mine = __reduce_add_sync(~0u, mine);
    if (lane == 0) shared_.digits.warp_sums[0][warp] = mine;
    __syncthreads();
    const uint32_t lower_lanes = (1u << lane) - 1;
    uint32_t before = __reduce_add_sync(~0u, lane < warp ? shared_.digits.warp_sums[0][lane] : 0);
#pragma unroll 1
    for (int base = first; base < last; base += 128) {
      const int i = base + 4 * lane;
      const uint4 four = i < last ? four_keys(part, i) : uint4{0, 0, 0, 0};
      const uint32_t keys[4] = {four.x, four.y, four.z, four.w};
      if (!__any_sync(~0u, max(max(four.x, four.y), max(four.z, four.w)) >= low)) continue;
      uint32_t place = before, mine = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t lanes = __ballot_sync(~0u, keys[j] >= low);
        place += __popc(lanes & lower_lanes);
        before += __popc(lanes);
        mine |= static_cast<uint32_t>(keys[j] >= low) << j;
      }
      for_bits(mine, [&](int j) {
        kept_keys[place] = key(part, i + j);
        kept_positions[place++] = position(part, i + j);
      });
    }
    if (threadIdx.x == 0) part.floor = low;  // read by all before the barrier above
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < static_cast<int>(kept); i += kThreads) {
      pool_[part.keys + i] = kept_keys[i];
      pool_[part.positions + i] = kept_positions[i];
    }
    return static_cast<int>(kept);
  }

  /// Calls take(place, index) for each of the min(k, all) selected keys of a part whose keys have been counted, places
  /// ascending with the index; returns how many they are. A block barrier must follow.
  template <typename Take>
  __device__ int select(RowPart& part, uint32_t k, Take take) {
    if (threadIdx.x == 0) shared_.listed = 0;
    __syncthreads();
    digits_.walk(shared_.digits.counts, k);
    const uint32_t total = shared_.digits.total;
    KeyRange range = {part.floor, part.floor - 1, 0, 0};  // no range: all that are counted are above it
    if (total > k) {
      range = KeyRange::of_first_digit(shared_.digits.digit);
      range.need = k - shared_.digits.above;
      range.inside = shared_.digits.inside;
      while (__builtin_expect(!range.is_narrow(), false)) {
        count_range(part, range);
        __syncthreads();
        digits_.walk(shared_.digits.counts, range.need);
        range = narrowed(range);
      }
    }
    list_keys(part, range);
    __syncthreads();
    finish(part, range, 0, 0, take);
    return static_cast<int>(min(total, k));
  }

  /// Rank 0 clears `rows` slots from `slot` on for the exchange of a row's histograms and lists or of its `keys`, and
  /// of `partials` words. A block barrier and `publish_prepared` must follow.
  __device__ void prepare(int slot, int rows, int first_chunk, int ranks, int keys, int partials) {
    const auto clear = [&](void* words, int bytes) {
#pragma unroll 1
      for (int i = threadIdx.x; i < bytes / 16; i += kThreads) static_cast<uint4*>(words)[i] = {0, 0, 0, 0};
    };
#pragma unroll 1
    for (int row = slot; row < slot + rows; ++row) {
      RowShared& shared = exchange_.rows[row];
      RowBuffers& buffers = exchange_.buffers[row];
      clear(shared.arrived, offsetof(RowShared, signature) - offsetof(RowShared, arrived));
      if (keys > 0) {
        clear(buffers.keys(), keys * sizeof(uint32_t));
      } else {
        clear(shared.counts, sizeof(shared.counts));
        clear(buffers.list, sizeof(buffers.list));
      }
      clear(exchange_.partials + static_cast<int64_t>(row) * exchange_.partial_words, partials * sizeof(uint32_t));
    }
    if (keys == 0) clear(exchange_.counts[first_chunk], ranks * sizeof(exchange_.counts[0]));
  }

  /// The last warp tells the other ranks; it waits for the stores of the block, the others do not wait for it.
  __device__ void publish_prepared(int slot, int rows) {
    const int lane = static_cast<int>(threadIdx.x) - (kThreads - 32);
    if (lane >= 0 && lane < rows) ptx::store_release(&exchange_.rows[slot + lane].signature, exchange_.signature);
  }

  /// Before a rank's first access to what `prepare` makes ready; a block barrier must follow.
  __device__ void await_prepared(int slot, int rows) {
    if (threadIdx.x >= rows) return;
    while (ptx::load_acquire(&exchange_.rows[slot + threadIdx.x].signature) != exchange_.signature) {
    }
  }

  /// Gives a short row's other ranks the keys of this part, which are those of the row from `first` on.
  __device__ void publish_keys(const RowPart& part, int first) {
    uint32_t* words = exchange_.buffers[part.slot].keys() + first;
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < part.count; i += 4 * kThreads) {
      const uint4 keys = four_keys(part, i);
      ptx::store_relaxed(
          reinterpret_cast<uint4*>(words + i),
          uint4{written_key(keys.x), written_key(keys.y), written_key(keys.z), written_key(keys.w)});
    }
  }

  /// Collects all `count` keys of a short row in `all`, among them this part's, from `first` on. The histogram is that
  /// of this part (`is_counted`) or empty before, and that of the row afterwards. A block barrier must precede and
  /// follow.
  __device__ void collect_keys(const RowPart& part, int first, int count, bool is_counted, uint32_t* all) {
    const uint32_t* words = exchange_.buffers[part.slot].keys();
    const auto is_own = [&](int i) { return i >= first && i < first + part.count; };
    constexpr int kAtOnce = 2;  // under way; registers are short
#pragma unroll 1
    for (int base = 4 * threadIdx.x; base < count; base += 4 * kAtOnce * kThreads) {
      uint4 keys[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = base + 4 * j * kThreads;
        if (i < count && !is_own(i)) keys[j] = ptx::load_relaxed(reinterpret_cast<const uint4*>(words + i));
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = base + 4 * j * kThreads;
        if (i >= count) continue;
        uint4& four = keys[j];
        if (is_own(i)) {
          four = four_keys(part, i - first);
        } else {
          if (!are_written(four)) four = wait_for_words(words + i);
          four = {read_key(four.x), read_key(four.y), read_key(four.z), read_key(four.w)};
        }
        *reinterpret_cast<uint4*>(all + i) = four;
        if (is_own(i) && is_counted) continue;
        this->count(four.x);
        this->count(four.y);
        this->count(four.z);
        this->count(four.w);
      }
    }
  }

  /// One thread of each rank that needs nothing of the row's exchange any more; `has_left` must follow, best when the
  /// value has arrived.
  __device__ uint32_t leave(const RowPart& part) { return atomicAdd(&exchange_.rows[part.slot].finished, 1u); }
  __device__ void has_left(const RowPart& part, uint32_t before) {
    if (before == static_cast<uint32_t>(part.ranks) - 1) exchange_.rows[part.slot].signature = 0;
  }

  /// Enters a part of a row with several ranks, whose keys have been counted, into the exchange for the row's k best.
  __device__ void enter(RowPart& part, uint32_t k) {
    if (threadIdx.x == 0) {
      part.range = {0, 0, k, 0};
      part.level = 0;
      part.active = true;
      part.is_narrow = false;
    }
    __syncthreads();
    add_counts(part, 0);
    clear_counts(part, 1);
    arrive(part, 0);
  }

  /// Takes the row one wait further: narrows the range, or writes this part's selected positions and ends
  /// (part.active = false).
  /// `is_counted`: the histogram is still that of this part.
  __device__ void advance(RowPart& part, bool is_counted) {
    const int level = part.level;
    if (part.is_narrow) {
      __syncthreads();
      finish_shared(part);
      if (threadIdx.x == 0) part.active = false;
      __syncthreads();
      return;
    }
    wait(part, level);
    if (threadIdx.x == 0) shared_.listed = 0;  // not earlier: of the row before, others may still write the list
    const auto* totals = reinterpret_cast<const uint4*>(counts_of(part, level));
    KeyRange range = part.range;
    digits_.walk_loaded([&](int bin) { return __ldcg(totals + bin / 4); }, range.need);
    range = narrowed(range, level == 0);
    if (threadIdx.x == 0) {
      part.range = range;
      part.level = level + 1;
      part.is_narrow = range.is_narrow();
    }
    if (__builtin_expect(range.is_narrow(), true)) {
      publish_list(part, range, is_counted);
      return;
    }
    count_range(part, range);
    __syncthreads();
    add_counts(part, level + 1);
    clear_counts(part, level + 2);
    arrive(part, level + 1);
  }

 private:
  const Exchange& exchange_;
  Shared& shared_;
  Digits digits_;
  uint64_t* list_;
  uint32_t* pool_;

  /// Calls visit(j) for the bits that are set, ascending: a loop, as instructions that run once cost their fetching.
  template <typename Visit>
  __device__ static void for_bits(uint32_t bits, Visit visit) {
#pragma unroll 1
    for (; bits != 0; bits &= bits - 1) visit(__ffs(static_cast<int>(bits)) - 1);
  }

  /// Warps take equal parts of the indices, each lane 4 at a time.
  __device__ static int warp_share(int count) { return (count + 128 * kWarps - 1) / (128 * kWarps) * 128; }
  __device__ static int first_of_warp(int count) { return threadIdx.x / 32 * warp_share(count); }
  __device__ static int last_of_warp(int count) { return min(first_of_warp(count) + warp_share(count), count); }

  /// The digit that the last walk chose, as a range.
  __device__ KeyRange narrowed(const KeyRange& range, bool is_first = false) const {
    KeyRange part = is_first ? KeyRange::of_first_digit(shared_.digits.digit) : range.part(shared_.digits.digit);
    part.need = range.need - shared_.digits.above;
    part.inside = shared_.digits.inside;
    return part;
  }

  /// A block barrier must follow.
  __device__ void count_range(const RowPart& part, const KeyRange& range) {
    clear();
    __syncthreads();
    const int shift = range.shift();
    for (int i = threadIdx.x; i < part.count; i += kThreads) {
      const uint32_t key = this->key(part, i);
      if (range.holds(key)) atomicAdd(&shared_.digits.counts[(key - range.low) >> shift], 1u);
    }
  }

  /// Counts each warp's keys above the range and, unless they are too many, lists those in it. shared_.listed must be
  /// 0; a block barrier must follow.
  __device__ void list_keys(RowPart& part, const KeyRange& range) {
    const int lane = threadIdx.x % 32, last = last_of_warp(part.count);
    const bool lists = !range.is_tied();
    uint32_t above = 0;
#pragma unroll 1
    for (int i = first_of_warp(part.count) + 4 * lane; i < last; i += 128) {
      const uint4 four = four_keys(part, i);
      const uint32_t keys[4] = {four.x, four.y, four.z, four.w};
      uint32_t inside = 0;  // a bit for each
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        above += keys[j] > range.high;
        inside |= static_cast<uint32_t>(range.holds(keys[j])) << j;
      }
      if (!lists) continue;
      for_bits(inside, [&](int j) {
        list_[atomicAdd(&shared_.listed, 1u)] =
            static_cast<uint64_t>(key(part, i + j)) << 32 | (0xFFFFFFFFu - position(part, i + j));
      });
    }
    above = __reduce_add_sync(~0u, above);
    if (lane == 0) part.above_of_warp[threadIdx.x / 32] = above;
  }

  /// The `need`-th largest of few listed values, each of which is compared with all. A block barrier must follow.
  __device__ uint64_t cut_of_few(int listed, uint32_t need) {
    constexpr int kParts = 4;
    auto& cut = *reinterpret_cast<uint64_t*>(shared_.digits.totals);
    const int part = threadIdx.x % kParts;
#pragma unroll 1
    for (int first = 0; first < listed; first += kThreads / kParts) {
      const int i = first + static_cast<int>(threadIdx.x) / kParts;
      const uint64_t own = i < listed ? list_[i] : 0;
      uint32_t larger = 0;
#pragma unroll 4
      for (int j = part; j < listed; j += kParts) larger += list_[j] > own;
#pragma unroll
      for (int offset = 1; offset < kParts; offset *= 2) larger += __shfl_xor_sync(~0u, larger, offset);
      if (part == 0 && i < listed && larger == need - 1) cut = own;
    }
    __syncthreads();
    return cut;
  }

  /// Writes what is selected of a part whose range has been listed. `earlier_above`, `earlier_inside`: the earlier
  /// ranks' keys.
  template <typename Take>
  __device__ void finish(
      const RowPart& part, const KeyRange& range, uint32_t earlier_above, uint32_t earlier_inside, Take take) {
    // more equal keys than a list holds: the first in order of position are selected
    if (__builtin_expect(range.is_tied(), false)) {
      const auto above = [&](int i) { return key(part, i) > range.high; };
      const auto inside = [&](int i) { return range.holds(key(part, i)); };
      const auto before = digits_.tally(part.count, above, inside);
      digits_.place(
          part.count, above, inside, range.need, earlier_above + before.above, earlier_inside + before.inside, take);
      return;
    }
    const int listed = static_cast<int>(range.inside);
    uint64_t cut = static_cast<uint64_t>(range.low) << 32;
    if (listed <= kRankedKeys) {
      if (range.inside != range.need) cut = cut_of_few(listed, range.need);
    } else if (range.inside != range.need) {
      using DigitsShared = typename Digits::Shared;
      static_assert(sizeof(SelectScratch) <= sizeof(DigitsShared::counts) + sizeof(DigitsShared::totals));
      auto& scratch = *reinterpret_cast<SelectScratch*>(shared_.digits.counts);
      const auto for_each = [&](auto visit) {
        for (int i = threadIdx.x; i < listed; i += kThreads) visit(list_[i]);
      };
      const uint64_t high = static_cast<uint64_t>(range.high) << 32 | 0xFFFFFFFFu;
      cut = kth_largest<kThreads>(cut, high, range.need, for_each, scratch);
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = first_of_warp(part.count), last = last_of_warp(part.count);
    const uint32_t first_position = first < part.count ? position(part, first) : 0;
    uint32_t before = lane < warp ? part.above_of_warp[lane] : 0;
#pragma unroll 1
    for (int i = lane; i < listed; i += 32) {
      const uint64_t value = list_[i];
      before += value >= cut && position_of(value) < first_position;
    }
    before = earlier_above + __reduce_add_sync(~0u, before);
    __syncthreads();  // from here on `take` may overwrite the list

    const auto cut_key = static_cast<uint32_t>(cut >> 32);
    const uint32_t cut_position = position_of(cut), lower_lanes = (1u << lane) - 1;
#pragma unroll 1
    for (int base = first; base < last; base += 128) {
      const int i = base + 4 * lane;
      const uint4 four = i < last ? four_keys(part, i) : uint4{0, 0, 0, 0};
      const uint32_t keys[4] = {four.x, four.y, four.z, four.w};
      uint32_t place = before, mine = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bool selected = keys[j] > cut_key;
        if (__builtin_expect(keys[j] == cut_key, false)) selected = position(part, i + j) <= cut_position;
        const uint32_t lanes = __ballot_sync(~0u, selected);
        place += __popc(lanes & lower_lanes);
        before += __popc(lanes);
        mine |= static_cast<uint32_t>(selected) << j;
      }
      for_bits(mine, [&](int j) { take(static_cast<int>(place++), i + j); });
    }
  }

  // ---------------------------------------------------------------- between ranks

  /// The histogram of a level. Three take turns: rank 0 clears that of the next level before it arrives at a level,
  /// when all ranks have done with that of two levels ago.
  __device__ uint32_t* counts_of(const RowPart& part, int level) const {
    return level % 3 == 0 ? exchange_.rows[part.slot].counts : exchange_.buffers[part.slot].more_counts[level % 3 - 1];
  }

  __device__ void clear_counts(const RowPart& part, int level) {
    if (part.rank > 0 || level >= kMaxLevels) return;
    auto* counts = reinterpret_cast<uint4*>(counts_of(part, level));
    for (int i = threadIdx.x; i < kDigits / 4; i += kThreads) counts[i] = {0, 0, 0, 0};
  }

  __device__ void add_counts(const RowPart& part, int level) {
    uint32_t* totals = counts_of(part, level);
    for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) {
      const uint32_t count = shared_.digits.counts[digit];
      if (count > 0) atomicAdd(totals + digit, count);
    }
  }

  /// Publishes all that the CTA wrote before.
  __device__ void arrive(const RowPart& part, int level) {
    __syncthreads();
    if (threadIdx.x == 0) ptx::add_one_release(&exchange_.rows[part.slot].arrived[level]);
  }

  __device__ void wait(const RowPart& part, int level) {
    if (threadIdx.x == 0) {
      const uint32_t* arrived = &exchange_.rows[part.slot].arrived[level];
      while (ptx::load_acquire(arrived) < static_cast<uint32_t>(part.ranks)) {
      }
    }
    __syncthreads();
  }

  __device__ void publish_list(RowPart& part, const KeyRange& range, bool is_counted) {
    uint32_t* listed = &exchange_.rows[part.slot].listed;
    uint32_t list_start = 0;
    if (threadIdx.x == 0 && is_counted && !range.is_tied()) {  // under way while the keys are searched
      const uint32_t own = shared_.digits.counts[shared_.digits.digit];
      if (own > 0) list_start = atomicAdd(listed, own);
    }
    list_keys(part, range);
    __syncthreads();
    uint32_t above = 0, inside = shared_.listed;
    if (__builtin_expect(range.is_tied(), false)) {
      const auto before = digits_.tally(
          part.count, [](int) { return false; }, [&](int i) { return range.holds(key(part, i)); });
      inside = before.all_inside;
    }
    if (threadIdx.x < 32) {
      above = __reduce_add_sync(~0u, threadIdx.x < kWarps ? part.above_of_warp[threadIdx.x] : 0);
    }
    if (threadIdx.x == 0) {
      uint32_t* counts = exchange_.counts[part.first_chunk + part.rank][part.row_in_item];
      ptx::store_relaxed(counts, above + 1);
      ptx::store_relaxed(counts + 1, inside + 1);
      if (!is_counted && shared_.listed > 0) list_start = atomicAdd(listed, shared_.listed);
      shared_.list_start = list_start;
    }
    __syncthreads();
    uint64_t* list = exchange_.buffers[part.slot].list + shared_.list_start;
    for (int i = threadIdx.x; i < shared_.listed; i += kThreads) ptx::store_relaxed(list + i, list_[i]);
  }

  __device__ void finish_shared(const RowPart& part) {
    const KeyRange range = part.range;
    const int thread = ptx::opaque(static_cast<int>(threadIdx.x));
    const bool is_earlier = thread < part.rank;  // than this rank; there are fewer than kThreads
    const uint32_t* counts = exchange_.counts[part.first_chunk + thread][part.row_in_item];
    uint32_t sums[2] = {is_earlier ? ptx::load_relaxed(counts) : 1, 1};  // 1 more than they are
    if (!range.is_tied()) {
      const uint64_t* list = exchange_.buffers[part.slot].list;
      for (int i = threadIdx.x; i < range.inside; i += kThreads) list_[i] = wait_for_word(list + i);
    } else if (is_earlier) {
      sums[1] = wait_for_word(counts + 1);
    }
    if (sums[0] == 0) sums[0] = wait_for_word(counts);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const uint32_t sum = __reduce_add_sync(~0u, sums[which] - 1);
      if (lane == 0) shared_.earlier[which][threadIdx.x / 32] = sum;
    }
    __syncthreads();
    const uint32_t above = __reduce_add_sync(~0u, lane < kWarps ? shared_.earlier[0][lane] : 0);
    const uint32_t inside = __reduce_add_sync(~0u, lane < kWarps ? shared_.earlier[1][lane] : 0);
    const uint32_t before = threadIdx.x == 0 ? leave(part) : 0;
    int32_t* out = part.out;
    finish(part, range, above, inside, [&](int place, int i) { out[place] = static_cast<int32_t>(position(part, i)); });
    if (threadIdx.x == 0) has_left(part, before);
  }
};

}  // namespace misa
