// Body of simd_generic.cpp, simd_avx2.cpp and simd_avx512.cpp, which define MISA_SIMD and are compiled with
// different machine flags.
//
// No C++ standard header here: an inline function of one would be emitted with this file's machine flags, and the
// linker might keep that copy for the whole library, also on machines that lack those instructions.

#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace misa {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

constexpr int kVectors = 3;  // with 4 heads: 12 accumulators, 3 keys and 1 query value fill 16 registers
constexpr int kPanelKeys = kVectors * kLanes;
constexpr int kHeadTile = 4;
static_assert(kChunkKeys % kPanelKeys == 0, "a chunk is a whole number of panels");
static_assert(kAttentionTile % kVectors == 0, "a tile is a whole number of register blocks");

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t VecIntUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *(const VecUnaligned*)p; }
inline void store(float* p, Vec v) { *(VecUnaligned*)p = v; }
inline VecInt load(const int32_t* p) { return *(const VecIntUnaligned*)p; }
inline void store(int32_t* p, VecInt v) { *(VecIntUnaligned*)p = v; }
inline Vec broadcast(float x) { return x - Vec{}; }

// max(x, 0); NaN gives 0
#if defined(__AVX2__) && !defined(__AVX512F__)
inline Vec relu(Vec x) { return (Vec)_mm256_max_ps((__m256)x, _mm256_setzero_ps()); }
#else
inline Vec relu(Vec x) { return x > 0.0f ? x : Vec{}; }
#endif

inline float sum(Vec v) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// ---------------------------------------------------------------- fp8 e4m3

#if defined(__AVX2__)

// fp8 s.eeee.mmm in the high byte of a word -> fp16 s.0eeee.mmm0000000, which is the value times 2^-8. F16C
// converts subnormals exactly whatever the thread's flush-to-zero mode is.
inline __m256i words_to_half(__m256i words) {
  return _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16((short)0xBFFF));
}
inline __m256 low_to_float(__m256i half) { return _mm256_cvtph_ps(_mm256_castsi256_si128(half)); }
inline __m256 high_to_float(__m256i half) { return _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)); }

// 16 fp8 values times `factor` * 2^-8.
inline void widen_16(const uint8_t* bytes, __m256 factor, __m256& first, __m256& second) {
  const __m256i words = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)bytes)), 8);
  const __m256i half = words_to_half(words);
  first = _mm256_mul_ps(low_to_float(half), factor);
  second = _mm256_mul_ps(high_to_float(half), factor);
}

void widen_fp8(const uint8_t* bytes, int count, float* values) {
  for (int i = 0; i < count; i += 16) {
    __m256 first, second;
    widen_16(bytes + i, _mm256_set1_ps(kKeyRescale), first, second);
    _mm256_storeu_ps(values + i, first);
    _mm256_storeu_ps(values + i + 8, second);
  }
}

// Columns of 8 keys as words, one in each 128 bits, become fp32 columns of a panel, 16 dimensions apart.
#if defined(__AVX512BW__)
#define MISA_WIDEST(operation) _mm512_##operation
typedef __m512i Bytes;
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store_columns(Bytes words, float* to) {
  constexpr int kStep = 16 * kPanelKeys;
  const __m512i half = _mm512_and_si512(_mm512_srai_epi16(words, 1), _mm512_set1_epi16((short)0xBFFF));
  const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
  const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
  _mm256_storeu_ps(to, _mm512_castps512_ps256(low));
  _mm256_storeu_ps(to + kStep, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(low), 1)));
  _mm256_storeu_ps(to + 2 * kStep, _mm512_castps512_ps256(high));
  _mm256_storeu_ps(to + 3 * kStep, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(high), 1)));
}
#else
#define MISA_WIDEST(operation) _mm256_##operation
typedef __m256i Bytes;
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store_columns(Bytes words, float* to) {
  const __m256i half = words_to_half(words);
  _mm256_storeu_ps(to, low_to_float(half));
  _mm256_storeu_ps(to + 16 * kPanelKeys, high_to_float(half));
}
#endif
constexpr int kDimsAtOnce = sizeof(Bytes);

