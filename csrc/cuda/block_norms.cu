// Norms |U_i diag(w) U_i' r|_1 for every token i and probe r, the probes' signs made on the fly.
//
// A block takes one token and eight probes, and reads U_i twice: for `z = diag(w) U_i' r`, which
// goes through a workspace (it stays in the nearest cache), and for the entries of `U_i z`. Sums run
// in a fixed order, so no result depends on timing. 4 d k operations a probe against 2 d k numbers
// read: at eight probes memory is the floor.

#include "kernels.h"
#include "launch.h"

namespace heat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kProbes = 8;
constexpr int kRows = 4;       // rows of U that a warp works on at a time
constexpr int kSigns = 128;    // rows whose signs are held
constexpr int kColumns = 2;    // columns of U of a lane
constexpr unsigned kAll = 0xffffffffu;

// The generator of kernels/rademacher/reference.py.
__device__ __forceinline__ std::uint32_t mix(std::uint32_t x) {
    x += 0x9E3779B9u;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

template <class T>
struct Arguments {
    const T* vectors;
    std::int64_t vectors_outer, vectors_token, vectors_row;
    const double* values;
    std::int64_t values_outer, values_token;
    std::int64_t tokens, width, rank, count;
    std::uint64_t seed;
    const std::int64_t* samples;
    T* workspace;  // [outer, tokens, count, rank]
    T* result;     // [outer, tokens, count]
};

template <class T>
__global__ void __launch_bounds__(kThreads) norms(Arguments<T> given) {
    __shared__ T signs[kSigns][kProbes];
    __shared__ T sums[kProbes][32 * kColumns];

    const std::int64_t groups = (given.count + kProbes - 1) / kProbes;
    const std::int64_t item = blockIdx.x / groups;  // over outer and tokens
    const std::int64_t first = blockIdx.x % groups * kProbes;
    const int probes =
        given.count - first < kProbes ? static_cast<int>(given.count - first) : kProbes;
    const std::int64_t token = item % given.tokens, outer = item / given.tokens;
    const T* const u =
        given.vectors + outer * given.vectors_outer + token * given.vectors_token;
    const double* const w =
        given.values + outer * given.values_outer + token * given.values_token;
    T* const z = given.workspace + (item * given.count + first) * given.rank;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;

    // Each thread makes signs of one probe. Without a probe of its own it repeats the last one.
    const int own = static_cast<int>(threadIdx.x) % kProbes;
    const std::int64_t sample = given.samples[first + (own < probes ? own : probes - 1)];
    std::uint32_t key = mix(static_cast<std::uint32_t>(given.seed));
    key = mix(key ^ static_cast<std::uint32_t>(given.seed >> 32));
    key = mix(key ^ static_cast<std::uint32_t>(sample));
    key = mix(key ^ static_cast<std::uint32_t>(token));

    for (std::int64_t column = 0; column < given.rank; column += 32 * kColumns) {
        T acc[kColumns][kProbes] = {};
        for (std::int64_t row = 0; row < given.width; row += kSigns) {
            __syncthreads();
            for (int r = static_cast<int>(threadIdx.x) / kProbes; r < kSigns;
                 r += kThreads / kProbes) {
                const std::uint32_t at = static_cast<std::uint32_t>(row) + r;
                signs[r][own] = mix(key ^ (at / 32)) >> (at % 32) & 1 ? T(-1) : T(1);
            }
            __syncthreads();
            for (int r = warp * kRows; r < kSigns; r += kWarps * kRows) {
                T entry[kRows][kColumns];
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) {
                        const std::int64_t x = row + r + i, c = column + 32 * j + lane;
                        entry[i][j] = x < given.width && c < given.rank
                                          ? u[x * given.vectors_row + c]
                                          : T(0);
                    }
                }
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
#pragma unroll
                    for (int probe = 0; probe < kProbes; ++probe) {
                        const T sign = signs[r + i][probe];
#pragma unroll
                        for (int j = 0; j < kColumns; ++j) acc[j][probe] += sign * entry[i][j];
                    }
                }
            }
        }
        for (int turn = 0; turn < kWarps; ++turn) {
            if (warp == turn) {
#pragma unroll
                for (int probe = 0; probe < kProbes; ++probe) {
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) {
                        T& sum = sums[probe][32 * j + lane];
                        sum = turn == 0 ? acc[j][probe] : sum + acc[j][probe];
                    }
                }
            }
            __syncthreads();
        }
        for (int i = static_cast<int>(threadIdx.x); i < probes * 32 * kColumns; i += kThreads) {
            const std::int64_t c = column + i % (32 * kColumns);
            if (c < given.rank) {
                z[i / (32 * kColumns) * given.rank + c] =
                    sums[i / (32 * kColumns)][i % (32 * kColumns)] * static_cast<T>(w[c]);
            }
        }
    }
    __syncthreads();

    T norm = 0;  // of probe `lane % kProbes`, over the rows that are this lane's in the end
    for (std::int64_t row = warp * kRows; row < given.width; row += kWarps * kRows) {
        T dot[kRows * kProbes] = {};
        for (std::int64_t c = lane; c < given.rank; c += 32) {
            T entry[kRows];
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                entry[i] = row + i < given.width ? u[(row + i) * given.vectors_row + c] : T(0);
            }
#pragma unroll
            for (int probe = 0; probe < kProbes; ++probe) {
                const T weight = probe < probes ? z[probe * given.rank + c] : T(0);
#pragma unroll
                for (int i = 0; i < kRows; ++i) dot[i * kProbes + probe] += weight * entry[i];
            }
        }
        // 32 sums over 32 lanes: each exchange halves how many are left, lane n ends with the n-th.
