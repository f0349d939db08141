// Scores of heads against the means of pool blocks, as every router computes them.
//
// Pool block means are rounded to fp16 after division by a power of two of their own, so that they keep 11 bits
// whatever the keys' range; the queries are exact in fp16, products accumulate in fp32.
//
// Sums run in an order that depends on the block index alone: columns of a tile by thread, tiles ascending within a
// segment (`segment_blocks`), the four lanes of a quad, then segments ascending. So a token gets the same heads from
// all routers, in any batch and with any number of CTAs.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "common/ptx.cuh"
#include "common/select.cuh"
#include "paged_rows.cuh"

namespace misa {

constexpr int kColumns = 8;           // pool blocks per mma
constexpr int kSegmentTokens = 8192;  // context whose blocks are summed by themselves, at least
constexpr int kMeanBytes = kHeadDim * 4;
constexpr int kMeanRowBytes = kHeadDim * 2;

__host__ __device__ constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

__host__ __device__ inline int segment_blocks_of(int pool_block) {
  return round_up((kSegmentTokens + pool_block - 1) / pool_block, kColumns);
}

// ---------------------------------------------------------------- pool block means

/// The 16-byte chunk of a mean's row that holds a chunk of 8 values: rows are 256 bytes, so chunks are spread over
/// the banks by the row's number.
__device__ __forceinline__ int swizzled(int chunk, int row) { return chunk ^ (row & 7); }

/// Write a pool block's mean as 128 fp16 and return its power-of-two scale. Lane l holds dimensions 4l .. 4l + 3.
/// Dimension 32t + 4s + 2e + f is stored at 16s + 8e + 2t + f: the thread of quad lane t then needs dimensions
/// 32t .. 32t + 31 of a query over the eight k-steps s, which are 32 consecutive bytes.
__device__ __forceinline__ float store_mean(char* row_data, int row, float4 mean, int lane) {
  float largest = fmaxf(fmaxf(fabsf(mean.x), fabsf(mean.y)), fmaxf(fabsf(mean.z), fabsf(mean.w)));
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
  }
  const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 1u), 253u);
  const float inverse = __uint_as_float((254u - exponent) << 23);
  const __half2 low = __floats2half2_rn(mean.x * inverse, mean.y * inverse);
  const __half2 high = __floats2half2_rn(mean.z * inverse, mean.w * inverse);
  const int step = lane % 8, quad_lane = lane / 8;
  *reinterpret_cast<__half2*>(row_data + swizzled(2 * step, row) * 16 + 4 * quad_lane) = low;
  *reinterpret_cast<__half2*>(row_data + swizzled(2 * step + 1, row) * 16 + 4 * quad_lane) = high;
  return __uint_as_float(exponent << 23);
}

// ---------------------------------------------------------------- scores on the tensor cores

/// A fragments of 16 heads of one query: 8 k-steps of m16n8k16.
struct QueryFragment {
  uint32_t regs[8][4];
};

__device__ __forceinline__ uint32_t fp8x2_to_half2(uint32_t pair) {
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
  return static_cast<uint32_t>(raw.x) | static_cast<uint32_t>(raw.y) << 16;
}

/// The bytes of a fragment: heads lane / 4 and lane / 4 + 8, dimensions 32 (lane % 4) on.
struct QueryBytes {
  uint4 halves[2][2];
};

__device__ __forceinline__ QueryBytes load_query(const uint8_t* query, int64_t head_stride, int first_head, int heads) {
  const int lane = threadIdx.x % 32;
  QueryBytes bytes = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = first_head + lane / 4 + 8 * half;
    if (head < heads) {
      const auto* source = reinterpret_cast<const uint4*>(query + head * head_stride + 32 * (lane % 4));
      bytes.halves[half][0] = source[0];
      bytes.halves[half][1] = source[1];
    }
  }
  return bytes;
}