// Transposes 8 keys x kDimsAtOnce dimensions of bytes into columns of 8 fp32.
inline void load_8_keys(const uint8_t* const* keys, int dim, float* column) {
  Bytes r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = load_bytes(keys[i] + dim);
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = MISA_WIDEST(unpacklo_epi8)(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = MISA_WIDEST(unpackhi_epi8)(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = MISA_WIDEST(unpacklo_epi16)(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = MISA_WIDEST(unpackhi_epi16)(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = MISA_WIDEST(unpacklo_epi16)(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = MISA_WIDEST(unpackhi_epi16)(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = MISA_WIDEST(unpacklo_epi32)(r[i], r[i + 4]);
    t[2 * i + 1] = MISA_WIDEST(unpackhi_epi32)(r[i], r[i + 4]);
  }
  // t[i]: dimensions 16g + 2i and 16g + 2i + 1 in its 128 bits g, 8 keys each
  for (int i = 0; i < 8; ++i) {
    float* to = column + (int64_t)(dim + 2 * i) * kPanelKeys;
    store_columns(MISA_WIDEST(unpacklo_epi8)(Bytes{}, t[i]), to);
    store_columns(MISA_WIDEST(unpackhi_epi8)(Bytes{}, t[i]), to + kPanelKeys);
  }
}
#undef MISA_WIDEST

void load_keys(const uint8_t* const* keys, int panel_count, float* panels) {
  for (int i = 0; i < panel_count * kPanelKeys; i += 8) {
    float* column = panels + (int64_t)(i / kPanelKeys) * kDim * kPanelKeys + i % kPanelKeys;
    for (int dim = 0; dim < kDim; dim += kDimsAtOnce) load_8_keys(keys + i, dim, column);
  }
}

void transpose_vectors(const float* vectors, float* panel) {
  for (int i = 0; i < kPanelKeys; i += 8)
    for (int dim = 0; dim < kDim; dim += 8) {
      __m256 r[8], t[8];
      for (int j = 0; j < 8; ++j) r[j] = _mm256_loadu_ps(vectors + (i + j) * kDim + dim);
      for (int j = 0; j < 4; ++j) {
        t[2 * j] = _mm256_unpacklo_ps(r[2 * j], r[2 * j + 1]);
        t[2 * j + 1] = _mm256_unpackhi_ps(r[2 * j], r[2 * j + 1]);
      }
      for (int j = 0; j < 2; ++j) {
        r[4 * j] = _mm256_shuffle_ps(t[4 * j], t[4 * j + 2], 0x44);
        r[4 * j + 1] = _mm256_shuffle_ps(t[4 * j], t[4 * j + 2], 0xEE);
        r[4 * j + 2] = _mm256_shuffle_ps(t[4 * j + 1], t[4 * j + 3], 0x44);
        r[4 * j + 3] = _mm256_shuffle_ps(t[4 * j + 1], t[4 * j + 3], 0xEE);
      }
      for (int j = 0; j < 4; ++j) {
        _mm256_storeu_ps(panel + (dim + j) * kPanelKeys + i, _mm256_permute2f128_ps(r[j], r[j + 4], 0x20));
        _mm256_storeu_ps(panel + (dim + j + 4) * kPanelKeys + i, _mm256_permute2f128_ps(r[j], r[j + 4], 0x31));
      }
    }
}

void mean_keys(const uint8_t* keys, const float* scales, int count, float* mean) {
  __m256 total[kDim / 8];
  for (int i = 0; i < kDim / 8; ++i) total[i] = _mm256_setzero_ps();
  for (int token = 0; token < count; ++token) {
    const __m256 factor = _mm256_set1_ps(scales[token] * kKeyRescale);
    for (int i = 0; i < kDim / 8; i += 2) {
      __m256 first, second;
      widen_16(keys + token * kDim + i * 8, factor, first, second);
      total[i] = _mm256_add_ps(total[i], first);
      total[i + 1] = _mm256_add_ps(total[i + 1], second);
    }
  }
  const __m256 divisor = _mm256_set1_ps((float)count);
  for (int i = 0; i < kDim / 8; ++i) _mm256_storeu_ps(mean + i * 8, _mm256_div_ps(total[i], divisor));
}

#else

inline float fp8_to_float(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float magnitude = exponent ? ldexpf((float)(8 + mantissa), exponent - 10) : ldexpf((float)mantissa, -9);
  return byte & 128 ? -magnitude : magnitude;
}

struct Fp8Table {
  float value[256];
  Fp8Table() {
    for (int i = 0; i < 256; ++i) value[i] = fp8_to_float((uint8_t)i);
  }
};
const Fp8Table fp8_table;

void widen_fp8(const uint8_t* bytes, int count, float* values) {
  for (int i = 0; i < count; ++i) values[i] = fp8_table.value[bytes[i]];
}

void load_keys(const uint8_t* const* keys, int panel_count, float* panels) {
  for (int i = 0; i < panel_count * kPanelKeys; ++i) {
    float* column = panels + (int64_t)(i / kPanelKeys) * kDim * kPanelKeys + i % kPanelKeys;
    for (int d = 0; d < kDim; ++d) column[d * kPanelKeys] = fp8_table.value[keys[i][d]] / kKeyRescale;
  }
}

void transpose_vectors(const float* vectors, float* panel) {
  for (int i = 0; i < kPanelKeys; ++i)
    for (int d = 0; d < kDim; ++d) panel[d * kPanelKeys + i] = vectors[i * kDim + d];
}

void mean_keys(const uint8_t* keys, const float* scales, int count, float* mean) {
  for (int d = 0; d < kDim; ++d) mean[d] = 0.0f;
  for (int token = 0; token < count; ++token)
    for (int d = 0; d < kDim; ++d) mean[d] += fp8_table.value[keys[token * kDim + d]] * scales[token];
  for (int d = 0; d < kDim; ++d) mean[d] /= (float)count;
}

#endif

void quantize_key(const float* x, uint8_t* bytes, float* scale) {
  constexpr float kFp8Max = 448.0f, kLeastAmax = 1e-4f;
  float amax = kLeastAmax;
  for (int i = 0; i < kDim; ++i) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
  *scale = exp2f(ceilf(log2f(amax / kFp8Max)));
  const float inverse = 1.0f / *scale;  // exact: a power of two
  for (int i = 0; i < kDim; ++i) {
    float value = x[i] * inverse;
    value = value > kFp8Max ? kFp8Max : value < -kFp8Max ? -kFp8Max : value;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 24 & 0x80, magnitude = bits & 0x7FFFFFFF;
    // normal: round the mantissa to 3 bits, to nearest even, and move the exponent's bias from 127 to 7
    const uint32_t normal = (magnitude + 0x7FFFF + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
    // subnormal: adding 2^14 leaves the value in steps of 2^-9, rounded to nearest even, in the low bits
    float shifted;
    memcpy(&shifted, &magnitude, 4);
    shifted += 16384.0f;
    uint32_t subnormal;
    memcpy(&subnormal, &shifted, 4);
    bytes[i] = (uint8_t)(sign | (magnitude < (121u << 23) ? subnormal & 0x7F : normal));
  }
}

// ---------------------------------------------------------------- means of positive and negative parts

void signed_mean_keys(const uint8_t* keys, const float* scales, int count, float* means) {
  Vec positive[kDim / kLanes] = {}, negative[kDim / kLanes] = {};
  for (int token = 0; token < count; ++token) {
    float key[kDim];
    widen_fp8(keys + token * kDim, kDim, key);
    for (int v = 0; v < kDim / kLanes; ++v) {
      const Vec value = load(key + v * kLanes) * scales[token];
      positive[v] += relu(value);
      negative[v] += relu(-value);
    }
  }
  for (int v = 0; v < kDim / kLanes; ++v) {
    store(means + v * kLanes, positive[v] / (float)count);
    store(means + kDim + v * kLanes, negative[v] / (float)count);
  }
}

void narrow_half(const float* values, int count, uint16_t* bits) {
  for (int i = 0; i < count; ++i) {
    const float value = values[i] < kHalfMax ? values[i] : kHalfMax;
    uint32_t magnitude;
    memcpy(&magnitude, &value, 4);
    // normal: round the mantissa to 10 bits, to nearest even, and move the exponent's bias from 127 to 15
    const uint32_t normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // subnormal: adding 1/2 leaves the value in steps of 2^-24, rounded to nearest even, in the low bits
    const float shifted = value + 0.5f;
    uint32_t subnormal;
    memcpy(&subnormal, &shifted, 4);
    bits[i] = (uint16_t)(magnitude < (113u << 23) ? subnormal & 0x7FF : normal);
  }
}

#if defined(__AVX512F__)
inline Vec load_halves(const uint16_t* bits) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)bits)); }
#elif defined(__AVX2__)
inline Vec load_halves(const uint16_t* bits) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)bits)); }
#else
inline Vec load_halves(const uint16_t* bits) {
  Vec values;
  for (int i = 0; i < kLanes; ++i) {
    // normal: move the exponent's bias; subnormal: steps of 2^-24, without fp32 subnormals, which a thread may flush
    const uint32_t moved = ((uint32_t)bits[i] << 13) + (112u << 23);
    float normal;
    memcpy(&normal, &moved, 4);
    values[i] = bits[i] < 0x400 ? (float)(int)bits[i] * (1.0f / 16777216) : normal;
  }
  return values;
}
#endif

