// Routing inside the decode selection: the CTAs that share a row pool and score its segments, while their first pages
// of keys arrive, and tell one another the segments' sums. Sums are those of pooled_scores.cuh, so that a token gets
// the heads that the router kernels give it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/ptx.cuh"
#include "paged_rows.cuh"
#include "pooled_scores.cuh"
#include "row_selection.cuh"

namespace misa {

__host__ __device__ constexpr int ceil_div(int value, int divisor) { return (value + divisor - 1) / divisor; }

/// value / divisor for 0 <= value < 2^21 and divisor > 0: the half is farther from every integer than the error of the
/// rough division. A third of a division's instructions, which cost a launch their fetching where they run once.
__device__ __forceinline__ int quotient(int value, int divisor) {
  return static_cast<int>(ptx::divide_roughly(static_cast<float>(value) + 0.5f, static_cast<float>(divisor)));
}
__device__ __forceinline__ int ceil_quotient(int value, int divisor) { return quotient(value + divisor - 1, divisor); }

struct RouteSettings {
  int heads, active_heads, pool_block, segment_blocks;
  int pages_per_block, head_groups;  // of 16
  int segments_at_once;              // that a CTA pools before it scores them
  int scales_offset, sums_offset;    // in the area, which begins with the ring and the tile
  int32_t* routed;                   // [rows, active_heads], null: nobody asks for the heads
};

/// A CTA's part in what is scored together: adjacent rows of one request.
struct RankOfRows {
  int row, rows, request;
  int rank, ranks;
  int slot;  // of the first row in the exchange
};

/// A segment's sum as a word that is never 0.
__device__ __forceinline__ uint32_t written_sum(float sum) { return sum != sum ? 0x803FFFFFu : ~__float_as_uint(sum); }
__device__ __forceinline__ float read_sum(uint32_t word) { return __uint_as_float(~word); }

/// `queries` have all heads. All threads of the CTA call each method together.
template <int kThreads>
class DecodeRouter {
 public:
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRingPages = 8 * kWarps;  // means in flight

  /// Lays out the area that it takes in shared memory, while a row is routed and no longer; returns its bytes.
  static int lay_out(RouteSettings& settings, int segments_at_once, int rows) {
    const int tile_blocks = segments_at_once * settings.segment_blocks;
    settings.segments_at_once = segments_at_once;
    settings.scales_offset = kRingPages * kMeanBytes + tile_blocks * kMeanRowBytes;
    settings.sums_offset = settings.scales_offset + tile_blocks * 4;
    return settings.sums_offset + segments_at_once * rows * kMaxHeads * 4;
  }
  /// More pages than this are not worth reading in every CTA to spare the wait for the others.
  static constexpr int kOwnPages = kSegmentTokens / kPageTokens;

  /// Words of the exchange that a row needs: the sums of its segments, each of at least kSegmentTokens.
  __host__ __device__ static int partial_words(int visible) {
    return (visible + kSegmentTokens - 1) / kSegmentTokens * kMaxHeads;
  }

  __device__ DecodeRouter(
      const RouteSettings& settings, const IndexCache& cache, const Rows& rows, const QueryHeads& queries,
      const Exchange& exchange, char* area)
      : settings_(settings), cache_(cache), rows_(rows), queries_(queries), exchange_(exchange), ring_(area) {
    tile_ = ring_ + kRingPages * kMeanBytes;
    scales_ = reinterpret_cast<float*>(ring_ + settings.scales_offset);
    sums_ = reinterpret_cast<float*>(ring_ + settings.sums_offset);
  }

  /// Writes the routed heads of row r, ascending, to heads[r * heads_stride]. Block barriers must precede and follow.
  /// All threads call start_loads() once, when the first means are under way, and await() once, before the part's slots
  /// in the exchange are touched.
  template <typename StartLoads, typename Await>
  __device__ void route(
      const RankOfRows& part, int32_t* heads, int heads_stride, StartLoads start_loads, Await await) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int segment_blocks = settings_.segment_blocks, pages_per_block = settings_.pages_per_block;
    int most_blocks = 0;
#pragma unroll 1
    for (int row = 0; row < part.rows; ++row) {
      most_blocks = max(most_blocks, blocks_of(part, row));
      if (threadIdx.x < settings_.heads) {  // needed in a while
        ptx::prefetch_l2(query_of(part, row) + threadIdx.x * queries_.head_stride);
        ptx::prefetch_l2(gates_of(part, row) + threadIdx.x);
      }
    }
    const int segments = ceil_quotient(most_blocks, segment_blocks);
    const bool shares = part.ranks > 1 && most_blocks * pages_per_block > kOwnPages;
    const int first_segment = shares ? quotient(part.rank * segments, part.ranks) : 0;
    const int last_segment = shares ? quotient((part.rank + 1) * segments, part.ranks) : segments;

