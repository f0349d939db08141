// The tensor map with which the copy engine loads pages of keys.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "torch_op.h"

namespace misa {

/// Boxes of one page's keys, 64 x 128 bytes, under the 128-byte swizzle: coordinates (0, 0, page).
inline CUtensorMap key_page_map(const IndexCache& cache) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint64_t sizes[3] = {kHeadDim, kPageTokens, static_cast<cuuint64_t>(cache.num_pages)};
  const cuuint64_t strides[2] = {kHeadDim, static_cast<cuuint64_t>(cache.page_stride)};
  const cuuint32_t box[3] = {kHeadDim, kPageTokens, 1};
  const cuuint32_t element_strides[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, cache.data, sizes, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with ", static_cast<int>(result));
  return map;
}

}  // namespace misa