void add_halves(const uint16_t* const* vectors, int count, float* sums) {
  constexpr int kColumns = 8;  // as many sums as registers hold
  for (int d = 0; d < 2 * kDim; d += kColumns * kLanes) {
    Vec total[kColumns];
    for (int v = 0; v < kColumns; ++v) total[v] = load(sums + d + v * kLanes);
    for (int i = 0; i < count; ++i)
      for (int v = 0; v < kColumns; ++v) total[v] += load_halves(vectors[i] + d + v * kLanes);
    for (int v = 0; v < kColumns; ++v) store(sums + d + v * kLanes, total[v]);
  }
}

template <int kHeads>
inline void dot_signed_heads(const float* q, const float* signed_sums, float* sums) {
  Vec total[kHeads] = {};
  for (int d = 0; d < kDim; d += kLanes) {
    const Vec positive = load(signed_sums + d), negative = -load(signed_sums + kDim + d);
    for (int j = 0; j < kHeads; ++j) {
      const Vec value = load(q + j * kDim + d);
      total[j] += value * (value > 0.0f ? positive : negative);
    }
  }
  for (int j = 0; j < kHeads; ++j) sums[j] = sum(total[j]);
}

void dot_signed(const float* q, int heads, const float* signed_sums, float* sums) {
  int j = 0;
  for (; j + kHeadTile <= heads; j += kHeadTile) dot_signed_heads<kHeadTile>(q + j * kDim, signed_sums, sums + j);
  for (; j < heads; ++j) dot_signed_heads<1>(q + j * kDim, signed_sums, sums + j);
}

