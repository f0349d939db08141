// The paged cache of index keys and the addressing of query rows, as misa_vllm/index_cache.py and rows.py define them.
#pragma once

#include <cstdint>

namespace misa {

constexpr int kHeadDim = 128;
constexpr int kPageTokens = 64;
constexpr int kScalesOffset = kPageTokens * kHeadDim;
constexpr int kMeanOffset = kScalesOffset + kPageTokens * 4;
constexpr int kPageBytes = kMeanOffset + kHeadDim * 4;
constexpr int kMaxHeads = 64;

/// index_cache: uint8 [num_pages, page_bytes], pages `page_stride` bytes apart.
struct IndexCache {
  uint8_t* data;
  int64_t page_stride;
  int64_t num_pages;

  __device__ uint8_t* page(int64_t id) const { return data + id * page_stride; }
  __device__ const float* mean(int64_t id) const {
    return reinterpret_cast<const float*>(page(id) + kMeanOffset);
  }
};

/// QueryRows: block_table int32 [R, W], request int32 [M], visible int32 [M].
struct Rows {
  const int32_t* block_table;
  int64_t table_stride;
  const int32_t* request;
  const int32_t* visible;
  int count;

  __device__ const int32_t* pages(int row) const { return block_table + request[row] * table_stride; }
};

/// fp32 as uint32 of the same order. 0 is kept free for "no key": only a NaN of negative sign would map to it.
__device__ __forceinline__ uint32_t ordered_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 and +0 are equal scores
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return key == 0 ? 1u : key;
}

}  // namespace misa
