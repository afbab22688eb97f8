// Orthonormal bases, low-rank factors and their block norms: kernels/low_rank/reference.py has the
// mathematics, the same steps under the same names.

// Whole batches: many small matrices go side by side, large ones one by one on all threads.
// `Work(scratch, threads)` takes the workspace of one matrix; body(work, index, threads) runs it.
template <class Work, class Call, class Body>
Outcome for_matrices(const Call& call, std::int64_t batch, bool small, Body body) {
    const int workers =
        small ? static_cast<int>(std::min<std::int64_t>(call.threads, batch)) : 1;
    const int inner = small ? 1 : call.threads;
    Scratch size{nullptr};
    Work(size, call, inner);
    std::atomic<int> worst{0};
    parallel_for(batch, workers, [&](std::int64_t index, int worker) {
        Scratch own{static_cast<double*>(call.workspace) + worker * size.used};
        const Work work(own, call, inner);
        const int outcome = static_cast<int>(body(work, index, inner));
        for (int seen = worst; seen < outcome && !worst.compare_exchange_weak(seen, outcome);) {
        }
    });
    return static_cast<Outcome>(worst.load());
}

template <class Work, class Call>
std::int64_t workspace_of(const Call& call, std::int64_t batch, bool small) {
    Scratch size{nullptr};
    Work(size, call, small ? 1 : call.threads);
    return size.used * (small ? std::min<std::int64_t>(call.threads, batch) : 1);
}

inline bool all_finite(const double* values, std::int64_t rows, std::int64_t count,
                       std::int64_t stride) {
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < count; ++j) {
            if (!(std::abs(values[i * stride + j]) <= std::numeric_limits<double>::max())) {
                return false;
            }
        }
    }
    return true;
}

// Why sums over finite numbers would not be finite: the numbers, or their size.
template <class T>
Outcome why_not_finite(const Tall<T>& matrix, double* peaks) {
    return column_peaks(matrix, peaks) ? Outcome::out_of_range : Outcome::not_finite;
}

template <class T>
bool is_small(const Array& matrices) {
    const std::int64_t count = matrices.shape[2];
    return chunk_count(matrices.shape[1], count, count) == 1;
}

template <class T>
struct GramWork : Grams<T> {
    GramWork(Scratch& scratch, const Gram& call, int threads)
        : Grams<T>(scratch, call.left.shape[1], call.left.shape[2], call.right.shape[2],
                   threads) {}
};

template <class T>
std::int64_t gram_workspace(const Gram& call) {
    return workspace_of<GramWork<T>>(call, call.left.shape[0], is_small<T>(call.left));
}

template <class T>
Outcome gram(const Gram& call) {
    return for_matrices<GramWork<T>>(
        call, call.left.shape[0], is_small<T>(call.left),
        [&](const GramWork<T>& work, std::int64_t index, int threads) {
            const Tall<T> right = tall<T>(call.right, index);
            double* const sums = work.cross.sums;
            work.run(tall<T>(call.left, index), nullptr, &right, threads, nullptr, sums);
            for (std::int64_t i = 0; i < work.cross.left; ++i) {
                const double* const row = sums + i * work.cross.stride;
                std::copy(row, row + work.cross.right, call.result.at<double>(index, i));
            }
            return Outcome::done;
        });
}

template <class T>
struct CombineWork : Combination<T> {
    CombineWork(Scratch& scratch, const Combine& call, int threads)
        : Combination<T>(scratch, call.tall.shape[1], call.tall.shape[2], call.small.shape[2],
                         threads) {}
};

template <class T>
std::int64_t combine_workspace(const Combine& call) {
    return workspace_of<CombineWork<T>>(call, call.tall.shape[0], is_small<T>(call.tall));
}

template <class T>
Outcome combine(const Combine& call) {
    return for_matrices<CombineWork<T>>(
        call, call.tall.shape[0], is_small<T>(call.tall),
        [&](const CombineWork<T>& work, std::int64_t index, int threads) {
            work.run(tall<T>(call.tall, index), call.small.at<double>(index),
                     call.small.stride[1], threads, tall<T>(call.result, index), nullptr);
            return Outcome::done;
        });
}