    float total = 0.0f;  // of row threadIdx.x / kMaxHeads and head threadIdx.x % kMaxHeads
    const int at_once = max(1, min(settings_.segments_at_once, last_segment - first_segment));
    MeanStream means(
        *this, rows_.block_table + part.request * rows_.table_stride, first_segment * segment_blocks,
        at_once * segment_blocks, min(last_segment * segment_blocks, most_blocks), pages_per_block);
#pragma unroll 1
    for (int segment = first_segment; segment < last_segment; segment += at_once) {
      means.pool_batch(start_loads);
      if (segment == first_segment) await();  // not earlier: what rank 0 makes ready is there by now
      __syncthreads();
      const int count = min(at_once, last_segment - segment);
      score_segments(part, segment, count, shares);
      __syncthreads();
      if (!shares && threadIdx.x < part.rows * kMaxHeads) {
#pragma unroll 1
        for (int i = 0; i < count; ++i) total += sums_[i * part.rows * kMaxHeads + threadIdx.x];
      }
    }
    if (first_segment == last_segment) {
      start_loads();
      await();
      __syncthreads();
    }
    if (shares) {
      auto* gathered = reinterpret_cast<uint32_t*>(ring_);
      const int summed_heads = 16 * settings_.head_groups;
      const int gathered_at_once = quotient(kRingPages * kMeanBytes / 4 / kMaxHeads, part.rows);
      for (int segment = 0; segment < segments; segment += gathered_at_once) {
        const int count = min(gathered_at_once, segments - segment);
        for (int i = 4 * threadIdx.x; i < count * part.rows * kMaxHeads; i += 4 * kThreads) {
          const int head = i % kMaxHeads, number = quotient(i / kMaxHeads, part.rows);
          const int row = i / kMaxHeads - number * part.rows;
          if (head >= summed_heads) continue;
          *reinterpret_cast<uint4*>(gathered + i) =
              wait_for_words(partials_of(part, row) + (segment + number) * kMaxHeads + head);
        }
        __syncthreads();
        if (threadIdx.x < part.rows * kMaxHeads && threadIdx.x % kMaxHeads < summed_heads) {
#pragma unroll 4
          for (int i = 0; i < count; ++i) total += read_sum(gathered[i * part.rows * kMaxHeads + threadIdx.x]);
        }
        __syncthreads();
      }
    }

    // Each head is compared with all by several threads; heads that do not exist have the smallest key.
    auto* keys = reinterpret_cast<uint32_t*>(sums_);
    auto* better = reinterpret_cast<uint32_t*>(ring_);
    const int all_heads = part.rows * kMaxHeads, head = threadIdx.x % kMaxHeads;
    if (threadIdx.x < all_heads) {
      const bool exists = head < settings_.heads;
      keys[threadIdx.x] = exists ? order_key(fabsf(gates_of(part, threadIdx.x / kMaxHeads)[head]) * total) : 0;
      better[threadIdx.x] = 0;
    }
    __syncthreads();
    const int shares_of_rivals = quotient(kThreads / kMaxHeads, part.rows);
    const int group = threadIdx.x / kMaxHeads, share = quotient(group, part.rows), row = group - share * part.rows;
    if (share < shares_of_rivals) {
      const uint32_t* rivals = keys + row * kMaxHeads;
      const uint32_t key = rivals[head];
      uint32_t count = 0;
#pragma unroll 4
      for (int i = share; i < settings_.heads; i += shares_of_rivals) {
        count += rivals[i] > key || (rivals[i] == key && i < head);
      }
      if (count > 0) atomicAdd(better + row * kMaxHeads + head, count);
    }
    __syncthreads();
    if (warp < part.rows) {
      int32_t* out = heads + warp * heads_stride;
      // without a block no score was summed, and the first heads are taken
      const bool has_scores = rows_.visible[part.row + warp] >= settings_.pool_block;
      int written = 0;
#pragma unroll
      for (int first = 0; first < kMaxHeads; first += 32) {
        const int own = first + lane;
        const int rank = has_scores ? static_cast<int>(better[warp * kMaxHeads + own]) : own;
        const bool chosen = own < settings_.heads && rank < settings_.active_heads;
        const uint32_t lanes = __ballot_sync(~0u, chosen);
        if (chosen) out[written + __popc(lanes & ((1u << lane) - 1))] = own;
        written += __popc(lanes);
      }
      __syncwarp();
      if (settings_.routed != nullptr && part.rank == 0) {
        int32_t* routed = settings_.routed + static_cast<int64_t>(part.row + warp) * settings_.active_heads;
        for (int i = lane; i < settings_.active_heads; i += 32) routed[i] = out[i];
      }
    }
  }

