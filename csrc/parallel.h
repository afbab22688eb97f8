// Data parallelism on the threads that torch already has.
//
// torch's matrix products run on an OpenMP team. A second pool would compete with it for the same
// cores, because OpenMP's threads spin for a while after every region. So the runtime that is
// already loaded is looked up by name and asked to run our loops; nothing is linked against it, and
// one build serves every torch. Where there is none, threads are started for the loop.
#pragma once

#include <cstdint>
#include <type_traits>

namespace heat {

// Calls body(context, item, worker) for every item in 0..count-1, on at most `threads` threads, in
// any order; `worker`, below `threads`, tells apart who runs at the same time. The body must not
// throw.
void parallel_items(std::int64_t count, int threads, void (*body)(void*, std::int64_t, int),
                    void* context);

template <class Body>
void parallel_for(std::int64_t count, int threads, Body&& body) {
    parallel_items(
        count, threads,
        [](void* context, std::int64_t item, int worker) {
            (*static_cast<std::remove_reference_t<Body>*>(context))(item, worker);
        },
        &body);
}

// "OpenMP of the process" or "threads started per loop".
const char* parallel_backend();

}  // namespace heat