// ---------------------------------------------------------------- scores

void mean_vectors(const float* const* vectors, int count, float* mean) {
  Vec total[kDim / kLanes] = {};
  for (int i = 0; i < count; ++i)
    for (int v = 0; v < kDim / kLanes; ++v) total[v] += load(vectors[i] + v * kLanes);
  for (int v = 0; v < kDim / kLanes; ++v) store(mean + v * kLanes, total[v] / (float)count);
}

// acc[j][v] = q[j] . keys, summed over the dimensions in order.
template <int kHeads>
inline __attribute__((always_inline)) void dot_panel(const float* q, const float* panel, Vec (&acc)[kHeads][kVectors]) {
#pragma GCC unroll 4
  for (int j = 0; j < kHeads; ++j)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) acc[j][v] = Vec{};
#pragma GCC unroll 2
  for (int d = 0; d < kDim; ++d) {
    const Vec k0 = load(panel + d * kPanelKeys);
    const Vec k1 = load(panel + d * kPanelKeys + kLanes);
    const Vec k2 = load(panel + d * kPanelKeys + 2 * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < kHeads; ++j) {
      const Vec value = broadcast(q[j * kDim + d]);
      acc[j][0] += value * k0;
      acc[j][1] += value * k1;
      acc[j][2] += value * k2;
    }
  }
}

