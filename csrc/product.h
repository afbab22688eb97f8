// Small matrix products whose factors sit in cache: C [m x n] (+)= A B (+ A2 B2).
//
// A is read through two strides, so a transposed factor costs nothing: its numbers are broadcast.
// B lies in panels of `panel` columns: either packed (`pack_transposed`) or the rows of an array in
// place. A block of C stays in registers over the whole inner dimension, of both products.

template <class T>
struct Panels {
    const T* data;
    std::int64_t row;    // from one inner index to the next
    std::int64_t panel;  // from one panel of columns to the next
};

template <class T>
struct Product {
    const T* a;
    std::int64_t a_row, a_inner;
    Panels<T> b;
    std::int64_t inner;
};

template <class T>
constexpr std::int64_t panel_columns = 2 * Simd<T>::lanes;

// Rows of C in registers: 2 vectors each, and the rest of the 16 (32) registers for A and B.
constexpr int block_rows = HEAT_VECTOR_BYTES == 64 ? 12 : 6;

template <class T, int Rows, int Vectors>
HEAT_INLINE void block(const Product<T>* products, int count, std::int64_t row, std::int64_t panel,
                       T* c, std::int64_t c_row, bool add) {
    using V = Vector<T>;
    constexpr std::int64_t lanes = Simd<T>::lanes;
    V sums[Rows][Vectors];
    for (int i = 0; i < Rows; ++i) {
        for (int v = 0; v < Vectors; ++v) {
            sums[i][v] = add ? load(c + i * c_row + v * lanes) : V{};
        }
    }
    for (int p = 0; p < count; ++p) {
        const Product<T>& product = products[p];
        const T* a = product.a + row * product.a_row;
        const T* b = product.b.data + panel * product.b.panel;
        const std::int64_t a_row = product.a_row;
        for (std::int64_t k = 0; k < product.inner; ++k) {
            V columns[Vectors];
            for (int v = 0; v < Vectors; ++v) {
                columns[v] = load(b + v * lanes);
            }
            for (int i = 0; i < Rows; ++i) {
                const V factor = broadcast(a[i * a_row]);
                for (int v = 0; v < Vectors; ++v) {
                    sums[i][v] += factor * columns[v];
                }
            }
            a += product.a_inner;
            b += product.b.row;
        }
    }
    for (int i = 0; i < Rows; ++i) {
        for (int v = 0; v < Vectors; ++v) {
            store(c + i * c_row + v * lanes, sums[i][v]);
        }
    }
}

template <class T, int Rows, int Vectors>
struct Blocks {
    static void run(int rows, const Product<T>* products, int count, std::int64_t row,
                    std::int64_t panel, T* c, std::int64_t c_row, bool add) {
        if (rows == Rows) {
            block<T, Rows, Vectors>(products, count, row, panel, c, c_row, add);
        } else {
            Blocks<T, Rows - 1, Vectors>::run(rows, products, count, row, panel, c, c_row, add);
        }
    }
};

template <class T, int Vectors>
struct Blocks<T, 0, Vectors> {
    static void run(int, const Product<T>*, int, std::int64_t, std::int64_t, T*, std::int64_t,
                    bool) {}
};

// n must be a multiple of the lanes; C's rows hold that many numbers.
template <class T>
void multiply(std::int64_t m, std::int64_t n, const Product<T>* products, int count, T* c,
              std::int64_t c_row, bool add) {
    constexpr std::int64_t columns = panel_columns<T>;
    for (std::int64_t low = 0, panel = 0; low < n; low += columns, ++panel) {
        const bool full = n - low >= columns;
        for (std::int64_t row = 0; row < m; row += block_rows) {
            const int rows = static_cast<int>(std::min<std::int64_t>(block_rows, m - row));
            T* corner = c + row * c_row + low;
            if (full) {
                Blocks<T, block_rows, 2>::run(rows, products, count, row, panel, corner, c_row,
                                              add);
            } else {
                Blocks<T, block_rows, 1>::run(rows, products, count, row, panel, corner, c_row,
                                              add);
            }
        }
    }
}

// The rows of an array [k x n] as B.
template <class T>
HEAT_INLINE Panels<T> rows_in_place(const T* data, std::int64_t row) {
    return {data, row, panel_columns<T>};
}

template <class T>
HEAT_INLINE std::int64_t padded(std::int64_t columns) {
    return (columns + panel_columns<T> - 1) / panel_columns<T> * panel_columns<T>;
}

// The transpose of an array [n x k] as B [k x n], zero in the columns that fill the last panel.
// `target` holds padded(n) * k numbers.
template <class T>
Panels<T> pack_transposed(const T* source, std::int64_t row, std::int64_t n, std::int64_t k,
                          T* target) {
    constexpr std::int64_t columns = panel_columns<T>;
    for (std::int64_t low = 0; low < n; low += columns) {
        T* panel = target + low * k;
        const std::int64_t count = std::min<std::int64_t>(columns, n - low);
        for (std::int64_t column = 0; column < columns; ++column) {
            if (column < count) {
                const T* values = source + (low + column) * row;
                for (std::int64_t inner = 0; inner < k; ++inner) {
                    panel[inner * columns + column] = values[inner];
                }
            } else {
                for (std::int64_t inner = 0; inner < k; ++inner) {
                    panel[inner * columns + column] = 0;
                }
            }
        }
    }
    return {target, columns, columns * k};
}
