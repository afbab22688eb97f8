// Row-wise operations that plain torch does in many passes: norms, rotation, gated activations.
//
// Formulas: kernels/norm/reference.py, kernels/rotary/reference.py, kernels/gated/reference.py.

// A loop body is written once, for `lanes` numbers (Wide) and for one (Narrow, the tail of a row).
template <class T>
struct Wide {
    using Value = Vector<T>;
    static HEAT_INLINE Value get(const T* source) { return load(source); }
    static HEAT_INLINE void put(T* target, Value value) { store(target, value); }
};

template <class T>
struct Narrow {
    using Value = T;
    static HEAT_INLINE Value get(const T* source) { return *source; }
    static HEAT_INLINE void put(T* target, Value value) { *target = value; }
};

template <class T, class Body>
HEAT_INLINE void each(std::int64_t count, Body body) {
    std::int64_t j = 0;
    for (; j + Simd<T>::lanes <= count; j += Simd<T>::lanes) {
        body(Wide<T>{}, j);
    }
    for (; j < count; ++j) {
        body(Narrow<T>{}, j);
    }
}

// The sum of body(kind, j) over j.
template <class T, class Body>
HEAT_INLINE T total(std::int64_t count, Body body) {
    Vector<T> sums{};
    std::int64_t j = 0;
    for (; j + Simd<T>::lanes <= count; j += Simd<T>::lanes) {
        sums += body(Wide<T>{}, j);
    }
    T result = sum<T>(sums);
    for (; j < count; ++j) {
        result += body(Narrow<T>{}, j);
    }
    return result;
}

// Rows are handed out a few at a time: about this many numbers.
constexpr std::int64_t numbers_per_item = 1 << 14;

// Calls body(batch, row) for all rows of an array [B, S, ..] with `width` numbers each.
template <class Body>
void for_rows(std::int64_t batch, std::int64_t rows, std::int64_t width, int threads, Body body) {
    const std::int64_t all = batch * rows;
    const std::int64_t step = std::max<std::int64_t>(1, numbers_per_item / width);
    parallel_for((all + step - 1) / step, threads, [&](std::int64_t item, int) {
        for (std::int64_t row = item * step; row < std::min(all, (item + 1) * step); ++row) {
            body(row / rows, row % rows);
        }
    });
}

// w + offset, or 1 where the norm has no weight.
template <class T, class Kind>
HEAT_INLINE typename Kind::Value weight_at(const Norm& norm, Kind, std::int64_t j) {
    using Value = typename Kind::Value;
    const T* const weight = static_cast<const T*>(norm.weight.data);
    if (weight == nullptr) {
        return Value{} + T(1);
    }
    return Kind::get(weight + j) + static_cast<T>(norm.weight_offset);
}

template <class T>
void norm_forward(const NormForward& call) {
    const Norm& norm = call.norm;
    const std::int64_t width = call.x.shape[2];
    const T* const bias = static_cast<const T*>(norm.bias.data);
    for_rows(call.x.shape[0], call.x.shape[1], width, norm.threads,
             [&](std::int64_t batch, std::int64_t row) {
        const T* const x = call.x.at<T>(batch, row);
        T* const y = call.y.at<T>(batch, row);
        T mean = 0;
        if (norm.centered) {
            mean = total<T>(width, [&](auto kind, std::int64_t j) { return kind.get(x + j); });
            mean /= static_cast<T>(width);
        }
        const T energy = total<T>(width, [&](auto kind, std::int64_t j) {
            const auto centred = kind.get(x + j) - mean;
            return centred * centred;
        });
        const T inverse =
            1 / std::sqrt(energy / static_cast<T>(width) + static_cast<T>(norm.eps));
        const bool keep = call.normalised.data != nullptr;
        T* const kept = keep ? call.normalised.at<T>(batch, row) : nullptr;
        each<T>(width, [&](auto kind, std::int64_t j) {
            const auto value = (kind.get(x + j) - mean) * inverse;
            if (keep) {
                kind.put(kept + j, value);
            }
            auto result = value * weight_at<T>(norm, kind, j);
            if (bias != nullptr) {
                result += kind.get(bias + j);
            }
            kind.put(y + j, result);
        });
        if (keep) {
            *call.inverse.at<T>(batch, row) = inverse;
        }
    });
}

template <class T>
void norm_tangent(const NormTangent& call) {
    const Norm& norm = call.norm;
    const std::int64_t width = call.x_dot.shape[2];
    const T size = static_cast<T>(width);
    for_rows(call.x_dot.shape[0], call.x_dot.shape[1], width, norm.threads,
             [&](std::int64_t batch, std::int64_t row) {
        const T* const x = call.x_dot.at<T>(batch, row);
        const T* const n = call.normalised.at<T>(row);
        T* const y = call.y_dot.at<T>(batch, row);
        T mean = 0;
        if (norm.centered) {
            mean = total<T>(width, [&](auto kind, std::int64_t j) { return kind.get(x + j); });
            mean /= size;
        }
        const T along = total<T>(width, [&](auto kind, std::int64_t j) {
            return (kind.get(x + j) - mean) * kind.get(n + j);
        }) / size;
        const T inverse = *call.inverse.at<T>(row);
        each<T>(width, [&](auto kind, std::int64_t j) {
            const auto moved = kind.get(x + j) - mean - kind.get(n + j) * along;
            kind.put(y + j, moved * inverse * weight_at<T>(norm, kind, j));
        });
    });
}

