// Small dense matrices in float64, rows `stride` apart: Cholesky factor, symmetric eigenproblem.

// y += factor * x
HEAT_INLINE void add_scaled(std::int64_t count, double factor, const double* x, double* y) {
    each<double>(count, [&](auto kind, std::int64_t j) {
        kind.put(y + j, kind.get(y + j) + kind.get(x + j) * factor);
    });
}

HEAT_INLINE double dot(std::int64_t count, const double* x, const double* y) {
    return total<double>(count, [&](auto kind, std::int64_t j) {
        return kind.get(x + j) * kind.get(y + j);
    });
}

// C [m x n] = A [m x k] B [k x n], or A' for A [k x m].
inline void small_product(std::int64_t m, std::int64_t k, std::int64_t n, const double* a,
                          std::int64_t a_stride, bool transposed, const double* b,
                          std::int64_t b_stride, double* c, std::int64_t c_stride) {
    for (std::int64_t i = 0; i < m; ++i) {
        double* const row = c + i * c_stride;
        std::fill(row, row + n, 0.0);
        for (std::int64_t inner = 0; inner < k; ++inner) {
            const double factor = transposed ? a[inner * a_stride + i] : a[i * a_stride + inner];
            add_scaled(n, factor, b + inner * b_stride, row);
        }
    }
}

// R with R' R = A, in place in the upper triangle, zero below; false where A is not positive.
inline bool cholesky(double* a, std::int64_t n, std::int64_t stride) {
    for (std::int64_t j = 0; j < n; ++j) {
        double* const row = a + j * stride;
        if (!(row[j] > 0)) {
            return false;
        }
        const double inverse = 1 / std::sqrt(row[j]);
        for (std::int64_t i = j; i < n; ++i) {
            row[i] *= inverse;
        }
        for (std::int64_t i = j + 1; i < n; ++i) {
            add_scaled(n - i, -row[i], row + i, a + i * stride + i);
            a[i * stride + j] = 0;
        }
    }
    return true;
}

// The eigenproblem of a symmetric matrix: reflections make it tridiagonal, shifted QR steps
// diagonal (Golub and Van Loan, "Matrix Computations", sections 8.3.1 and 8.3.3). The eigenvectors
// are kept as rows, so that a rotation of two of them runs along memory.
struct Eigen {
    std::int64_t order, stride;
    double *matrix, *rows, *values, *beside, *factors, *image;

    Eigen(Scratch& scratch, std::int64_t n)
        : order(n),
          stride(leading(n)),
          matrix(scratch.take(n * stride)),
          rows(scratch.take(n * stride)),
          values(scratch.take(n)),
          beside(scratch.take(n)),
          factors(scratch.take(n)),
          image(scratch.take(n)) {}

    // Of (A + A') / 2, A's rows `given_stride` apart; `values` in any order, `rows` orthonormal.
    // False if a number is not finite.
    bool run(const double* given, std::int64_t given_stride) const {
        double peak = 0;
        for (std::int64_t i = 0; i < order; ++i) {
            for (std::int64_t j = 0; j < order; ++j) {
                const double value =
                    given[i * given_stride + j] / 2 + given[j * given_stride + i] / 2;
                matrix[i * stride + j] = value;
                if (!(std::abs(value) <= std::numeric_limits<double>::max())) {
                    return false;
                }
                peak = std::max(peak, std::abs(value));
            }
        }
        // A power of two near the largest entry: squares stay far from overflow and underflow.
        int power = 0;
        std::frexp(peak, &power);
        power = std::max(power, -1000);
        const double scale = std::ldexp(1.0, -power);
        for (std::int64_t i = 0; i < order; ++i) {
            for (std::int64_t j = 0; j < order; ++j) {
                matrix[i * stride + j] *= scale;
            }
        }
        tridiagonalise();
        accumulate_reflections();
        const bool converged = diagonalise();
        for (std::int64_t i = 0; i < order; ++i) {
            values[i] = std::ldexp(values[i], power);
        }
        return converged;
    }