__device__ __forceinline__ void convert_query(QueryFragment& fragment, const QueryBytes& bytes) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      const uint4 four = bytes.halves[half][step / 4];
      const uint32_t word = step % 4 == 0 ? four.x : step % 4 == 1 ? four.y : step % 4 == 2 ? four.z : four.w;
      fragment.regs[step][half] = fp8x2_to_half2(word & 0xffff);
      fragment.regs[step][half + 2] = fp8x2_to_half2(word >> 16);
    }
  }
}

/// Adds relu(q . kbar) of 8 pool blocks (rows first .. first + 7 of the tile) to the sums of 16 * kFragments heads.
/// Blocks from `blocks_left` on do not count.
template <int kFragments>
__device__ __forceinline__ void score_columns(
    float (&sum)[kFragments][2], const QueryFragment (&query)[kFragments], const char* tile, const float* scales,
    int first, int blocks_left) {
  const int lane = threadIdx.x % 32;
  uint32_t kbar[8][2];
  const int row = first + lane % 8;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const int chunk = 4 * pair + lane / 8;
    uint32_t matrices[4];
    ptx::load_matrix_x4(matrices, tile + row * kMeanRowBytes + swizzled(chunk, row) * 16);
    kbar[2 * pair][0] = matrices[0];
    kbar[2 * pair][1] = matrices[1];
    kbar[2 * pair + 1][0] = matrices[2];
    kbar[2 * pair + 1][1] = matrices[3];
  }
  const int column = 2 * (lane % 4);
  const float2 scale = *reinterpret_cast<const float2*>(scales + first + column);
  float d[kFragments][4] = {};
#pragma unroll
  for (int step = 0; step < 8; ++step) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) ptx::mma_fp16(d[f], query[f].regs[step], kbar[step][0], kbar[step][1]);
  }
  // a select, not a product with zero: what lies past the last complete block may be infinite
  const bool counts[2] = {column < blocks_left, column + 1 < blocks_left};
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float left = fmaf(fmaxf(d[f][2 * half], 0.0f), scale.x, sum[f][half]);
      sum[f][half] = counts[0] ? left : sum[f][half];
      const float right = fmaf(fmaxf(d[f][2 * half + 1], 0.0f), scale.y, sum[f][half]);
      sum[f][half] = counts[1] ? right : sum[f][half];
    }
  }
}

/// The sum of a segment over the four lanes of a quad, which each lane gets; restarts the lanes' sums.
template <int kFragments>
__device__ __forceinline__ void take_segment(float (&segment)[kFragments][2], float (&sum)[kFragments][2]) {
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float value = sum[f][half];
      value += __shfl_xor_sync(~0u, value, 1);
      value += __shfl_xor_sync(~0u, value, 2);
      segment[f][half] = value;
      sum[f][half] = 0.0f;
    }
  }
}

/// One warp writes the heads with the largest of scores[0 .. heads), ascending; of equal scores the lower head wins.
__device__ __forceinline__ void write_top_heads(const float* scores, int heads, int active_heads, int32_t* out) {
  const int lane = threadIdx.x % 32;
  uint32_t key[2];
  int rank[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = lane + 32 * half;
    key[half] = head < heads ? order_key(scores[head]) : 0u;
  }
  const auto compare = [&](int first, uint32_t rivals) {  // heads that do not exist have the smallest key
#pragma unroll 16
    for (int i = 0; i < 32; ++i) {
      const uint32_t rival = __shfl_sync(~0u, rivals, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int head = lane + 32 * half;
        rank[half] += rival > key[half] || (rival == key[half] && first + i < head);
      }
    }
  };
  compare(0, key[0]);
  if (heads > 32) compare(32, key[1]);
  int written = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = lane + 32 * half;
    const bool chosen = head < heads && rank[half] < active_heads;
    const uint32_t chosen_lanes = __ballot_sync(~0u, chosen);
    if (chosen) out[written + __popc(chosen_lanes & ((1u << lane) - 1))] = head;
    written += __popc(chosen_lanes);
  }
}

}  // namespace misa