#pragma unroll
        for (int turn = 0; turn < 5; ++turn) {
            const int half = 16 >> turn;
            const bool upper = (lane & half) != 0;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                if (i >= half) continue;
                const T kept = upper ? dot[i + half] : dot[i];
                const T sent = upper ? dot[i] : dot[i + half];
                dot[i] = kept + __shfl_xor_sync(kAll, sent, half);
            }
        }
        norm += dot[0] < 0 ? -dot[0] : dot[0];
    }
#pragma unroll
    for (int half = kProbes; half < 32; half *= 2) norm += __shfl_xor_sync(kAll, norm, half);
    if (lane < kProbes) sums[lane][warp] = norm;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < probes) {
        T total = 0;
        for (int i = 0; i < kWarps; ++i) total += sums[threadIdx.x][i];
        given.result[item * given.count + first + threadIdx.x] = total;
    }
}

template <class T>
void norms_of(Where where, const Factors& factors, std::int64_t outer, std::int64_t tokens,
              std::int64_t width, std::int64_t rank, std::uint64_t seed, std::uintptr_t samples,
              std::int64_t count, std::uintptr_t workspace, std::uintptr_t result) {
    const Arguments<T> given{reinterpret_cast<const T*>(factors.vectors),
                             factors.vectors_outer,
                             factors.vectors_token,
                             factors.vectors_row,
                             reinterpret_cast<const double*>(factors.values),
                             factors.values_outer,
                             factors.values_token,
                             tokens,
                             width,
                             rank,
                             count,
                             seed,
                             reinterpret_cast<const std::int64_t*>(samples),
                             reinterpret_cast<T*>(workspace),
                             reinterpret_cast<T*>(result)};
    const std::int64_t groups = (count + kProbes - 1) / kProbes;
    launch("block_norms", norms<T>, where.device, where.stream, outer * tokens * groups, kThreads,
           given);
}

}  // namespace

void block_norms(Where where, bool is_double, Factors factors, std::int64_t outer, std::int64_t tokens,
                 std::int64_t width, std::int64_t rank, std::uint64_t seed, std::uintptr_t samples,
                 std::int64_t count, std::uintptr_t workspace, std::uintptr_t result) {
    (is_double ? norms_of<double> : norms_of<float>)(
        where, factors, outer, tokens, width, rank, seed, samples, count, workspace, result);
}

}  // namespace heat::cuda
