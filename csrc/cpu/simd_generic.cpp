#define MISA_SIMD simd_generic
#define MISA_SIMD_NAME "generic"
#include "simd_impl.h"
