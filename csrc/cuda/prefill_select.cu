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
// A thread of the final kernel takes so many entries of one list at a time
constexpr int kChunk = 8;
// Where a row's lists have room for up to so many entries, of which they mostly hold two thirds, smaller blocks keep them
// in registers
constexpr int kFewEntries = 6144;
// Positions that have a bit each in shared memory at a time
constexpr int kWindow = 1 << 17;
constexpr int kWindowWords = kWindow / 32;
constexpr int kMostSelected = 16384;

struct FinalShared {
  union {
    SelectScratch scratch;  // the values that decide lie where its bins were
    uint16_t ranks[kWindowWords + 32];  // how many positions are selected before each word's
  };
  // A bit for each position, set where it is selected. What is not selected has a bit in a word of each lane's, behind
  // all others, so that nothing branches around it
  alignas(16) uint32_t words[kWindowWords + 32];
  uint32_t few_count;
  uint64_t cut;
};
static_assert(kMostSelected + 32 <= 1 << 16);

// One block per slot: writes the row's selection, ascending, or lists the row as undecided if one of its lists
// overflowed or the threshold let fewer than k keys pass. A thread keeps its first kOwnChunks chunks of entries; others
// are read again for every pass. kBlocks: so many fit on a multiprocessor. kOneWindow: no row sees more than kWindow keys.
template <int kThreads, int kOwnChunks, int kBlocks, bool kOneWindow>
__global__ __launch_bounds__(kThreads, kBlocks) void final_kernel(const __grid_constant__ Params p) {
  // [k + 32] positions, at last; before, those of the threads' own chunks (see own_bytes)
  extern __shared__ __align__(16) uint32_t chosen[];
  __shared__ FinalShared sh;
  static_assert(kWindowWords % (2 * kThreads) == 0);
  const int lane = threadIdx.x % 32;
  const int slot = blockIdx.x;
  const int row = p.row_begin + slot;
  auto clear = [](uint32_t* words, auto count) {
#pragma unroll
    for (int i = threadIdx.x; i < count / 4; i += kThreads) {
      reinterpret_cast<uint4*>(words)[i] = make_uint4(0, 0, 0, 0);
    }
  };
  const auto clear_words = [&] { clear(sh.words, std::integral_constant<int, kWindowWords>{}); };
  clear_words();
  clear(sh.scratch.bins, std::integral_constant<int, kSelectBins>{});
  if (threadIdx.x == 0) sh.few_count = 0;
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const uint32_t capacity = p.list_capacity;
  const int visible = p.rows.visible[row];
  // Lane s of every warp knows list s. Loaded together with what says whether there are any
  auto load_count = [&] { return lane < p.splits ? p.counts[static_cast<int64_t>(slot) * p.splits + lane] : 0; };
  const uint32_t count = load_count();
  const float threshold = p.threshold[slot];
  if (visible < p.written_from || visible >= p.scored_to) return;
  int32_t* out = p.out + row * p.out_row_stride;
  if (visible < p.scored_from) {
    for (int i = threadIdx.x; i < p.k; i += kThreads) out[i] = i < visible ? i : -1;
    return;
  }

  const bool overflow = __any_sync(0xFFFFFFFFu, count > capacity);
  const uint32_t total = __reduce_add_sync(0xFFFFFFFFu, count);
  if (overflow || total < static_cast<uint32_t>(p.k)) {
    if (threadIdx.x == 0) p.undecided[atomicAdd(p.undecided_count, 1u)] = row;
    return;
  }

  // So that no key is negative, as with most thresholds; a NaN may have either sign
  const bool is_positive = threshold > 0;
  struct Lists {
    uint32_t count, chunks, chunks_end;
  };
  auto lists_of = [](uint32_t count) {
    const uint32_t chunks = (count + kChunk - 1) / kChunk;
    return Lists{count, chunks, warp_inclusive_sum(chunks)};
  };
  const Lists lists = lists_of(count);
  const uint32_t all_chunks = __shfl_sync(0xFFFFFFFFu, lists.chunks_end, 31);
  // A warp loads together, of the chunks from `first` on, one a thread: the entries from `begin` on. Key 0: no entry.
  // take_positions(position) gets theirs.
  auto load = [&](auto& key, uint32_t first, uint32_t begin, const Lists& lists, auto&& take_positions) {
    constexpr int kCount = sizeof(key) / sizeof(uint32_t);
    const auto [count, chunks, chunks_end] = lists;
    const uint32_t chunk = first + threadIdx.x;
    uint32_t split = 0;  // the first list that ends behind the chunk
#pragma unroll 1
    for (uint32_t step = p.split_step; step != 0; step /= 2) {
      if (__shfl_sync(0xFFFFFFFFu, chunks_end, split + step - 1) <= chunk) split += step;
    }
    const uint32_t size = __shfl_sync(0xFFFFFFFFu, count, split);
    const uint32_t in_list = (chunk - __shfl_sync(0xFFFFFFFFu, chunks_end - chunks, split)) * kChunk + begin;
    const bool exists = chunk < all_chunks;  // else what is loaded does not matter
    const uint32_t valid = exists && in_list < size ? size - in_list : 0;
    const uint32_t place = exists ? (slot * p.splits + split) * capacity + in_list : 0;
    uint32_t packed[kCount / 2];
    load_words(packed, reinterpret_cast<const uint32_t*>(p.list_positions + place));
    load_words(key, p.list_scores + place);
    auto unpack = [&](auto position_of_packed) {
      uint32_t position[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) position[i] = position_of_packed(packed[i / 2] >> i % 2 * 16 & 0xFFFF);
      take_positions(position);
    };
    if (p.in_splits.odd == 1) {
      unpack([&](uint32_t value) { return p.in_splits.unpack_even(value, split); });
    } else {
      unpack([&](uint32_t value) { return p.in_splits.unpack(value, split); });
    }
    if (is_positive) {
      constexpr uint32_t kPositiveNan = 0x7F800001u;  // any will do: they are equal, and above all others
#pragma unroll
      for (int i = 0; i < kCount; ++i) key[i] = min(key[i], kPositiveNan) | 0x80000000u;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) key[i] = order_key(__uint_as_float(key[i]));
    }
    if (!__all_sync(0xFFFFFFFFu, valid >= kCount)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) key[i] = i < valid ? key[i] : 0;
    }
  };
  const auto has_chunks = [&](uint32_t first) { return first + threadIdx.x - lane < all_chunks; };
  // Reads the other chunks, some entries at a time as registers are taken, and calls visit(key, position)
  auto read_others = [&](auto&& visit) {
    constexpr int kCount = 2;
#pragma unroll 1
    for (uint32_t first = kOwnChunks * kThreads; has_chunks(first); first += kThreads) {
#pragma unroll 1
      for (int begin = 0; begin < kChunk; begin += kCount) {
        const Lists lists = lists_of(load_count());  // not kept, either
        uint32_t key[kCount], position[kCount];
        load(key, first, begin, lists, [&](const uint32_t (&positions)[kCount]) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) position[i] = positions[i];
        });
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (key[i] != 0) visit(key[i], position[i]);
        }
      }
    }
  };
  uint32_t own[kOwnChunks][kChunk] = {};  // keys
  // Positions are needed late: they wait in shared memory
  auto parked = [&](int j, int half) -> uint4& {
    return reinterpret_cast<uint4*>(chosen)[(2 * j + half) * kThreads + threadIdx.x];
  };
  auto parked_position = [&](int j, int i) { return reinterpret_cast<const uint32_t*>(&parked(j, i / 4))[i % 4]; };
