// The inner loops, compiled once per instruction set (simd_*.cpp) and chosen at run time.
//
// Every function is a pure function of the rows it is given: the operations that make one number and their
// order depend neither on other rows nor on threads, so results are bit-equal however work is cut up.
#pragma once

#include "layout.h"

namespace misa {

struct Simd {
  const char* name;
  // Keys are laid out in panels [kDim][panel_keys] of fp32: one vector lane per key.
  int panel_keys;

  // values[i] = fp8 e4m3 bytes[i] as fp32, i < count; count is a multiple of 16.
  void (*widen_fp8)(const uint8_t* bytes, int count, float* values);

  // One fp32 key x [kDim] to fp8 e4m3 and its power-of-two scale.
  void (*quantize_key)(const float* x, uint8_t* bytes, float* scale);

  // mean [kDim] of `count` keys of one page.
  void (*mean_keys)(const uint8_t* keys, const float* scales, int count, float* mean);

  // Means [2][kDim] of relu(k) and of relu(-k) over `count` keys k of one page.
  void (*signed_mean_keys)(const uint8_t* keys, const float* scales, int count, float* means);

  // mean [kDim] of `count` vectors.
  void (*mean_vectors)(const float* const* vectors, int count, float* mean);

  // Transposes panel_keys vectors [panel_keys][kDim] of fp32 into one panel.
  void (*transpose_vectors)(const float* vectors, float* panel);

  // Transposes panel_count * panel_keys keys into panels; a key is multiplied by 2^-8 (kKeyExponent).
  void (*load_keys)(const uint8_t* const* keys, int panel_count, float* panels);

  // scores[i] = sum over heads of gates[j] * relu(q[j] . key i * scales[i]) for the panels' keys; q [heads][kDim].
  void (*score_keys)(const float* q, const float* gates, int heads, const float* panels, const float* scales,
                     int panel_count, float* scores);

  // sums[j] = sum over the first `count` vectors in the panels of relu(q[j] . vector).
  void (*sum_relu)(const float* q, int heads, const float* panels, int count, float* sums);

  // sums [2][kDim] += `count` vectors [2][kDim] of fp16 values that are not negative, one after the other.
  void (*add_halves)(const uint16_t* const* vectors, int count, float* sums);

  // sums[j] = relu(q[j]) . signed[0] + relu(-q[j]) . signed[1]; q [heads][kDim], signed [2][kDim].
  void (*dot_signed)(const float* q, int heads, const float* signed_sums, float* sums);

  // bits[i] = fp16 of values[i] >= 0, rounded to nearest even, at most kHalfMax; NaN gives kHalfMax.
  void (*narrow_half)(const float* values, int count, uint16_t* bits);

  // Writes the ascending positions of the k largest of scores[0 .. n), k < n. Of equal scores the earlier wins, NaN
  // counts as largest. Overwrites scores; scratch holds n values.
  void (*select_largest)(float* scores, int n, int k, int32_t* scratch, int32_t* positions);

  // values[i] = bf16 bits[i] as fp32.
  void (*widen_bf16)(const uint16_t* bits, int count, float* values);

  // bits[i] = values[i] rounded to nearest even.
  void (*narrow_bf16)(const float* values, int count, uint16_t* bits);

  // One step of online softmax over `count` <= kAttentionTile tokens: kv [count][stride], q [heads][stride],
  // both padded with zeros to `stride`, a multiple of kMaxLanes; rows of kv up to a multiple of 3 exist.
  // accumulator [heads][stride] (first `rank` used), highest [heads], total [heads] carry the state.
  void (*attend)(const float* q, int heads, const float* kv, int count, int stride, int rank, float scale,
                 float* accumulator, float* highest, float* total);
};

// load_keys multiplies keys by 2^-8: an fp8 pattern shifted into fp16 has its exponent off by 8.
constexpr float kKeyRescale = 256.0f;

extern const Simd simd_generic;
#if defined(__x86_64__)
extern const Simd simd_avx2;
extern const Simd simd_avx512;
#endif

// The widest variant of this machine; the environment variable MISA_CPU_ISA (generic, avx2, avx512) overrides.
const Simd& simd();

}  // namespace misa