 private:
  const RouteSettings& settings_;
  const IndexCache& cache_;
  const Rows& rows_;
  const QueryHeads& queries_;
  const Exchange& exchange_;
  char *ring_, *tile_;
  float *scales_, *sums_;

  __device__ const uint8_t* query_of(const RankOfRows& part, int row) const {
    return queries_.query + (part.row + row) * queries_.row_stride;
  }
  __device__ const float* gates_of(const RankOfRows& part, int row) const {
    return queries_.gates + (part.row + row) * queries_.gates_stride;
  }
  /// Pool blocks that are complete for a row.
  __device__ int blocks_of(const RankOfRows& part, int row) const {
    const auto visible = static_cast<uint32_t>(rows_.visible[part.row + row]);
    return quotient(visible / kPageTokens, ptx::opaque(settings_.pages_per_block));
  }
  __device__ uint32_t* partials_of(const RankOfRows& part, int row) const {
    return exchange_.partials + static_cast<int64_t>(part.slot + row) * exchange_.partial_words;
  }

  /// Sums `count` segments from `first` on, whose means are in the tile, for all heads of all rows.
  __device__ void score_segments(const RankOfRows& part, int first, int count, bool shares) {
    // a warp takes a group of 16 heads of one row, and of the segments every step-th
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, segment_blocks = settings_.segment_blocks;
    const int groups = ptx::opaque(settings_.head_groups), tasks = groups * part.rows, step = quotient(kWarps, tasks);
    const int share = quotient(warp, tasks), task = warp - share * tasks, row = quotient(task, groups);
    const int first_head = (task - row * groups) * 16;
    if (share >= step) return;
    const int row_blocks = blocks_of(part, row);
#pragma unroll 1
    for (int i = share; i < count; i += step) {
      QueryFragment query[1];
      convert_query(query[0], load_query(query_of(part, row), queries_.head_stride, first_head, settings_.heads));
      float sum[1][2] = {}, result[1][2];
      const int blocks = min(segment_blocks, row_blocks - (first + i) * segment_blocks);
#pragma unroll 1
      for (int column = 0; column < blocks; column += kColumns) {
        score_columns(
            sum, query, tile_ + i * segment_blocks * kMeanRowBytes, scales_ + i * segment_blocks, column,
            blocks - column);
      }
      take_segment(result, sum);
      if (lane % 4 != 0) continue;
      const int head = first_head + lane / 4;
      if (shares) {
        uint32_t* words = partials_of(part, row) + (first + i) * kMaxHeads + head;
        ptx::store_relaxed(words, written_sum(result[0][0]));
        ptx::store_relaxed(words + 8, written_sum(result[0][1]));
      } else {
        float* sums = sums_ + (i * part.rows + row) * kMaxHeads + head;
        sums[0] = result[0][0];
        sums[8] = result[0][1];
      }
    }
  }

