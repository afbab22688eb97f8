// Tall matrices [M x s] of any strides: Gram matrices, products with small matrices, A R^-1.
//
// A tile of rows is copied to float64 once, small enough for the second-level cache; all that needs
// the rows happens there, so a pass reads the matrix once and writes its result once. Gram matrices
// are summed over chunks of rows whose number depends on the shape alone, and the chunks in order:
// results depend neither on timing nor on the number of threads.

constexpr std::int64_t double_panel = panel_columns<double>;

// One matrix. Results are written to matrices whose columns lie side by side (column == 1).
template <class T>
struct Tall {
    T* data;
    std::int64_t rows, count, row, column;
};

template <class T>
Tall<T> tall(const Array& array, std::int64_t index) {
    return {array.at<T>(index), array.shape[1], array.shape[2], array.stride[1], array.stride[2]};
}

// Hands out parts of a workspace; without one it only counts.
struct Scratch {
    double* base;
    std::int64_t used = 0;

    double* take(std::int64_t count) {
        double* const found = base == nullptr ? nullptr : base + used;
        used += (count + 7) / 8 * 8;
        return found;
    }
};

// Numbers from one row of a tile or a small matrix to the next: whole cache lines, an odd number of
// them, so that a column does not fall on a few sets of the cache.
inline std::int64_t leading(std::int64_t count) {
    constexpr std::int64_t unit = std::max<std::int64_t>(8, double_panel);
    const std::int64_t whole = (count + unit - 1) / unit * unit;
    return whole / 8 % 2 == 0 ? whole + 8 : whole;
}

// Rows of a tile: about 64 KiB, at least as many as a Gram matrix needs for its additions.
inline std::int64_t tile_rows(std::int64_t count) {
    return std::clamp<std::int64_t>((1 << 13) / count / 16 * 16, 64, 256);
}

inline std::int64_t chunk_count(std::int64_t rows, std::int64_t left, std::int64_t right) {
    const std::int64_t wanted = rows * std::max(left, right) / (1 << 18);
    const std::int64_t most = std::clamp<std::int64_t>((1 << 21) / (left * right), 1, 32);
    return std::clamp<std::int64_t>(wanted, 1, most);
}

// Calls body(chunk, worker, first, rows) for every tile of rows, chunks in parallel.
template <class Body>
void for_tiles(std::int64_t rows, std::int64_t tile, std::int64_t chunks, int threads, Body body) {
    const std::int64_t tiles = (rows + tile - 1) / tile;
    parallel_for(chunks, threads, [&](std::int64_t chunk, int worker) {
        const std::int64_t stop = tiles * (chunk + 1) / chunks;
        for (std::int64_t item = tiles * chunk / chunks; item < stop; ++item) {
            const std::int64_t first = item * tile;
            body(chunk, worker, first, std::min(tile, rows - first));
        }
    });
}

// target[i * stride + j] = scale[j or i] * source(i, j), for n x m numbers, in float64. `by_row`:
// whether the scale goes with i.
template <class T>
void copy_tile(const T* source, std::int64_t row, std::int64_t column, std::int64_t n,
               std::int64_t m, const double* scale, bool by_row, double* target,
               std::int64_t stride) {
    constexpr std::int64_t side = 8;
    if (column == 1) {
        for (std::int64_t i = 0; i < n; ++i) {
            const T* const from = source + i * row;
            double* const to = target + i * stride;
            for (std::int64_t j = 0; j < m; ++j) {
                to[j] = static_cast<double>(from[j]);
            }
        }
    } else {
        // Eight columns at a time: each is read along its memory, and whole lines are written.
        for (std::int64_t low = 0; low < m; low += side) {
            const std::int64_t high = std::min(m, low + side);
            for (std::int64_t i = 0; i < n; ++i) {
                for (std::int64_t j = low; j < high; ++j) {
                    target[i * stride + j] = static_cast<double>(source[i * row + j * column]);
                }
            }
        }
    }
    if (scale != nullptr) {
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t j = 0; j < m; ++j) {
                target[i * stride + j] *= scale[by_row ? i : j];
            }
        }
    }
}

