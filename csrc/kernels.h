// The kernels of one instruction set. Included by kernels_*.cpp, which set HEAT_NAMESPACE and
// HEAT_VECTOR_BYTES and, after the system headers, the target of the compiler.

#define HEAT_INLINE inline __attribute__((always_inline))

namespace heat {
namespace HEAT_NAMESPACE {

#include "simd.h"

#include "product.h"

#include "attention.h"

#include "elementwise.h"

#include "tall.h"

#include "small.h"

#include "signs.h"

#include "low_rank.h"

template <class T>
Kernels<T> table() {
    return {
        Simd<T>::lanes,
        branch_attention_workspace<T>,
        branch_attention<T>,
        attention_tangent_workspace<T>,
        attention_tangent<T>,
        attention_adjoint_tangent_workspace<T>,
        attention_adjoint_tangent<T>,
        norm_forward<T>,
        norm_tangent<T>,
        norm_adjoint_tangent<T>,
        rotate<T>,
        gate_tangent<T>,
        gate_adjoint_tangent<T>,
        gram_workspace<T>,
        gram<T>,
        combine_workspace<T>,
        combine<T>,
        orthonormalise_workspace<T>,
        orthonormalise<T>,
        single_pass_workspace<T>,
        single_pass<T>,
        second_pass_workspace<T>,
        second_pass<T>,
        symmetric_eigen_workspace,
        symmetric_eigen,
        block_norms_workspace<T>,
        block_norms<T>,
        window_mean_workspace<T>,
        window_mean<T>,
    };
}

Kernels<float> float_kernels() { return table<float>(); }
Kernels<double> double_kernels() { return table<double>(); }

}  // namespace HEAT_NAMESPACE
}  // namespace heat
