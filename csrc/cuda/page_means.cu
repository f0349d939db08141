// Means of the pages that a step wrote to.
#include <cuda_fp8.h>

#include "common/ptx.cuh"
#include "torch_op.h"

namespace misa {
namespace {

constexpr int kWarps = 8;
constexpr int kKeyGroups = 4;  // lanes 8g .. 8g + 7 read keys g, g + 4, ...; each lane 16 of the 128 dimensions
constexpr int kKeysPerGroup = kPageTokens / kKeyGroups;

__device__ __forceinline__ void accumulate(float (&sum)[16], uint4 key, float scale) {
  const uint32_t words[4] = {key.x, key.y, key.z, key.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (16 * (i % 2)));
    const float2 value = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    sum[2 * i] = fmaf(value.x, scale, sum[2 * i]);
    sum[2 * i + 1] = fmaf(value.y, scale, sum[2 * i + 1]);
  }
}

/// One warp per token; it works if its token is the last that the step wrote in its page. The order of the sum
/// depends on the keys' places in the page alone, so a mean does not depend on how tokens were grouped into steps.
__global__ void __launch_bounds__(32 * kWarps) page_means_kernel(
    IndexCache cache, const int64_t* __restrict__ slot_mapping, int tokens) {
  const int token = blockIdx.x * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  if (token >= tokens) return;
  const int64_t slot = slot_mapping[token];
  const int64_t following = token + 1 < tokens ? slot_mapping[token + 1] : -1;
  if (slot < 0 || (following == slot + 1 && following % kPageTokens != 0)) return;

  uint8_t* page = cache.page(slot / kPageTokens);
  const int count = static_cast<int>(slot % kPageTokens) + 1;
  const int group = lane / 8, part = lane % 8;
  const auto* scales = reinterpret_cast<const float*>(page + kScalesOffset);
  const float scale_low = lane < count ? scales[lane] : 0.0f;
  const float scale_high = lane + 32 < count ? scales[lane + 32] : 0.0f;
  uint4 keys[kKeysPerGroup];
#pragma unroll
  for (int j = 0; j < kKeysPerGroup; ++j) {
    const int key = j * kKeyGroups + group;
    keys[j] = key < count ? reinterpret_cast<const uint4*>(page + key * kHeadDim)[part] : uint4{0, 0, 0, 0};
  }
  float sum[16] = {};
#pragma unroll
  for (int j = 0; j < kKeysPerGroup; ++j) {
    const int key = j * kKeyGroups + group;
    const float scale = __shfl_sync(~0u, j < kKeysPerGroup / 2 ? scale_low : scale_high, key % 32);
    accumulate(sum, keys[j], scale);
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    sum[i] += __shfl_xor_sync(~0u, sum[i], 8);
    sum[i] += __shfl_xor_sync(~0u, sum[i], 16);
  }
  const float keys_in_page = static_cast<float>(count);
  auto* mean = reinterpret_cast<float4*>(page + kMeanOffset);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (group == i) {
      mean[part * 4 + i] = {
          sum[4 * i] / keys_in_page, sum[4 * i + 1] / keys_in_page, sum[4 * i + 2] / keys_in_page,
          sum[4 * i + 3] / keys_in_page};
    }
  }
}

void update_page_means(Tensor index_cache, Tensor slot_mapping) {
  const IndexCache cache = index_cache_of(index_cache, true);
  check_tensor(slot_mapping, "slot_mapping", ScalarType::Long, 1);
  const int tokens = static_cast<int>(slot_mapping.size(0));
  if (tokens == 0) return;
  launch_overlapping(
      "update_page_means", page_means_kernel, dim3((tokens + kWarps - 1) / kWarps), 32 * kWarps,
      current_stream(index_cache), cache, static_cast<const int64_t*>(slot_mapping.data_ptr()), tokens);
}

}  // namespace
}  // namespace misa

STABLE_TORCH_LIBRARY_FRAGMENT(misa_vllm, m) {
  m.def("update_page_means(Tensor(a!) index_cache, Tensor slot_mapping) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CUDA, m) {
  m.impl("update_page_means", TORCH_BOX(&misa::update_page_means));
}
