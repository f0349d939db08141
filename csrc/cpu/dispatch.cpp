#include <cstdlib>
#include <stdexcept>
#include <string>

#include "simd.h"

namespace misa {
namespace {

bool runs_here(const Simd& variant) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&variant == &simd_avx2) return avx2;
  if (&variant == &simd_avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
#endif
  return &variant == &simd_generic;
}

const Simd& choose() {
  const Simd* const variants[] = {
#if defined(__x86_64__)
      &simd_avx512, &simd_avx2,
#endif
      &simd_generic};
  const char* wanted = std::getenv("MISA_CPU_ISA");
  for (const Simd* variant : variants)
    if (wanted == nullptr ? runs_here(*variant) : variant->name == std::string(wanted) && runs_here(*variant))
      return *variant;
  throw std::runtime_error("MISA_CPU_ISA=" + std::string(wanted) +
                           " does not run on this machine: choose generic, avx2 or avx512, or unset it");
}

}  // namespace

const Simd& simd() {
  static const Simd& chosen = choose();
  return chosen;
}

}  // namespace misa