    // I - f v v' maps the rest of row k to a multiple of the first unit vector; v replaces the rest.
    void tridiagonalise() const {
        for (std::int64_t k = 0; k < order; ++k) {
            double* const v = matrix + k * stride + k + 1;
            const std::int64_t n = order - k - 1;
            values[k] = matrix[k * stride + k];
            factors[k] = 0;
            if (n == 0) {
                break;
            }
            const double tail = dot(n - 1, v + 1, v + 1);
            if (tail < std::numeric_limits<double>::min()) {
                beside[k] = v[0];
                continue;
            }
            const double size = std::sqrt(v[0] * v[0] + tail);
            beside[k] = v[0] > 0 ? -size : size;
            v[0] -= beside[k];
            factors[k] = 2 / (v[0] * v[0] + tail);
            double* const corner = matrix + (k + 1) * stride + k + 1;
            for (std::int64_t i = 0; i < n; ++i) {
                image[i] = factors[k] * dot(n, corner + i * stride, v);
            }
            add_scaled(n, -factors[k] / 2 * dot(n, image, v), v, image);
            for (std::int64_t i = 0; i < n; ++i) {
                const double of_image = v[i], of_v = image[i];
                double* const row = corner + i * stride;
                each<double>(n, [&](auto kind, std::int64_t j) {
                    kind.put(row + j, kind.get(row + j) - kind.get(image + j) * of_image -
                                          kind.get(v + j) * of_v);
                });
            }
        }
    }

    // The rows of the product of the reflections, last to first.
    void accumulate_reflections() const {
        for (std::int64_t i = 0; i < order; ++i) {
            std::fill(rows + i * stride, rows + i * stride + order, 0.0);
            rows[i * stride + i] = 1;
        }
        // Row i of X becomes row i of X (I - f v v'); X is the transpose of the product so far.
        for (std::int64_t k = order - 2; k >= 0; --k) {
            const double* const v = matrix + k * stride + k + 1;
            const std::int64_t n = order - k - 1;
            for (std::int64_t i = k + 1; factors[k] != 0 && i < order; ++i) {
                double* const row = rows + i * stride + k + 1;
                add_scaled(n, -factors[k] * dot(n, row, v), v, row);
            }
        }
    }

    bool diagonalise() const {
        constexpr double eps = std::numeric_limits<double>::epsilon();
        double* const d = values;
        double* const e = beside;
        std::int64_t high = order - 1;
        std::int64_t left = 60 * order;
        while (high > 0) {
            std::int64_t low = high;
            while (low > 0 &&
                   std::abs(e[low - 1]) > eps * (std::abs(d[low - 1]) + std::abs(d[low]) + eps)) {
                --low;
            }
            if (low == high) {
                --high;
                continue;
            }
            if (--left < 0) {
                return false;
            }
            const double half = (d[high - 1] - d[high]) / 2, last = e[high - 1];
            const double root = std::hypot(half, last);
            const double shift = d[high] - last / (half + (half < 0 ? -root : root)) * last;
            double x = d[low] - shift, z = e[low];
            for (std::int64_t k = low; k < high; ++k) {
                const double size = std::hypot(x, z);
                const double c = size > 0 ? x / size : 1, s = size > 0 ? z / size : 0;
                if (k > low) {
                    e[k - 1] = size;
                }
                const double above = d[k], below = d[k + 1], beside_k = e[k];
                d[k] = c * c * above + 2 * c * s * beside_k + s * s * below;
                d[k + 1] = s * s * above - 2 * c * s * beside_k + c * c * below;
                e[k] = (c * c - s * s) * beside_k + c * s * (below - above);
                if (k + 1 < high) {
                    x = e[k];
                    z = s * e[k + 1];
                    e[k + 1] *= c;
                }
                double* const one = rows + k * stride;
                double* const other = one + stride;
                each<double>(order, [&](auto kind, std::int64_t j) {
                    const auto first = kind.get(one + j), second = kind.get(other + j);
                    kind.put(one + j, first * c + second * s);
                    kind.put(other + j, second * c - first * s);
                });
            }
        }
        return true;
    }
};
