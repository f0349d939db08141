#include "emulator.h"

#include <link.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <unordered_map>

#include "cuda_fp16.h"
#include "emulated_ptx.h"
#include "torch/csrc/stable/library.h"

__thread emulator::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Device device;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kSliceSwitches = 4000;
constexpr unsigned char kPoison = 0xFF;

std::mt19937_64 random_bits;
bool one_in(unsigned n) { return random_bits() % n == 0; }

// ---------------------------------------------------------------- what runs

struct Warp {
  uint64_t words[2][32] = {};
  void* arguments[2][32] = {};
  int parity = 0, arrived = 0, alive = 32;
  uint32_t ended = 0;
  const char* what = "";
  std::vector<Fiber*> waiting;
};

struct Barrier {
  int arrived = 0, expected = 0;
  std::vector<Fiber*> waiting;
};

struct Product {
  float* d;
  int columns;
  const char *a, *b;
  bool accumulate;
  uint64_t fenced;  // the issuing thread's last proxy fence
};

struct BarrierCopy {
  std::vector<Copy> parts;
  uint64_t* barrier;
  Fiber* thread = nullptr;  // whose cp.async these are: then it arrives when they have landed
};

/// Bytes that a thread's cp.async wrote, which tensor cores may read after a proxy fence only.
struct Written {
  uint64_t when;
  const Fiber* thread;
};

struct Grid;
struct Cluster;
struct Worker;

}  // namespace

struct Fiber {
  Cta* cta;
  Warp* warp;
  Dim thread;
  int number;
  ucontext_t context;
  void* stack_pointer = nullptr;
  const char* waits_for = nullptr;
  std::vector<std::vector<Copy>> copies{1};  // the last group is open
  std::vector<std::vector<Product>> products{1};
  uint64_t cluster_phase = 0, fenced = 0;
  bool in_cluster_phase = false, ended = false;
};

struct Cta {
  Grid* grid;
  Cluster* cluster;
  Worker* worker = nullptr;
  int number, rank, multiprocessor;
  int alive = 0;
  char* shared_base = nullptr;
  bool started = false, ended = false, let_next_start = false, wants_switch = false;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  std::deque<Fiber*> ready;
  std::vector<Fiber*> polling;
  Barrier barriers[16];
  std::vector<std::pair<Fiber*, std::pair<uint64_t*, uint32_t>>> mbarrier_waits;
  std::vector<BarrierCopy> copies;
  std::unordered_map<uintptr_t, Written> written;  // of 16 bytes each
  unsigned order;  // how the next thread is picked
};

namespace {

struct Cluster {
  std::vector<Cta*> ctas;
  int arrived = 0, alive = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
};

struct Grid {
  Launch launch;
  int64_t id;
  unsigned next_cta = 0, ended = 0, let_next_start = 0;
  unsigned count() const { return launch.grid.x * launch.grid.y * launch.grid.z; }
  bool is_complete() const { return ended == count(); }
  std::vector<Fiber*> waiting;  // for the grid before
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<Cluster>> clusters;
};

struct Worker {
  std::thread thread;
  sem_t go;
  Cta* cta = nullptr;
  char* stacks = nullptr;
  size_t stack_count = 0;
  void* scheduler_stack = nullptr;
  ucontext_t scheduler;
};

struct Multiprocessor {
  int threads = 0;
  size_t shared = 0;
};

std::deque<Launch> launches;
std::deque<std::unique_ptr<Grid>> active;
std::vector<Multiprocessor> multiprocessors;
std::vector<Worker*> idle_workers;
int64_t launched = 0;
std::map<int64_t, bool> completed;  // by launch
sem_t main_turn;
std::string failure;
bool has_failed = false;
uint64_t progress = 0;

__thread Worker* this_worker;
__thread Fiber* this_fiber;

std::string name_of(const Cta& cta) {
  std::ostringstream name;
  const std::string& full = cta.grid->launch.name;
  const size_t with = full.find("with Parameters");
  name << "CTA " << cta.number << " of " << cta.grid->count();
  if (with != std::string::npos) name << " of a kernel (" << full.substr(with + 5, 60) << ")";
  return name.str();
}

std::string name_of(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.number) + " of " + name_of(*fiber.cta);
}

// ---------------------------------------------------------------- switching

#if defined(__x86_64__)
extern "C" void misa_emulator_switch(void** from, void* to);
asm(R"(
.text
.type misa_emulator_switch, @function
misa_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size misa_emulator_switch, .-misa_emulator_switch
)");
#endif

void end_of_fiber();

void fiber_main() {
  this_fiber->cta->grid->launch.body();
  end_of_fiber();
}