// Rows `first..` of a matrix as a tile [rows x count], zero up to a whole vector.
template <class T>
void pack_rows(const Tall<T>& matrix, std::int64_t first, std::int64_t rows, const double* scale,
               double* tile, std::int64_t stride) {
    copy_tile(matrix.data + first * matrix.row, matrix.row, matrix.column, rows, matrix.count,
              scale, false, tile, stride);
    for (std::int64_t i = 0; i < rows; ++i) {
        std::fill(tile + i * stride + matrix.count, tile + (i + 1) * stride, 0.0);
    }
}

// The same, transposed: [count x rows], zero up to `stride`.
template <class T>
void pack_columns(const Tall<T>& matrix, std::int64_t first, std::int64_t rows,
                  const double* scale, double* tile, std::int64_t stride) {
    copy_tile(matrix.data + first * matrix.row, matrix.column, matrix.row, matrix.count, rows,
              scale, true, tile, stride);
    for (std::int64_t j = 0; j < matrix.count; ++j) {
        std::fill(tile + j * stride + rows, tile + (j + 1) * stride, 0.0);
    }
}

// Write a tile to the rows `first..`; the tile keeps what was written.
template <class T>
void unpack_rows(double* tile, std::int64_t stride, std::int64_t first, std::int64_t rows,
                 const Tall<T>& matrix) {
    for (std::int64_t i = 0; i < rows; ++i) {
        double* const from = tile + i * stride;
        T* const to = matrix.data + (first + i) * matrix.row;
        for (std::int64_t j = 0; j < matrix.count; ++j) {
            to[j] = static_cast<T>(from[j]);
            from[j] = static_cast<double>(to[j]);
        }
    }
}

// sums [left_count x right_count] += L' R of two tiles; of their upper triangle if symmetric.
inline void add_gram(const double* left, std::int64_t left_stride, std::int64_t left_count,
                     const double* right, std::int64_t right_stride, std::int64_t right_count,
                     std::int64_t rows, bool symmetric, double* sums, std::int64_t stride) {
    constexpr std::int64_t lanes = Simd<double>::lanes;
    for (std::int64_t low = 0; low < right_count; low += double_panel) {
        const std::int64_t columns = right_count - low > lanes ? double_panel : lanes;
        const std::int64_t above =
            symmetric ? std::min(left_count, low + double_panel) : left_count;
        const Product<double> product = {
            left, 1, left_stride, rows_in_place(right + low, right_stride), rows};
        multiply(above, columns, &product, 1, sums + low, stride, true);
    }
}

// Partial sums of a Gram matrix, one for each chunk of rows.
struct GramSums {
    std::int64_t left, right, stride, chunks;
    double* sums;

    GramSums(Scratch& scratch, std::int64_t rows, std::int64_t left_count,
             std::int64_t right_count)
        : left(left_count),
          right(right_count),
          stride(leading(right_count)),
          chunks(chunk_count(rows, left_count, right_count)),
          sums(scratch.take(chunks * left * stride)) {}

    double* of(std::int64_t chunk) const { return sums + chunk * left * stride; }

    void clear() const { std::fill(sums, sums + chunks * left * stride, 0.0); }

    // The total, to `result` with rows `leading(right)` apart; that may be `sums` itself.
    void total(bool symmetric, double* result) const {
        if (result != sums) {
            std::copy(sums, sums + left * stride, result);
        }
        for (std::int64_t chunk = 1; chunk < chunks; ++chunk) {
            const double* const part = of(chunk);
            for (std::int64_t index = 0; index < left * stride; ++index) {
                result[index] += part[index];
            }
        }
        for (std::int64_t i = 0; symmetric && i < left; ++i) {
            for (std::int64_t j = 0; j < i; ++j) {
                result[i * stride + j] = result[j * stride + i];
            }
        }
    }
};

// A' A and A' B. Where both are wanted A is read once.
template <class T>
struct Grams {
    std::int64_t tile, left_stride, right_stride;
    GramSums own, cross;
    double* tiles;

