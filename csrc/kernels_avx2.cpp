// For processors with AVX2 and FMA (x86-64-v3).
#include "system.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#define HEAT_NAMESPACE avx2
#define HEAT_VECTOR_BYTES 32
#include "kernels.h"
#pragma GCC pop_options
#endif
