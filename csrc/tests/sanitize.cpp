// Every kernel of every instruction set that this processor runs, on odd sizes and awkward numbers,
// with buffers of exactly the size that they need: compiled with the address and the undefined
// behaviour sanitizers ("make sanitize"), it shows what reads or writes where it must not. A few
// identities are checked beside; the accuracy of the kernels is tested from Python.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <vector>

#include "../arguments.h"
#include "../instruction_sets.h"

using namespace heat;

namespace {

int failures = 0;

void check(bool good, const char* what) {
    if (!good) {
        std::printf("failed: %s\n", what);
        ++failures;
    }
}

std::uint64_t state = 1;

double draw() {  // in (-1, 1), the same in every run
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<std::int64_t>(state)) / 9223372036854775808.0;
}

// An array with memory of its own, in rows, or with the last two dimensions' strides swapped.
template <class T>
struct Owned : Array {
    std::unique_ptr<T[]> memory;
    std::int64_t numbers = 1;

    Owned(std::initializer_list<std::int64_t> sizes, bool swapped = false) {
        for (const std::int64_t size : sizes) {
            shape[dims++] = size;
        }
        for (int dim = dims - 1; dim >= 0; --dim) {
            stride[dim] = numbers;
            numbers *= shape[dim];
        }
        if (swapped) {
            stride[dims - 1] = shape[dims - 2];
            stride[dims - 2] = 1;
        }
        memory = std::make_unique<T[]>(static_cast<std::size_t>(numbers));
        data = memory.get();
        for (std::int64_t index = 0; index < numbers; ++index) {
            memory[index] = static_cast<T>(draw());
        }
    }

    bool finite() const {
        for (std::int64_t index = 0; index < numbers; ++index) {
            if (!std::isfinite(static_cast<double>(memory[index]))) {
                return false;
            }
        }
        return true;
    }
};

template <class T, class Call, class Result>
Result run(Call& call, std::int64_t (*size)(const Call&), Result (*kernel)(const Call&)) {
    const auto workspace = std::make_unique<T[]>(static_cast<std::size_t>(size(call)));
    call.workspace = workspace.get();
    return kernel(call);
}

template <class T>
void attention(const Kernels<T>& set, std::int64_t queries, std::int64_t stop, int threads) {
    const std::int64_t heads = 2, batch = 2, group = 3, depth = set.lanes;
    const std::int64_t start = stop - queries;
    for (const Masking masking : {Masking{0.3, 0, 0}, Masking{0.3, 5, 1.5}}) {
        Owned<T> query({heads, batch, group, queries, depth}), output({heads, batch, group, queries, depth});
        Owned<T> key({heads, batch, queries, depth}), value({heads, batch, queries, depth});
        Owned<T> prefix_key({heads, start, depth}), prefix_value({heads, start, depth});
        Owned<T> normaliser({heads, batch, group, queries});
        BranchAttention branch;
        branch.query = query, branch.key = key, branch.value = value;
        branch.prefix_key = prefix_key, branch.prefix_value = prefix_value;
        branch.output = output, branch.normaliser = normaliser;
        branch.masking = masking, branch.threads = threads;
        run<T>(branch, set.branch_attention_workspace, set.branch_attention);
        check(output.finite() && normaliser.finite(), "branch attention");

        Owned<T> q({heads, group, queries, depth}), k({heads, stop, depth}), v({heads, stop, depth});
        Owned<T> log_sum({heads, group, queries}), out({heads, group, queries, depth});
        Primal primal;
        primal.query = q, primal.key = k, primal.value = v;
        primal.normaliser = log_sum, primal.output = out;
        primal.start = start, primal.masking = masking;
        AttentionTangent tangent;
        tangent.primal = primal, tangent.query = query, tangent.key = key, tangent.value = value;
        tangent.output = output, tangent.threads = threads;
        run<T>(tangent, set.attention_tangent_workspace, set.attention_tangent);
        check(output.finite(), "attention tangent");

        Owned<T> bar({heads, group, queries, depth}), bar_dot({heads, batch, group, queries, depth});
        Owned<T> query_result({heads, batch, group, queries, depth});
        Owned<T> key_result({heads, batch, queries, depth}), value_result({heads, batch, queries, depth});
        AttentionAdjointTangent adjoint;
        adjoint.primal = primal, adjoint.query = query, adjoint.key = key, adjoint.value = value;
        adjoint.output = output, adjoint.output_bar = bar, adjoint.output_bar_dot = bar_dot;
        adjoint.query_result = query_result, adjoint.key_result = key_result;
        adjoint.value_result = value_result, adjoint.threads = threads;
        run<T>(adjoint, set.attention_adjoint_tangent_workspace, set.attention_adjoint_tangent);
        check(query_result.finite() && key_result.finite() && value_result.finite(),
              "attention adjoint tangent");
    }
}