struct EigenWork : Eigen {
    EigenWork(Scratch& scratch, const SymmetricEigen& call, int)
        : Eigen(scratch, call.matrix.shape[1]) {}
};

inline std::int64_t symmetric_eigen_workspace(const SymmetricEigen& call) {
    return workspace_of<EigenWork>(call, call.matrix.shape[0], true);
}

inline Outcome symmetric_eigen(const SymmetricEigen& call) {
    return for_matrices<EigenWork>(
        call, call.matrix.shape[0], true,
        [&](const EigenWork& work, std::int64_t index, int) {
            if (!work.run(call.matrix.at<double>(index), call.matrix.stride[1])) {
                return Outcome::not_finite;
            }
            std::copy(work.values, work.values + work.order, call.values.at<double>(index));
            for (std::int64_t i = 0; i < work.order; ++i) {
                const double* const row = work.rows + i * work.stride;
                std::copy(row, row + work.order, call.vectors.at<double>(index, i));
            }
            return Outcome::done;
        });
}

// Shifted Cholesky QR (Fukaya et al. 2020).
template <class T>
struct Orthonormaliser {
    std::int64_t rows, count, stride;
    Grams<T> grams;
    Substitution<T> substitution;
    double *gram, *upper, *trial, *triangle, *peaks, *scale, *length;

    Orthonormaliser(Scratch& scratch, std::int64_t row_count, std::int64_t columns, int threads)
        : rows(row_count),
          count(columns),
          stride(leading(columns)),
          grams(scratch, row_count, columns, 0, threads),
          substitution(scratch, row_count, columns, threads),
          gram(scratch.take(columns * stride)),
          upper(scratch.take(columns * stride)),
          trial(scratch.take(columns * stride)),
          triangle(scratch.take(columns * stride)),
          peaks(scratch.take(columns)),
          scale(scratch.take(columns)),
          length(scratch.take(columns)) {}

    // Q to `frame`, R to `triangle`. Q may be A. `known`: whether `gram` holds A' A already.
    Outcome run(const Tall<T>& matrix, const Tall<T>& frame, bool known, int threads) const {
        const double* scaled = nullptr;
        for (std::int64_t j = 0; j < count; ++j) {
            std::fill(triangle + j * stride, triangle + (j + 1) * stride, 0.0);
            triangle[j * stride + j] = 1;
        }
        if (!known) {
            grams.run(matrix, nullptr, nullptr, threads, gram, nullptr);
        }
        if (!in_range()) {
            // Only now is a pass over the columns' sizes worth its time.
            if (!column_peaks(matrix, peaks)) {
                return Outcome::not_finite;
            }
            for (std::int64_t j = 0; j < count; ++j) {
                int power = 0;
                std::frexp(peaks[j], &power);
                power = peaks[j] > 0 ? std::max(power, -1000) : 0;
                scale[j] = std::ldexp(1.0, -power);
                triangle[j * stride + j] = 1 / scale[j];
            }
            scaled = scale;
            grams.run(matrix, scaled, nullptr, threads, gram, nullptr);
        }
        return iterate(matrix, scaled, frame, threads);
    }

    // Whether the squares of the columns can be told from overflow and underflow.
    bool in_range() const {
        for (std::int64_t j = 0; j < count; ++j) {
            const double square = gram[j * stride + j];
            const bool zero = square == 0 && sizeof(T) == sizeof(float);
            if (!zero && !(square > 1e-200 && square < 1e200)) {
                return false;
            }
        }
        return true;
    }

