#if defined(__x86_64__)
#define MISA_SIMD simd_avx512
#define MISA_SIMD_NAME "avx512"
#include "simd_impl.h"
#endif