#pragma unroll
  for (int j = 0; j < kOwnChunks; ++j) {
    if (!has_chunks(j * kThreads)) continue;
    load(own[j], j * kThreads, 0, lists, [&](const uint32_t (&at)[kChunk]) {
      parked(j, 0) = make_uint4(at[0], at[1], at[2], at[3]);
      parked(j, 1) = make_uint4(at[4], at[5], at[6], at[7]);
    });
  }
  auto value_of = [](uint32_t key, uint32_t position) {
    return static_cast<uint64_t>(key) << 32 | (0xFFFFFFFFu - position);
  };

  // The cut lies not far above a threshold, as the lists keep little more than the k best. Without one they keep all keys
  const ScoreBins bins = isfinite(threshold) ? ScoreBins::above(threshold) : ScoreBins::of_all_scores();
  auto count_key = [&](uint32_t key) { atomicAdd(&sh.scratch.bins[bins.of_not_below(key)], 1u); };
  __syncthreads();  // bins are empty
#pragma unroll
  for (int j = 0; j < kOwnChunks; ++j) {
    if (!has_chunks(j * kThreads)) continue;
    if (__all_sync(0xFFFFFFFFu, own[j][kChunk - 1] != 0)) {
#pragma unroll
      for (const uint32_t key : own[j]) count_key(key);
    } else {
#pragma unroll
      for (const uint32_t key : own[j]) {
        if (key != 0) count_key(key);
      }
    }
  }
  read_others([&](uint32_t key, uint32_t) { count_key(key); });
  __syncthreads();
  choose_bin<kThreads>(p.k, sh.scratch);
  const uint32_t inside = sh.scratch.inside, need = p.k - sh.scratch.above;
  // Keys above `bound` are selected, and of equal ones those at positions before `end`
  const uint32_t low = bins.first_key(sh.scratch.chosen_bin);
  uint32_t bound = bins.last_key(sh.scratch.chosen_bin), end = 0;
  const bool decides_by_few = inside <= kFewValues;
  if (!decides_by_few) {
    select_sync<kThreads>();
    auto for_each_value = [&](auto&& visit) {
#pragma unroll
      for (int j = 0; j < kOwnChunks; ++j) {
        if (!has_chunks(j * kThreads)) continue;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          visit(value_of(own[j][i], parked_position(j, i)));
        }
      }
      read_others([&](uint32_t key, uint32_t position) { visit(value_of(key, position)); });
    };
    Cut cut{static_cast<uint64_t>(low) << 32, static_cast<uint64_t>(bound - low) << 32 | 0xFFFFFFFFu, need, false, inside};
    cut = narrow_to_keys<kThreads>(cut, visible, for_each_value, sh.scratch);
    const uint64_t last = end_search<kThreads>(cut, for_each_value, sh.scratch);
    bound = static_cast<uint32_t>(last >> 32);
    end = position_of(last) + 1;
  }
  auto is_selected = [&](uint32_t key, uint32_t position) { return (key > bound) | ((key == bound) & (position < end)); };

  // Where a position's bit is, in `words`: in the window, or in the lane's own word
  const uint32_t outside = (kWindowWords + lane) * 32;
  const uint32_t not_selected = kOneWindow ? outside : 0xFFFFFFFFu;
  auto bit_of = [&](uint32_t position, uint32_t window) {
    if constexpr (kOneWindow) return position;
    return position - window < kWindow ? position - window : outside;
  };
  auto set_bit = [&](uint32_t bit) { atomicOr(&sh.words[bit / 32], 1u << bit % 32); };
  // Those of the deciding bin are ranked among themselves; they wait where the bins were
  auto* const few = reinterpret_cast<uint64_t*>(sh.scratch.bins);
  auto add_few = [&](uint32_t key, uint32_t position) { few[atomicAdd(&sh.few_count, 1u)] = value_of(key, position); };
  const uint32_t few_span = bound - low;  // used if decided by few
  // Selected positions take the place of the keys; a thread may decide on one more
  uint32_t decided = not_selected;
  if (decides_by_few) {
#pragma unroll
    for (int j = 0; j < kOwnChunks; ++j) {
      if (!has_chunks(j * kThreads)) continue;
      auto& key = own[j];
      uint32_t least = 0xFFFFFFFFu;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) least = min(least, key[i] - low);
      if (least <= few_span) {
        uint32_t few_of_thread = 0;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) few_of_thread |= static_cast<uint32_t>(key[i] - low <= few_span) << i;
#pragma unroll 1
        for (; few_of_thread != 0; few_of_thread &= few_of_thread - 1) {
          const int place = __ffs(few_of_thread) - 1;
          uint32_t its_key = key[0];
#pragma unroll
          for (int i = 1; i < kChunk; ++i) its_key = i == place ? key[i] : its_key;
          add_few(its_key, parked_position(j, place));
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kOwnChunks; ++j) {
    if (!has_chunks(j * kThreads)) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t position[kChunk / 2];
      load_words(position, reinterpret_cast<const uint32_t*>(&parked(j, half)));
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i) {
        uint32_t& key = own[j][half * (kChunk / 2) + i];
        key = is_selected(key, position[i]) ? position[i] : not_selected;
        set_bit(bit_of(key, 0));
      }
    }
  }
  read_others([&](uint32_t key, uint32_t position) {
    if (is_selected(key, position)) set_bit(bit_of(position, 0));
    if (decides_by_few && key - low <= few_span) add_few(key, position);
  });
  __syncthreads();
  if (decides_by_few) {
    if (threadIdx.x < inside) {
      const uint64_t value = few[threadIdx.x];
      uint32_t larger = 0;
#pragma unroll 4
      for (uint32_t i = 0; i < inside; ++i) larger += few[i] > value;
      if (larger < need) {
        decided = position_of(value);
        set_bit(bit_of(decided, 0));
      }
      if (larger == need - 1) sh.cut = value;
    }
    __syncthreads();
    bound = static_cast<uint32_t>(sh.cut >> 32);
    end = position_of(sh.cut) + 1;
  }
  // Calls visit(position) for each selected position, and for not_selected
  auto for_each_selected = [&](auto&& visit) {
#pragma unroll
    for (int j = 0; j < kOwnChunks; ++j) {
      if (!has_chunks(j * kThreads)) continue;
#pragma unroll
      for (const uint32_t position : own[j]) visit(position);
    }
    if (decided != not_selected) visit(decided);
    read_others([&](uint32_t key, uint32_t position) {
      if (is_selected(key, position)) visit(position);
    });
  };

  // A selected position's rank: the bits before its word's, and those before it in the word. The ranks of what is not
  // selected lie behind the k places.
  uint32_t earlier = 0;  // in earlier windows