template <class T>
void norm_adjoint_tangent(const NormAdjointTangent& call) {
    const Norm& norm = call.norm;
    const std::int64_t width = call.x_dot.shape[2];
    const T size = static_cast<T>(width);
    for_rows(call.x_dot.shape[0], call.x_dot.shape[1], width, norm.threads,
             [&](std::int64_t batch, std::int64_t row) {
        const T* const x = call.x_dot.at<T>(batch, row);
        const T* const y = call.y_bar_dot.at<T>(batch, row);
        const T* const n = call.normalised.at<T>(row);
        const T* const u = call.pulled.at<T>(row);
        T* const result = call.result.at<T>(batch, row);
        T x_mean = 0, y_mean = 0;
        if (norm.centered) {
            x_mean = total<T>(width, [&](auto kind, std::int64_t j) { return kind.get(x + j); });
            y_mean = total<T>(width, [&](auto kind, std::int64_t j) {
                return kind.get(y + j) * weight_at<T>(norm, kind, j);
            });
            x_mean /= size;
            y_mean /= size;
        }
        const T a = total<T>(width, [&](auto kind, std::int64_t j) {
            return (kind.get(x + j) - x_mean) * kind.get(n + j);
        }) / size;
        const T cross = total<T>(width, [&](auto kind, std::int64_t j) {
            return (kind.get(x + j) - x_mean) * kind.get(u + j);
        }) / size;
        const T radial = total<T>(width, [&](auto kind, std::int64_t j) {
            return (kind.get(y + j) * weight_at<T>(norm, kind, j) - y_mean) * kind.get(n + j);
        }) / size;
        const T inverse = *call.inverse.at<T>(row), along = *call.along.at<T>(row);
        const T of_pulled = inverse * a, of_moved = inverse * along;
        const T of_normalised = inverse * (3 * a * along - cross) - radial;
        each<T>(width, [&](auto kind, std::int64_t j) {
            const auto moved = kind.get(x + j) - x_mean;
            const auto pulled_dot = kind.get(y + j) * weight_at<T>(norm, kind, j) - y_mean;
            const auto value = pulled_dot - kind.get(u + j) * of_pulled - moved * of_moved +
                               kind.get(n + j) * of_normalised;
            kind.put(result + j, value * inverse);
        });
    });
}

template <class T>
void rotate(const Rotation& call) {
    const std::int64_t batch = call.x.shape[0], rows = call.x.shape[1];
    const std::int64_t heads = call.x.shape[2], depth = call.x.shape[3];
    const std::int64_t turned = call.cos.data == nullptr ? 0 : call.cos.shape[1];
    const std::int64_t half = turned / 2;
    const T sign = static_cast<T>(call.sign);
    for_rows(batch, rows, heads * depth, call.threads, [&](std::int64_t b, std::int64_t row) {
        const T* const cos = turned ? call.cos.at<T>(row) : nullptr;
        const T* const sin = turned ? call.sin.at<T>(row) : nullptr;
        for (std::int64_t head = 0; head < heads; ++head) {
            const T* const x = call.x.at<T>(b, row, head);
            T* const y = call.y.at<T>(b, row, head);
            if (call.interleaved) {
                for (std::int64_t j = 0; j < turned; j += 2) {
                    const T left = x[j], right = x[j + 1];
                    y[j] = left * cos[j] + sign * right * sin[j];
                    y[j + 1] = right * cos[j + 1] + sign * left * sin[j + 1];
                }
            } else {
                each<T>(half, [&](auto kind, std::int64_t j) {
                    const auto left = kind.get(x + j), right = kind.get(x + half + j);
                    kind.put(y + j, left * kind.get(cos + j) + right * kind.get(sin + j) * sign);
                    kind.put(y + half + j, right * kind.get(cos + half + j) +
                                               left * kind.get(sin + half + j) * sign);
                });
            }
            std::copy(x + turned, x + depth, y + turned);
        }
    });
}

template <class T>
void gate_tangent(const GateTangent& call) {
    const std::int64_t width = call.gate.shape[2];
    for_rows(call.gate.shape[0], call.gate.shape[1], width, call.threads,
             [&](std::int64_t batch, std::int64_t row) {
        const T* const value = call.value.at<T>(row);
        const T* const slope = call.slope.at<T>(row);
        const T* const gate = call.gate.at<T>(batch, row);
        const T* const up = call.up.at<T>(batch, row);
        T* const result = call.result.at<T>(batch, row);
        each<T>(width, [&](auto kind, std::int64_t j) {
            kind.put(result + j, kind.get(slope + j) * kind.get(gate + j) +
                                     kind.get(value + j) * kind.get(up + j));
        });
    });
}

template <class T>
void gate_adjoint_tangent(const GateAdjointTangent& call) {
    const std::int64_t width = call.gate.shape[2];
    for_rows(call.gate.shape[0], call.gate.shape[1], width, call.threads,
             [&](std::int64_t batch, std::int64_t row) {
        const T* const value = call.value.at<T>(row);
        const T* const slope = call.slope.at<T>(row);
        const T* const bend = call.bend.at<T>(row);
        const T* const mixed = call.mixed.at<T>(row);
        const T* const gate = call.gate.at<T>(batch, row);
        const T* const up = call.up.at<T>(batch, row);
        const T* const hidden = call.hidden.at<T>(batch, row);
        T* const gate_result = call.gate_result.at<T>(batch, row);
        T* const up_result = call.up_result.at<T>(batch, row);
        each<T>(width, [&](auto kind, std::int64_t j) {
            const auto h = kind.get(hidden + j), g = kind.get(gate + j);
            const auto m = kind.get(mixed + j);
            kind.put(gate_result + j, h * kind.get(slope + j) + kind.get(bend + j) * g +
                                          m * kind.get(up + j));
            kind.put(up_result + j, h * kind.get(value + j) + m * g);
        });
    });
}
