// Means over the windows that hold a token, in the order of the windows: a gather, no atomics.
//
// A window holds tokens [0, sink), [start, start + body), [tokens - tail, tokens), in this order.

#include "kernels.h"
#include "launch.h"

namespace heat::cuda {
namespace {

struct Layout {
    std::int64_t windows, rows, tokens, sink, body, tail;
};

template <class T>
__global__ void mean(const T* values, const std::int64_t* starts, const bool* counted, T* result,
                     Layout layout) {
    const std::int64_t number = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (number >= layout.rows * layout.tokens) return;
    const std::int64_t row = number / layout.tokens, token = number % layout.tokens;
    const std::int64_t length = layout.sink + layout.body + layout.tail;
    T total = 0, count = 0;
    for (std::int64_t window = 0; window < layout.windows; ++window) {
        std::int64_t place;
        if (token < layout.sink) {
            place = token;
        } else if (token >= layout.tokens - layout.tail) {
            place = token - layout.tokens + length;
        } else {
            const std::int64_t within = token - starts[window];
            if (within < 0 || within >= layout.body) continue;
            place = layout.sink + within;
        }
        total += values[(window * layout.rows + row) * length + place];
        count += counted == nullptr || counted[window * length + place] ? T(1) : T(0);
    }
    result[number] = total / (count > 1 ? count : T(1));
}

template <class T>
void mean_of(Where where, std::uintptr_t values, std::uintptr_t starts, std::uintptr_t counted,
             std::uintptr_t result, const Layout& layout) {
    launch("window_mean", mean<T>, where.device, where.stream,
           (layout.rows * layout.tokens + 127) / 128, 128, reinterpret_cast<const T*>(values),
           reinterpret_cast<const std::int64_t*>(starts), reinterpret_cast<const bool*>(counted),
           reinterpret_cast<T*>(result), layout);
}

}  // namespace

void window_mean(Where where, bool is_double, std::uintptr_t values, std::uintptr_t starts,
                 std::uintptr_t counted, std::int64_t windows, std::int64_t rows,
                 std::int64_t tokens, std::int64_t sink, std::int64_t body, std::int64_t tail,
                 std::uintptr_t result) {
    (is_double ? mean_of<double> : mean_of<float>)(where, values, starts, counted, result,
                                                   {windows, rows, tokens, sink, body, tail});
}

}  // namespace heat::cuda