    // right_count 0: A' A alone.
    Grams(Scratch& scratch, std::int64_t rows, std::int64_t left_count, std::int64_t right_count,
          int threads)
        : tile(tile_rows(left_count)),
          left_stride(leading(left_count)),
          right_stride(right_count == 0 ? 0 : leading(right_count)),
          own(scratch, rows, left_count, left_count),
          cross(scratch, rows, left_count, std::max<std::int64_t>(1, right_count)),
          tiles(scratch.take(threads * tile * (left_stride + right_stride))) {}

    // Null: not wanted. `scale [left_count]` multiplies the columns of A; null: one.
    void run(const Tall<T>& left, const double* scale, const Tall<T>* right, int threads,
             double* own_result, double* cross_result) const {
        own.clear();
        cross.clear();
        const std::int64_t chunks = own_result == nullptr ? cross.chunks
                                    : right == nullptr    ? own.chunks
                                                          : std::min(own.chunks, cross.chunks);
        for_tiles(left.rows, tile, chunks, threads,
                  [&](std::int64_t chunk, int worker, std::int64_t first, std::int64_t rows) {
            double* const a = tiles + worker * tile * (left_stride + right_stride);
            pack_rows(left, first, rows, scale, a, left_stride);
            if (own_result != nullptr) {
                add_gram(a, left_stride, left.count, a, left_stride, left.count, rows, true,
                         own.of(chunk), own.stride);
            }
            if (right != nullptr) {
                double* const b = a + tile * left_stride;
                pack_rows(*right, first, rows, nullptr, b, right_stride);
                add_gram(a, left_stride, left.count, b, right_stride, right->count, rows, false,
                         cross.of(chunk), cross.stride);
            }
        });
        if (own_result != nullptr) {
            own.total(true, own_result);
        }
        if (cross_result != nullptr) {
            cross.total(false, cross_result);
        }
    }
};

// B = A C for a small matrix C, and B' B of what was written in the same pass. B may be A.
template <class T>
struct Combination {
    std::int64_t tile, inner, outer, inner_stride, outer_stride;
    GramSums gram;
    double *small, *tiles;

    Combination(Scratch& scratch, std::int64_t rows, std::int64_t inner_count,
                std::int64_t outer_count, int threads)
        : tile(tile_rows(std::max(inner_count, outer_count))),
          inner(inner_count),
          outer(outer_count),
          inner_stride(leading(inner_count)),
          outer_stride(leading(outer_count)),
          gram(scratch, rows, outer_count, outer_count),
          small(scratch.take(inner_count * padded<double>(outer_count))),
          tiles(scratch.take(threads * tile * (inner_stride + outer_stride))) {}

    // C's rows are `stride` apart. `gram_result` null: not wanted.
    void run(const Tall<T>& source, const double* factor, std::int64_t stride, int threads,
             const Tall<T>& result, double* gram_result) const {
        for (std::int64_t low = 0; low < outer; low += double_panel) {
            for (std::int64_t i = 0; i < inner; ++i) {
                double* const to = small + low * inner + i * double_panel;
                for (std::int64_t j = 0; j < double_panel; ++j) {
                    to[j] = low + j < outer ? factor[i * stride + low + j] : 0;
                }
            }
        }
        gram.clear();
        for_tiles(source.rows, tile, gram.chunks, threads,
                  [&](std::int64_t chunk, int worker, std::int64_t first, std::int64_t rows) {
            double* const a = tiles + worker * tile * (inner_stride + outer_stride);
            double* const b = a + tile * inner_stride;
            pack_rows(source, first, rows, nullptr, a, inner_stride);
            const Product<double> product = {
                a, inner_stride, 1, {small, double_panel, double_panel * inner}, inner};
            multiply(rows, padded<double>(outer), &product, 1, b, outer_stride, false);
            unpack_rows(b, outer_stride, first, rows, result);
            if (gram_result != nullptr) {
                add_gram(b, outer_stride, outer, b, outer_stride, outer, rows, true,
                         gram.of(chunk), gram.stride);
            }
        });
        if (gram_result != nullptr) {
            gram.total(true, gram_result);
        }
    }
};

// Q = A R^-1 by substitution, and Q' Q of what was written in the same pass. Q may be A.
//
// A product with R^-1 would be simpler, but its error grows with the condition of R, and what the
// substitution leaves is A - Q R of the size of a rounding whatever R is.
template <class T>
struct Substitution {
    std::int64_t tile, count, column_stride, row_stride, stride;
    GramSums gram;
    double *minus, *inverse, *tiles;