void prepare(Fiber& fiber, char* stack) {
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uint64_t*>(stack + kStackBytes) - 2;
  *--top = 0;  // where fiber_main would return to: it does not
  *--top = reinterpret_cast<uint64_t>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

void switch_to(Fiber& fiber) {
  this_fiber = &fiber;
  threadIdx = fiber.thread;
#if defined(__x86_64__)
  misa_emulator_switch(&this_worker->scheduler_stack, fiber.stack_pointer);
#else
  swapcontext(&this_worker->scheduler, &fiber.context);
#endif
}

void switch_to_scheduler() {
  Fiber& fiber = *this_fiber;
#if defined(__x86_64__)
  misa_emulator_switch(&fiber.stack_pointer, this_worker->scheduler_stack);
#else
  swapcontext(&fiber.context, &this_worker->scheduler);
#endif
}

void release(Fiber* fiber) {
  ++progress;
  fiber->waits_for = nullptr;
  fiber->cta->ready.push_back(fiber);
}

void release_all(std::vector<Fiber*>& waiting) {
  if (waiting.empty()) return;
  const size_t first = random_bits() % waiting.size() / 32 * 32;  // warps in another order
  for (size_t i = 0; i < waiting.size(); ++i) release(waiting[(first + i) % waiting.size()]);
  waiting.clear();
}

void block(const char* what) {
  this_fiber->waits_for = what;
  switch_to_scheduler();
}

// ---------------------------------------------------------------- mbarriers and copies

struct MbarrierState {
  uint16_t expected;
  int16_t phase_and_pending;  // pending arrivals, shifted left by one, and the phase's parity
  int32_t bytes;

  int pending() const { return phase_and_pending >> 1; }
  unsigned parity() const { return phase_and_pending & 1; }
};
static_assert(sizeof(MbarrierState) == sizeof(uint64_t));

MbarrierState& state_of(uint64_t* barrier) {
  auto& state = *reinterpret_cast<MbarrierState*>(barrier);
  if (state.expected == 0xFFFF || state.expected == 0) fail("an mbarrier is used that was not initialised");
  return state;
}

void complete_phase(Cta& cta, uint64_t* barrier) {
  MbarrierState& state = state_of(barrier);
  if (state.pending() < 0) fail("an mbarrier got more arrivals than it expects in a phase");
  if (state.pending() > 0 || state.bytes != 0) return;
  state.phase_and_pending = static_cast<int16_t>(state.expected << 1 | (state.parity() ^ 1));
  auto& waits = cta.mbarrier_waits;
  for (size_t i = 0; i < waits.size();) {
    if (waits[i].second.first == barrier && state.parity() != waits[i].second.second) {
      release(waits[i].first);
      waits[i] = waits.back();
      waits.pop_back();
    } else {
      ++i;
    }
  }
}

void arrive_once(Cta& cta, uint64_t* barrier) {
  MbarrierState& state = state_of(barrier);
  state.phase_and_pending = static_cast<int16_t>(state.phase_and_pending - 2);
  ++progress;
  complete_phase(cta, barrier);
}

void land(const Copy& copy) {
  if (copy.zero) {
    std::memset(copy.destination, 0, copy.bytes);
  } else {
    std::memcpy(copy.destination, copy.source, copy.bytes);
  }
}

void land_of(const Fiber& thread, const Copy& copy) {
  land(copy);
  if (copy.bytes == 16) thread.cta->written[reinterpret_cast<uintptr_t>(copy.destination)] = {++progress, &thread};
}

void land_one(Cta& cta, size_t i) {
  const BarrierCopy copy = std::move(cta.copies[i]);
  cta.copies[i] = std::move(cta.copies.back());
  cta.copies.pop_back();
  if (copy.thread != nullptr) {
    for (const Copy& part : copy.parts) land_of(*copy.thread, part);
    arrive_once(cta, copy.barrier);
    return;
  }
  uint32_t bytes = 0;
  for (const Copy& part : copy.parts) {
    land(part);
    bytes += part.bytes;
  }
  state_of(copy.barrier).bytes -= static_cast<int32_t>(bytes);
  ++progress;
  complete_phase(cta, copy.barrier);
}

void land_one(Cta& cta) { land_one(cta, random_bits() % cta.copies.size()); }

void finish_group(std::vector<Copy>& group) {
  for (const Copy& copy : group) land_of(*this_fiber, copy);
  group.clear();
}

/// Lands what the thread handed over to barriers.
void finish_arrivals() {
  auto& copies = this_fiber->cta->copies;
  for (size_t i = 0; i < copies.size();) {
    if (copies[i].thread == this_fiber) {
      land_one(*this_fiber->cta, i);
    } else {
      ++i;
    }
  }
}

// ---------------------------------------------------------------- barriers

void complete_barrier(Cta& cta, int id) {
  Barrier& barrier = cta.barriers[id];
  const int expected = barrier.expected < 0 ? cta.alive : barrier.expected;
  if (barrier.arrived > expected) fail("barrier " + std::to_string(id) + " got more arrivals than threads");
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  barrier.arrived = 0;
  release_all(barrier.waiting);
}

void enter_barrier(int id, int threads) {
  Barrier& barrier = this_fiber->cta->barriers[id];
  if (barrier.arrived > 0 && barrier.expected != threads) {
    fail("threads disagree on the size of barrier " + std::to_string(id));
  }
  barrier.expected = threads;
  ++barrier.arrived;
  ++progress;
}

void complete_warp(Warp& warp) {
  if (warp.arrived == 0 || warp.arrived < warp.alive) return;
  for (int i = 0; i < 32; ++i) {
    if (warp.ended >> i & 1) warp.words[warp.parity][i] = 0;
  }
  warp.arrived = 0;
  warp.parity ^= 1;
  release_all(warp.waiting);
}

void complete_cluster(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.alive) return;
  cluster.arrived = 0;
  ++cluster.phase;
  for (Cta* cta : cluster.ctas) {
    for (auto& fiber : cta->fibers) fiber->in_cluster_phase = false;
  }
  release_all(cluster.waiting);
}

void end_of_fiber() {
  Fiber& fiber = *this_fiber;
  Cta& cta = *fiber.cta;
  for (const auto& group : fiber.copies) {
    if (!group.empty()) fail("a thread ends before its asynchronous copies have been waited for");
  }
  for (const auto& group : fiber.products) {
    if (!group.empty()) fail("a thread ends before its matrix products have been waited for");
  }
  ++progress;
  fiber.ended = true;
  --cta.alive;
  Cluster& cluster = *cta.cluster;
  --cluster.alive;
  if (fiber.in_cluster_phase) --cluster.arrived;
  complete_cluster(cluster);
  Warp& warp = *fiber.warp;
  --warp.alive;
  warp.ended |= 1u << fiber.number % 32;
  complete_warp(warp);
  if (cta.barriers[0].expected < 0) complete_barrier(cta, 0);
  switch_to_scheduler();
}