    Outcome iterate(Tall<T> current, const double* scaled, const Tall<T>& frame,
                    int threads) const {
        constexpr double eps = std::numeric_limits<double>::epsilon();
        constexpr int passes = 8;
        // A rounding of the entries, and what the sums of the Gram matrix themselves round off.
        const double allowed = 4 * std::sqrt(count) * std::numeric_limits<T>::epsilon() +
                               2 * std::sqrt(rows) * eps;
        // A pass over a frame this near leaves its rounding alone.
        const double near = std::sqrt(std::numeric_limits<T>::epsilon());
        bool solved = false;
        double before = std::numeric_limits<double>::infinity();
        for (int attempt = 0; attempt < passes; ++attempt) {
            const bool empty = find_lost(solved);
            const double distance =
                empty ? std::numeric_limits<double>::infinity() : distance_from_identity();
            const bool done = !empty && (distance <= allowed || before <= near);
            before = distance;
            if (empty || done) {
                copy(current, scaled, frame);
                current = frame;
                scaled = nullptr;
            }
            if (done) {
                return all_finite(triangle, count, count, stride) ? Outcome::done
                                                                  : Outcome::out_of_range;
            }
            if (empty) {
                fill(frame, attempt);
                grams.run(frame, nullptr, nullptr, threads, gram, nullptr);
                continue;
            }
            if (!factorise()) {
                return Outcome::out_of_range;
            }
            substitution.run(current, scaled, upper, threads, frame, gram);
            solved = true;
            current = frame;
            scaled = nullptr;
            for (std::int64_t i = 0; i < count; ++i) {  // triangle = upper triangle
                double* const row = trial + i * stride;
                std::fill(row, row + count, 0.0);
                for (std::int64_t k = i; k < count; ++k) {
                    add_scaled(count - k, upper[i * stride + k], triangle + k * stride + k,
                               row + k);
                }
            }
            std::copy(trial, trial + count * stride, triangle);
        }
        return Outcome::out_of_range;
    }

    // Lengths of the columns; 0 where A has nothing more to say: what is left of a column that the
    // shift has swallowed is rounding noise, and that may be parallel to another column for ever.
    bool find_lost(bool solved) const {
        constexpr double swallowed = 1e-3;
        const double least = std::numeric_limits<T>::epsilon() / 4;
        std::fill(peaks, peaks + count, std::numeric_limits<double>::min());
        for (std::int64_t i = 0; i < count; ++i) {
            for (std::int64_t j = i; j < count; ++j) {
                peaks[j] = std::max(peaks[j], std::abs(triangle[i * stride + j]));
            }
        }
        bool any = false;
        for (std::int64_t i = 0; i < count; ++i) {
            length[i] = std::sqrt(gram[i * stride + i]);
            double share = 0;
            for (std::int64_t j = i; j < count; ++j) {
                share = std::max(share, std::abs(triangle[i * stride + j]) / peaks[j]);
            }
            if (solved && length[i] < swallowed && length[i] * share <= least) {
                length[i] = 0;
            }
            any = any || length[i] == 0;
        }
        return any;
    }

