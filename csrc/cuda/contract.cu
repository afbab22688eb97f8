// Products of tall matrices in float64: A' B (tall by tall) and A B (tall by small).
//
// Both are out[x, y] = sum_k P[k, x] Q[k, y]: for the Gram matrix k are the rows, cut into chunks
// whose sums a second kernel adds up in order, so that no result depends on timing; for A B, x are
// the rows. A block makes a 64 x 64 tile of `out`, four warps a quarter each, on the float64 tensor
// cores. Tiles of P and Q lie in shared memory as doubles, `[k][x]`; a pitch of 4 modulo 16 doubles
// keeps the reads of the fragments, four k by four x in half a warp, free of bank conflicts.
//
// Work, for M rows by s columns: 2 M s^2 operations (M s^2 for A' A, plus its diagonal tiles' other
// half), and the tall matrices once from memory; s = 128 in float32 is 32 operations a byte, so the
// float64 rate is the floor on every GPU.

#include "kernels.h"
#include "launch.h"

namespace heat::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPitch = kTile + 4;
constexpr int kFetched = kTile * kDepth / kThreads;  // numbers of an operand's tile, per thread

// acc += A B for A [16 x 8], B [8 x 8]. Lane 4 g + t holds A[g + 8 i, t + 4 j] in a[i + 2 j],
// B[t + 4 j, g] in b[j] and the result's [g + 8 i, 2 t + j] in acc[2 i + j].
__device__ __forceinline__ void multiply(double (&acc)[4], const double (&a)[4],
                                         const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+d"(acc[0]), "+d"(acc[1]), "+d"(acc[2]), "+d"(acc[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
    for (int j = 0; j < 2; ++j) {
        for (int i = 0; i < 2; ++i) {
            asm volatile(
                "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+d"(acc[2 * i]), "+d"(acc[2 * i + 1])
                : "d"(a[i + 2 * j]), "d"(b[j]));
        }
    }
#endif
}

template <class T>
struct Operand {
    const T* data;
    std::int64_t outer, inner, depth, across;  // strides
};

// A thread's share of an operand's tiles: every `step`-th number of a tile, along whichever of its
// two directions is contiguous.
template <class T>
class Fetch {
public:
    __device__ __forceinline__ Fetch(const Operand<T>& from, std::int64_t first_k,
                                     std::int64_t first_x, std::int64_t across) {
        const int thread = static_cast<int>(threadIdx.x);
        const bool along = from.across == 1;
        k_ = along ? thread / kTile : thread % kDepth;
        x_ = along ? thread % kTile : thread / kDepth;
        step_k_ = along ? kThreads / kTile : 0;
        step_x_ = along ? 0 : kThreads / kDepth;
        across_ = across - first_x < kTile ? static_cast<int>(across - first_x) : kTile;
        step_ = step_k_ * from.depth + step_x_ * from.across;
        tile_ = kDepth * from.depth;
        next_ = from.data + (first_k + k_) * from.depth + (first_x + x_) * from.across;
    }
    // The next tile, of which `depth` rows are there.
    __device__ __forceinline__ void load(int depth) {
        const T* at = next_;
        int k = k_, x = x_;
#pragma unroll
        for (int i = 0; i < kFetched; ++i) {
            held_[i] = k < depth && x < across_ ? *at : T(0);
            at += step_;
            k += step_k_;
            x += step_x_;
        }
        next_ += tile_;
    }
    __device__ __forceinline__ void store(double (*tile)[kPitch]) const {
        double* to = &tile[k_][x_];
#pragma unroll
        for (int i = 0; i < kFetched; ++i) {
            *to = static_cast<double>(held_[i]);
            to += step_k_ * kPitch + step_x_;
        }
    }

private:
    const T* next_;
    std::int64_t step_, tile_;
    int k_, x_, step_k_, step_x_, across_;
    T held_[kFetched];
};

struct Shape {
    std::int64_t inner, depth, across_p, across_q, chunks, depth_each;
    bool symmetric;
};