template <int kHeads>
inline void add_head_scores(const float* q, const float* gates, const float* panel, const float* scales,
                            float* scores) {
  Vec acc[kHeads][kVectors];
  dot_panel<kHeads>(q, panel, acc);
#pragma GCC unroll 3
  for (int v = 0; v < kVectors; ++v) {
    const Vec scale = load(scales + v * kLanes);
    Vec score = load(scores + v * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < kHeads; ++j) score += gates[j] * relu(acc[j][v] * scale);
    store(scores + v * kLanes, score);
  }
}

void score_keys(const float* q, const float* gates, int heads, const float* panels, const float* scales,
                int panel_count, float* scores) {
  // 8 heads of fp32 queries (4 KiB) stay in the first-level cache while the panels pass through it
  constexpr int kHeadBlock = 8;
  for (int i = 0; i < panel_count * kPanelKeys; i += kLanes) store(scores + i, Vec{});
  for (int block = 0; block < heads; block += kHeadBlock) {
    const int end = block + kHeadBlock < heads ? block + kHeadBlock : heads;
    for (int p = 0; p < panel_count; ++p) {
      const float* panel = panels + (int64_t)p * kDim * kPanelKeys;
      const float* scale = scales + p * kPanelKeys;
      float* score = scores + p * kPanelKeys;
      int j = block;
      for (; j + kHeadTile <= end; j += kHeadTile)
        add_head_scores<kHeadTile>(q + j * kDim, gates + j, panel, scale, score);
      for (; j + 2 <= end; j += 2) add_head_scores<2>(q + j * kDim, gates + j, panel, scale, score);
      for (; j < end; ++j) add_head_scores<1>(q + j * kDim, gates + j, panel, scale, score);
    }
  }
}

template <int kHeads>
inline void add_head_sums(const float* q, const float* panels, int count, float* sums) {
  VecInt lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Vec total[kHeads][kVectors] = {};
  for (int first = 0; first < count; first += kPanelKeys) {
    Vec acc[kHeads][kVectors];
    dot_panel<kHeads>(q, panels + (int64_t)first * kDim, acc);
    for (int j = 0; j < kHeads; ++j)
      for (int v = 0; v < kVectors; ++v) {
        const VecInt exists = lane + (first + v * kLanes) < count;
        total[j][v] += exists ? relu(acc[j][v]) : Vec{};
      }
  }
  for (int j = 0; j < kHeads; ++j) sums[j] = sum(total[j][0]) + sum(total[j][1]) + sum(total[j][2]);
}

void sum_relu(const float* q, int heads, const float* panels, int count, float* sums) {
  int j = 0;
  for (; j + kHeadTile <= heads; j += kHeadTile) add_head_sums<kHeadTile>(q + j * kDim, panels, count, sums + j);
  for (; j < heads; ++j) add_head_sums<1>(q + j * kDim, panels, count, sums + j);
}

// ---------------------------------------------------------------- selection

// Bit i: values[i] > threshold (or == threshold).
#if defined(__AVX512F__)
inline uint32_t above_mask(const int32_t* p, int32_t threshold) {
  return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(threshold));
}
inline uint32_t equal_mask(const int32_t* p, int32_t threshold) {
  return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(threshold));
}
#elif defined(__AVX2__)
inline uint32_t above_mask(const int32_t* p, int32_t threshold) {
  const __m256i values = _mm256_loadu_si256((const __m256i*)p);
  return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(values, _mm256_set1_epi32(threshold))));
}
inline uint32_t equal_mask(const int32_t* p, int32_t threshold) {
  const __m256i values = _mm256_loadu_si256((const __m256i*)p);
  return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(values, _mm256_set1_epi32(threshold))));
}
#else
inline uint32_t above_mask(const int32_t* p, int32_t threshold) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (uint32_t)(p[i] > threshold) << i;
  return mask;
}
inline uint32_t equal_mask(const int32_t* p, int32_t threshold) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (uint32_t)(p[i] == threshold) << i;
  return mask;
}
#endif

