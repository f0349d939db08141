// FP8 conversions, for the emulator.
#pragma once

#include "cuda_fp16.h"

using __nv_fp8x2_storage_t = unsigned short;
enum __nv_fp8_interpretation_t { __NV_E4M3 };

inline __half2_raw __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t pair, __nv_fp8_interpretation_t) {
  return {emulator::half_bits(emulator::e4m3(pair & 0xff)), emulator::half_bits(emulator::e4m3(pair >> 8))};
}
