// Runs CUDA kernels on the CPU, so that their logic is tested where there is no GPU.
//
// Kernels are compiled as C++. Every CTA gets an operating-system thread, so that `__shared__` can be thread_local, and
// every CUDA thread a stack that this thread switches between. Only one CTA runs at a time: the emulator needs no
// locks, and a seed fixes the order of everything. That order is hostile where CUDA leaves it open:
//
//   shared memory     starts as 0xFF bytes, and is 0xFF again once its CTA has ended
//   copies            (cp.async, bulk, tensor) spoil their destination at once and land late, in any order
//   wgmma             reads its operands when it is waited for; accumulators are NaN until then; what cp.async wrote
//                     needs a proxy fence before it
//   CTAs              start in order as multiprocessors have room, and are interrupted at atomics and fences
//   dependent launch  the next kernel starts as early as it may
//   global memory     each tensor ends at an inaccessible page, and is compared if the operator must not write it
//
// A thread that waits for something that cannot come ends the call with a message that says who waits for what.
// What is not emulated: the memory model (every store is seen at once), rounding of the tensor cores (sums are fp32, in
// order), bank conflicts, registers and time.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

struct Fiber;
struct Cta;

struct Launch {
  std::string name;
  std::function<void()> body;
  Dim grid, block;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  bool cooperative = false, may_overlap = false;
  bool is_memset = false;
};

/// What the device has; set before the first launch.
struct Device {
  int multiprocessors = 4;
  size_t shared_bytes = 228 * 1024;
  int threads = 2048;
};
extern Device device;

void enqueue(Launch launch);
/// Runs what was launched, to its end. Throws std::runtime_error where the kernels went wrong.
void run();
void set_seed(uint64_t seed);
/// Launches so far, for tests that count them.
int64_t launch_count();

/// Ends the call; never returns.
[[noreturn]] void fail(const std::string& message);

// ---------------------------------------------------------------- what kernels call

int lane();
/// A word per lane of the warp; valid until the warp's next exchange.
const uint64_t* warp_exchange(uint64_t value, uint32_t mask, const char* what);
/// The same, with work for the last lane that arrives.
void warp_together(void* argument, const std::function<void(void* const* arguments)>& work, const char* what);
/// `threads` < 0: all of the block that have not ended.
void barrier_sync(int id, int threads);
/// Lets others run now and then.
void maybe_switch();
/// The thread found that it must wait for something that another thread writes.
void poll(const char* what);

void mbarrier_init(uint64_t* barrier, uint32_t arrivals);
void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
bool mbarrier_test(const uint64_t* barrier, uint32_t parity);

struct Copy {
  char* destination;
  const char* source;
  uint32_t bytes;
  bool zero = false;
};
/// Lands late, then counts towards the barrier.
void copy_to_barrier(std::vector<Copy> parts, uint64_t* barrier);
void thread_copy(const Copy& copy);
void thread_copy_commit();
void thread_copy_wait(int pending);
void thread_copy_wait_all();
void thread_copy_arrive(uint64_t* barrier);
void fence_proxy_async();

/// d [columns / 2] (+)= 32 dimensions of a tile of 64 keys times `columns` columns, laid out as the hardware does.
void wgmma(float* d, int columns, const char* a, const char* b, bool accumulate);
void wgmma_commit();
void wgmma_wait(int pending);
float e4m3(uint8_t byte);

int cluster_size();
int cluster_rank();
void cluster_arrive();
void cluster_wait();
/// The same place in the shared memory of another CTA of the cluster.
void* map_shared(void* pointer, int rank);
uint32_t shared_address(const void* pointer);
void* shared_pointer(uint32_t address);

void wait_for_previous_kernel();
void let_next_kernel_start();

}  // namespace emulator
