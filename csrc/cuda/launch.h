// Launches of kernels, and their errors as C++ exceptions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace heat::cuda {

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(
            std::string(what) + " could not run: " + cudaGetErrorString(status) + " (CUDA error " +
            std::to_string(static_cast<int>(status)) +
            "); expected a CUDA device of an architecture that heat_fast.build_info()['cuda'] "
            "lists, and a driver that is not older than the CUDA runtime named there. Use "
            "impl='reference' without one.");
    }
}

// The static runtime keeps a current device of its own, so every launch names it.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int device, std::uintptr_t stream,
            std::int64_t blocks, int threads, Arguments... arguments) {
    if (blocks == 0) return;
    check(cudaSetDevice(device), what);
    kernel<<<static_cast<unsigned>(blocks), threads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        arguments...);
    check(cudaGetLastError(), what);
}

}  // namespace heat::cuda