// fp32 -> int32 of the same order; -0 and 0 are equal, every NaN is the largest.
inline VecInt ordered(Vec x) {
  const VecInt bits = (VecInt)(x + 0.0f);
  const VecInt order = bits ^ (bits >> 31 & 0x7FFFFFFF);
  return x == x ? order : VecInt{} + 0x7FFFFFFF;
}

// values[0 .. n) -> int32 order in place; the last vector is padded in a copy. Returns the range.
inline void order_in_place(float* scores, int n, int32_t& least, int32_t& greatest) {
  int32_t* order = (int32_t*)scores;
  VecInt low = VecInt{} + 0x7FFFFFFF, high = VecInt{} - 0x7FFFFFFF - 1;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecInt value = ordered(load(scores + i));
    low = value < low ? value : low;
    high = value > high ? value : high;
    store(order + i, value);
  }
  least = 0x7FFFFFFF, greatest = -0x7FFFFFFF - 1;
  for (int lane = 0; lane < kLanes; ++lane) {
    least = low[lane] < least ? low[lane] : least;
    greatest = high[lane] > greatest ? high[lane] : greatest;
  }
  for (; i < n; ++i) {
    const int32_t value = ordered(broadcast(scores[i]))[0];
    least = value < least ? value : least;
    greatest = value > greatest ? value : greatest;
    memcpy(scores + i, &value, 4);
  }
}

// Finds `threshold` and `ties` such that the k largest of values[0 .. n) are those above the threshold and `ties` of
// those equal to it. Each round splits the range of the k-th value into 2048 bins and keeps the bin that holds it.
inline void find_threshold(const int32_t* values, int n, int k, int32_t least, int32_t greatest, int32_t* scratch,
                           int32_t& threshold, int& ties) {
  constexpr int kBinBits = 11, kBins = 1 << kBinBits;
  uint32_t low = (uint32_t)least, width = (uint32_t)greatest - low;  // the range is low .. low + width, inclusive
  for (;;) {
    int shift = 0;
    while (width >> shift >= (uint32_t)kBins) ++shift;
    // two histograms: neighbours often share a bin, and a counter's store must land before it is read again
    int32_t histogram[2][kBins];
    memset(histogram, 0, sizeof(histogram));
    int i = 0;
    for (; i + 2 <= n; i += 2) {
      ++histogram[0][((uint32_t)values[i] - low) >> shift];
      ++histogram[1][((uint32_t)values[i + 1] - low) >> shift];
    }
    if (i < n) ++histogram[0][((uint32_t)values[i] - low) >> shift];
    int bin = (int)(width >> shift), above = 0, inside;
    for (;; --bin) {
      inside = histogram[0][bin] + histogram[1][bin];
      if (above + inside >= k) break;
      above += inside;
    }
    low += (uint32_t)bin << shift;
    k -= above;
    if (shift == 0) {
      threshold = (int32_t)low;
      ties = k;
      return;
    }
    if (inside == k) {  // the bin goes in whole, and something lies below it because k < n
      threshold = (int32_t)(low - 1);
      ties = 0;
      return;
    }
    // scratch may be `values` of the round before: the write index never passes the read index
    const uint32_t last = ((uint32_t)1 << shift) - 1;
    int kept = 0;
    for (int j = 0; j < n; ++j) {
      const int32_t value = values[j];
      scratch[kept] = value;
      kept += (uint32_t)value - low <= last;
    }
    values = scratch;
    n = kept;
    width = last;
  }
}

