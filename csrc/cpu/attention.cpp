// Sparse MLA attention over the selected tokens.

#include <cmath>
#include <cstring>

#include "ops.h"
#include "simd.h"
#include "tensors.h"

namespace misa {
namespace {

// Rows of bf16 or fp32 widened to fp32.
struct Activations {
  View3<const char> bytes;
  bool is_bf16;

  explicit Activations(const Tensor& t) : bytes(t), is_bf16(t.element_size() == 2) {}

  void widen(int64_t i, int64_t j, float* to) const {
    const int64_t offset = i * bytes.stride0 + j * bytes.stride1;
    if (is_bf16)
      simd().widen_bf16((const uint16_t*)bytes.data + offset, (int)bytes.size2, to);
    else
      std::memcpy(to, (const float*)bytes.data + offset, bytes.size2 * sizeof(float));
  }
};

}  // namespace

void sparse_mla_attention(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table, const Tensor& request,
                          const Tensor& tokens, double scale, int64_t kv_lora_rank, const Tensor& out) {
  const Activations queries(q), kv(kv_cache);
  const View2<const int32_t> pages(block_table), token(tokens);
  const View1<const int32_t> requests(request);
  const View3<char> result(out);
  const int64_t rows = queries.bytes.size0, heads = queries.bytes.size1, dim = queries.bytes.size2;
  const int64_t stride = (dim + kMaxLanes - 1) / kMaxLanes * kMaxLanes;

  // Few rows are cut by heads so that every thread has work; more heads per item widen fewer tokens twice.
  const int64_t wanted = rows >= torch::stable::get_num_threads() ? 32 : 8;
  const int64_t heads_per_item = std::min(heads, wanted), parts = (heads + heads_per_item - 1) / heads_per_item;

  struct Scratch {
    Buffer<float> q, kv, accumulator, highest, total;
  };
  const auto make_scratch = [&] {
    Scratch s{Buffer<float>(heads_per_item * stride), Buffer<float>(kAttentionTile * stride),
              Buffer<float>(heads_per_item * stride), Buffer<float>(heads_per_item), Buffer<float>(heads_per_item)};
    std::memset(s.q.get(), 0, heads_per_item * stride * sizeof(float));
    std::memset(s.kv.get(), 0, kAttentionTile * stride * sizeof(float));
    return s;
  };
  parallel_items(rows * parts, make_scratch, [&](int64_t item, const Scratch& s) {
    const int64_t m = item / parts, first = item % parts * heads_per_item;
    const int64_t some = std::min(heads_per_item, heads - first);
    for (int64_t j = 0; j < some; ++j) {
      queries.widen(m, first + j, s.q.get() + j * stride);
      s.highest[j] = -INFINITY;
      s.total[j] = 0.0f;
    }
    std::memset(s.accumulator.get(), 0, some * stride * sizeof(float));

    int count = 0;
    const auto attend_tile = [&] {
      simd().attend(s.q.get(), (int)some, s.kv.get(), count, (int)stride, (int)kv_lora_rank, (float)scale,
                    s.accumulator.get(), s.highest.get(), s.total.get());
      count = 0;
    };
    for (int64_t t = 0; t < token.columns; ++t) {
      const int64_t position = token.at(m, t);
      if (position < 0) continue;
      const int64_t id = requests[m];
      require(id >= 0 && id < pages.rows, "request", id, "is not a row of block_table");
      require(position < pages.columns * kPageTokens, "token", position, "is past the end of block_table");
      const int64_t page = pages.at(id, position / kPageTokens);
      require(page >= 0 && page < kv.bytes.size0, "block_table entry", page, "is not a page of the cache");
      kv.widen(page, position % kPageTokens, s.kv.get() + count * stride);
      if (++count == kAttentionTile) attend_tile();
    }
    if (count) attend_tile();

    for (int64_t j = 0; j < some; ++j) {
      float* row = s.accumulator.get() + j * stride;
      if (s.total[j] != 0.0f)
        for (int64_t d = 0; d < kv_lora_rank; ++d) row[d] /= s.total[j];
      const int64_t offset = m * result.stride0 + (first + j) * result.stride1;
      if (queries.is_bf16)
        simd().narrow_bf16(row, (int)kv_lora_rank, (uint16_t*)result.data + offset);
      else
        std::memcpy((float*)result.data + offset, row, kv_lora_rank * sizeof(float));
    }
  });
}

}  // namespace misa