// ---------------------------------------------------------------- CTAs

struct ThreadStorage {
  char* base = nullptr;
  size_t bytes = 0;
};

/// This thread's copy of the library's thread_local data, where `__shared__` variables are.
ThreadStorage thread_storage() {
  ThreadStorage found;
  found.base = reinterpret_cast<char*>(&this_fiber);  // makes the block exist
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        bool is_this = false;
        size_t bytes = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          const auto here = reinterpret_cast<uintptr_t>(&device);
          if (header.p_type == PT_LOAD && here >= begin && here < begin + header.p_memsz) is_this = true;
          if (header.p_type == PT_TLS) bytes = header.p_memsz;
        }
        if (is_this) *static_cast<ThreadStorage*>(result) = {static_cast<char*>(info->dlpi_tls_data), bytes};
        return is_this ? 1 : 0;
      },
      &found);
  if (found.base == nullptr) fail("the library's thread storage was not found");
  return found;
}

void spoil_shared_memory(const ThreadStorage& storage) {
  Worker* const worker = this_worker;
  // the compiler must not think that a variable whose address it has not seen keeps its value
  asm volatile("" ::"r"(&this_worker), "r"(&this_fiber) : "memory");
  std::memset(storage.base, kPoison, storage.bytes);
  asm volatile("" ::"r"(&this_worker), "r"(&this_fiber) : "memory");
  this_worker = worker;
}