#pragma unroll 1
  for (uint32_t window = 0; window < static_cast<uint32_t>(visible); window += kWindow) {
    if (window > 0) {
      __syncthreads();
      clear_words();
      __syncthreads();
      for_each_selected([&](uint32_t position) { set_bit(bit_of(position, window)); });
      __syncthreads();
    }
    // a warp's words are neighbours, and 32 of them at a time have a lane each
    int own_words = kWindowWords / kThreads;
    while (own_words > 2 && visible - window <= 16 * own_words * kThreads) own_words /= 2;
    const int first_word = threadIdx.x / 32 * own_words * 32 + lane;
    uint32_t sum = 0, all;
#pragma unroll 2
    for (int i = 0; i < own_words; ++i) sum += __popc(sh.words[first_word + 32 * i]);
    uint32_t rank = earlier + block_exclusive_sum<kThreads>(sum, sh.scratch.warp_sums, all);
    earlier += all;
    rank = __shfl_sync(0xFFFFFFFFu, rank, 0);
#pragma unroll 1
    for (int word = first_word; word < first_word + 32 * own_words; word += 64) {
      const uint32_t counts = __popc(sh.words[word]) | __popc(sh.words[word + 32]) << 16;
      const uint32_t inclusive = warp_inclusive_sum(counts), before = inclusive - counts;
      const uint32_t totals = __shfl_sync(0xFFFFFFFFu, inclusive, 31);
      sh.ranks[word] = static_cast<uint16_t>(rank + (before & 0xFFFF));
      rank += totals & 0xFFFF;
      sh.ranks[word + 32] = static_cast<uint16_t>(rank + (before >> 16));
      rank += totals >> 16;
    }
    if (threadIdx.x < 32) sh.ranks[kWindowWords + lane] = static_cast<uint16_t>(p.k + lane);
    __syncthreads();
    for_each_selected([&](uint32_t position) {
      const uint32_t bit = bit_of(position, window), word = bit / 32;
      chosen[sh.ranks[word] + __popc(sh.words[word] & ~(~0u << bit % 32))] = position;
    });
    if constexpr (kOneWindow) break;
  }
  __syncthreads();
  if (p.k % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
#pragma unroll 2
    for (int i = threadIdx.x; i < p.k / 4; i += kThreads) {
      reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(chosen)[i];
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < p.k; i += kThreads) out[i] = static_cast<int32_t>(chosen[i]);
  }
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

template <int kThreads, int kOwnChunks, int kBlocks>
void launch_final(const Params& p, bool one_window, cudaStream_t stream) {
  const size_t own_bytes = kThreads * kOwnChunks * kChunk * sizeof(uint32_t);
  const size_t shared = std::max(own_bytes, (p.k + 32) * sizeof(uint32_t));
  const auto kernel = one_window ? final_kernel<kThreads, kOwnChunks, kBlocks, true>
                                 : final_kernel<kThreads, kOwnChunks, kBlocks, false>;
  launch(kernel, p.num_rows, kThreads, shared, stream, kOverlaps, p);
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
          launch_final<256, 2, 4>(p, plan.dense_stride <= kWindow, stream);
        } else {
          launch_final<512, 3, 2>(p, plan.dense_stride <= kWindow, stream);
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
  p.split_step = 1;
  while (2 * p.split_step < plan.splits) p.split_step *= 2;
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