    Substitution(Scratch& scratch, std::int64_t rows, std::int64_t columns, int threads)
        : tile(tile_rows(columns)),
          count(columns),
          column_stride(tile + 8),
          row_stride(leading(columns)),
          stride(leading(columns)),
          gram(scratch, rows, columns, columns),
          minus(scratch.take(columns * stride)),
          inverse(scratch.take(columns)),
          tiles(scratch.take(threads * (columns * column_stride + tile * row_stride))) {}

    // R's rows are `leading(count)` apart.
    void run(const Tall<T>& source, const double* scale, const double* upper, int threads,
             const Tall<T>& result, double* gram_result) const {
        for (std::int64_t i = 0; i < count; ++i) {
            inverse[i] = 1 / upper[i * stride + i];
            for (std::int64_t j = 0; j < count; ++j) {
                minus[i * stride + j] = -upper[i * stride + j];
            }
        }
        gram.clear();
        for_tiles(source.rows, tile, gram.chunks, threads,
                  [&](std::int64_t chunk, int worker, std::int64_t first, std::int64_t rows) {
            double* const x = tiles + worker * (count * column_stride + tile * row_stride);
            double* const q = x + count * column_stride;
            pack_columns(source, first, rows, scale, x, column_stride);
            for (std::int64_t low = 0; low < rows; low += double_panel) {
                substitute(x + low);
            }
            transpose(x, rows, q);
            unpack_rows(q, row_stride, first, rows, result);
            add_gram(q, row_stride, count, q, row_stride, count, rows, true, gram.of(chunk),
                     gram.stride);
        });
        gram.total(true, gram_result);
    }

    // Two vectors of rows of A, in place: blocks of columns from left to right.
    void substitute(double* x) const {
        using V = Vector<double>;
        constexpr std::int64_t lanes = Simd<double>::lanes;
        for (std::int64_t low = 0; low < count; low += block_rows) {
            const int width = static_cast<int>(std::min<std::int64_t>(block_rows, count - low));
            double* const own = x + low * column_stride;
            const Product<double> before = {
                minus + low, 1, stride, {x, column_stride, double_panel}, low};
            Blocks<double, block_rows, 2>::run(width, &before, 1, 0, 0, own, column_stride, true);
            for (std::int64_t j = 0; j < width; ++j) {
                double* const at = own + j * column_stride;
                V left = load(at), right = load(at + lanes);
                for (std::int64_t i = 0; i < j; ++i) {
                    const V factor = broadcast(minus[(low + i) * stride + low + j]);
                    left += factor * load(own + i * column_stride);
                    right += factor * load(own + i * column_stride + lanes);
                }
                const V factor = broadcast(inverse[low + j]);
                store(at, left * factor);
                store(at + lanes, right * factor);
            }
        }
    }

    void transpose(const double* x, std::int64_t rows, double* q) const {
        constexpr std::int64_t side = 8;
        for (std::int64_t low = 0; low < count; low += side) {
            const std::int64_t high = std::min(count, low + side);
            for (std::int64_t i = 0; i < rows; ++i) {
                for (std::int64_t j = low; j < high; ++j) {
                    q[i * row_stride + j] = x[j * column_stride + i];
                }
            }
        }
        for (std::int64_t i = 0; i < rows; ++i) {
            std::fill(q + i * row_stride + count, q + (i + 1) * row_stride, 0.0);
        }
    }
};

// The largest magnitude of every column; false if a number is not finite.
template <class T>
bool column_peaks(const Tall<T>& matrix, double* peaks) {
    std::fill(peaks, peaks + matrix.count, 0.0);
    bool finite = true;
    for (std::int64_t i = 0; i < matrix.rows; ++i) {
        for (std::int64_t j = 0; j < matrix.count; ++j) {
            const double value = std::abs(
                static_cast<double>(matrix.data[i * matrix.row + j * matrix.column]));
            finite = finite && value <= std::numeric_limits<double>::max();
            peaks[j] = std::max(peaks[j], value);
        }
    }
    return finite;
}