void start_cta(Cta& cta) {
  const Launch& launch = cta.grid->launch;
  const int threads = static_cast<int>(launch.block.x);
  Worker& worker = *cta.worker;
  if (worker.stack_count < static_cast<size_t>(threads)) {
    if (worker.stacks != nullptr) munmap(worker.stacks, worker.stack_count * kStackBytes);
    worker.stack_count = threads;
    void* memory = mmap(
        nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    worker.stacks = static_cast<char*>(memory);
  }
  const ThreadStorage storage = thread_storage();
  spoil_shared_memory(storage);
  cta.shared_base = storage.base;
  const unsigned x = cta.number % launch.grid.x, rest = cta.number / launch.grid.x;
  blockIdx = {x, rest % launch.grid.y, rest / launch.grid.y};
  blockDim = launch.block;
  gridDim = launch.grid;
  cta.order = random_bits() % 3;
  for (int i = 0; i < threads; ++i) {
    auto fiber = std::make_unique<Fiber>();
    fiber->cta = &cta;
    fiber->number = i;
    fiber->thread = {static_cast<unsigned>(i), 0, 0};
    if (i % 32 == 0) {
      cta.warps.push_back(std::make_unique<Warp>());
      cta.warps.back()->alive = std::min(32, threads - i);
    }
    fiber->warp = cta.warps.back().get();
    prepare(*fiber, worker.stacks + i * kStackBytes);
    cta.ready.push_back(fiber.get());
    cta.fibers.push_back(std::move(fiber));
  }
  cta.started = true;
}

Fiber* pick(Cta& cta) {
  size_t i = 0;
  if (cta.order == 1) i = cta.ready.size() - 1;
  if (cta.order == 2 || one_in(16)) i = random_bits() % std::min<size_t>(cta.ready.size(), 64);
  Fiber* fiber = cta.ready[i];
  cta.ready.erase(cta.ready.begin() + static_cast<std::ptrdiff_t>(i));
  return fiber;
}

void run_slice(Cta& cta) {
  if (!cta.started) start_cta(cta);
  cta.wants_switch = false;
  const int switches = one_in(8) ? 50 : kSliceSwitches;
  for (int i = 0; i < switches && !cta.wants_switch; ++i) {
    if (cta.ready.empty() && !cta.copies.empty()) land_one(cta);
    if (cta.ready.empty()) break;
    if (!cta.copies.empty() && one_in(64)) land_one(cta);
    switch_to(*pick(cta));
  }
  if (cta.ready.empty()) {
    for (Fiber* fiber : cta.polling) cta.ready.push_back(fiber);
    cta.polling.clear();
  }
  if (cta.alive == 0) {
    if (!cta.copies.empty()) fail("a CTA ends before its copies have landed");
    spoil_shared_memory(thread_storage());
    cta.ended = true;
  }
}

void worker_main(Worker* worker) {
  this_worker = worker;
  static constexpr size_t kSignalStack = 64 * 1024;
  stack_t signal_stack = {};
  signal_stack.ss_sp = mmap(nullptr, kSignalStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  signal_stack.ss_size = kSignalStack;
  sigaltstack(&signal_stack, nullptr);
  while (true) {
    while (sem_wait(&worker->go) != 0) {
    }
    run_slice(*worker->cta);
    sem_post(&main_turn);
  }
}

Worker* take_worker() {
  if (idle_workers.empty()) {
    auto* worker = new Worker;  // lives as long as its thread, which never ends
    sem_init(&worker->go, 0, 0);
    worker->thread = std::thread(worker_main, worker);
    worker->thread.detach();
    return worker;
  }
  Worker* worker = idle_workers.back();
  idle_workers.pop_back();
  return worker;
}

// ---------------------------------------------------------------- grids

bool fits(const Multiprocessor& multiprocessor, const Launch& launch) {
  return multiprocessor.threads + static_cast<int>(launch.block.x) <= device.threads &&
         multiprocessor.shared + launch.shared_bytes + 1024 <= device.shared_bytes;
}

/// Places `count` CTAs at once; where, or nothing if they do not fit.
std::vector<int> place(const Launch& launch, unsigned count, std::vector<Multiprocessor> state) {
  std::vector<int> places;
  for (size_t round = 0; places.size() < count; ++round) {
    const size_t before = places.size();
    for (size_t i = 0; i < state.size() && places.size() < count; ++i) {
      if (!fits(state[i], launch)) continue;
      state[i].threads += static_cast<int>(launch.block.x);
      state[i].shared += launch.shared_bytes + 1024;
      places.push_back(static_cast<int>(i));
    }
    if (places.size() == before) return {};
  }
  return places;
}

bool start_some(Grid& grid) {
  const Launch& launch = grid.launch;
  bool any = false;
  while (grid.next_cta < grid.count()) {
    const unsigned together = launch.cooperative ? grid.count() : launch.cluster;
    const std::vector<int> places = place(launch, together, multiprocessors);
    if (places.empty()) break;
    for (unsigned i = 0; i < together; ++i) {
      auto cta = std::make_unique<Cta>();
      cta->grid = &grid;
      cta->number = static_cast<int>(grid.next_cta++);
      cta->rank = cta->number % static_cast<int>(launch.cluster);
      if (cta->rank == 0) grid.clusters.push_back(std::make_unique<Cluster>());
      cta->cluster = grid.clusters.back().get();
      cta->cluster->ctas.push_back(cta.get());
      cta->cluster->alive += static_cast<int>(launch.block.x);
      cta->alive = static_cast<int>(launch.block.x);
      cta->multiprocessor = places[i];
      Multiprocessor& multiprocessor = multiprocessors[places[i]];
      multiprocessor.threads += static_cast<int>(launch.block.x);
      multiprocessor.shared += launch.shared_bytes + 1024;
      cta->worker = take_worker();
      cta->worker->cta = cta.get();
      grid.ctas.push_back(std::move(cta));
    }
    any = true;
  }
  return any;
}

void activate() {
  while (!launches.empty()) {
    Launch& next = launches.front();
    if (!active.empty()) {
      const Grid& last = *active.back();
      const bool may_start = next.may_overlap && !next.is_memset && last.next_cta == last.count() &&
                             last.let_next_start + last.ended >= last.count();
      if (!may_start || active.size() >= 3) return;
    }
    if (next.is_memset) {
      next.body();
      completed[launched++] = true;
      launches.pop_front();
      continue;
    }
    if (next.cooperative || next.cluster > 1) {
      const unsigned together = next.cooperative ? next.grid.x * next.grid.y * next.grid.z : next.cluster;
      if (place(next, together, std::vector<Multiprocessor>(device.multiprocessors)).empty()) {
        throw std::runtime_error("a launch needs more CTAs at once than the device can hold");
      }
    }
    auto grid = std::make_unique<Grid>();
    grid->launch = std::move(next);
    grid->id = launched++;
    if (grid->count() == 0 || grid->count() % grid->launch.cluster != 0) {
      throw std::runtime_error("a grid is empty or not a multiple of its cluster");
    }
    if (grid->launch.shared_bytes > 227 * 1024 || grid->launch.block.x > 1024) {
      throw std::runtime_error("a launch needs more shared memory or threads than a CTA can have");
    }
    launches.pop_front();
    active.push_back(std::move(grid));
  }
}

std::string who_waits() {
  std::ostringstream text;
  int shown = 0;
  for (const auto& grid : active) {
    for (const auto& cta : grid->ctas) {
      std::map<std::string, std::pair<int, int>> reasons;  // count, first thread
      for (const auto& fiber : cta->fibers) {
        if (fiber->ended) continue;
        auto& entry = reasons[fiber->waits_for != nullptr ? fiber->waits_for : "nothing"];
        if (entry.first++ == 0) entry.second = fiber->number;
      }
      for (const auto& [reason, entry] : reasons) {
        if (++shown > 12) return text.str() + "; ...";
        text << "; " << name_of(*cta) << ": " << entry.first << " threads from " << entry.second << " on wait for "
             << reason;
      }
    }
  }
  return text.str();
}

void end_of_turn(Cta& cta) {
  if (!cta.ended) return;
  Multiprocessor& multiprocessor = multiprocessors[cta.multiprocessor];
  multiprocessor.threads -= static_cast<int>(cta.grid->launch.block.x);
  multiprocessor.shared -= cta.grid->launch.shared_bytes + 1024;
  idle_workers.push_back(cta.worker);
  cta.worker = nullptr;
  cta.fibers.clear();
  if (cta.let_next_start) --cta.grid->let_next_start;
  ++cta.grid->ended;
}

// ---------------------------------------------------------------- memory of the operators' tensors

struct GuardedMemory {
  char *map = nullptr, *begin = nullptr;
  size_t map_bytes = 0, bytes = 0;
  int argument = 0;

  GuardedMemory(const void* from, size_t size, int number) : bytes(size), argument(number) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (size + 15 + page - 1) / page * page;
    map_bytes = inner + 2 * page;
    map = static_cast<char*>(mmap(nullptr, map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(map + page, inner, PROT_READ | PROT_WRITE);
    begin = map + page + inner - (size + 15) / 16 * 16;
    std::memset(map + page, kPoison, inner);
    if (size > 0) std::memcpy(begin, from, size);
  }
  GuardedMemory(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(map, map_bytes); }
};

std::vector<std::unique_ptr<GuardedMemory>> guarded;
struct sigaction previous_action[2];

void on_fault(int signal, siginfo_t* info, void*) {
  const auto* address = static_cast<const char*>(info->si_addr);
  if (this_worker == nullptr) {  // not ours
    sigaction(SIGSEGV, &previous_action[0], nullptr);
    sigaction(SIGBUS, &previous_action[1], nullptr);
    return;
  }
  std::ostringstream text;
  text << "access to memory that is not the kernel's (signal " << signal << ", address "
       << static_cast<const void*>(address) << ")";
  for (const auto& memory : guarded) {
    if (address >= memory->map && address < memory->map + memory->map_bytes) {
      text << ", " << address - memory->begin << " bytes from the start of argument " << memory->argument
           << ", which has " << memory->bytes;
    }
  }
  fail(text.str());
}

}  // namespace

// ---------------------------------------------------------------- interface

void enqueue(Launch launch) { launches.push_back(std::move(launch)); }
void set_seed(uint64_t seed) { random_bits.seed(seed); }
int64_t launch_count() { return launched; }

void fail(const std::string& message) {
  if (this_worker == nullptr) throw std::runtime_error(message);
  failure = message;
  failure += "; " + name_of(*this_worker->cta);
  has_failed = true;
  sem_post(&main_turn);
  while (true) pause();  // the main thread has gone on without this CTA
}

void run() {
  static const bool initialised = (sem_init(&main_turn, 0, 0), true);
  (void)initialised;
  multiprocessors.assign(device.multiprocessors, {});
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous_action[0]);
  sigaction(SIGBUS, &action, &previous_action[1]);
  const auto stop = [](const std::string& message) {
    for (auto& grid : active) {
      completed[grid->id] = true;
      grid.release();  // its threads are still there
    }
    active.clear();
    launches.clear();
    has_failed = false;
    sigaction(SIGSEGV, &previous_action[0], nullptr);
    sigaction(SIGBUS, &previous_action[1], nullptr);
    if (!message.empty()) throw std::runtime_error(message);
  };
  uint64_t last_progress = progress;
  int64_t idle_turns = 0;
  try {
    while (true) {
      activate();
      if (active.empty()) break;
      std::vector<Cta*> running;
      for (auto& grid : active) {
        start_some(*grid);
        for (auto& cta : grid->ctas) {
          const bool can_run = !cta->started || !cta->ready.empty() || !cta->polling.empty() || !cta->copies.empty();
          if (!cta->ended && can_run) running.push_back(cta.get());
        }
        if (grid->next_cta < grid->count()) break;
      }
      if (running.empty()) stop("nothing goes on" + who_waits());
      for (size_t turn = 0; turn < running.size(); ++turn) {
        // often a later one: a kernel that may overlap the one before gets ahead of it
        const size_t first = one_in(2) ? 0 : running.size() / 2;
        Cta* cta = running[first + random_bits() % (running.size() - first)];
        if (cta->ended) continue;
        sem_post(&cta->worker->go);
        while (sem_wait(&main_turn) != 0) {
        }
        if (has_failed) {
          const std::string message = failure;
          stop(message);
        }
        end_of_turn(*cta);
        idle_turns = progress == last_progress ? idle_turns + 1 : 0;
        last_progress = progress;
        if (cta->ended || !launches.empty()) turn = running.size();  // others may start
        if (idle_turns > 200 + 20 * static_cast<int64_t>(running.size())) stop("nothing goes on" + who_waits());
      }
      while (!active.empty() && active.front()->is_complete()) {
        completed[active.front()->id] = true;
        active.pop_front();
        if (!active.empty()) release_all(active.front()->waiting);
      }
    }
  } catch (const std::runtime_error& error) {
    if (!active.empty() || !launches.empty()) stop(error.what());
    throw;
  }
  stop("");
}

int lane() { return this_fiber->number % 32; }

const uint64_t* warp_exchange(uint64_t value, uint32_t mask, const char* what) {
  Warp& warp = *this_fiber->warp;
  if (mask != ~0u) fail("only full masks are emulated");
  if (warp.arrived > 0 && std::strcmp(warp.what, what) != 0) {
    fail(std::string("the threads of a warp are at ") + warp.what + " and at " + what);
  }
  const int parity = warp.parity;
  warp.what = what;
  warp.words[parity][lane()] = value;
  ++progress;
  if (++warp.arrived == warp.alive) {
    complete_warp(warp);
  } else {
    warp.waiting.push_back(this_fiber);
    block(what);
  }
  return warp.words[parity];
}

void warp_together(void* argument, const std::function<void(void* const* arguments)>& work, const char* what) {
  Warp& warp = *this_fiber->warp;
  const int parity = warp.parity;
  warp.arguments[parity][lane()] = argument;
  if (warp.arrived + 1 == warp.alive) {
    if (warp.alive < 32) fail(std::string(what) + " needs all threads of the warp");
    if (warp.arrived > 0 && std::strcmp(warp.what, what) != 0) fail(std::string("a warp diverges at ") + what);
    work(warp.arguments[parity]);
  }
  warp_exchange(0, ~0u, what);
}

void barrier_sync(int id, int threads) {
  enter_barrier(id, threads);
  Cta& cta = *this_fiber->cta;
  Barrier& barrier = cta.barriers[id];
  const int expected = threads < 0 ? cta.alive : threads;
  if (barrier.arrived >= expected) {
    complete_barrier(cta, id);
    return;
  }
  static const char* const kNames[16] = {
      "__syncthreads", "barrier 1", "barrier 2", "barrier 3", "barrier 4", "barrier 5", "barrier 6", "barrier 7",
      "barrier 8", "barrier 9", "barrier 10", "barrier 11", "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  barrier.waiting.push_back(this_fiber);
  block(kNames[id]);
}

void maybe_switch() {
  ++progress;
  if (!one_in(512)) return;
  this_fiber->cta->ready.push_back(this_fiber);
  this_fiber->cta->wants_switch = true;
  switch_to_scheduler();
}

void poll(const char* what) {
  this_fiber->cta->polling.push_back(this_fiber);
  block(what);
}

void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  *reinterpret_cast<MbarrierState*>(barrier) = {
      static_cast<uint16_t>(arrivals), static_cast<int16_t>(arrivals << 1), 0};
}

void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes) {
  MbarrierState& state = state_of(barrier);
  state.bytes += static_cast<int32_t>(expected_bytes);
  arrive_once(*this_fiber->cta, barrier);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (state_of(barrier).parity() == parity) {
    this_fiber->cta->mbarrier_waits.push_back({this_fiber, {barrier, parity}});
    block("an mbarrier");
  }
}

