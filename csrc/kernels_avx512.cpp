// For processors with AVX-512 (x86-64-v4).
#include "system.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")
#define HEAT_NAMESPACE avx512
#define HEAT_VECTOR_BYTES 64
#include "kernels.h"
#pragma GCC pop_options
#endif