template <class T>
void elementwise(const Kernels<T>& set, std::int64_t rows, std::int64_t width, int threads) {
    const std::int64_t batch = 2;
    Owned<T> weight({width}), bias({width});
    Owned<T> x({batch, rows, width}), y({batch, rows, width}), normalised({batch, rows, width});
    Owned<T> inverse({batch, rows});
    for (const bool centered : {false, true}) {
        Norm norm;
        norm.weight = weight, norm.weight_offset = 1, norm.eps = 1e-5;
        norm.bias = centered ? static_cast<Array>(bias) : Array{};
        norm.centered = centered, norm.threads = threads;
        NormForward forward;
        forward.norm = norm, forward.x = x, forward.y = y;
        forward.normalised = normalised, forward.inverse = inverse;
        set.norm_forward(forward);
        Owned<T> n({rows, width}), pulled({rows, width}), r({rows}), along({rows});
        Owned<T> result({batch, rows, width});
        NormTangent tangent;
        tangent.norm = norm, tangent.normalised = n, tangent.inverse = r;
        tangent.x_dot = x, tangent.y_dot = result;
        set.norm_tangent(tangent);
        NormAdjointTangent adjoint;
        adjoint.norm = norm, adjoint.normalised = n, adjoint.inverse = r;
        adjoint.pulled = pulled, adjoint.along = along;
        adjoint.x_dot = x, adjoint.y_bar_dot = y, adjoint.result = result;
        set.norm_adjoint_tangent(adjoint);
        check(y.finite() && result.finite(), "norm");
    }
    const std::int64_t heads = 3, turned = width / 4 * 2;
    Owned<T> heads_in({batch, rows, heads, width}), heads_out({batch, rows, heads, width});
    Owned<T> cos({rows, turned}), sin({rows, turned});
    for (const bool interleaved : {false, true}) {
        Rotation rotation;
        rotation.x = heads_in, rotation.y = heads_out;
        if (turned > 0) {
            rotation.cos = cos, rotation.sin = sin;
        }
        rotation.sign = -1, rotation.interleaved = interleaved, rotation.threads = threads;
        set.rotate(rotation);
    }
    check(heads_out.finite(), "rotation");
    Owned<T> value({rows, width}), slope({rows, width}), bend({rows, width}), mixed({rows, width});
    Owned<T> hidden({batch, rows, width}), up({batch, rows, width});
    GateTangent gate;
    gate.value = value, gate.slope = slope, gate.gate = x, gate.up = up, gate.result = y;
    gate.threads = threads;
    set.gate_tangent(gate);
    GateAdjointTangent adjoint;
    adjoint.value = value, adjoint.slope = slope, adjoint.bend = bend, adjoint.mixed = mixed;
    adjoint.gate = x, adjoint.up = up, adjoint.hidden = hidden;
    adjoint.gate_result = y, adjoint.up_result = normalised, adjoint.threads = threads;
    set.gate_adjoint_tangent(adjoint);
    check(y.finite() && normalised.finite(), "gate");
}

