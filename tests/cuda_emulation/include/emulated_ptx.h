// What csrc/cuda/common/ptx.cuh wraps, for the emulator: the same names, by the emulator's own means.
#pragma once

#include "cuda_runtime.h"

namespace misa::ptx {

inline uint32_t smem_address(const void* pointer) { return emulator::shared_address(pointer); }

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { emulator::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { emulator::mbarrier_arrive(barrier, 0); }
constexpr int kArrivalsOfWarp = 1;
inline void mbarrier_arrive_warp(uint64_t* barrier, int lane) {
  if (lane == 0) mbarrier_arrive(barrier);
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) { emulator::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulator::mbarrier_wait(barrier, parity); }
inline bool mbarrier_test(uint64_t* barrier, uint32_t parity) { return emulator::mbarrier_test(barrier, parity); }

void tma_load_3d(void* destination, const CUtensorMap* map, int x, int y, int z, uint64_t* barrier);
inline void prefetch_tensor_map(const CUtensorMap*) {}
void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier);

template <int kBytes>
void cp_async(void* destination, const void* source) {
  emulator::thread_copy({static_cast<char*>(destination), static_cast<const char*>(source), kBytes});
}
template <int kBytes>
void cp_async_if(bool copies, uint32_t destination, const void* source) {
  if (copies) {
    emulator::thread_copy(
        {static_cast<char*>(emulator::shared_pointer(destination)), static_cast<const char*>(source), kBytes});
  }
}
inline void cp_async_commit() { emulator::thread_copy_commit(); }
template <int kPending>
void cp_async_wait() {
  emulator::thread_copy_wait(kPending);
}
inline void cp_async_wait_all() { emulator::thread_copy_wait_all(); }
inline void cp_async_mbarrier_arrive(uint64_t* barrier) { emulator::thread_copy_arrive(barrier); }
inline void fence_proxy_async() { emulator::fence_proxy_async(); }

template <typename T>
T load_acquire(const T* pointer) {
  emulator::poll("load_acquire");
  return *pointer;
}
inline void store_release(uint64_t* pointer, uint64_t value) {
  emulator::maybe_switch();
  *pointer = value;
}
inline void add_one_release(uint32_t* pointer) {
  emulator::maybe_switch();
  ++*pointer;
}
inline void prefetch_l2(const void*) {}
inline float divide_roughly(float x, float y) { return x / y; }
template <typename T>
T load_relaxed(const T* pointer) {
  return load_acquire(pointer);
}
template <typename T>
void store_relaxed(T* pointer, std::common_type_t<T> value) {
  emulator::maybe_switch();
  *pointer = value;
}

template <int kId, int kThreads>
void named_barrier_sync() {
  emulator::barrier_sync(kId, kThreads);
}
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }

template <typename T>
T opaque(T value) {
  return value;
}
template <int kRegisters>
void set_more_registers() {}
template <int kRegisters>
void set_fewer_registers() {}

inline void wait_for_previous_kernel() { emulator::wait_for_previous_kernel(); }
inline void let_next_kernel_start() { emulator::let_next_kernel_start(); }

/// Here an address; 16 bytes are one, as in the hardware's descriptors.
inline uint64_t swizzled_descriptor(const void* base) { return reinterpret_cast<uint64_t>(base) >> 4; }
inline uint64_t descriptor_after(uint64_t descriptor, uint32_t chunks) { return descriptor + chunks; }
inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
template <int kCount>
void pin_registers(float (&)[kCount]) {}

template <int kColumns>
void wgmma_m64k32(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  emulator::wgmma(
      d, kColumns, reinterpret_cast<const char*>(a << 4), reinterpret_cast<const char*>(b << 4), accumulate);
}

void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void load_matrix_x4(uint32_t (&registers)[4], const void* row);
template <typename T>
void store_if(bool stores, T* to, T value) {
  if (stores) *to = value;
}
/// See the wrapper.
template <uint32_t kStep>
void append_if_not_less(uint32_t& address, float value, float threshold, uint32_t tag) {
  if (value < threshold) return;
  auto* entry = static_cast<uint32_t*>(emulator::shared_pointer(address));
  entry[0] = __float_as_uint(value);
  entry[1] = tag;
  address += kStep;
}

}  // namespace misa::ptx
