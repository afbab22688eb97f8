#include "parallel.h"

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace heat {
namespace {

// The entry point of GNU's runtime; its signature has been stable since GCC 4.9.
using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);

Region find_region() {
#if defined(__linux__)
    const char* path = nullptr;
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* found) {
            if (info->dlpi_name != nullptr && std::strstr(info->dlpi_name, "libgomp") != nullptr) {
                *static_cast<const char**>(found) = info->dlpi_name;
                return 1;
            }
            return 0;
        },
        &path);
    if (path != nullptr) {
        if (void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD)) {
            return reinterpret_cast<Region>(dlsym(library, "GOMP_parallel"));
        }
    }
#endif
    return nullptr;
}

// Looked up at the first use, when torch and with it the runtime are loaded.
Region region() {
    static const Region found = find_region();
    return found;
}

struct Loop {
    std::atomic<std::int64_t> next{0};
    std::atomic<int> workers{0};
    std::int64_t count;
    void (*body)(void*, std::int64_t, int);
    void* context;
};

void work(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    const int worker = loop.workers.fetch_add(1);
    for (std::int64_t item; (item = loop.next.fetch_add(1)) < loop.count;) {
        loop.body(loop.context, item, worker);
    }
}

}  // namespace

void parallel_items(std::int64_t count, int threads, void (*body)(void*, std::int64_t, int),
                    void* context) {
    if (threads > count) {
        threads = static_cast<int>(count);
    }
    if (threads <= 1) {
        for (std::int64_t item = 0; item < count; ++item) {
            body(context, item, 0);
        }
        return;
    }
    Loop loop;
    loop.count = count;
    loop.body = body;
    loop.context = context;
    if (Region run = region()) {
        run(work, &loop, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int index = 1; index < threads; ++index) {
        others.emplace_back(work, &loop);
    }
    work(&loop);
    for (std::thread& other : others) {
        other.join();
    }
}

const char* parallel_backend() {
    return region() != nullptr ? "OpenMP of the process" : "threads started per loop";
}

}  // namespace heat