bool mbarrier_test(const uint64_t* barrier, uint32_t parity) {
  if (state_of(const_cast<uint64_t*>(barrier)).parity() != parity) return true;
  poll("mbarrier_test");
  return state_of(const_cast<uint64_t*>(barrier)).parity() != parity;
}

void copy_to_barrier(std::vector<Copy> parts, uint64_t* barrier) {
  state_of(barrier);
  for (const Copy& part : parts) std::memset(part.destination, kPoison, part.bytes);
  this_fiber->cta->copies.push_back({std::move(parts), barrier});
}

void thread_copy(const Copy& copy) {
  std::memset(copy.destination, kPoison, copy.bytes);
  if (one_in(4)) {
    land_of(*this_fiber, copy);
  } else {
    this_fiber->copies.back().push_back(copy);
  }
}

void thread_copy_commit() { this_fiber->copies.emplace_back(); }

void thread_copy_wait(int pending) {
  auto& groups = this_fiber->copies;
  const int done = static_cast<int>(groups.size()) - 1 - pending;
  if (done <= 0) return;
  finish_arrivals();
  for (int i = 0; i < done; ++i) finish_group(groups[i]);
  groups.erase(groups.begin(), groups.begin() + done);
}

void thread_copy_wait_all() {
  finish_arrivals();
  for (auto& group : this_fiber->copies) finish_group(group);
  this_fiber->copies.assign(1, {});
}