// The largest entry of Q' Q - I.
template <class T>
double distance(const Array& frame) {
    double worst = 0;
    for (std::int64_t b = 0; b < frame.shape[0]; ++b) {
        for (std::int64_t i = 0; i < frame.shape[2]; ++i) {
            for (std::int64_t j = 0; j < frame.shape[2]; ++j) {
                double sum = i == j ? -1 : 0;
                for (std::int64_t row = 0; row < frame.shape[1]; ++row) {
                    sum += static_cast<double>(*frame.at<T>(b, row, i)) *
                           static_cast<double>(*frame.at<T>(b, row, j));
                }
                worst = std::max(worst, std::abs(sum));
            }
        }
    }
    return worst;
}

// What is done to a matrix before it is orthonormalised.
enum class Kind { plain, repeated, zero, huge, tiny, graded, not_a_number, infinite };

template <class T>
void spoil(Kind kind, Owned<T>& matrix) {
    const std::int64_t columns = matrix.shape[2];
    const T most = std::numeric_limits<T>::max(), least = std::numeric_limits<T>::denorm_min();
    for (std::int64_t b = 0; b < matrix.shape[0]; ++b) {
        for (std::int64_t i = 0; i < matrix.shape[1]; ++i) {
            for (std::int64_t j = 0; j < columns; ++j) {
                T& entry = *matrix.template at<T>(b, i, j);
                switch (kind) {
                    case Kind::plain: break;
                    case Kind::repeated: entry = *matrix.template at<T>(b, i, j / 2); break;
                    case Kind::zero: entry = 0; break;
                    case Kind::huge: entry *= most / 1024; break;
                    case Kind::tiny: entry *= least * 64; break;
                    case Kind::graded: entry *= std::pow(T(10), -T(j)); break;
                    case Kind::not_a_number: entry = i + j == 0 ? std::nan("") : entry; break;
                    case Kind::infinite: entry = i + j == 0 ? 2 * most : entry; break;
                }
            }
        }
    }
}

template <class T>
void low_rank(const Kernels<T>& set, std::int64_t batch, std::int64_t rows, std::int64_t columns,
              bool swapped, Kind kind, int threads) {
    const bool finite = kind != Kind::not_a_number && kind != Kind::infinite;
    const double allowed = 8 * std::sqrt(columns) * std::numeric_limits<T>::epsilon() +
                           1e-15 * std::sqrt(rows);
    Owned<T> matrix({batch, rows, columns}, swapped), frame({batch, rows, columns});
    spoil(kind, matrix);
    Owned<double> triangle({batch, columns, columns});
    Orthonormalise basis;
    basis.matrix = matrix, basis.frame = frame, basis.triangle = triangle;
    basis.threads = threads;
    const Outcome outcome = run<double>(basis, set.orthonormalise_workspace, set.orthonormalise);
    check(outcome == (finite ? Outcome::done : Outcome::not_finite), "outcome of a basis");
    check(outcome != Outcome::done || distance<T>(frame) < allowed, "orthonormal basis");

    const std::int64_t other = columns / 2 + 1;
    Owned<T> right({batch, rows, other}, !swapped);
    Owned<double> product({batch, columns, other});
    Gram gram;
    gram.left = matrix, gram.right = right, gram.result = product, gram.threads = threads;
    run<double>(gram, set.gram_workspace, set.gram);
    Owned<double> small({batch, columns, other});
    Owned<T> combined({batch, rows, other});
    Combine combine;
    combine.tall = matrix, combine.small = small, combine.result = combined;
    combine.threads = threads;
    run<double>(combine, set.combine_workspace, set.combine);
    check(!finite || kind == Kind::huge || (product.finite() && combined.finite()), "products");

    const std::int64_t rank = columns / 2 + 1;
    Owned<T> tests({batch, rows, columns}, !swapped), vectors({batch, rows, rank});
    Owned<double> values({batch, rank});
    SinglePass single;
    single.tests = tests, single.images = matrix, single.vectors = vectors, single.values = values;
    single.precision = std::numeric_limits<T>::epsilon(), single.threads = threads;
    const Outcome once = run<double>(single, set.single_pass_workspace, set.single_pass);
    check(finite || once == Outcome::not_finite, "outcome of a single pass");
    check(once != Outcome::done || distance<T>(vectors) < 2 * allowed, "single pass");
    SecondPass second;
    second.frame = outcome == Outcome::done ? frame : tests;
    second.images = matrix, second.vectors = vectors, second.values = values;
    second.threads = threads;
    const Outcome twice = run<double>(second, set.second_pass_workspace, set.second_pass);
    check(finite || twice == Outcome::not_finite, "outcome of a second pass");

    const std::int64_t tokens = 3, probes = columns;
    Owned<T> blocks({batch, tokens, rows, columns}, swapped), norms({batch, tokens, probes});
    Owned<double> weights({batch, tokens, columns});
    Owned<std::int64_t> samples({probes});
    BlockNorms block;
    block.vectors = blocks, block.values = weights, block.samples = samples, block.norms = norms;
    block.seed = 0xFFFFFFFFFFFFFFFF, block.threads = threads;
    run<double>(block, set.block_norms_workspace, set.block_norms);
    check(norms.finite(), "block norms");

    Owned<T> means({rows, batch + 3}), window_rows({columns, rows, batch + 1});
    Owned<T> counted({columns, batch + 1});
    Owned<std::int64_t> index({columns, batch + 1});
    for (std::int64_t item = 0; item < index.numbers; ++item) {
        index.memory[item] = item % (batch + 3);
    }
    WindowMean mean;
    mean.rows = window_rows, mean.index = index, mean.mean = means, mean.threads = threads;
    run<T>(mean, set.window_mean_workspace, set.window_mean);
    mean.counted = counted;
    run<T>(mean, set.window_mean_workspace, set.window_mean);
    check(means.finite(), "window mean");
}

