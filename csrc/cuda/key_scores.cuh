// Scores of a tile of 64 keys for one query by FP8 wgmma, keys as the rows and heads as the columns.
//
// The score of a key is (((w0 r0) + w1 r1) + ...) * scale with r = relu(q . key), heads ascending and one fma each,
// whatever kernel computes it: a (query, key) pair has the same bits in prefill and decode.
#pragma once

#include "common/ptx.cuh"
#include "paged_rows.cuh"

namespace misa {

/// How the heads of a query, or of up to kRows queries of one request, lie in the columns of the product.
///
/// Lane c of a quad holds columns {8i + 2c, 8i + 2c + 1}. With up to 8 heads ("private") those are the heads of query
/// c, so its head sum needs no other lane; a lane without a query costs nothing, as the tensor core is bound by reading
/// the keys. With more heads lane c holds heads [c, c + 1) * kHeadsPerLane of one query and the sum is handed from lane
/// to lane.
template <int kHeads>
struct HeadLayout {
  static_assert(kHeads == 8 || kHeads == 16 || kHeads == 32 || kHeads == 64);
  static constexpr bool kPrivate = kHeads == 8;
  static constexpr int kRows = kPrivate ? 4 : 1;
  static constexpr int kColumns = kPrivate ? 32 : kHeads;
  static constexpr int kHeadsPerLane = kColumns / 4;
  static constexpr int kQueryBytes = kColumns * kHeadDim;

  __device__ static int row_of_lane() { return kPrivate ? threadIdx.x % 4 : 0; }
  /// Whether this lane gets the sums of row row_of_lane().
  __device__ static bool has_result(int rows) { return kPrivate ? threadIdx.x % 4 < rows : threadIdx.x % 4 == 3; }
  __device__ static int row_of(int column) { return kPrivate ? column % 8 / 2 : 0; }
  __device__ static int head_of(int column) {
    const int head = 2 * (column / 8) + column % 2;
    return kPrivate ? head : column % 8 / 2 * kHeadsPerLane + head;
  }
};

/// A block's first kThreads threads, all if 0, fill the B operand (1024-byte aligned, kQueryBytes) with the queries of
/// `rows` rows. A barrier of those who read it must follow.
template <int kHeads, int kThreads = 0>
__device__ __forceinline__ void store_query(char* operand, const QueryHeads& queries, int rows) {
  using Layout = HeadLayout<kHeads>;
  constexpr int kChunks = kHeadDim / 16;
  for (int i = threadIdx.x; i < Layout::kColumns * kChunks; i += kThreads != 0 ? kThreads : blockDim.x) {
    const int column = i / kChunks, chunk = i % kChunks;
    const int row = Layout::row_of(column), index = Layout::head_of(column);
    uint4 bytes = {0, 0, 0, 0};
    if (row < rows && index < queries.count) {
      const uint8_t* query =
          queries.query + row * queries.row_stride + queries.head(row, index) * queries.head_stride;
      bytes = reinterpret_cast<const uint4*>(query)[chunk];
    }
    *reinterpret_cast<uint4*>(operand + column * kHeadDim + (chunk ^ (column & 7)) * 16) = bytes;
  }
  ptx::fence_proxy_async();
}

/// The gates of this lane's columns, zero where there is no head.
template <int kHeads>
__device__ __forceinline__ void load_gates(
    float (&gate)[HeadLayout<kHeads>::kHeadsPerLane], const QueryHeads& queries, int rows) {
  using Layout = HeadLayout<kHeads>;
  const int quad_lane = threadIdx.x % 4;
  const bool has_row = Layout::row_of_lane() < rows;
  const int row = has_row ? Layout::row_of_lane() : 0;
  const float* gates = queries.gates + row * queries.gates_stride;
#pragma unroll
  for (int i = 0; i < Layout::kHeadsPerLane; ++i) {
    const int index = Layout::head_of(8 * (i / 2) + 2 * quad_lane + i % 2);
    const bool exists = has_row && index < queries.count;
    const float value = gates[queries.head(row, exists ? index : 0)];  // always loads, as branches cost more
    gate[i] = exists ? value : 0.0f;
  }
}

/// A warpgroup starts the product of a tile of 64 keys (1024-byte aligned, 128-byte swizzle) and the query operand,
/// which are given by descriptors.
template <int kHeads>
__device__ __forceinline__ void start_tile(
    float (&d)[HeadLayout<kHeads>::kColumns / 2], uint64_t keys, uint64_t operand) {
  ptx::pin_registers(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kHeadDim / 32; ++step) {
    ptx::wgmma_m64k32<HeadLayout<kHeads>::kColumns>(
        d, ptx::descriptor_after(keys, 2 * step), ptx::descriptor_after(operand, 2 * step), step > 0);
  }
  ptx::wgmma_commit();
}

template <int kHeads>
__device__ __forceinline__ void start_tile(
    float (&d)[HeadLayout<kHeads>::kColumns / 2], const char* keys, const char* operand) {
  start_tile<kHeads>(d, ptx::swizzled_descriptor(keys), ptx::swizzled_descriptor(operand));
}

/// Head sums of the two keys of this thread (rows lane / 4 and lane / 4 + 8 of its warp's 16), in the lanes for which
/// HeadLayout::has_result.
template <int kHeads>
__device__ __forceinline__ void sum_heads(
    float (&sum)[2], const float (&d)[HeadLayout<kHeads>::kColumns / 2],
    const float (&gate)[HeadLayout<kHeads>::kHeadsPerLane]) {
  using Layout = HeadLayout<kHeads>;
  sum[0] = sum[1] = 0.0f;
  constexpr int kPhases = Layout::kPrivate ? 1 : 4;
#pragma unroll
  for (int phase = 0; phase < kPhases; ++phase) {
    if (phase > 0) {
      const int previous = (threadIdx.x % 32 & ~3) | (phase - 1);
      sum[0] = __shfl_sync(~0u, sum[0], previous);
      sum[1] = __shfl_sync(~0u, sum[1], previous);
    }
#pragma unroll
    for (int i = 0; i < Layout::kHeadsPerLane; ++i) {
      sum[0] = fmaf(gate[i], fmaxf(d[4 * (i / 2) + i % 2], 0.0f), sum[0]);
      sum[1] = fmaf(gate[i], fmaxf(d[4 * (i / 2) + 2 + i % 2], 0.0f), sum[1]);
    }
  }
}

}  // namespace misa
