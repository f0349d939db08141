// Checks and conversions between torch's stable tensors and the kernels' arguments.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "paged_rows.cuh"

namespace misa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

template <typename... Parameters, typename... Arguments>
void launch_simple(
    const char* what, void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
    const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

/// May start before the previous kernel of the stream has ended, for which the kernel must wait.
template <typename... Parameters, typename... Arguments>
void launch_overlapping(
    const char* what, void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
    const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

inline void check_tensor(const Tensor& tensor, const char* name, ScalarType dtype, int dim) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be a CUDA tensor");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, it has ", tensor.dim());
  STD_TORCH_CHECK(
      dim == 0 || tensor.size(dim - 1) <= 1 || tensor.stride(dim - 1) == 1, name,
      ": the last dimension must be contiguous");
}

inline IndexCache index_cache_of(const Tensor& cache, bool needs_means) {
  check_tensor(cache, "index_cache", ScalarType::Byte, 2);
  const int64_t least = needs_means ? kPageBytes : kMeanOffset;
  STD_TORCH_CHECK(
      cache.size(1) >= least, "index_cache pages are ", cache.size(1), " bytes, at least ", least, " are needed");
  auto* data = static_cast<uint8_t*>(cache.data_ptr());
  STD_TORCH_CHECK(
      cache.stride(0) % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0,
      "index_cache: pages must start at multiples of 16 bytes, their stride is ", cache.stride(0));
  return {data, cache.stride(0), cache.size(0)};
}

inline Rows rows_of(const Tensor& block_table, const Tensor& request, const Tensor& visible) {
  check_tensor(block_table, "block_table", ScalarType::Int, 2);
  check_tensor(request, "request", ScalarType::Int, 1);
  check_tensor(visible, "visible", ScalarType::Int, 1);
  STD_TORCH_CHECK(
      request.size(0) == visible.size(0), "request has ", request.size(0), " rows, visible ", visible.size(0));
  return {
      static_cast<const int32_t*>(block_table.data_ptr()), block_table.stride(0),
      static_cast<const int32_t*>(request.data_ptr()), static_cast<const int32_t*>(visible.data_ptr()),
      static_cast<int>(visible.size(0))};
}

/// q float8_e4m3fn [M, H, 128] and gates float32 [M, H] of the rows; returns H.
inline int check_queries(const Tensor& q, const Tensor& gates, const Rows& rows) {
  check_tensor(q, "q", ScalarType::Float8_e4m3fn, 3);
  check_tensor(gates, "gates", ScalarType::Float, 2);
  const int64_t heads = q.size(1);
  STD_TORCH_CHECK(q.size(2) == kHeadDim, "q must have ", kHeadDim, " dimensions a head, it has ", q.size(2));
  STD_TORCH_CHECK(heads >= 1 && heads <= kMaxHeads, "q must have 1 to ", kMaxHeads, " heads, it has ", heads);
  STD_TORCH_CHECK(
      q.size(0) == rows.count && gates.size(0) == rows.count && gates.size(1) == heads,
      "q, gates and visible disagree on the number of rows or heads");
  STD_TORCH_CHECK(
      q.stride(1) % 16 == 0 && q.stride(0) % 16 == 0 && reinterpret_cast<uintptr_t>(q.data_ptr()) % 16 == 0,
      "q: heads must start at multiples of 16 bytes");
  return static_cast<int>(heads);
}

/// All heads of q and gates, which it checks.
inline QueryHeads query_heads(const Tensor& q, const Tensor& gates, const Rows& rows) {
  QueryHeads queries = {};
  queries.count = check_queries(q, gates, rows);
  queries.query = static_cast<const uint8_t*>(q.data_ptr());
  queries.row_stride = q.stride(0);
  queries.head_stride = q.stride(1);
  queries.gates = static_cast<const float*>(gates.data_ptr());
  queries.gates_stride = gates.stride(0);
  return queries;
}

}  // namespace misa
