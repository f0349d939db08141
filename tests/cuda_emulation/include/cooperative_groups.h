// Clusters, for the emulator.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return emulator::cluster_size(); }
  unsigned block_rank() const { return emulator::cluster_rank(); }
  void sync() const {
    emulator::cluster_arrive();
    emulator::cluster_wait();
  }
  template <typename T>
  auto map_shared_rank(T& object, int rank) const {
    if constexpr (std::is_array_v<T>) {
      using Pointer = std::decay_t<T>;
      return static_cast<Pointer>(emulator::map_shared(&object[0], rank));
    } else {
      static_assert(std::is_pointer_v<T>);
      return static_cast<T>(emulator::map_shared(object, rank));
    }
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