void thread_copy_arrive(uint64_t* barrier) {
  state_of(barrier);
  BarrierCopy copy{{}, barrier, this_fiber};
  for (auto& group : this_fiber->copies) copy.parts.insert(copy.parts.end(), group.begin(), group.end());
  this_fiber->copies.assign(1, {});
  this_fiber->cta->copies.push_back(std::move(copy));
}

void fence_proxy_async() {
  this_fiber->fenced = ++progress;
  maybe_switch();
}

float e4m3(uint8_t byte) {
  static const std::vector<float> table = [] {
    std::vector<float> values(256);
    for (int i = 0; i < 256; ++i) {
      const int exponent = i >> 3 & 15, mantissa = i & 7;
      float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                  : std::ldexp(1.0f + static_cast<float>(mantissa) / 8.0f, exponent - 7);
      if ((i & 0x7f) == 0x7f) value = std::numeric_limits<float>::quiet_NaN();
      values[i] = i & 0x80 ? -value : value;
    }
    return values;
  }();
  return table[byte];
}

namespace {

/// 32 bytes of row `row` of an operand under the 128-byte swizzle, by a thread that last fenced at `fenced`.
void read_row(float* out, const char* base, int row, uint64_t fenced) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(row) * 128;
  for (int chunk = 0; chunk < 2; ++chunk) {
    uintptr_t address = first + chunk * 16;
    address ^= (address >> 7 & 7) << 4;
    const auto& written = this_fiber->cta->written;
    const auto copied = written.empty() ? written.end() : written.find(address);
    if (copied != written.end() && copied->second.when > std::max(fenced, copied->second.thread->fenced)) {
      fail("wgmma reads what cp.async wrote without a proxy fence between them");
    }
    for (int i = 0; i < 16; ++i) out[chunk * 16 + i] = e4m3(reinterpret_cast<const uint8_t*>(address)[i]);
  }
}

void multiply(void* const* arguments, int warp) {
  const auto& groups = *static_cast<const std::vector<Product>*>(arguments[0]);
  for (size_t number = 0; number < groups.size(); ++number) {
    const Product& product = groups[number];
    float a[16][32], b[256][32];
    for (int row = 0; row < 16; ++row) read_row(a[row], product.a, 16 * warp + row, product.fenced);
    for (int column = 0; column < product.columns; ++column) read_row(b[column], product.b, column, product.fenced);
    for (int lane = 0; lane < 32; ++lane) {
      const Product& mine = (*static_cast<const std::vector<Product>*>(arguments[lane]))[number];
      for (int i = 0; i < product.columns / 8; ++i) {
        for (int half = 0; half < 2; ++half) {
          for (int e = 0; e < 2; ++e) {
            const float* row = a[lane / 4 + 8 * half];
            const float* column = b[8 * i + 2 * (lane % 4) + e];
            float sum = 0.0f;
            for (int k = 0; k < 32; ++k) sum += row[k] * column[k];
            float& d = mine.d[4 * i + 2 * half + e];
            d = product.accumulate ? d + sum : sum;
          }
        }
      }
    }
  }
}

}  // namespace