template <class T>
void eigen(const Kernels<T>& set, std::int64_t order, double scale, double repeat) {
    Owned<double> matrix({2, order, order}), values({2, order}), vectors({2, order, order});
    for (std::int64_t index = 0; index < matrix.numbers; ++index) {
        matrix.memory[index] = scale * (repeat != 0 ? repeat : matrix.memory[index]);
    }
    SymmetricEigen call;
    call.matrix = matrix, call.values = values, call.vectors = vectors, call.threads = 2;
    const Outcome outcome =
        run<double>(call, set.symmetric_eigen_workspace, set.symmetric_eigen);
    check(outcome == (std::isfinite(scale) ? Outcome::done : Outcome::not_finite), "eigenproblem");
    check(outcome != Outcome::done || distance<double>(vectors) < 1e-13 * double(order),
          "eigenvectors");
}

template <class T>
void all(const Kernels<T>& set) {
    for (const int threads : {1, 3}) {
        attention(set, 1, 1, threads);
        attention(set, 37, 37, threads);
        attention(set, 5, 41, threads);
        elementwise(set, 1, 1, threads);
        elementwise(set, 7, 37, threads);
        for (const bool swapped : {false, true}) {
            low_rank(set, 1, 1, 1, swapped, Kind::plain, threads);
            low_rank(set, 3, 19, 19, swapped, Kind::plain, threads);
            low_rank(set, 2, 300, 13, swapped, Kind::plain, threads);
            low_rank(set, 1, 60011, 9, swapped, Kind::plain, threads);  // several chunks
            for (const Kind kind : {Kind::repeated, Kind::zero, Kind::huge, Kind::tiny,
                                    Kind::graded, Kind::not_a_number, Kind::infinite}) {
                low_rank(set, 2, 71, 9, swapped, kind, threads);
            }
        }
    }
    for (const std::int64_t order : {1, 2, 3, 17, 64}) {
        for (const double scale : {1.0, 0.0, 1e300, 1e-310, double(INFINITY), double(NAN)}) {
            eigen(set, order, scale, 0);
            eigen(set, order, scale, 1);
        }
    }
}

}  // namespace

int main() {
    for (const InstructionSet& set : runnable()) {
        all(set.of_float);
        all(set.of_double);
        std::printf("%s: %s\n", set.name, failures == 0 ? "clean" : "failed");
    }
    return failures == 0 ? 0 : 1;
}
