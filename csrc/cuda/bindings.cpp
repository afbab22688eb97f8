// The Python module heat_fast._cuda: checks arguments and launches.
//
// An array arrives as (address, bytes of a number, shape, strides) of a tensor on the device that is
// named beside the stream. Workspaces and results are tensors of the caller. Nothing is kept, nothing
// is waited for. What does not fit together raises ValueError, a launch that fails RuntimeError;
// heat_fast/kernels/*/cuda.py are the only callers, and addresses are trusted.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace heat::cuda {
namespace {

using Sizes = std::vector<std::int64_t>;

std::string text(const Sizes& sizes) {
    std::string joined = "[";
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        joined += (i ? ", " : "") + std::to_string(sizes[i]);
    }
    return joined + "]";
}

struct Array {
    std::string name;
    std::uintptr_t data;
    int bytes;
    Sizes shape, strides;

    Array(std::string called, const py::tuple& given) : name(std::move(called)) {
        data = given[0].cast<std::uintptr_t>();
        bytes = given[1].cast<int>();
        shape = given[2].cast<Sizes>();
        strides = given[3].cast<Sizes>();
        if (shape.size() != strides.size()) refuse("as many strides as sizes");
        for (std::int64_t size : shape) {
            if (size < 1) refuse("no empty dimension");
        }
    }
    [[noreturn]] void refuse(const std::string& expected) const {
        throw std::invalid_argument(name + " of shape " + text(shape) + ", strides " +
                                    text(strides) + " and " + std::to_string(bytes) +
                                    " bytes a number: expected " + expected + ".");
    }
    const Array& of(const Sizes& expected) const {
        if (shape != expected) refuse("shape " + text(expected));
        return *this;
    }
    const Array& rank(std::size_t dimensions) const {
        if (shape.size() != dimensions) refuse(std::to_string(dimensions) + " dimensions");
        return *this;
    }
    const Array& number(int size) const {
        if (bytes != size) refuse(std::to_string(size) + " bytes a number");
        return *this;
    }
    const Array& floating() const {
        if (bytes != 4 && bytes != 8) refuse("float32 or float64");
        return *this;
    }
    const Array& contiguous() const {
        std::int64_t stride = 1;
        for (std::size_t i = shape.size(); i-- > 0; stride *= shape[i]) {
            if (shape[i] > 1 && strides[i] != stride) refuse("contiguous numbers");
        }
        return *this;
    }
    const Array& rows() const {
        if (shape.back() > 1 && strides.back() != 1) refuse("a last stride of 1");
        return *this;
    }
    bool is_double() const { return bytes == 8; }
    Matrices matrices() const {
        return {data, strides[0], strides[1], strides[2], strides[3]};
    }
};

// A grid has at most 2^31 - 1 blocks.
void fits(const char* what, std::int64_t blocks) {
    if (blocks > 0x7fffffff) {
        throw std::invalid_argument(std::string(what) + " of " + std::to_string(blocks) +
                                    " blocks: expected fewer than 2^31. Split the batch.");
    }
}

void bind_gram(int device, std::uintptr_t stream, const py::tuple& left, const py::tuple& right,
               bool symmetric, const py::tuple& partial, std::int64_t rows_each,
               const py::tuple& result) {
    const Array a("left", left), b("right", right), sums("partial", partial), out("result", result);
    a.rank(4).floating();
    b.rank(4).number(a.bytes).of({a.shape[0], a.shape[1], a.shape[2], b.shape[3]});
    const std::int64_t rows = a.shape[2], chunks = sums.rank(5).shape[2];
    sums.of({a.shape[0], a.shape[1], chunks, a.shape[3], b.shape[3]}).number(8).contiguous();
    out.of({a.shape[0], a.shape[1], a.shape[3], b.shape[3]}).number(8).contiguous();
    if (rows_each < 1 || rows_each >= std::int64_t(1) << 30 || (chunks - 1) * rows_each >= rows ||
        chunks * rows_each < rows) {
        a.refuse("its rows in " + std::to_string(chunks) + " chunks of " +
                 std::to_string(rows_each));
    }
    if (symmetric && (a.data != b.data || a.bytes != b.bytes || a.shape != b.shape ||
                      a.strides != b.strides)) {
        b.refuse("the left matrix itself");
    }
    const std::int64_t tiles =
        ((a.shape[3] + kTile - 1) / kTile) * ((b.shape[3] + kTile - 1) / kTile);
    fits("gram", a.shape[0] * a.shape[1] * chunks * tiles);
    gram({device, stream}, a.is_double(), a.matrices(), b.matrices(), symmetric, a.shape[0], a.shape[1], rows,
         a.shape[3], b.shape[3], chunks, rows_each, sums.data, out.data);
}

