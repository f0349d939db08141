// The part of CUDA C++ and of its runtime that the kernels use, for the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda.h"
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local

extern __thread emulator::Dim threadIdx, blockIdx, blockDim, gridDim;

// ---------------------------------------------------------------- types

struct dim3 : emulator::Dim {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : emulator::Dim{x, y, z} {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---------------------------------------------------------------- arithmetic

#define MISA_EMULATED_MIN_MAX(Result, A, B)                                                      \
  inline Result min(A a, B b) {                                                                  \
    return static_cast<Result>(a) < static_cast<Result>(b) ? static_cast<Result>(a) : static_cast<Result>(b); \
  }                                                                                              \
  inline Result max(A a, B b) {                                                                  \
    return static_cast<Result>(a) > static_cast<Result>(b) ? static_cast<Result>(a) : static_cast<Result>(b); \
  }
MISA_EMULATED_MIN_MAX(int, int, int)
MISA_EMULATED_MIN_MAX(unsigned, unsigned, unsigned)
MISA_EMULATED_MIN_MAX(unsigned, int, unsigned)
MISA_EMULATED_MIN_MAX(unsigned, unsigned, int)
MISA_EMULATED_MIN_MAX(long, long, long)
MISA_EMULATED_MIN_MAX(unsigned long, unsigned long, unsigned long)
MISA_EMULATED_MIN_MAX(float, float, float)
#undef MISA_EMULATED_MIN_MAX

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __clzll(long long value) { return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
using std::isfinite;
using std::isinf;
using std::isnan;

// ---------------------------------------------------------------- warps and blocks

namespace emulator {

template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <typename T>
uint64_t to_word(T value) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::from_word<T>(emulator::warp_exchange(emulator::to_word(value), mask, "__shfl_sync")[source & 31]);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset) {
  const uint64_t* words = emulator::warp_exchange(emulator::to_word(value), mask, "__shfl_up_sync");
  const int source = emulator::lane() - static_cast<int>(offset);
  return source < 0 ? value : emulator::from_word<T>(words[source]);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  const uint64_t* words = emulator::warp_exchange(emulator::to_word(value), mask, "__shfl_down_sync");
  const int source = emulator::lane() + static_cast<int>(offset);
  return source > 31 ? value : emulator::from_word<T>(words[source]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  const uint64_t* words = emulator::warp_exchange(emulator::to_word(value), mask, "__shfl_xor_sync");
  return emulator::from_word<T>(words[emulator::lane() ^ offset]);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* words = emulator::warp_exchange(predicate != 0, mask, "__ballot_sync");
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(words[i]) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  const uint64_t* words = emulator::warp_exchange(emulator::to_word(value), mask, "__reduce_add_sync");
  unsigned sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<unsigned>(words[i]);
  return static_cast<T>(sum);
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  const uint64_t* words = emulator::warp_exchange(emulator::to_word(value), mask, "__reduce_max_sync");
  T best = emulator::from_word<T>(words[0]);
  for (int i = 1; i < 32; ++i) best = std::max(best, emulator::from_word<T>(words[i]));
  return best;
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  const uint64_t* words = emulator::warp_exchange(emulator::to_word(value), mask, "__reduce_min_sync");
  T best = emulator::from_word<T>(words[0]);
  for (int i = 1; i < 32; ++i) best = std::min(best, emulator::from_word<T>(words[i]));
  return best;
}
inline void __syncwarp(unsigned mask = ~0u) { emulator::warp_exchange(0, mask, "__syncwarp"); }
inline void __syncthreads() { emulator::barrier_sync(0, -1); }

// ---------------------------------------------------------------- memory

template <typename T>
T __ldcg(const T* pointer) {
  emulator::maybe_switch();
  return *pointer;
}
template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline void __threadfence() { emulator::maybe_switch(); }
inline void __threadfence_block() { emulator::maybe_switch(); }
inline void __nanosleep(unsigned) { emulator::poll("__nanosleep"); }

template <typename T>
T atomicAdd(T* pointer, std::common_type_t<T> value) {
  emulator::maybe_switch();
  const T old = *pointer;
  *pointer = old + value;
  return old;
}
template <typename T>
T atomicMax(T* pointer, std::common_type_t<T> value) {
  emulator::maybe_switch();
  const T old = *pointer;
  *pointer = std::max(old, value);
  return old;
}
template <typename T>
T atomicMin(T* pointer, std::common_type_t<T> value) {
  emulator::maybe_switch();
  const T old = *pointer;
  *pointer = std::min(old, value);
  return old;
}
template <typename T>
T atomicExch(T* pointer, std::common_type_t<T> value) {
  emulator::maybe_switch();
  const T old = *pointer;
  *pointer = value;
  return old;
}
template <typename T>
T atomicOr(T* pointer, std::common_type_t<T> value) {
  emulator::maybe_switch();
  const T old = *pointer;
  *pointer = old | value;
  return old;
}
template <typename T>
T atomicCAS(T* pointer, std::common_type_t<T> expected, std::common_type_t<T> value) {
  emulator::maybe_switch();
  const T old = *pointer;
  if (old == expected) *pointer = value;
  return old;
}

// ---------------------------------------------------------------- runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorCooperativeLaunchTooLarge = 82 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault = 0 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative, programmaticStreamSerializationAllowed;
    struct { unsigned x, y, z; } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "the launch was refused by the emulator";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::device.multiprocessors;
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, int, cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
constexpr int kEmulatedMaxShared = 227 * 1024;
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute attribute, int value) {
  const bool fits = attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value <= kEmulatedMaxShared;
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  emulator::Launch launch;
  launch.name = "memset";
  launch.body = [=] { std::memset(pointer, value, bytes); };
  launch.is_memset = true;
  emulator::enqueue(std::move(launch));
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  emulator::Launch launch;
  launch.name = __PRETTY_FUNCTION__;
  launch.grid = config->gridDim;
  launch.block = config->blockDim;
  launch.shared_bytes = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) {
      launch.cooperative = attribute.val.cooperative != 0;
    } else if (attribute.id == cudaLaunchAttributeClusterDimension) {
      launch.cluster = attribute.val.clusterDim.x;
    } else {
      launch.may_overlap = attribute.val.programmaticStreamSerializationAllowed != 0;
    }
  }
  std::tuple<std::decay_t<Parameters>...> copies(arguments...);
  launch.body = [kernel, copies] { std::apply(kernel, copies); };
  emulator::enqueue(std::move(launch));
  return cudaSuccess;
}
