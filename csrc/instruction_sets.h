// The instruction sets that the kernels are compiled for, and which of them this processor runs.
// HEAT_WITHOUT_AVX512 leaves one out, to save the time to compile what cannot run.
#pragma once

#include <vector>

#include "arguments.h"

namespace heat {

#define HEAT_DECLARE(name)             \
    namespace name {                   \
    Kernels<float> float_kernels();    \
    Kernels<double> double_kernels();  \
    }
HEAT_DECLARE(base)
#if defined(__x86_64__)
HEAT_DECLARE(avx2)
#if !defined(HEAT_WITHOUT_AVX512)
HEAT_DECLARE(avx512)
#endif
#endif
#undef HEAT_DECLARE

struct InstructionSet {
    const char* name;
    Kernels<float> of_float;
    Kernels<double> of_double;
};

// The widest first.
inline std::vector<InstructionSet> runnable() {
    std::vector<InstructionSet> found;
#if defined(__x86_64__)
#if !defined(HEAT_WITHOUT_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found.push_back({"avx512", avx512::float_kernels(), avx512::double_kernels()});
    }
#endif
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back({"avx2", avx2::float_kernels(), avx2::double_kernels()});
    }
#endif
    found.push_back({"base", base::float_kernels(), base::double_kernels()});
    return found;
}

}  // namespace heat