void wgmma(float* d, int columns, const char* a, const char* b, bool accumulate) {
  if (reinterpret_cast<uintptr_t>(a) % 1024 >= 128 || reinterpret_cast<uintptr_t>(b) % 1024 >= 128) {
    fail("an operand of wgmma is not at a multiple of 1024 bytes");
  }
  if (!accumulate) std::fill(d, d + columns / 2, std::numeric_limits<float>::quiet_NaN());
  this_fiber->products.back().push_back({d, columns, a, b, accumulate, this_fiber->fenced});
}

void wgmma_commit() { this_fiber->products.emplace_back(); }

void wgmma_wait(int pending) {
  auto& groups = this_fiber->products;
  const int done = static_cast<int>(groups.size()) - 1 - pending;
  std::vector<Product> due;
  for (int i = 0; i < done; ++i) due.insert(due.end(), groups[i].begin(), groups[i].end());
  if (done > 0) groups.erase(groups.begin(), groups.begin() + done);
  const int warp = this_fiber->number / 32 % 4;
  warp_together(&due, [warp](void* const* arguments) { multiply(arguments, warp); }, "wgmma_wait");
}

int cluster_size() { return static_cast<int>(this_fiber->cta->grid->launch.cluster); }
int cluster_rank() { return this_fiber->cta->rank; }

void cluster_arrive() {
  Fiber& fiber = *this_fiber;
  Cluster& cluster = *fiber.cta->cluster;
  if (fiber.in_cluster_phase) fail("a thread arrives twice at the cluster's barrier without waiting");
  fiber.in_cluster_phase = true;
  fiber.cluster_phase = cluster.phase + 1;
  ++cluster.arrived;
  ++progress;
  complete_cluster(cluster);
}

void cluster_wait() {
  Fiber& fiber = *this_fiber;
  Cluster& cluster = *fiber.cta->cluster;
  while (cluster.phase < fiber.cluster_phase) {
    cluster.waiting.push_back(&fiber);
    block("the cluster's barrier");
  }
}

void* map_shared(void* pointer, int rank) {
  Cta& cta = *this_fiber->cta;
  if (rank < 0 || rank >= cluster_size()) fail("map_shared_rank of a CTA that is not in the cluster");
  const Cta& other = *cta.cluster->ctas[rank];
  if (other.ended) fail("the shared memory of a CTA is used that has ended");
  while (!other.started) poll("the start of another CTA of the cluster");  // its memory has no address before
  return other.shared_base + (static_cast<char*>(pointer) - cta.shared_base);
}

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - this_fiber->cta->shared_base);
}

void* shared_pointer(uint32_t address) { return this_fiber->cta->shared_base + address; }

void wait_for_previous_kernel() {
  const int64_t previous = this_fiber->cta->grid->id - 1;
  while (previous >= 0 && !completed[previous]) {
    this_fiber->cta->grid->waiting.push_back(this_fiber);
    block("the previous kernel");
  }
}

void let_next_kernel_start() {
  Cta& cta = *this_fiber->cta;
  if (cta.let_next_start) return;
  cta.let_next_start = true;
  ++cta.grid->let_next_start;
  ++progress;
  cta.ready.push_back(this_fiber);  // the others had better not rely on this kernel's haste
  cta.wants_switch = true;
  switch_to_scheduler();
}

}  // namespace emulator

// ---------------------------------------------------------------- the copy engine and warp-wide matrix instructions

CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address, const cuuint64_t* sizes,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank != 3 || strides[0] % 16 != 0 || strides[1] % 16 != 0 || reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *map = {};
  map->base = static_cast<char*>(address);
  for (int i = 0; i < 3; ++i) {
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
  }
  map->strides[0] = strides[0];
  map->strides[1] = strides[1];
  return CUDA_SUCCESS;
}

namespace misa::ptx {

void tma_load_3d(void* destination, const CUtensorMap* map, int x, int y, int z, uint64_t* barrier) {
  const auto base = reinterpret_cast<uintptr_t>(destination);
  if (base % 1024 != 0 || x != 0) emulator::fail("a tensor copy to a place that is not a multiple of 1024 bytes");
  if (z < 0 || static_cast<uint64_t>(z) >= map->sizes[2]) {
    emulator::fail("a tensor copy from page " + std::to_string(z) + " of " + std::to_string(map->sizes[2]));
  }
  std::vector<emulator::Copy> parts;
  for (uint32_t row = 0; row < map->box[1]; ++row) {
    const char* source = map->base + z * map->strides[1] + (y + row) * map->strides[0];
    for (uint32_t chunk = 0; chunk < map->box[0] / 16; ++chunk) {
      uintptr_t address = base + row * map->box[0] + chunk * 16;
      address ^= (address >> 7 & 7) << 4;
      parts.push_back({reinterpret_cast<char*>(address), source + chunk * 16, 16});
    }
  }
  emulator::copy_to_barrier(std::move(parts), barrier);
}

void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
  if ((reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source) | bytes) % 16 != 0) {
    emulator::fail("a bulk copy that is not of multiples of 16 bytes");
  }
  emulator::copy_to_barrier({{static_cast<char*>(destination), static_cast<const char*>(source), bytes}}, barrier);
}

