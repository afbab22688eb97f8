// What the kernels are given: plain pointers, sizes and strides. All strides count elements.
#pragma once

#include <cstdint>

namespace heat {

// A strided array of at most 5 dimensions. Kernels read `at<T>(i, j, ..)`.
struct Array {
    void* data = nullptr;
    std::int64_t shape[5] = {1, 1, 1, 1, 1};
    std::int64_t stride[5] = {0, 0, 0, 0, 0};
    int dims = 0;

    template <class T, class... Index>
    T* at(Index... index) const {
        const std::int64_t position[] = {static_cast<std::int64_t>(index)...};
        std::int64_t offset = 0;
        for (unsigned dim = 0; dim < sizeof...(index); ++dim) {
            offset += position[dim] * stride[dim];
        }
        return static_cast<T*>(data) + offset;
    }
};

// s = cap tanh(scale q.k / cap), causal; a query sees `window` keys, itself included (0: all).
struct Masking {
    double scale;
    std::int64_t window;
    double softcap;  // 0: none
};

struct BranchAttention {
    Array query, key, value, prefix_key, prefix_value;  // [Hk,B,G,Q,D] [Hk,B,S,D] [Hk,P,D]
    Array output, normaliser;                           // [Hk,B,G,Q,D] [Hk,B,G,Q]
    Masking masking;
    void* workspace;
    int threads;
};

// The primal values of a block (see kernels/second_order_attention/reference.py).
struct Primal {
    Array query, key, value, normaliser, output;  // [Hk,G,Q,D] [Hk,T,D] [Hk,G,Q] [Hk,G,Q,D]
    std::int64_t start;
    Masking masking;
};

struct AttentionTangent {
    Primal primal;
    Array query, key, value;  // tangents, [Hk,B,G,Q,D] [Hk,B,S,D]
    Array output;             // result, [Hk,B,G,Q,D]
    void* workspace;
    int threads;
};

struct AttentionAdjointTangent {
    Primal primal;
    Array query, key, value, output;                 // tangents
    Array output_bar, output_bar_dot;                // [Hk,G,Q,D] [Hk,B,G,Q,D]
    Array query_result, key_result, value_result;    // as the tangents; key and value zeroed here
    void* workspace;
    int threads;
};

struct Norm {
    Array weight;  // [d], data null: none
    Array bias;    // [d], data null: none
    double weight_offset, eps;
    bool centered;
    int threads;
};

struct NormForward {
    Norm norm;
    Array x, y;                 // [B,S,d]
    Array normalised, inverse;  // [B,S,d] [B,S], data null: not wanted
};

struct NormTangent {
    Norm norm;
    Array normalised, inverse;  // primal, [S,d] [S]
    Array x_dot, y_dot;         // [B,S,d]
};

struct NormAdjointTangent {
    Norm norm;
    Array normalised, inverse, pulled, along;  // primal, [S,d] [S] [S,d] [S]
    Array x_dot, y_bar_dot, result;            // [B,S,d]
};

struct Rotation {
    Array x, y;       // [B,S,H,D], any strides but 1 in D
    Array cos, sin;   // [S,r]; the first of a pair has its sine negated
    double sign;      // +1 turns, -1 turns back
    bool interleaved;
    int threads;
};

struct GateTangent {  // h. = slope o g. + value o u.
    Array value, slope;  // [S,f]
    Array gate, up;      // [B,S,f]
    Array result;        // [B,S,f]
    int threads;
};

struct GateAdjointTangent {
    // g_. = h_. o slope + bend o g. + mixed o u.,   u_. = h_. o value + mixed o g.
    Array value, slope, bend, mixed;  // primal, [S,f]
    Array gate, up, hidden;           // [B,S,f]
    Array gate_result, up_result;     // [B,S,f]
    int threads;
};

// What became of a computation; the larger is the worse.
enum class Outcome { done, out_of_range, not_finite };

// Below, tall matrices may have any strides; results and all that is small is in rows. What is
// small is in float64 whatever the type of the tall matrices, and so are the workspaces.

struct Gram {
    Array left, right, result;  // [B,M,a] [B,M,b] [B,a,b]
    void* workspace;
    int threads;
};

struct Combine {
    Array tall, small, result;  // [B,M,a] [B,a,b] [B,M,b]
    void* workspace;
    int threads;
};

struct Orthonormalise {
    Array matrix, frame, triangle;  // [B,M,s] [B,M,s] [B,s,s]
    void* workspace;
    int threads;
};

struct SinglePass {
    Array tests, images, vectors, values;  // [B,M,s] [B,M,s] [B,M,k] [B,k]
    double precision;
    void* workspace;
    int threads;
};

struct SecondPass {
    Array frame, images, vectors, values;  // [B,M,s] [B,M,s] [B,M,k] [B,k]
    void* workspace;
    int threads;
};

struct BlockNorms {
    Array vectors, values, samples, norms;  // [B,N,d,k] any strides, [B,N,k] [m] [B,N,m]
    std::uint64_t seed;
    void* workspace;
    int threads;
};

struct SymmetricEigen {
    Array matrix, values, vectors;  // float64: [B,n,n] [B,n] [B,n,n], eigenvectors in rows
    void* workspace;
    int threads;
};

struct WindowMean {
    Array rows, index, counted, mean;  // [W,n,L] [W,L] int64, [W,L] data null: all, [n,N]
    void* workspace;                   // N numbers of the rows' type
    int threads;
};

// One set of kernels per instruction set; the best one that the processor has is taken.
template <class T>
struct Kernels {
    std::int64_t lanes;  // numbers per vector: head dimensions must be a multiple
    std::int64_t (*branch_attention_workspace)(const BranchAttention&);
    void (*branch_attention)(const BranchAttention&);
    std::int64_t (*attention_tangent_workspace)(const AttentionTangent&);
    void (*attention_tangent)(const AttentionTangent&);
    std::int64_t (*attention_adjoint_tangent_workspace)(const AttentionAdjointTangent&);
    void (*attention_adjoint_tangent)(const AttentionAdjointTangent&);
    void (*norm_forward)(const NormForward&);
    void (*norm_tangent)(const NormTangent&);
    void (*norm_adjoint_tangent)(const NormAdjointTangent&);
    void (*rotate)(const Rotation&);
    void (*gate_tangent)(const GateTangent&);
    void (*gate_adjoint_tangent)(const GateAdjointTangent&);
    std::int64_t (*gram_workspace)(const Gram&);
    Outcome (*gram)(const Gram&);
    std::int64_t (*combine_workspace)(const Combine&);
    Outcome (*combine)(const Combine&);
    std::int64_t (*orthonormalise_workspace)(const Orthonormalise&);
    Outcome (*orthonormalise)(const Orthonormalise&);
    std::int64_t (*single_pass_workspace)(const SinglePass&);
    Outcome (*single_pass)(const SinglePass&);
    std::int64_t (*second_pass_workspace)(const SecondPass&);
    Outcome (*second_pass)(const SecondPass&);
    std::int64_t (*symmetric_eigen_workspace)(const SymmetricEigen&);
    Outcome (*symmetric_eigen)(const SymmetricEigen&);
    std::int64_t (*block_norms_workspace)(const BlockNorms&);
    void (*block_norms)(const BlockNorms&);
    std::int64_t (*window_mean_workspace)(const WindowMean&);
    void (*window_mean)(const WindowMean&);
};

}  // namespace heat