void bind_combine(int device, std::uintptr_t stream, const py::tuple& tall, const py::tuple& small,
                  const py::tuple& result) {
    const Array a("tall", tall), b("small", small), out("result", result);
    a.rank(4).floating();
    b.rank(4).number(8).of({a.shape[0], a.shape[1], a.shape[3], b.shape[3]});
    out.of({a.shape[0], a.shape[1], a.shape[2], b.shape[3]}).number(a.bytes).contiguous();
    if (a.shape[3] >= std::int64_t(1) << 30) a.refuse("fewer than 2^30 columns");
    fits("combine", a.shape[0] * a.shape[1] * ((a.shape[2] + kTile - 1) / kTile) *
                        ((b.shape[3] + kTile - 1) / kTile));
    combine({device, stream}, a.is_double(), a.matrices(), b.matrices(), a.shape[0], a.shape[1], a.shape[2],
            a.shape[3], b.shape[3], out.data);
}

void bind_block_norms(int device, std::uintptr_t stream, const py::tuple& vectors,
                      const py::tuple& values, std::uint64_t seed, const py::tuple& samples,
                      const py::tuple& workspace, const py::tuple& result) {
    const Array u("vectors", vectors), w("values", values), probes("samples", samples);
    const Array space("workspace", workspace), out("result", result);
    u.rank(4).floating().rows();
    w.number(8).of({u.shape[0], u.shape[1], u.shape[3]}).rows();
    probes.rank(1).number(8).contiguous();
    const std::int64_t count = probes.shape[0];
    space.of({u.shape[0], u.shape[1], count, u.shape[3]}).number(u.bytes).contiguous();
    out.of({u.shape[0], u.shape[1], count}).number(u.bytes).contiguous();
    fits("block_norms", u.shape[0] * u.shape[1] * ((count + 7) / 8));
    block_norms({device, stream}, u.is_double(),
                {u.data, u.strides[0], u.strides[1], u.strides[2], w.data,
                 w.strides[0], w.strides[1]},
                u.shape[0], u.shape[1], u.shape[2], u.shape[3], seed, probes.data, count,
                space.data, out.data);
}

void bind_window_mean(int device, std::uintptr_t stream, const py::tuple& values,
                      const py::tuple& places, const py::object& counted,
                      const py::tuple& result) {
    const Array in("values", values), where("places", places), out("result", result);
    in.rank(3).floating().contiguous();
    out.rank(2).of({in.shape[1], out.shape[1]}).number(in.bytes).contiguous();
    where.of({in.shape[0], out.shape[1]}).number(8).contiguous();
    std::uintptr_t mask = 0;
    if (!counted.is_none()) {
        const Array given("counted", counted.cast<py::tuple>());
        mask = given.of({in.shape[0], in.shape[2]}).number(1).contiguous().data;
    }
    fits("window_mean", (in.shape[1] * out.shape[1] + 127) / 128);
    window_mean({device, stream}, in.is_double(), in.data, where.data, mask, in.shape[0],
                in.shape[1], out.shape[1], in.shape[2], out.data);
}

}  // namespace
}  // namespace heat::cuda

PYBIND11_MODULE(_cuda, module) {
    namespace cuda = heat::cuda;
    module.doc() = "CUDA kernels of heat_fast; see csrc/README.md.";
    module.attr("architectures") = HEAT_FAST_CUDA_ARCHS;
    module.attr("compiler") = cuda::compiler();
    module.attr("runtime") = cuda::runtime_version();
    module.attr("tile") = cuda::kTile;
    module.attr("depth") = cuda::kDepth;
    module.attr("resident") = cuda::kResident;
    module.def("gram", &cuda::bind_gram);
    module.def("combine", &cuda::bind_combine);
    module.def("block_norms", &cuda::bind_block_norms);
    module.def("window_mean", &cuda::bind_window_mean);
}