    double distance_from_identity() const {
        double worst = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            for (std::int64_t j = 0; j < count; ++j) {
                const double value = std::abs(gram[i * stride + j] - (i == j ? 1 : 0));
                if (!(value <= std::numeric_limits<double>::max())) {
                    return std::numeric_limits<double>::infinity();
                }
                worst = std::max(worst, value);
            }
        }
        return worst;
    }

    // `upper`: the Cholesky factor of the Gram matrix, shifted where that is not surely positive.
    bool factorise() const {
        const double shift = 4 * static_cast<double>(count) *
                             std::numeric_limits<double>::epsilon();
        double farthest = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            double off = 0;
            for (std::int64_t j = 0; j < count; ++j) {
                gram[i * stride + j] /= length[i] * length[j];
                off += std::abs(gram[i * stride + j] - (i == j ? 1 : 0));
            }
            if (!(off <= std::numeric_limits<double>::max())) {
                return false;
            }
            farthest = std::max(farthest, off);
        }
        double lift = farthest < 0.5 ? 0 : shift;
        for (double more = shift; lift < 1; more *= 10) {
            for (std::int64_t i = 0; i < count; ++i) {
                std::copy(gram + i * stride, gram + i * stride + count, upper + i * stride);
                upper[i * stride + i] += lift;
            }
            if (cholesky(upper, count, stride)) {
                for (std::int64_t i = 0; i < count; ++i) {
                    for (std::int64_t j = i; j < count; ++j) {
                        upper[i * stride + j] *= length[j];
                    }
                }
                return true;
            }
            lift += 10 * more;
        }
        return false;
    }

    void copy(const Tall<T>& from, const double* scaled, const Tall<T>& to) const {
        if (from.data == to.data && scaled == nullptr) {
            return;
        }
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = 0; j < count; ++j) {
                const T factor = scaled == nullptr ? T(1) : static_cast<T>(scaled[j]);
                to.data[i * to.row + j] = from.data[i * from.row + j * from.column] * factor;
            }
        }
    }

    // Columns that vanish, replaced by uniform numbers (signs would often be parallel where few
    // dimensions are left); the column of A is 0 times that.
    void fill(const Tall<T>& frame, int attempt) const {
        for (std::int64_t j = 0; j < count; ++j) {
            if (length[j] != 0) {
                continue;
            }
            const std::uint32_t key = sign_key(seed_key(0), j, attempt);
            for (std::int64_t i = 0; i < rows; ++i) {
                const std::uint32_t word = mix(key ^ static_cast<std::uint32_t>(i));
                frame.data[i * frame.row + j] = static_cast<T>(word * 0x1p-31 - 1);
            }
            std::fill(triangle + j * stride, triangle + (j + 1) * stride, 0.0);
        }
    }
};

template <class T>
struct OrthonormaliseWork : Orthonormaliser<T> {
    OrthonormaliseWork(Scratch& scratch, const Orthonormalise& call, int threads)
        : Orthonormaliser<T>(scratch, call.matrix.shape[1], call.matrix.shape[2], threads) {}
};

template <class T>
std::int64_t orthonormalise_workspace(const Orthonormalise& call) {
    return workspace_of<OrthonormaliseWork<T>>(call, call.matrix.shape[0],
                                               is_small<T>(call.matrix));
}

template <class T>
Outcome orthonormalise(const Orthonormalise& call) {
    return for_matrices<OrthonormaliseWork<T>>(
        call, call.matrix.shape[0], is_small<T>(call.matrix),
        [&](const OrthonormaliseWork<T>& work, std::int64_t index, int threads) {
            const Outcome outcome = work.run(tall<T>(call.matrix, index),
                                             tall<T>(call.frame, index), false, threads);
            for (std::int64_t i = 0; i < work.count; ++i) {
                std::copy(work.triangle + i * work.stride,
                          work.triangle + i * work.stride + work.count,
                          call.triangle.at<double>(index, i));
            }
            return outcome;
        });
}

// The eigenvalues of largest magnitude, ties in ascending order, and their vectors as columns.
struct Leading {
    std::int64_t order, rank, stride;
    Eigen eigen;
    double *values, *vectors, *ranks;

    Leading(Scratch& scratch, std::int64_t n, std::int64_t most)
        : order(n),
          rank(std::min(n, most)),
          stride(leading(rank)),
          eigen(scratch, n),
          values(scratch.take(rank)),
          vectors(scratch.take(n * stride)),
          ranks(scratch.take(n)) {}

    bool run(const double* matrix, std::int64_t matrix_stride) const {
        if (!eigen.run(matrix, matrix_stride)) {
            return false;
        }
        auto* const index = reinterpret_cast<std::int64_t*>(ranks);
        for (std::int64_t i = 0; i < order; ++i) {
            index[i] = i;
        }
        std::sort(index, index + order, [&](std::int64_t i, std::int64_t j) {
            const double one = eigen.values[i], other = eigen.values[j];
            const double size = std::abs(one), beside = std::abs(other);
            return size != beside ? size > beside : one != other ? one < other : i < j;
        });
        for (std::int64_t k = 0; k < rank; ++k) {
            values[k] = eigen.values[index[k]];
            const double* const from = eigen.rows + index[k] * eigen.stride;
            for (std::int64_t i = 0; i < order; ++i) {
                vectors[i * stride + k] = from[i];
            }
        }
        return true;
    }
};