// Copies the values above the threshold, in order. Returns how many.
inline int copy_above(const int32_t* values, int n, int32_t threshold, int32_t* to) {
  int count = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (uint32_t above = above_mask(values + i, threshold); above; above &= above - 1)
      to[count++] = values[i + __builtin_ctz(above)];
  for (; i < n; ++i)
    if (values[i] > threshold) to[count++] = values[i];
  return count;
}

// The k largest of values[0 .. n) are looked for among those above a bound that a sample suggests. A bound that
// leaves fewer than k costs time only: then all values are searched.
inline void find_threshold_by_sample(const int32_t* values, int n, int k, int32_t least, int32_t greatest,
                                     int32_t* scratch, int32_t& threshold, int& ties) {
  constexpr int kSample = 1024;
  if (n >= 8 * kSample) {
    const int step = n / kSample;
    const float expected = (float)k / (float)step;
    const int rank = (int)(expected + 4.0f * sqrtf(expected)) + 4;  // four standard deviations of luck
    if (rank < kSample) {
      for (int i = 0; i < kSample; ++i) scratch[i] = values[(int64_t)i * step];
      int32_t bound;
      int ignored;
      find_threshold(scratch, kSample, rank, least, greatest, scratch, bound, ignored);
      if (bound > least) {
        const int count = copy_above(values, n, bound - 1, scratch);
        if (count > k) return find_threshold(scratch, count, k, bound, greatest, scratch, threshold, ties);
      }
    }
  }
  find_threshold(values, n, k, least, greatest, scratch, threshold, ties);
}

void select_largest(float* scores, int n, int k, int32_t* scratch, int32_t* positions) {
  int32_t least, greatest, threshold;
  int ties;
  order_in_place(scores, n, least, greatest);
  const int32_t* order = (const int32_t*)scores;
  find_threshold_by_sample(order, n, k, least, greatest, scratch, threshold, ties);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    uint32_t chosen = above_mask(order + i, threshold);
    if (ties)
      for (uint32_t equal = equal_mask(order + i, threshold); equal && ties; equal &= equal - 1, --ties)
        chosen |= equal & -equal;
    for (; chosen; chosen &= chosen - 1) *positions++ = i + __builtin_ctz(chosen);
  }
  for (; i < n; ++i) {
    if (order[i] > threshold) *positions++ = i;
    else if (order[i] == threshold && ties) *positions++ = i, --ties;
  }
}

// ---------------------------------------------------------------- attention

void widen_bf16(const uint16_t* bits, int count, float* values) {
  uint32_t* out = (uint32_t*)values;
  for (int i = 0; i < count; ++i) out[i] = (uint32_t)bits[i] << 16;
}

void narrow_bf16(const float* values, int count, uint16_t* out) {
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, values + i, 4);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    out[i] = (uint16_t)(values[i] == values[i] ? rounded : 0x7FC0);
  }
}

// e^x for x <= 0, to about 1 ulp; e^-87 for anything less. The constant 1.5 * 2^23 rounds to an integer in place.
inline Vec exp_nonpositive(Vec x) {
  const Vec least = broadcast(-87.0f);
  x = x < least ? least : x;
  const Vec rounder = broadcast(12582912.0f);
  const Vec shifted = x * 1.44269504f + rounder;
  const Vec n = shifted - rounder;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vec result = (Vec)((VecInt)p + (((VecInt)shifted - (VecInt)rounder) << 23));
  return x == x ? result : x;
}

template <int kHeads>
inline void dot_tokens(const float* q, const float* kv, int stride, float* out /* [kHeads][kAttentionTile] */) {
  Vec acc[kHeads][3] = {};
  for (int d = 0; d < stride; d += kLanes) {
    const Vec k0 = load(kv + d), k1 = load(kv + stride + d), k2 = load(kv + 2 * stride + d);
#pragma GCC unroll 4
    for (int j = 0; j < kHeads; ++j) {
      const Vec value = load(q + j * stride + d);
      acc[j][0] += value * k0;
      acc[j][1] += value * k1;
      acc[j][2] += value * k2;
    }
  }
  for (int j = 0; j < kHeads; ++j)
    for (int t = 0; t < 3; ++t) out[j * kAttentionTile + t] = sum(acc[j][t]);
}

