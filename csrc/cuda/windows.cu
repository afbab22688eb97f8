// Means over the windows that hold a token, in the order of the windows: a gather, no atomics.

#include "kernels.h"
#include "launch.h"

namespace heat::cuda {
namespace {

struct Layout {
    std::int64_t windows, rows, tokens, length;
};

// values [windows, rows, length]; places [windows, tokens]: where a window holds a token, or -1.
template <class T>
__global__ void mean(const T* values, const std::int64_t* places, const bool* counted, T* result,
                     Layout layout) {
    const std::int64_t number = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (number >= layout.rows * layout.tokens) return;
    const std::int64_t row = number / layout.tokens, token = number % layout.tokens;
    T total = 0, count = 0;
    for (std::int64_t window = 0; window < layout.windows; ++window) {
        const std::int64_t place = places[window * layout.tokens + token];
        if (place < 0) continue;
        total += values[(window * layout.rows + row) * layout.length + place];
        count += counted == nullptr || counted[window * layout.length + place] ? T(1) : T(0);
    }
    result[number] = total / (count > 1 ? count : T(1));
}

template <class T>
void mean_of(Where where, std::uintptr_t values, std::uintptr_t places, std::uintptr_t counted,
             std::uintptr_t result, const Layout& layout) {
    launch("window_mean", mean<T>, where.device, where.stream,
           (layout.rows * layout.tokens + 127) / 128, 128, reinterpret_cast<const T*>(values),
           reinterpret_cast<const std::int64_t*>(places), reinterpret_cast<const bool*>(counted),
           reinterpret_cast<T*>(result), layout);
}

}  // namespace

void window_mean(Where where, bool is_double, std::uintptr_t values, std::uintptr_t places,
                 std::uintptr_t counted, std::int64_t windows, std::int64_t rows,
                 std::int64_t tokens, std::int64_t length, std::uintptr_t result) {
    (is_double ? mean_of<double> : mean_of<float>)(where, values, places, counted, result,
                                                   {windows, rows, tokens, length});
}

}  // namespace heat::cuda