// The single pass: see `single_pass` of the reference.
template <class T>
struct SinglePassWork {
    std::int64_t rows, count, rank, stride, small_stride;
    Grams<T> grams;
    Eigen whitener;
    Leading core;
    Combination<T> combine, turn;
    Orthonormaliser<T> orthonormaliser;
    Leading last;
    double *own, *cross, *whiten, *product, *mixing, *peaks;

    SinglePassWork(Scratch& scratch, const SinglePass& call, int threads)
        : rows(call.images.shape[1]),
          count(call.images.shape[2]),
          rank(call.vectors.shape[2]),
          stride(leading(count)),
          small_stride(leading(rank)),
          grams(scratch, rows, count, count, threads),
          whitener(scratch, count),
          core(scratch, count, rank),
          combine(scratch, rows, count, rank, threads),
          turn(scratch, rows, rank, rank, threads),
          orthonormaliser(scratch, rows, rank, threads),
          last(scratch, rank, rank),
          own(scratch.take(count * stride)),
          cross(scratch.take(count * stride)),
          whiten(scratch.take(count * stride)),
          product(scratch.take(count * stride)),
          mixing(scratch.take(count * small_stride)),
          peaks(scratch.take(count)) {}

    Outcome run(const Tall<T>& tests, const Tall<T>& images, const Tall<T>& vectors,
                double* values, double precision, int threads) const {
        grams.run(tests, nullptr, &images, threads, own, cross);
        if (!whitener.run(own, stride)) {
            return why_not_finite(tests, peaks);
        }
        if (!all_finite(cross, count, count, stride)) {
            return why_not_finite(images, peaks);
        }
        inverse_root();
        small_product(count, count, count, whiten, stride, true, cross, stride, product, stride);
        small_product(count, count, count, product, stride, false, whiten, stride, cross, stride);
        if (!core.run(cross, stride)) {
            return Outcome::out_of_range;
        }
        const double smallest = 4 * precision * std::abs(core.values[0]);
        for (std::int64_t k = 0; k < rank; ++k) {
            const bool known = std::abs(core.values[k]) > smallest;
            core.values[k] = known ? core.values[k] : 0;
            for (std::int64_t i = 0; i < count; ++i) {
                double& entry = core.vectors[i * core.stride + k];
                entry = known ? entry / core.values[k] : 0;
            }
        }
        small_product(count, count, rank, whiten, stride, false, core.vectors, core.stride,
                      mixing, small_stride);
        if (!all_finite(mixing, count, rank, small_stride)) {
            return Outcome::out_of_range;
        }
        combine.run(images, mixing, small_stride, threads, vectors, orthonormaliser.gram);
        const Outcome outcome = orthonormaliser.run(vectors, vectors, true, threads);
        if (outcome != Outcome::done) {
            // The columns of the factors are ours: what is not finite in them has overflowed.
            return Outcome::out_of_range;
        }
        middle();
        if (!last.run(product, small_stride)) {
            return Outcome::out_of_range;
        }
        turn.run(vectors, last.vectors, last.stride, threads, vectors, nullptr);
        std::copy(last.values, last.values + rank, values);
        return Outcome::done;
    }

    // whiten = G^(-1/2) on the range of G.
    void inverse_root() const {
        constexpr double dependent = 1e-10;
        const double* const values = whitener.values;
        const double most = *std::max_element(values, values + count);
        for (std::int64_t k = 0; k < count; ++k) {
            const double factor =
                values[k] > dependent * most ? 1 / std::sqrt(values[k]) : 0;
            const double* const from = whitener.rows + k * whitener.stride;
            for (std::int64_t j = 0; j < count; ++j) {
                product[k * stride + j] = from[j] * factor;
            }
        }
        small_product(count, count, count, product, stride, true, whitener.rows, whitener.stride,
                      whiten, stride);
    }