  /// A warp's pool blocks of one batch after the other: each lane fetches and reads its own 16 bytes of the pages'
  /// means, through a ring that needs no barrier and runs on over the ends of batches. It is filled by halves.
  class MeanStream {
   public:
    /// Blocks [first, end) of a request whose pages are given, `batch` at a time.
    __device__ MeanStream(
        const DecodeRouter& router, const int32_t* pages, int first, int batch, int end, int pages_per_block)
        : router_(router), pages_(pages), batch_pages_(batch * pages_per_block), pages_per_block_(pages_per_block) {
      const int warp = threadIdx.x / 32, warp_blocks = ceil_div(batch, kWarps);
      first_block_ = warp * warp_blocks;
      const int blocks = min(warp_blocks, max(batch - first_block_, 0));
      my_pages_ = blocks * pages_per_block;
      first_page_ = (first + first_block_) * pages_per_block;
      const int before_last = quotient(max(end - first - 1, 0), batch);  // batches
      const int in_last = (end - first - before_last * batch - first_block_) * pages_per_block;
      page_count_ = before_last * my_pages_ + min(max(in_last, 0), my_pages_);
      half_ = batch <= kWarps / 2 * warp_blocks ? 8 : 4;  // half of the warps have it all
      slots_ = router.ring_ + warp * 2 * half_ * kMeanBytes + threadIdx.x % 32 * 16;
      later_ids_ = load_ids(0);
    }

    /// The next batch's means go to the tile. start_loads() is called once the first are under way.
    template <typename StartLoads>
    __device__ void pool_batch(StartLoads start_loads) {
      const int lane = threadIdx.x % 32, end = min(consumed_ + my_pages_, page_count_);
      // a product with a power of two is the quotient to the bit
      const bool is_power = (pages_per_block_ & (pages_per_block_ - 1)) == 0;
      const float divisor = static_cast<float>(pages_per_block_), inverse = 1.0f / divisor;
      float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
      int left = pages_per_block_, index = first_block_;
#pragma unroll 1
      while (true) {
        const bool starts = fetched_ == 0;
#pragma unroll 1
        while (fetched_ - consumed_ <= half_) fetch_half();
        if (starts) start_loads();
        if (consumed_ >= end) break;
        if ((consumed_ & (half_ - 1)) == 0) ptx::cp_async_wait<1>();  // all but the later half
        const char* slot = slots_ + (consumed_ & (2 * half_ - 1)) * kMeanBytes;
        const int run = min(min(left, end - consumed_), half_ - (consumed_ & (half_ - 1)));
#pragma unroll 4
        for (int i = 0; i < run; ++i) {
          const float4 mean = *reinterpret_cast<const float4*>(slot + i * kMeanBytes);
          sum = {sum.x + mean.x, sum.y + mean.y, sum.z + mean.z, sum.w + mean.w};
        }
        consumed_ += run;
        left -= run;
        if (left > 0) continue;
        const float4 mean = is_power
                                ? float4{sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse}
                                : float4{sum.x / divisor, sum.y / divisor, sum.z / divisor, sum.w / divisor};
        const float scale = store_mean(router_.tile_ + index * kMeanRowBytes, index, mean, lane);
        if (lane == 0) router_.scales_[index] = scale;
        sum = {0.0f, 0.0f, 0.0f, 0.0f};
        left = pages_per_block_;
        ++index;
      }
    }

   private:
    const DecodeRouter& router_;
    const int32_t* pages_;
    char* slots_;
    int batch_pages_, pages_per_block_, first_block_, first_page_, my_pages_, page_count_, half_;
    int fetched_ = 0, consumed_ = 0;  // of the warp's pages
    int ids_ = 0, later_ids_;         // of pages 32 n + lane, from the last fetched on

    __device__ int load_ids(int from) const {
      const int number = from + static_cast<int>(threadIdx.x % 32);
      if (number >= page_count_) return -1;
      const int batch = quotient(number, my_pages_);
      return pages_[first_page_ + batch * batch_pages_ + number - batch * my_pages_];
    }
    __device__ void fetch_half() {
      if (fetched_ < page_count_) {
        if (fetched_ % 32 == 0) {
          ids_ = later_ids_;
          later_ids_ = load_ids(fetched_ + 32);
        }
        char* slot = slots_ + (fetched_ & (2 * half_ - 1)) * kMeanBytes;
#pragma unroll 1
        for (int i = 0; i < half_; ++i) {
          const int id = __shfl_sync(~0u, ids_, (fetched_ + i) % 32);
          ptx::cp_async_if<16>(
              id >= 0, ptx::smem_address(slot + i * kMeanBytes), router_.cache_.mean(id) + 4 * (threadIdx.x % 32));
        }
      }
      ptx::cp_async_commit();
      fetched_ += half_;
    }
  };
};

}  // namespace misa
