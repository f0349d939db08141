// Half precision, for the emulator.
#pragma once

#include "cuda_runtime.h"

struct __half2_raw {
  unsigned short x, y;
};

namespace emulator {

inline unsigned short half_bits(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  unsigned short bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}
inline float half_value(unsigned short bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}

}  // namespace emulator

struct __half2 : __half2_raw {
  __half2() = default;
  explicit __half2(const __half2_raw& raw) : __half2_raw(raw) {}
};
inline __half2 __floats2half2_rn(float low, float high) {
  return __half2(__half2_raw{emulator::half_bits(low), emulator::half_bits(high)});
}
inline float2 __half22float2(const __half2& pair) { return {emulator::half_value(pair.x), emulator::half_value(pair.y)}; }