    // product = R diag(l) R'
    void middle() const {
        const double* const upper = orthonormaliser.triangle;
        for (std::int64_t i = 0; i < rank; ++i) {
            for (std::int64_t j = 0; j < rank; ++j) {
                cross[i * stride + j] = upper[i * small_stride + j] * core.values[j];
            }
        }
        for (std::int64_t i = 0; i < rank; ++i) {
            for (std::int64_t j = 0; j < rank; ++j) {
                product[i * small_stride + j] =
                    dot(rank, cross + i * stride, upper + j * small_stride);
            }
        }
    }
};

template <class T>
std::int64_t single_pass_workspace(const SinglePass& call) {
    return workspace_of<SinglePassWork<T>>(call, call.images.shape[0], is_small<T>(call.images));
}

template <class T>
Outcome single_pass(const SinglePass& call) {
    return for_matrices<SinglePassWork<T>>(
        call, call.images.shape[0], is_small<T>(call.images),
        [&](const SinglePassWork<T>& work, std::int64_t index, int threads) {
            return work.run(tall<T>(call.tests, index), tall<T>(call.images, index),
                            tall<T>(call.vectors, index), call.values.at<double>(index),
                            call.precision, threads);
        });
}

// The second of two passes: Q' H Q, its eigenvectors, Q times these.
template <class T>
struct SecondPassWork {
    std::int64_t count, rank, stride;
    Grams<T> grams;
    Leading leader;
    Combination<T> combine;
    double *cross, *peaks;

    SecondPassWork(Scratch& scratch, const SecondPass& call, int threads)
        : count(call.frame.shape[2]),
          rank(call.vectors.shape[2]),
          stride(leading(count)),
          grams(scratch, call.frame.shape[1], count, count, threads),
          leader(scratch, count, rank),
          combine(scratch, call.frame.shape[1], count, rank, threads),
          cross(scratch.take(count * stride)),
          peaks(scratch.take(count)) {}

    Outcome run(const Tall<T>& frame, const Tall<T>& images, const Tall<T>& vectors,
                double* values, int threads) const {
        grams.run(frame, nullptr, &images, threads, nullptr, cross);
        if (!leader.run(cross, stride)) {
            return why_not_finite(images, peaks);
        }
        combine.run(frame, leader.vectors, leader.stride, threads, vectors, nullptr);
        std::copy(leader.values, leader.values + rank, values);
        return Outcome::done;
    }
};

template <class T>
std::int64_t second_pass_workspace(const SecondPass& call) {
    return workspace_of<SecondPassWork<T>>(call, call.images.shape[0], is_small<T>(call.images));
}

template <class T>
Outcome second_pass(const SecondPass& call) {
    return for_matrices<SecondPassWork<T>>(
        call, call.images.shape[0], is_small<T>(call.images),
        [&](const SecondPassWork<T>& work, std::int64_t index, int threads) {
            return work.run(tall<T>(call.frame, index), tall<T>(call.images, index),
                            tall<T>(call.vectors, index), call.values.at<double>(index),
                            threads);
        });
}

// |U_i diag(w) U_i' r|_1: probes are the columns of the products, U is read through its strides.
constexpr std::int64_t norm_rows = 48;  // between two additions in float64

template <class T>
std::int64_t block_norms_each(const BlockNorms& call) {
    const std::int64_t width = call.vectors.shape[2], rank = call.vectors.shape[3];
    return (width + rank + norm_rows) * panel_columns<T> * sizeof(T) / sizeof(double) + 8;
}

template <class T>
std::int64_t block_norms_workspace(const BlockNorms& call) {
    return block_norms_each<T>(call) * call.threads;
}