void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine = {d, a, {b0, b1}};
  emulator::warp_together(
      &mine,
      [](void* const* arguments) {
        const auto half = [](uint32_t word, int i) {
          return emulator::half_value(static_cast<unsigned short>(word >> (16 * i)));
        };
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const auto& from = *static_cast<const Operands*>(arguments[lane]);
          for (int i = 0; i < 2; ++i) {
            const int row = lane / 4, column = 2 * (lane % 4) + i;
            a[row][column] = half(from.a[0], i);
            a[row + 8][column] = half(from.a[1], i);
            a[row][column + 8] = half(from.a[2], i);
            a[row + 8][column + 8] = half(from.a[3], i);
            b[column][row] = half(from.b[0], i);
            b[column + 8][row] = half(from.b[1], i);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          const auto& to = *static_cast<const Operands*>(arguments[lane]);
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            to.d[i] += sum;
          }
        }
      },
      "mma");
}

void load_matrix_x4(uint32_t (&registers)[4], const void* row) {
  struct Operands {
    uint32_t* registers;
    const void* row;
  } mine = {registers, row};
  emulator::warp_together(
      &mine,
      [](void* const* arguments) {
        for (int lane = 0; lane < 32; ++lane) {
          auto& to = *static_cast<const Operands*>(arguments[lane]);
          for (int matrix = 0; matrix < 4; ++matrix) {
            const auto& from = *static_cast<const Operands*>(arguments[8 * matrix + lane / 4]);
            std::memcpy(&to.registers[matrix], static_cast<const char*>(from.row) + 4 * (lane % 4), 4);
          }
        }
      },
      "ldmatrix");
}

}  // namespace misa::ptx

// ---------------------------------------------------------------- operators by name

namespace emulator {
namespace {

struct Operator {
  std::vector<bool> is_written;  // per argument
  Boxed boxed = nullptr;
};
std::map<std::string, Operator>& operators() {
  static std::map<std::string, Operator> all;
  return all;
}

struct Passed {
  void* original;
  bool is_written;
};
std::vector<Passed> passed;  // in the order of `guarded`

/// Gives the kernels a copy of a tensor; one that several calls of a stream share is copied once.
void pass(torch::stable::TensorData& tensor, int argument, bool is_written) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim; ++d) {
    last = tensor.sizes[d] == 0 || last < 0 ? -1 : last + (tensor.sizes[d] - 1) * tensor.strides[d];
  }
  const size_t bytes = last < 0 ? 0 : static_cast<size_t>(last + 1) * tensor.item_bytes;
  size_t i = 0;
  while (i < passed.size() && (passed[i].original != tensor.data || guarded[i]->bytes != bytes)) ++i;
  if (i == passed.size()) {
    guarded.push_back(std::make_unique<GuardedMemory>(tensor.data, bytes, argument));
    passed.push_back({tensor.data, false});
  }
  passed[i].is_written |= is_written;
  tensor.data = guarded[i]->begin;
}

int give_up(const std::exception& error, char* message, int message_bytes) {
  std::strncpy(message, error.what(), static_cast<size_t>(message_bytes) - 1);
  message[message_bytes - 1] = 0;
  launches.clear();
  passed.clear();
  // threads of a failed launch may still hold pointers into it
  for (auto& memory : guarded) memory.release();
  guarded.clear();
  return -1;
}

}  // namespace

void Library::def(const char* schema) {
  const std::string text = schema;
  const size_t open = text.find('(');
  Operator& entry = operators()[text.substr(0, open)];
  const std::string arguments = text.substr(open + 1, text.rfind("->") - open - 2);
  std::istringstream stream(arguments);
  for (std::string argument; std::getline(stream, argument, ',');) {
    entry.is_written.push_back(argument.find('!') != std::string::npos);
  }
}

void Library::impl(const char* name, Boxed operation) { operators()[name].boxed = operation; }

}  // namespace emulator

extern "C" {

void misa_emulation_configure(int multiprocessors, uint64_t seed) {
  emulator::device.multiprocessors = multiprocessors;
  emulator::set_seed(seed);
}

int64_t misa_emulation_launch_count() { return emulator::launch_count(); }

/// Runs what the calls since the last one launched. 0, or -1 with a message.
int misa_emulation_finish(char* message, int message_bytes) {
  using namespace emulator;
  const std::vector<Passed> tensors = std::move(passed);
  passed.clear();
  try {
    run();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const GuardedMemory& memory = *guarded[i];
      if (memory.bytes == 0 || std::memcmp(tensors[i].original, memory.begin, memory.bytes) == 0) continue;
      if (!tensors[i].is_written) {
        throw std::runtime_error("argument " + std::to_string(memory.argument) + " was written");
      }
      std::memcpy(tensors[i].original, memory.begin, memory.bytes);
    }
    guarded.clear();
    return 0;
  } catch (const std::exception& error) {
    return give_up(error, message, message_bytes);
  }
}

/// Calls an operator; its launches wait for misa_emulation_finish, as those of a stream do. 0, or -1 with a message.
int misa_emulation_call(
    const char* name, emulator::Value* arguments, int count, int64_t* result, char* message, int message_bytes) {
  using namespace emulator;
  try {
    const auto found = operators().find(name);
    if (found == operators().end()) throw std::runtime_error(std::string("there is no operator ") + name);
    const Operator& operation = found->second;
    if (operation.is_written.size() != static_cast<size_t>(count)) {
      throw std::runtime_error(
          std::string(name) + " takes " + std::to_string(operation.is_written.size()) + " arguments");
    }
    for (int i = 0; i < count; ++i) {
      if (arguments[i].kind == 2) pass(arguments[i].tensor, i, operation.is_written[i]);
    }
    *result = operation.boxed(arguments);
    return 0;
  } catch (const std::exception& error) {
    return give_up(error, message, message_bytes);
  }
}

}  // extern "C"