template <int kHeads, int kColumns>
inline void add_values(const float* weights, const float* correction, const float* kv, int count, int stride,
                       float* accumulator) {
  Vec acc[kHeads][kColumns];
#pragma GCC unroll 4
  for (int j = 0; j < kHeads; ++j)
#pragma GCC unroll 3
    for (int v = 0; v < kColumns; ++v) acc[j][v] = load(accumulator + j * stride + v * kLanes) * correction[j];
  for (int t = 0; t < count; ++t) {
    Vec value[kColumns];
#pragma GCC unroll 3
    for (int v = 0; v < kColumns; ++v) value[v] = load(kv + (int64_t)t * stride + v * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < kHeads; ++j) {
      const Vec weight = broadcast(weights[j * kAttentionTile + t]);
#pragma GCC unroll 3
      for (int v = 0; v < kColumns; ++v) acc[j][v] += weight * value[v];
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kHeads; ++j)
#pragma GCC unroll 3
    for (int v = 0; v < kColumns; ++v) store(accumulator + j * stride + v * kLanes, acc[j][v]);
}

template <int kHeads>
inline void attend_heads(const float* q, const float* kv, int count, int stride, int rank, float scale,
                         float* accumulator, float* highest, float* total) {
  constexpr int kPadded = (kAttentionTile + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  float scores[kHeads * kAttentionTile + kPadded - kAttentionTile];
  float correction[kHeads];
  for (int t = 0; t < count; t += 3) dot_tokens<kHeads>(q, kv + (int64_t)t * stride, stride, scores + t);
  for (int j = 0; j < kHeads; ++j) {
    float* row = scores + j * kAttentionTile;
    float top = highest[j];
    for (int t = 0; t < count; ++t) {
      row[t] *= scale;
      top = row[t] > top ? row[t] : top;
    }
    float weights[kPadded];
    for (int t = 0; t < kPadded; ++t) weights[t] = t < count ? row[t] : top;
    for (int t = 0; t < kPadded; t += kLanes) store(weights + t, exp_nonpositive(load(weights + t) - top));
    correction[j] = exp_nonpositive(broadcast(highest[j] - top))[0];  // of the first tile: anything, times zero
    float sum_of_tile = 0.0f;
    for (int t = 0; t < count; ++t) {
      row[t] = weights[t];
      sum_of_tile += weights[t];
    }
    total[j] = total[j] * correction[j] + sum_of_tile;
    highest[j] = top;
  }
  int d = 0;
  for (; d + 3 * kLanes <= rank; d += 3 * kLanes)
    add_values<kHeads, 3>(scores, correction, kv + d, count, stride, accumulator + d);
  for (; d < rank; d += kLanes) add_values<kHeads, 1>(scores, correction, kv + d, count, stride, accumulator + d);
}

void attend(const float* q, int heads, const float* kv, int count, int stride, int rank, float scale,
            float* accumulator, float* highest, float* total) {
  int j = 0;
  for (; j + kHeadTile <= heads; j += kHeadTile)
    attend_heads<kHeadTile>(q + j * stride, kv, count, stride, rank, scale, accumulator + j * stride, highest + j,
                            total + j);
  for (; j < heads; ++j)
    attend_heads<1>(q + j * stride, kv, count, stride, rank, scale, accumulator + j * stride, highest + j, total + j);
}

}  // namespace

extern const Simd MISA_SIMD;
const Simd MISA_SIMD = {
    MISA_SIMD_NAME,    kPanelKeys, widen_fp8,  quantize_key, mean_keys,  signed_mean_keys, mean_vectors,
    transpose_vectors, load_keys,  score_keys, sum_relu,     add_halves, dot_signed,       narrow_half,
    select_largest,    widen_bf16, narrow_bf16, attend,
};

}  // namespace misa
