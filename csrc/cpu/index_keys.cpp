// Writing index keys into their pages, and the pages' statistics.

#include <unordered_map>

#include "ops.h"
#include "simd.h"
#include "tensors.h"

namespace misa {

void write_index_keys(const Tensor& k, const Tensor& index_cache, const Tensor& slot_mapping) {
  const View2<uint8_t> cache(index_cache);
  const View1<const int64_t> slots(slot_mapping);
  const bool is_bf16 = k.element_size() == 2;
  const View2<const uint16_t> k_bf16(k);
  const View2<const float> k_fp32(k);
  constexpr int64_t kTokensPerItem = 64;
  parallel_items((slots.size + kTokensPerItem - 1) / kTokensPerItem, [&](int64_t item) {
    float widened[kDim];
    for (int64_t i = item * kTokensPerItem; i < std::min(slots.size, (item + 1) * kTokensPerItem); ++i) {
      if (slots[i] < 0) continue;
      require(slots[i] < cache.rows * kPageTokens, "slot_mapping entry", slots[i], "is outside the cache");
      uint8_t* page = cache[slots[i] / kPageTokens];
      const int64_t offset = slots[i] % kPageTokens;
      const float* x = k_fp32[i];
      if (is_bf16) {
        simd().widen_bf16(k_bf16[i], kDim, widened);
        x = widened;
      }
      simd().quantize_key(x, page + offset * kDim, (float*)(page + kScalesOffset) + offset);
    }
  });
}

namespace {

// Calls update(page, number of its keys) for every page that a step wrote to.
template <class Update>
void update_pages(const Tensor& index_cache, const Tensor& slot_mapping, const Update& update) {
  const View2<uint8_t> cache(index_cache);
  const View1<const int64_t> slots(slot_mapping);
  std::unordered_map<int64_t, int> tokens_of_page;  // the last write of a page decides how many tokens it has
  for (int64_t i = 0; i < slots.size; ++i) {
    if (slots[i] < 0) continue;
    require(slots[i] < cache.rows * kPageTokens, "slot_mapping entry", slots[i], "is outside the cache");
    tokens_of_page[slots[i] / kPageTokens] = (int)(slots[i] % kPageTokens) + 1;
  }
  const std::vector<std::pair<int64_t, int>> written(tokens_of_page.begin(), tokens_of_page.end());
  parallel_items((int64_t)written.size(),
                 [&](int64_t item) { update(cache[written[item].first], written[item].second); });
}

}  // namespace

void update_page_means(const Tensor& index_cache, const Tensor& slot_mapping) {
  update_pages(index_cache, slot_mapping, [](uint8_t* page, int count) {
    simd().mean_keys(page, (const float*)(page + kScalesOffset), count, (float*)(page + kMeanOffset));
  });
}

void update_signed_means(const Tensor& index_cache, const Tensor& slot_mapping) {
  update_pages(index_cache, slot_mapping, [](uint8_t* page, int count) {
    float means[2 * kDim];
    simd().signed_mean_keys(page, (const float*)(page + kScalesOffset), count, means);
    simd().narrow_half(means, 2 * kDim, (uint16_t*)(page + kMeanOffset));
  });
}

}  // namespace misa
