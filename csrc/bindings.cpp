// The Python module heat_fast._native: checks arguments, allocates through Python, releases the GIL.
//
// An array arrives as (address, shape, strides) of a tensor, or None. Workspaces are allocated by
// the `allocate(count)` that the caller passes, so that they count in torch's memory; it returns the
// address of `count` numbers. No function keeps an address. Sizes that do not fit together raise
// ValueError before anything is computed.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "instruction_sets.h"
#include "parallel.h"

namespace py = pybind11;

namespace heat {

namespace {

const std::vector<InstructionSet>& sets() {
    static const std::vector<InstructionSet> all = runnable();
    return all;
}

std::size_t chosen = 0;  // read and written under the GIL

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
    return sets()[chosen].of_float;
}
template <>
const Kernels<double>& kernels<double>() {
    return sets()[chosen].of_double;
}

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

std::string list(const std::int64_t* values, int count) {
    std::string text = "[";
    for (int index = 0; index < count; ++index) {
        text += (index ? ", " : "") + std::to_string(values[index]);
    }
    return text + "]";
}

// An argument, checked against the shape it must have.
Array strided(const char* name, const py::object& given, std::initializer_list<std::int64_t> shape,
              bool optional = false) {
    Array result;
    if (given.is_none()) {
        if (!optional) {
            fail(std::string(name) + " is None: expected an array");
        }
        return result;
    }
    const auto parts = given.cast<py::tuple>();
    if (parts.size() != 3) {
        fail(std::string(name) + ": expected (address, shape, strides)");
    }
    const auto sizes = parts[1].cast<std::vector<std::int64_t>>();
    const auto strides = parts[2].cast<std::vector<std::int64_t>>();
    if (sizes.size() != shape.size() || strides.size() != shape.size() ||
        !std::equal(sizes.begin(), sizes.end(), shape.begin())) {
        fail(std::string(name) + " has shape " + list(sizes.data(), int(sizes.size())) +
             ": expected " + list(shape.begin(), int(shape.size())));
    }
    result.dims = static_cast<int>(sizes.size());
    std::int64_t numbers = 1;
    for (int dim = 0; dim < result.dims; ++dim) {
        result.shape[dim] = sizes[dim];
        result.stride[dim] = strides[dim];
        numbers *= sizes[dim];
        if (strides[dim] < 0) {
            fail(std::string(name) + " has a negative stride");
        }
    }
    result.data = reinterpret_cast<void*>(parts[0].cast<std::uintptr_t>());
    if (result.data == nullptr && numbers > 0) {
        fail(std::string(name) + " has no memory");
    }
    return result;
}

// The same for one whose last dimension must be contiguous.
Array array(const char* name, const py::object& given, std::initializer_list<std::int64_t> shape,
            bool optional = false) {
    const Array result = strided(name, given, shape, optional);
    const int last = result.dims - 1;
    if (last >= 0 && result.shape[last] > 1 && result.stride[last] != 1) {
        fail(std::string(name) + " is not contiguous in its last dimension");
    }
    return result;
}

std::vector<std::int64_t> shape_of(const char* name, const py::object& given, std::size_t dims) {
    if (!py::isinstance<py::tuple>(given) || given.cast<py::tuple>().size() != 3) {
        fail(std::string(name) + ": expected (address, shape, strides)");
    }
    auto shape = given.cast<py::tuple>()[1].cast<std::vector<std::int64_t>>();
    if (shape.size() != dims) {
        fail(std::string(name) + " has " + std::to_string(shape.size()) +
             " dimensions: expected " + std::to_string(dims));
    }
    for (const std::int64_t size : shape) {
        if (size < 1) {
            fail(std::string(name) + " is empty");
        }
    }
    return shape;
}

Masking masking(double scale, std::int64_t window, double softcap) {
    if (window < 0 || !(softcap >= 0)) {
        fail("window and softcap must not be negative");
    }
    return {scale, window, softcap};
}

int thread_count(int threads) {
    if (threads < 1) {
        fail("threads must be at least 1");
    }
    return threads;
}

template <class T>
void check_depth(std::int64_t depth) {
    if (depth % kernels<T>().lanes != 0) {
        fail("head dimension " + std::to_string(depth) + ": expected a multiple of " +
             std::to_string(kernels<T>().lanes));
    }
}

// Ask Python for the workspace and run with the GIL released.
template <class Call, class Result>
Result run(Call& call, std::int64_t (*size)(const Call&), Result (*kernel)(const Call&),
           const py::function& allocate) {
    call.workspace = reinterpret_cast<void*>(allocate(size(call)).template cast<std::uintptr_t>());
    py::gil_scoped_release released;
    return kernel(call);
}

template <class Call>
void run(const Call& call, void (*kernel)(const Call&)) {
    py::gil_scoped_release released;
    kernel(call);
}

template <class T>
void branch_attention(py::object query, py::object key, py::object value, py::object prefix_key,
                      py::object prefix_value, py::object output, py::object normaliser,
                      double scale, std::int64_t window, double softcap, py::function allocate,
                      int threads) {
    const auto q = shape_of("query", query, 5);
    const auto k = shape_of("key", key, 4);
    const std::int64_t heads = q[0], batch = q[1], group = q[2], queries = q[3], depth = q[4];
    const std::int64_t own = k[2];
    const std::int64_t start =
        prefix_key.is_none() ? 0 : shape_of("prefix_key", prefix_key, 3)[1];
    if (queries > own) {
        fail("more queries than keys of their own");
    }
    check_depth<T>(depth);
    BranchAttention call;
    call.query = array("query", query, {heads, batch, group, queries, depth});
    call.key = array("key", key, {heads, batch, own, depth});
    call.value = array("value", value, {heads, batch, own, depth});
    call.prefix_key = array("prefix_key", prefix_key, {heads, start, depth}, true);
    call.prefix_value = array("prefix_value", prefix_value, {heads, start, depth}, true);
    if (start == 0) {
        call.prefix_key.shape[1] = 0;
    } else if (call.prefix_value.data == nullptr) {
        fail("prefix_value is None: expected an array beside prefix_key");
    }
    call.output = array("output", output, {heads, batch, group, queries, depth});
    call.normaliser = array("normaliser", normaliser, {heads, batch, group, queries});
    call.masking = masking(scale, window, softcap);
    call.threads = thread_count(threads);
    const Kernels<T>& set = kernels<T>();
    run(call, set.branch_attention_workspace, set.branch_attention, allocate);
}

// (query, key, value, normaliser, output) of the trunk.
template <class T>
Primal primal(const py::tuple& given, std::int64_t start, double scale, std::int64_t window,
              double softcap) {
    if (given.size() != 5) {
        fail("primal: expected (query, key, value, normaliser, output)");
    }
    const auto q = shape_of("primal query", given[0], 4);
    const auto k = shape_of("primal key", given[1], 3);
    const std::int64_t heads = q[0], group = q[1], queries = q[2], depth = q[3], stop = k[1];
    if (start < 0 || start + queries > stop) {
        fail("start " + std::to_string(start) + " with " + std::to_string(queries) +
             " queries and " + std::to_string(stop) + " keys: expected the queries from start on");
    }
    check_depth<T>(depth);
    Primal result;
    result.query = array("primal query", given[0], {heads, group, queries, depth});
    result.key = array("primal key", given[1], {heads, stop, depth});
    result.value = array("primal value", given[2], {heads, stop, depth});
    result.normaliser = array("primal normaliser", given[3], {heads, group, queries});
    result.output = array("primal output", given[4], {heads, group, queries, depth});
    result.start = start;
    result.masking = masking(scale, window, softcap);
    return result;
}

template <class T>
void attention_tangent(py::tuple trunk, std::int64_t start, double scale, std::int64_t window,
                       double softcap, py::object query, py::object key, py::object value,
                       py::object output, py::function allocate, int threads) {
    AttentionTangent call;
    call.primal = primal<T>(trunk, start, scale, window, softcap);
    const Array& q = call.primal.query;
    const std::int64_t heads = q.shape[0], group = q.shape[1], queries = q.shape[2];
    const std::int64_t depth = q.shape[3], own = call.primal.key.shape[1] - start;
    const std::int64_t batch = shape_of("query", query, 5)[1];
    call.query = array("query", query, {heads, batch, group, queries, depth});
    call.key = array("key", key, {heads, batch, own, depth});
    call.value = array("value", value, {heads, batch, own, depth});
    call.output = array("output", output, {heads, batch, group, queries, depth});
    call.threads = thread_count(threads);
    const Kernels<T>& set = kernels<T>();
    run(call, set.attention_tangent_workspace, set.attention_tangent, allocate);
}

template <class T>
void attention_adjoint_tangent(py::tuple trunk, std::int64_t start, double scale,
                               std::int64_t window, double softcap, py::tuple tangents,
                               py::object output_bar, py::object output_bar_dot,
                               py::tuple results, py::function allocate, int threads) {
    if (tangents.size() != 4 || results.size() != 3) {
        fail("expected tangents (query, key, value, output) and results (query, key, value)");
    }
    AttentionAdjointTangent call;
    call.primal = primal<T>(trunk, start, scale, window, softcap);
    const Array& q = call.primal.query;
    const std::int64_t heads = q.shape[0], group = q.shape[1], queries = q.shape[2];
    const std::int64_t depth = q.shape[3], own = call.primal.key.shape[1] - start;
    const std::int64_t batch = shape_of("query", tangents[0], 5)[1];
    call.query = array("query", tangents[0], {heads, batch, group, queries, depth});
    call.key = array("key", tangents[1], {heads, batch, own, depth});
    call.value = array("value", tangents[2], {heads, batch, own, depth});
    call.output = array("output", tangents[3], {heads, batch, group, queries, depth});
    call.output_bar = array("output_bar", output_bar, {heads, group, queries, depth});
    call.output_bar_dot =
        array("output_bar_dot", output_bar_dot, {heads, batch, group, queries, depth});
    call.query_result = array("query result", results[0], {heads, batch, group, queries, depth});
    call.key_result = array("key result", results[1], {heads, batch, own, depth});
    call.value_result = array("value result", results[2], {heads, batch, own, depth});
    call.threads = thread_count(threads);
    const Kernels<T>& set = kernels<T>();
    run(call, set.attention_adjoint_tangent_workspace, set.attention_adjoint_tangent, allocate);
}

Norm norm(py::object weight, py::object bias, double offset, double eps, bool centered,
          int threads, std::int64_t width) {
    Norm result;
    result.weight = array("weight", weight, {width}, true);
    result.bias = array("bias", bias, {width}, true);
    result.weight_offset = offset;
    result.eps = eps;
    result.centered = centered;
    result.threads = thread_count(threads);
    return result;
}

template <class T>
void norm_forward(py::object weight, py::object bias, double offset, double eps, bool centered,
                  py::object x, py::object y, py::object normalised, py::object inverse,
                  int threads) {
    const auto size = shape_of("x", x, 3);
    NormForward call;
    call.norm = norm(weight, bias, offset, eps, centered, threads, size[2]);
    call.x = array("x", x, {size[0], size[1], size[2]});
    call.y = array("y", y, {size[0], size[1], size[2]});
    call.normalised = array("normalised", normalised, {size[0], size[1], size[2]}, true);
    call.inverse =
        array("inverse", inverse, {size[0], size[1]}, call.normalised.data == nullptr);
    run(call, kernels<T>().norm_forward);
}

template <class T>
void norm_tangent(py::object weight, double offset, bool centered, py::object normalised,
                  py::object inverse, py::object x_dot, py::object y_dot, int threads) {
    const auto size = shape_of("x_dot", x_dot, 3);
    NormTangent call;
    call.norm = norm(weight, py::none(), offset, 0, centered, threads, size[2]);
    call.normalised = array("normalised", normalised, {size[1], size[2]});
    call.inverse = array("inverse", inverse, {size[1]});
    call.x_dot = array("x_dot", x_dot, {size[0], size[1], size[2]});
    call.y_dot = array("y_dot", y_dot, {size[0], size[1], size[2]});
    run(call, kernels<T>().norm_tangent);
}

template <class T>
void norm_adjoint_tangent(py::object weight, double offset, bool centered, py::object normalised,
                          py::object inverse, py::object pulled, py::object along,
                          py::object x_dot, py::object y_bar_dot, py::object result,
                          int threads) {
    const auto size = shape_of("x_dot", x_dot, 3);
    NormAdjointTangent call;
    call.norm = norm(weight, py::none(), offset, 0, centered, threads, size[2]);
    call.normalised = array("normalised", normalised, {size[1], size[2]});
    call.inverse = array("inverse", inverse, {size[1]});
    call.pulled = array("pulled", pulled, {size[1], size[2]});
    call.along = array("along", along, {size[1]});
    call.x_dot = array("x_dot", x_dot, {size[0], size[1], size[2]});
    call.y_bar_dot = array("y_bar_dot", y_bar_dot, {size[0], size[1], size[2]});
    call.result = array("result", result, {size[0], size[1], size[2]});
    run(call, kernels<T>().norm_adjoint_tangent);
}

template <class T>
void rotate(py::object x, py::object y, py::object cos, py::object sin, double sign,
            bool interleaved, int threads) {
    const auto size = shape_of("x", x, 4);
    Rotation call;
    call.x = array("x", x, {size[0], size[1], size[2], size[3]});
    call.y = array("y", y, {size[0], size[1], size[2], size[3]});
    if (!cos.is_none()) {
        const std::int64_t turned = shape_of("cos", cos, 2)[1];
        if (turned > size[3] || turned % 2 != 0) {
            fail("cos is wider than a head, or of odd width");
        }
        call.cos = array("cos", cos, {size[1], turned});
        call.sin = array("sin", sin, {size[1], turned});
    }
    call.sign = sign;
    call.interleaved = interleaved;
    call.threads = thread_count(threads);
    run(call, kernels<T>().rotate);
}

template <class T>
void gate_tangent(py::object value, py::object slope, py::object gate, py::object up,
                  py::object result, int threads) {
    const auto size = shape_of("gate", gate, 3);
    GateTangent call;
    call.value = array("value", value, {size[1], size[2]});
    call.slope = array("slope", slope, {size[1], size[2]});
    call.gate = array("gate", gate, {size[0], size[1], size[2]});
    call.up = array("up", up, {size[0], size[1], size[2]});
    call.result = array("result", result, {size[0], size[1], size[2]});
    call.threads = thread_count(threads);
    run(call, kernels<T>().gate_tangent);
}

template <class T>
void gate_adjoint_tangent(py::object value, py::object slope, py::object bend, py::object mixed,
                          py::object gate, py::object up, py::object hidden,
                          py::object gate_result, py::object up_result, int threads) {
    const auto size = shape_of("gate", gate, 3);
    GateAdjointTangent call;
    call.value = array("value", value, {size[1], size[2]});
    call.slope = array("slope", slope, {size[1], size[2]});
    call.bend = array("bend", bend, {size[1], size[2]});
    call.mixed = array("mixed", mixed, {size[1], size[2]});
    call.gate = array("gate", gate, {size[0], size[1], size[2]});
    call.up = array("up", up, {size[0], size[1], size[2]});
    call.hidden = array("hidden", hidden, {size[0], size[1], size[2]});
    call.gate_result = array("gate_result", gate_result, {size[0], size[1], size[2]});
    call.up_result = array("up_result", up_result, {size[0], size[1], size[2]});
    call.threads = thread_count(threads);
    run(call, kernels<T>().gate_adjoint_tangent);
}

// Below, what is returned tells how it went: "" or the reason why there is no result.
const char* reason(Outcome outcome) {
    return outcome == Outcome::done ? "" : outcome == Outcome::not_finite ? "not finite" : "range";
}

template <class T>
void gram(py::object left, py::object right, py::object result, py::function allocate,
          int threads) {
    const auto size = shape_of("left", left, 3);
    const std::int64_t others = shape_of("right", right, 3)[2];
    Gram call;
    call.left = strided("left", left, {size[0], size[1], size[2]});
    call.right = strided("right", right, {size[0], size[1], others});
    call.result = array("result", result, {size[0], size[2], others});
    call.threads = thread_count(threads);
    run(call, kernels<T>().gram_workspace, kernels<T>().gram, allocate);
}

template <class T>
void combine(py::object tall, py::object small, py::object result, py::function allocate,
             int threads) {
    const auto size = shape_of("tall", tall, 3);
    const std::int64_t columns = shape_of("small", small, 3)[2];
    Combine call;
    call.tall = strided("tall", tall, {size[0], size[1], size[2]});
    call.small = array("small", small, {size[0], size[2], columns});
    call.result = array("result", result, {size[0], size[1], columns});
    call.threads = thread_count(threads);
    run(call, kernels<T>().combine_workspace, kernels<T>().combine, allocate);
}

template <class T>
const char* orthonormalise(py::object matrix, py::object frame, py::object triangle,
                           py::function allocate, int threads) {
    const auto size = shape_of("matrix", matrix, 3);
    if (size[2] > size[1]) {
        fail("matrix has more columns than rows");
    }
    Orthonormalise call;
    call.matrix = strided("matrix", matrix, {size[0], size[1], size[2]});
    call.frame = array("frame", frame, {size[0], size[1], size[2]});
    call.triangle = array("triangle", triangle, {size[0], size[2], size[2]});
    call.threads = thread_count(threads);
    return reason(
        run(call, kernels<T>().orthonormalise_workspace, kernels<T>().orthonormalise, allocate));
}

// Arguments `vectors [B,M,k]` and `values [B,k]`: k at most what the test vectors can carry.
std::int64_t rank_of(const py::object& vectors, const std::vector<std::int64_t>& images) {
    const std::int64_t rank = shape_of("vectors", vectors, 3)[2];
    if (rank > images[1] || rank > images[2]) {
        fail("rank " + std::to_string(rank) + " is above the rows or the columns of the images");
    }
    return rank;
}

template <class T>
const char* single_pass(py::object tests, py::object images, py::object vectors,
                        py::object values, double precision, py::function allocate,
                        int threads) {
    const auto size = shape_of("images", images, 3);
    const std::int64_t rank = rank_of(vectors, size);
    SinglePass call;
    call.tests = strided("tests", tests, {size[0], size[1], size[2]});
    call.images = strided("images", images, {size[0], size[1], size[2]});
    call.vectors = array("vectors", vectors, {size[0], size[1], rank});
    call.values = array("values", values, {size[0], rank});
    call.precision = precision;
    call.threads = thread_count(threads);
    return reason(
        run(call, kernels<T>().single_pass_workspace, kernels<T>().single_pass, allocate));
}

template <class T>
const char* second_pass(py::object frame, py::object images, py::object vectors,
                        py::object values, py::function allocate, int threads) {
    const auto size = shape_of("images", images, 3);
    const std::int64_t rank = rank_of(vectors, size);
    SecondPass call;
    call.frame = strided("frame", frame, {size[0], size[1], size[2]});
    call.images = strided("images", images, {size[0], size[1], size[2]});
    call.vectors = array("vectors", vectors, {size[0], size[1], rank});
    call.values = array("values", values, {size[0], rank});
    call.threads = thread_count(threads);
    return reason(
        run(call, kernels<T>().second_pass_workspace, kernels<T>().second_pass, allocate));
}

const char* symmetric_eigen(py::object matrix, py::object values, py::object vectors,
                            py::function allocate, int threads) {
    const auto size = shape_of("matrix", matrix, 3);
    SymmetricEigen call;
    call.matrix = array("matrix", matrix, {size[0], size[1], size[1]});
    call.values = array("values", values, {size[0], size[1]});
    call.vectors = array("vectors", vectors, {size[0], size[1], size[1]});
    call.threads = thread_count(threads);
    const auto& set = kernels<double>();
    return reason(run(call, set.symmetric_eigen_workspace, set.symmetric_eigen, allocate));
}

template <class T>
void block_norms(py::object vectors, py::object values, std::uint64_t seed, py::object samples,
                 py::object norms, py::function allocate, int threads) {
    const auto size = shape_of("vectors", vectors, 4);
    const std::int64_t probes = shape_of("samples", samples, 1)[0];
    BlockNorms call;
    call.vectors = strided("vectors", vectors, {size[0], size[1], size[2], size[3]});
    call.values = strided("values", values, {size[0], size[1], size[3]});
    call.samples = array("samples", samples, {probes});
    call.norms = array("norms", norms, {size[0], size[1], probes});
    call.seed = seed;
    call.threads = thread_count(threads);
    run(call, kernels<T>().block_norms_workspace, kernels<T>().block_norms, allocate);
}

template <class T>
void window_mean(py::object rows, py::object index, py::object counted, py::object mean,
                 py::function allocate, int threads) {
    const auto size = shape_of("rows", rows, 3);
    const std::int64_t tokens = shape_of("mean", mean, 2)[1];
    WindowMean call;
    call.rows = array("rows", rows, {size[0], size[1], size[2]});
    call.index = array("index", index, {size[0], size[2]});
    call.counted = array("counted", counted, {size[0], size[2]}, true);
    call.mean = array("mean", mean, {size[1], tokens});
    call.threads = thread_count(threads);
    for (std::int64_t window = 0; window < size[0]; ++window) {
        for (std::int64_t i = 0; i < size[2]; ++i) {
            const std::int64_t token = *call.index.at<std::int64_t>(window, i);
            if (token < 0 || token >= tokens) {
                fail("index holds " + std::to_string(token) + ": expected 0.." +
                     std::to_string(tokens - 1));
            }
        }
    }
    run(call, kernels<T>().window_mean_workspace, kernels<T>().window_mean, allocate);
}

// The operations for one type of number, under the name of the submodule.
template <class T>
void define(py::module_& module) {
    module.def("lanes", [] { return kernels<T>().lanes; },
               "Numbers per vector; head dimensions must be a multiple.");
    module.def("branch_attention", &branch_attention<T>);
    module.def("attention_tangent", &attention_tangent<T>);
    module.def("attention_adjoint_tangent", &attention_adjoint_tangent<T>);
    module.def("norm_forward", &norm_forward<T>);
    module.def("norm_tangent", &norm_tangent<T>);
    module.def("norm_adjoint_tangent", &norm_adjoint_tangent<T>);
    module.def("rotate", &rotate<T>);
    module.def("gate_tangent", &gate_tangent<T>);
    module.def("gate_adjoint_tangent", &gate_adjoint_tangent<T>);
    module.def("gram", &gram<T>);
    module.def("combine", &combine<T>);
    module.def("orthonormalise", &orthonormalise<T>);
    module.def("single_pass", &single_pass<T>);
    module.def("second_pass", &second_pass<T>);
    module.def("block_norms", &block_norms<T>);
    module.def("window_mean", &window_mean<T>);
}

}  // namespace
}  // namespace heat

PYBIND11_MODULE(_native, module) {
    using namespace heat;
    module.doc() = "Compiled kernels of heat_fast for the CPU; see heat_fast/native.py.";
    auto of_float = module.def_submodule("float32");
    auto of_double = module.def_submodule("float64");
    define<float>(of_float);
    define<double>(of_double);
    of_double.def("symmetric_eigen", &symmetric_eigen);
    module.def(
        "instruction_sets",
        [] {
            std::vector<std::string> names;
            for (const auto& set : sets()) {
                names.emplace_back(set.name);
            }
            return names;
        },
        "The instruction sets that this processor runs, the widest first.");
    module.def("instruction_set", [] { return std::string(sets()[chosen].name); },
               "The instruction set in use.");
    module.def(
        "use_instruction_set",
        [](const std::string& name) {
            for (std::size_t index = 0; index < sets().size(); ++index) {
                if (name == sets()[index].name) {
                    chosen = index;
                    return;
                }
            }
            fail("instruction set '" + name + "' is not available on this processor");
        },
        "Choose one of instruction_sets().");
    module.def("threads", [] { return std::string(parallel_backend()); },
               "Whose threads run the loops.");
    module.attr("compiler") = __VERSION__;
}
