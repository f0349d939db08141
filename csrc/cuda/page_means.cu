// Means of the pages that a step wrote to.
#include <cuda_fp8.h>

#include "common/ptx.cuh"
#include "torch_op.h"

namespace misa {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kParts = 8;                  // of 16 dimensions, a thread each
constexpr int kKeysAtOnce = kThreads / kParts;
constexpr int kTokensOfCta = 8;            // of many tokens, few of which end a page
constexpr int kManyTokens = 1024;

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

/// The mean of a page whose first `count` keys are valid. The order of the sum depends on the keys' places in the page
/// alone, so a mean does not depend on how tokens were grouped into steps. Few instructions: most launches run them once.
__device__ __forceinline__ void update_mean(uint8_t* page, int count, float (&sums)[kWarps][kHeadDim]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = threadIdx.x % kParts;
  constexpr int kKeysOfThread = kPageTokens / kKeysAtOnce;
  const auto* scales = reinterpret_cast<const float*>(page + kScalesOffset);
  uint4 key[kKeysOfThread];
  float scale[kKeysOfThread], sum[16] = {};
#pragma unroll
  for (int i = 0; i < kKeysOfThread; ++i) {
    const int number = threadIdx.x / kParts + i * kKeysAtOnce;
    const bool exists = number < count;
    key[i] = exists ? reinterpret_cast<const uint4*>(page + number * kHeadDim)[part] : uint4{0, 0, 0, 0};
    scale[i] = exists ? scales[number] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kKeysOfThread; ++i) accumulate(sum, key[i], scale[i]);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    sum[i] += __shfl_xor_sync(~0u, sum[i], 8);
    sum[i] += __shfl_xor_sync(~0u, sum[i], 16);
  }
  if (lane < kParts) {
    auto* own = reinterpret_cast<float4*>(&sums[warp][part * 16]);
#pragma unroll
    for (int i = 0; i < 4; ++i) own[i] = {sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]};
  }
  __syncthreads();
  if (threadIdx.x < kHeadDim) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += sums[i][threadIdx.x];
    reinterpret_cast<float*>(page + kMeanOffset)[threadIdx.x] = total / static_cast<float>(count);
  }
}

/// A CTA looks at adjacent tokens, and updates a page at the last one that the step wrote in it.
__global__ void __launch_bounds__(kThreads) page_means_kernel(
    IndexCache cache, const int64_t* __restrict__ slot_mapping, int tokens, int tokens_of_cta) {
  __shared__ __align__(16) float sums[kWarps][kHeadDim];
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const int first = blockIdx.x * tokens_of_cta, last = min(first + tokens_of_cta, tokens);
#pragma unroll 1
  for (int token = first; token < last; ++token) {
    const int64_t slot = slot_mapping[token];
    const int64_t following = token + 1 < tokens ? slot_mapping[token + 1] : -1;
    if (slot < 0 || (following == slot + 1 && following % kPageTokens != 0)) continue;
    update_mean(cache.page(slot / kPageTokens), static_cast<int>(slot % kPageTokens) + 1, sums);
    __syncthreads();
  }
}

void update_page_means(Tensor index_cache, Tensor slot_mapping) {
  const IndexCache cache = index_cache_of(index_cache, true);
  check_tensor(slot_mapping, "slot_mapping", ScalarType::Long, 1);
  const int tokens = static_cast<int>(slot_mapping.size(0));
  if (tokens == 0) return;
  const int tokens_of_cta = tokens < kManyTokens ? 1 : kTokensOfCta;
  launch_overlapping(
      "update_page_means", page_means_kernel, dim3((tokens + tokens_of_cta - 1) / tokens_of_cta), kThreads,
      current_stream(index_cache), cache, static_cast<const int64_t*>(slot_mapping.data_ptr()), tokens, tokens_of_cta);
}

}  // namespace
}  // namespace misa

STABLE_TORCH_LIBRARY_FRAGMENT(misa_vllm, m) {
  m.def("update_page_means(Tensor(a!) index_cache, Tensor slot_mapping) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CUDA, m) {
  m.impl("update_page_means", TORCH_BOX(&misa::update_page_means));
}