template <class T>
void block_norms(const BlockNorms& call) {
    const Array& u = call.vectors;
    const std::int64_t tokens = u.shape[1], width = u.shape[2], rank = u.shape[3];
    const std::int64_t probes = call.norms.shape[2];
    const auto* const samples = static_cast<const std::int64_t*>(call.samples.data);
    const std::uint32_t seed = seed_key(call.seed);
    parallel_for(u.shape[0] * tokens, call.threads, [&](std::int64_t item, int worker) {
        const std::int64_t batch = item / tokens, token = item % tokens;
        const T* const rows = u.at<T>(batch, token);
        T* const signs = reinterpret_cast<T*>(static_cast<double*>(call.workspace) +
                                              worker * block_norms_each<T>(call));
        T* const inner = signs + width * panel_columns<T>;
        T* const images = inner + rank * panel_columns<T>;
        for (std::int64_t low = 0; low < probes; low += panel_columns<T>) {
            const std::int64_t count = std::min(panel_columns<T>, probes - low);
            const std::int64_t n = count > Simd<T>::lanes ? panel_columns<T> : Simd<T>::lanes;
            std::uint32_t keys[panel_columns<T>], words[panel_columns<T>];
            for (std::int64_t j = 0; j < n; ++j) {
                keys[j] = sign_key(seed, samples[low + std::min(j, count - 1)], token);
            }
            for (std::int64_t i = 0; i < width; ++i) {
                if (i % signs_per_word == 0) {
                    for (std::int64_t j = 0; j < n; ++j) {
                        words[j] = mix(keys[j] ^ static_cast<std::uint32_t>(i / signs_per_word));
                    }
                }
                for (std::int64_t j = 0; j < n; ++j) {
                    signs[i * n + j] = sign_of<T>(words[j], i);
                }
            }
            const Product<T> down = {rows, u.stride[3], u.stride[2], {signs, n, n}, width};
            multiply(rank, n, &down, 1, inner, n, false);
            const double* const values = call.values.at<double>(batch, token);
            for (std::int64_t k = 0; k < rank; ++k) {
                const T value = static_cast<T>(values[k * call.values.stride[2]]);
                for (std::int64_t j = 0; j < n; ++j) {
                    inner[k * n + j] *= value;
                }
            }
            double sums[panel_columns<T>] = {};
            for (std::int64_t first = 0; first < width; first += norm_rows) {
                const std::int64_t some = std::min(norm_rows, width - first);
                const Product<T> up = {rows + first * u.stride[2], u.stride[2], u.stride[3],
                                       {inner, n, n}, rank};
                multiply(some, n, &up, 1, images, n, false);
                T part[panel_columns<T>] = {};
                for (std::int64_t i = 0; i < some; ++i) {
                    for (std::int64_t j = 0; j < n; ++j) {
                        part[j] += std::abs(images[i * n + j]);
                    }
                }
                for (std::int64_t j = 0; j < n; ++j) {
                    sums[j] += static_cast<double>(part[j]);
                }
            }
            T* const norms = call.norms.at<T>(batch, token, low);
            for (std::int64_t j = 0; j < count; ++j) {
                norms[j] = static_cast<T>(sums[j]);
            }
        }
    });
}

template <class T>
std::int64_t window_mean_workspace(const WindowMean& call) {
    return call.mean.shape[1];
}

// Means over the windows that hold a token (see kernels/window_mean/reference.py).
template <class T>
void window_mean(const WindowMean& call) {
    const std::int64_t windows = call.rows.shape[0], targets = call.rows.shape[1];
    const std::int64_t length = call.rows.shape[2], tokens = call.mean.shape[1];
    T* const count = static_cast<T*>(call.workspace);
    std::fill(count, count + tokens, T(0));
    for (std::int64_t window = 0; window < windows; ++window) {
        const std::int64_t* const index = call.index.at<std::int64_t>(window);
        for (std::int64_t i = 0; i < length; ++i) {
            count[index[i]] += call.counted.data ? *call.counted.at<T>(window, i) : T(1);
        }
    }
    parallel_for(targets, call.threads, [&](std::int64_t target, int) {
        T* const mean = call.mean.at<T>(target);
        std::fill(mean, mean + tokens, T(0));
        for (std::int64_t window = 0; window < windows; ++window) {
            const std::int64_t* const index = call.index.at<std::int64_t>(window);
            const T* const row = call.rows.at<T>(window, target);
            for (std::int64_t i = 0; i < length; ++i) {
                mean[index[i]] += row[i];
            }
        }
        for (std::int64_t i = 0; i < tokens; ++i) {
            mean[i] /= std::max(count[i], T(1));
        }
    });
}
