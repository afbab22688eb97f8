// Vectors of the instruction set a file is compiled for, and the exponential.
//
// Included once per instruction set, inside its own namespace, with HEAT_VECTOR_BYTES set: GCC's
// vector extension turns the same text into SSE, AVX2, AVX-512 or NEON instructions.

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float Vector __attribute__((vector_size(HEAT_VECTOR_BYTES)));
    typedef std::int32_t Integers __attribute__((vector_size(HEAT_VECTOR_BYTES)));
    static constexpr std::int64_t lanes = HEAT_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
    typedef double Vector __attribute__((vector_size(HEAT_VECTOR_BYTES)));
    static constexpr std::int64_t lanes = HEAT_VECTOR_BYTES / 8;
};

template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
HEAT_INLINE Vector<T> load(const T* source) {
    Vector<T> value;
    __builtin_memcpy(&value, source, sizeof value);
    return value;
}

template <class T>
HEAT_INLINE void store(T* target, Vector<T> value) {
    __builtin_memcpy(target, &value, sizeof value);
}

template <class T>
HEAT_INLINE Vector<T> broadcast(T value) {
    return value - Vector<T>{};
}

template <class T>
HEAT_INLINE T sum(Vector<T> value) {
    T total = 0;
    for (int lane = 0; lane < Simd<T>::lanes; ++lane) {
        total += value[lane];
    }
    return total;
}

template <class T>
HEAT_INLINE T largest(Vector<T> value) {
    T found = value[0];
    for (int lane = 1; lane < Simd<T>::lanes; ++lane) {
        found = value[lane] > found ? value[lane] : found;
    }
    return found;
}

// exp in float32, within about one unit in the last place; 0 below -87.3 (the smallest normal
// number), the result of 88 above that. exp(r) = 1 + r + r^2 q(r) on |r| <= ln(2) / 2, with q a
// least-squares fit reweighted towards the largest error (5e-11 in exact arithmetic).
HEAT_INLINE Vector<float> exponential(Vector<float> x) {
    using V = Vector<float>;
    using I = Simd<float>::Integers;
    const V low = broadcast(-87.33654f), high = broadcast(88.0f);
    const I vanishes = x < low;
    V clamped = x < low ? low : x;  // keeps NaN
    clamped = clamped > high ? high : clamped;
    const V magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const V shifted = clamped * 1.44269504f + magic;
    const V whole = shifted - magic;
    V r = clamped - whole * 0.693145751953125f;  // ln 2 in two parts, the first one short
    r = r - whole * 1.42860676e-6f;
    V q = broadcast(1.9918385e-4f);
    q = q * r + 1.39460736e-3f;
    q = q * r + 8.33326392e-3f;
    q = q * r + 4.16662693e-2f;
    q = q * r + 1.66666672e-1f;
    q = q * r + 0.5f;
    V y = (q * r) * r + r;
    y = y + 1.0f;
    // The integer sits in the low mantissa bits of `shifted`; move it to y's exponent.
    const I power = (I)shifted << 23;
    const I bits = (I)y + power;
    return (V)(bits & ~vanishes);
}

HEAT_INLINE Vector<double> exponential(Vector<double> x) {
    Vector<double> y{};
    for (int lane = 0; lane < Simd<double>::lanes; ++lane) {
        y[lane] = std::exp(x[lane]);
    }
    return y;
}
