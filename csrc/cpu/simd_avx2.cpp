#if defined(__x86_64__)
#define MISA_SIMD simd_avx2
#define MISA_SIMD_NAME "avx2"
#include "simd_impl.h"
#endif
