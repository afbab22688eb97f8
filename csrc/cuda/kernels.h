// The launchers that the Python module calls, in plain C++: bindings.cpp needs no CUDA header.
//
// All pointers are device pointers, all strides count elements, `stream` is a cudaStream_t.
#pragma once

#include <cstdint>
#include <string>

namespace heat::cuda {

// A batch of matrices `[outer, inner, rows, columns]`; a broadcast dimension has stride 0.
struct Matrices {
    std::uintptr_t data;
    std::int64_t outer, inner, row, column;  // strides
};

struct Where {
    int device;
    std::uintptr_t stream;
};

// Side of a tile of the result, and the depth to which a chunk of rows is rounded up.
constexpr int kTile = 64;
constexpr int kDepth = 16;
// Blocks of `contract` that share a multiprocessor.
constexpr int kResident = 3;

// G = A' B, `[outer, inner, left, right]` in double, from `chunks` partial sums of `rows_each` rows
// in `partial [outer, inner, chunks, left, right]`. `symmetric`: A is B, half of G is computed.
void gram(Where, bool is_double, Matrices a, Matrices b, bool symmetric, std::int64_t outer, std::int64_t inner,
          std::int64_t rows, std::int64_t left, std::int64_t right, std::int64_t chunks,
          std::int64_t rows_each, std::uintptr_t partial, std::uintptr_t result);

// C = A B, contiguous `[outer, inner, rows, right]` in A's type; B `[outer, inner, left, right]` is
// double and small.
void combine(Where, bool is_double, Matrices a, Matrices b, std::int64_t outer, std::int64_t inner,
             std::int64_t rows, std::int64_t left, std::int64_t right, std::uintptr_t result);

// Norms `[outer, tokens, samples]` of `U_i diag(w) U_i' r`, in U's type.
struct Factors {
    std::uintptr_t vectors;  // [outer, tokens, width, rank], the last stride 1
    std::int64_t vectors_outer, vectors_token, vectors_row;
    std::uintptr_t values;  // double [outer, tokens, rank], the last stride 1
    std::int64_t values_outer, values_token;
};
void block_norms(Where, bool is_double, Factors, std::int64_t outer, std::int64_t tokens, std::int64_t width,
                 std::int64_t rank, std::uint64_t seed, std::uintptr_t samples, std::int64_t count,
                 std::uintptr_t workspace, std::uintptr_t result);

// Means `[rows, tokens]` of contiguous `values [windows, rows, length]`; `places [windows, tokens]`
// tells where a window holds a token (-1: nowhere), `counted [windows, length]` (bytes, or none)
// what counts.
void window_mean(Where, bool is_double, std::uintptr_t values, std::uintptr_t places,
                 std::uintptr_t counted, std::int64_t windows, std::int64_t rows,
                 std::int64_t tokens, std::int64_t length, std::uintptr_t result);

int runtime_version();
std::string compiler();

}  // namespace heat::cuda