// out [outer, inner, chunks, across_p, across_q]; a block for each of its tiles.
template <class P, class Q, class Out>
__global__ void __launch_bounds__(kThreads, kResident)
    contract(Operand<P> p, Operand<Q> q, Out* out, Shape shape) {
    __shared__ double tiles[2][kDepth][kPitch];

    const std::int64_t tiles_p = (shape.across_p + kTile - 1) / kTile;
    const std::int64_t tiles_q = (shape.across_q + kTile - 1) / kTile;
    const std::int64_t each = shape.symmetric ? tiles_p * (tiles_p + 1) / 2 : tiles_p * tiles_q;
    const std::int64_t chunk = blockIdx.x / each;  // over batches and chunks
    const std::int64_t batch = chunk / shape.chunks;
    std::int64_t row = 0, column = blockIdx.x % each;
    if (shape.symmetric) {  // the lower triangle, row by row
        while (column > row) column -= ++row;
    } else {
        row = column / tiles_q;
        column %= tiles_q;
    }
    const bool diagonal = shape.symmetric && row == column;
    const std::int64_t first_x = row * kTile, first_y = column * kTile;
    const std::int64_t from = chunk % shape.chunks * shape.depth_each;
    const std::int64_t end = from + shape.depth_each;
    const std::int64_t to = end < shape.depth ? end : shape.depth;
    p.data += batch / shape.inner * p.outer + batch % shape.inner * p.inner;
    q.data += batch / shape.inner * q.outer + batch % shape.inner * q.inner;

    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int group = lane / 4, member = lane % 4;
    const int own_x = warp / 2 * 32, own_y = warp % 2 * 32;
    double(*tile_p)[kPitch] = tiles[0];
    double(*tile_q)[kPitch] = diagonal ? tiles[0] : tiles[1];

    double acc[2][4][4] = {};
    int depth = static_cast<int>(to - from);
    Fetch<P> left(p, from, first_x, shape.across_p);
    Fetch<Q> right(q, from, first_y, shape.across_q);
    left.load(depth);
    if (!diagonal) right.load(depth);
    for (; depth > 0; depth -= kDepth) {
        left.store(tile_p);
        if (!diagonal) right.store(tile_q);
        __syncthreads();
        // The next tile is on its way while this one is multiplied.
        left.load(depth - kDepth);
        if (!diagonal) right.load(depth - kDepth);
#pragma unroll
        for (int step = 0; step < kDepth; step += 8) {
            double a[2][4], b[4][2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                    a[i][part] = tile_p[step + member + part / 2 * 4]
                                       [own_x + 16 * i + part % 2 * 8 + group];
                }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                b[j][0] = tile_q[step + member][own_y + 8 * j + group];
                b[j][1] = tile_q[step + member + 4][own_y + 8 * j + group];
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) multiply(acc[i][j], a[i], b[j]);
            }
        }
        __syncthreads();
    }

    out += chunk * shape.across_p * shape.across_q;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const std::int64_t x = first_x + own_x + 16 * i + part / 2 * 8 + group;
                const std::int64_t y = first_y + own_y + 8 * j + 2 * member + part % 2;
                if (x < shape.across_p && y < shape.across_q) {
                    out[x * shape.across_q + y] = static_cast<Out>(acc[i][j][part]);
                }
            }
        }
    }
}

// Sums over chunks in their order; what a symmetric Gram matrix left out comes from its mirror.
__global__ void sum_chunks(const double* partial, double* result, std::int64_t total,
                           std::int64_t chunks, std::int64_t left, std::int64_t right,
                           bool symmetric) {
    const std::int64_t number = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (number >= total) return;
    const std::int64_t size = left * right, batch = number / size;
    std::int64_t x = number % size / right, y = number % right;
    if (symmetric && x / kTile < y / kTile) {
        const std::int64_t swap = x;
        x = y;
        y = swap;
    }
    partial += batch * chunks * size + x * right + y;
    double sum = 0;
#pragma unroll 8
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * size];
    result[number] = sum;
}

// `by_row`: the contraction runs along the rows of the matrices, else along their columns.
template <class T>
Operand<T> operand(const Matrices& m, bool by_row) {
    return {reinterpret_cast<const T*>(m.data), m.outer, m.inner, by_row ? m.row : m.column,
            by_row ? m.column : m.row};
}

std::int64_t tiles_of(std::int64_t size) { return (size + kTile - 1) / kTile; }

template <class T>
void gram_of(Where where, const Matrices& a, const Matrices& b, const Shape& shape,
             std::int64_t blocks, std::uintptr_t partial) {
    launch("gram", contract<T, T, double>, where.device, where.stream, blocks, kThreads,
           operand<T>(a, true), operand<T>(b, true), reinterpret_cast<double*>(partial), shape);
}

template <class T>
void combine_of(Where where, const Matrices& a, const Matrices& b, const Shape& shape,
                std::int64_t blocks, std::uintptr_t result) {
    launch("combine", contract<T, double, T>, where.device, where.stream, blocks, kThreads,
           operand<T>(a, false), operand<double>(b, true), reinterpret_cast<T*>(result), shape);
}

}  // namespace

void gram(Where where, bool is_double, Matrices a, Matrices b, bool symmetric, std::int64_t outer,
          std::int64_t inner, std::int64_t rows, std::int64_t left, std::int64_t right,
          std::int64_t chunks, std::int64_t rows_each, std::uintptr_t partial,
          std::uintptr_t result) {
    const Shape shape{inner, rows, left, right, chunks, rows_each, symmetric};
    const std::int64_t across = tiles_of(left);
    const std::int64_t tiles = symmetric ? across * (across + 1) / 2 : across * tiles_of(right);
    const std::int64_t blocks = outer * inner * chunks * tiles;
    (is_double ? gram_of<double> : gram_of<float>)(where, a, b, shape, blocks, partial);
    const std::int64_t total = outer * inner * left * right;
    launch("gram", sum_chunks, where.device, where.stream, (total + 127) / 128, 128,
           reinterpret_cast<const double*>(partial), reinterpret_cast<double*>(result), total,
           chunks, left, right, symmetric);
}

void combine(Where where, bool is_double, Matrices a, Matrices b, std::int64_t outer, std::int64_t inner,
             std::int64_t rows, std::int64_t left, std::int64_t right, std::uintptr_t result) {
    const Shape shape{inner, left, rows, right, 1, left, false};
    const std::int64_t blocks = outer * inner * tiles_of(rows) * tiles_of(right);
    (is_double ? combine_of<double> : combine_of<float>)(where, a, b, shape, blocks, result);
}

int runtime_version() { return CUDART_VERSION; }

std::string compiler() {
    return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." +
           std::to_string(__CUDACC_VER_MINOR__) + "." + std::to_string(__CUDACC_VER_BUILD__);
}

}  // namespace heat::cuda
