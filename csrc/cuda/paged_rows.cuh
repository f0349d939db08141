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

/// Queries, gates and heads of rows that are scored together; `heads` null: heads 0 .. count - 1.
struct QueryHeads {
  const uint8_t* query;
  int64_t row_stride, head_stride;
  const float* gates;
  int64_t gates_stride;
  const int32_t* heads;
  int64_t heads_stride;
  int count;

  __device__ QueryHeads from_row(int64_t row) const {
    QueryHeads from = *this;
    from.query += row * row_stride;
    from.gates += row * gates_stride;
    if (heads != nullptr) from.heads += row * heads_stride;
    return from;
  }
  __device__ int head(int row, int index) const { return heads == nullptr ? index : heads[row * heads_stride + index]; }
};

}  // namespace misa
