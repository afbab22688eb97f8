// Attention over a shared prefix and own rows, its tangent, and the tangent of its adjoint.
//
// Formulas and layout: kernels/branch_attention/reference.py and
// kernels/second_order_attention/reference.py. Keys come in two parts, the prefix (positions below
// `start`, shared by all branches or probes) and the own rows. Work goes by tiles of a few query
// rows against all the keys they see: a tile's scores stay in cache over every pass.

// A few query rows of one head and the columns of scores they need. Both parts begin at a panel.
struct Tile {
    std::int64_t row, rows;       // among the query rows
    std::int64_t position;        // of the first row
    std::int64_t prefix, own;     // first key of each part, counted within the part
    std::int64_t prefix_keys, own_keys;
    std::int64_t own_column;      // where the own part begins in a row of scores
    std::int64_t width;           // columns in use
};

// The keys a tile can see, and how its rows are laid out.
struct Layout {
    Masking masking;
    std::int64_t start, queries, first;  // first position of a query
    std::int64_t rows, width;            // of the largest tile

    template <class T>
    static Layout make(const Masking& masking, std::int64_t start, std::int64_t own,
                       std::int64_t queries) {
        Layout layout;
        layout.masking = masking;
        layout.start = start;
        layout.queries = queries;
        layout.first = start + own - queries;
        layout.width = padded<T>(start) + padded<T>(own);
        const std::int64_t rows = 65536 / static_cast<std::int64_t>(sizeof(T)) / layout.width;
        layout.rows = std::max<std::int64_t>(block_rows, rows / block_rows * block_rows);
        layout.rows = std::min<std::int64_t>(layout.rows, 24);
        layout.rows = std::min<std::int64_t>(layout.rows, queries);
        return layout;
    }

    std::int64_t tiles() const { return (queries + rows - 1) / rows; }

    std::int64_t first_key(std::int64_t position) const {
        return masking.window == 0 ? 0
                                   : std::max<std::int64_t>(0, position - masking.window + 1);
    }

    template <class T>
    Tile tile(std::int64_t index) const {
        constexpr std::int64_t columns = panel_columns<T>;
        Tile tile;
        tile.row = index * rows;
        tile.rows = std::min(rows, queries - tile.row);
        tile.position = first + tile.row;
        const std::int64_t low = first_key(tile.position);
        tile.prefix = std::min(low, start) / columns * columns;
        tile.prefix_keys = low < start ? start - tile.prefix : 0;
        tile.own = (std::max(low, start) - start) / columns * columns;
        tile.own_keys = tile.position + tile.rows - start - tile.own;
        tile.own_column = padded<T>(tile.prefix_keys);
        tile.width = tile.own_column + padded<T>(tile.own_keys);
        return tile;
    }

    // Overwrite the scores that a row must not see.
    template <class T>
    void hide(const Tile& tile, std::int64_t row, T* scores, T value) const {
        const std::int64_t position = tile.position + row, low = first_key(position);
        const std::int64_t below = std::max<std::int64_t>(0, low - tile.prefix);
        std::fill(scores, scores + std::min(below, tile.own_column), value);
        std::fill(scores + tile.prefix_keys, scores + tile.own_column, value);
        T* own = scores + tile.own_column;
        const std::int64_t hidden = std::max<std::int64_t>(0, low - start - tile.own);
        std::fill(own, own + hidden, value);
        std::fill(own + position - start - tile.own + 1, scores + tile.width, value);
    }
};

// One tile's scores A B' over both parts, B given as packed panels of each part.
template <class T>
HEAT_INLINE void over_keys(const Tile& tile, const T* a, std::int64_t a_row, std::int64_t depth,
                           const Panels<T>& prefix, const Panels<T>& own, T* scores,
                           std::int64_t width, const Product<T>* own_second = nullptr) {
    constexpr std::int64_t columns = panel_columns<T>;
    if (tile.prefix_keys > 0) {
        Panels<T> from = prefix;
        from.data += tile.prefix / columns * from.panel;
        const Product<T> product{a, a_row, 1, from, depth};
        multiply<T>(tile.rows, tile.own_column, &product, 1, scores, width, false);
    }
    Panels<T> from = own;
    from.data += tile.own / columns * from.panel;
    Product<T> products[2] = {{a, a_row, 1, from, depth}, {}};
    if (own_second != nullptr) {
        products[1] = *own_second;
        products[1].b.data += tile.own / columns * products[1].b.panel;
    }
    multiply<T>(tile.rows, tile.width - tile.own_column, products, own_second != nullptr ? 2 : 1,
                scores + tile.own_column, width, false);
}

// sum over keys of both parts of scores X, X as rows in place.
template <class T>
HEAT_INLINE void over_values(const Tile& tile, const T* scores, std::int64_t width,
                             const T* prefix, std::int64_t prefix_row, const T* own,
                             std::int64_t own_row, std::int64_t depth, T* result,
                             std::int64_t result_row, const Product<T>* third = nullptr) {
    Product<T> products[3];
    int count = 0;
    if (tile.prefix_keys > 0) {
        products[count++] = {scores, width, 1,
                             rows_in_place(prefix + tile.prefix * prefix_row, prefix_row),
                             tile.prefix_keys};
    }
    products[count++] = {scores + tile.own_column, width, 1,
                         rows_in_place(own + tile.own * own_row, own_row), tile.own_keys};
    if (third != nullptr) {
        products[count++] = *third;
    }
    multiply<T>(tile.rows, depth, products, count, result, result_row, false);
}

// Scaled and capped scores in place; with a cap also its slope w and bend w./U.
template <class T>
HEAT_INLINE void cap_row(T* scores, std::int64_t width, const Masking& masking, T* slope,
                         T* bend) {
    const T scale = static_cast<T>(masking.scale);
    if (masking.softcap == 0) {
        for (std::int64_t j = 0; j < width; j += Simd<T>::lanes) {
            store(scores + j, load(scores + j) * scale);
        }
        return;
    }
    const T cap = static_cast<T>(masking.softcap);
    for (std::int64_t j = 0; j < width; ++j) {
        const T ratio = std::tanh(scores[j] * scale / cap);
        scores[j] = cap * ratio;
        if (slope != nullptr) {
            slope[j] = 1 - ratio * ratio;
            bend[j] = -2 / cap * ratio * slope[j];
        }
    }
}

template <class T>
std::int64_t branch_attention_workspace(const BranchAttention& call) {
    const std::int64_t heads = call.query.shape[0], batch = call.query.shape[1];
    const std::int64_t depth = call.query.shape[4];
    const std::int64_t start = call.prefix_key.shape[1], own = call.key.shape[2];
    const Layout layout = Layout::make<T>(call.masking, start, own, call.query.shape[3]);
    const std::int64_t packed = heads * depth * (padded<T>(start) + batch * padded<T>(own));
    return packed + call.threads * layout.rows * layout.width;
}

template <class T>
void branch_attention(const BranchAttention& call) {
    using V = Vector<T>;
    constexpr std::int64_t lanes = Simd<T>::lanes;
    const std::int64_t heads = call.query.shape[0], batch = call.query.shape[1];
    const std::int64_t group = call.query.shape[2], queries = call.query.shape[3];
    const std::int64_t depth = call.query.shape[4];
    const std::int64_t start = call.prefix_key.shape[1], own = call.key.shape[2];
    const Layout layout = Layout::make<T>(call.masking, start, own, queries);

    T* const prefix_packed = static_cast<T*>(call.workspace);
    const std::int64_t prefix_size = padded<T>(start) * depth, own_size = padded<T>(own) * depth;
    T* const own_packed = prefix_packed + heads * prefix_size;
    T* const scratch = own_packed + heads * batch * own_size;

    parallel_for(heads * (batch + 1), call.threads, [&](std::int64_t item, int) {
        const std::int64_t head = item / (batch + 1), member = item % (batch + 1);
        if (member == batch) {
            pack_transposed(call.prefix_key.at<T>(head), call.prefix_key.stride[1], start, depth,
                            prefix_packed + head * prefix_size);
        } else {
            pack_transposed(call.key.at<T>(head, member), call.key.stride[2], own, depth,
                            own_packed + (head * batch + member) * own_size);
        }
    });

    const std::int64_t tiles = layout.tiles();
    parallel_for(heads * batch * group * tiles, call.threads, [&](std::int64_t item, int worker) {
        const Tile tile = layout.tile<T>(item % tiles);
        std::int64_t rest = item / tiles;
        const std::int64_t g = rest % group;
        rest /= group;
        const std::int64_t member = rest % batch, head = rest / batch;
        const std::int64_t width = layout.width;
        T* const scores = scratch + worker * layout.rows * width;
        constexpr std::int64_t columns = panel_columns<T>;
        const Panels<T> below{prefix_packed + head * prefix_size, columns, columns * depth};
        const Panels<T> mine{own_packed + (head * batch + member) * own_size, columns,
                             columns * depth};
        over_keys<T>(tile, call.query.at<T>(head, member, g, tile.row), call.query.stride[3],
                     depth, below, mine, scores, width);
        T totals[24];
        for (std::int64_t row = 0; row < tile.rows; ++row) {
            T* const line = scores + row * width;
            cap_row<T>(line, tile.width, call.masking, nullptr, nullptr);
            layout.hide(tile, row, line, -std::numeric_limits<T>::infinity());
            V peaks = load(line);
            for (std::int64_t j = lanes; j < tile.width; j += lanes) {
                const V next = load(line + j);
                peaks = next > peaks ? next : peaks;
            }
            const T peak = largest<T>(peaks);
            V sums{};
            for (std::int64_t j = 0; j < tile.width; j += lanes) {
                const V weight = exponential(load(line + j) - peak);
                store(line + j, weight);
                sums += weight;
            }
            totals[row] = sum<T>(sums);
            *call.normaliser.at<T>(head, member, g, tile.row + row) = peak + std::log(totals[row]);
        }
        T* const result = call.output.at<T>(head, member, g, tile.row);
        over_values<T>(tile, scores, width, call.prefix_value.at<T>(head),
                       call.prefix_value.stride[1], call.value.at<T>(head, member),
                       call.value.stride[2], depth, result, call.output.stride[3]);
        for (std::int64_t row = 0; row < tile.rows; ++row) {
            T* const line = result + row * call.output.stride[3];
            const T inverse = 1 / totals[row];
            for (std::int64_t j = 0; j < depth; j += lanes) {
                store(line + j, load(line + j) * inverse);
            }
        }
    });
}

// The packed transposes of one array's keys: prefix and own rows of every head.
template <class T>
struct PackedKeys {
    T* data;
    std::int64_t start, own, depth;

    static std::int64_t size(std::int64_t start, std::int64_t own, std::int64_t depth) {
        return (padded<T>(start) + padded<T>(own)) * depth;
    }

    void pack(const Array& source, std::int64_t head) const {
        T* const target = data + head * size(start, own, depth);
        pack_transposed(source.at<T>(head), source.stride[1], start, depth, target);
        pack_transposed(source.at<T>(head, start), source.stride[1], own, depth,
                        target + padded<T>(start) * depth);
    }

    Panels<T> prefix_panels(std::int64_t head) const {
        constexpr std::int64_t columns = panel_columns<T>;
        return {data + head * size(start, own, depth), columns, columns * depth};
    }

    Panels<T> own_panels(std::int64_t head) const {
        Panels<T> panels = prefix_panels(head);
        panels.data += padded<T>(start) * depth;
        return panels;
    }
};

// The softmax rows P of a tile from the log-sum-exp; with a cap also its slope and bend.
template <class T>
HEAT_INLINE void primal_weights(const Primal& primal, const Layout& layout, const Tile& tile,
                                const PackedKeys<T>& keys, std::int64_t head, std::int64_t g,
                                T* weights, T* slope, T* bend) {
    const std::int64_t width = layout.width;
    over_keys<T>(tile, primal.query.at<T>(head, g, tile.row), primal.query.stride[2], keys.depth,
                 keys.prefix_panels(head), keys.own_panels(head), weights, width);
    for (std::int64_t row = 0; row < tile.rows; ++row) {
        T* const line = weights + row * width;
        cap_row<T>(line, tile.width, primal.masking, slope + row * width, bend + row * width);
        const T normaliser = *primal.normaliser.at<T>(head, g, tile.row + row);
        for (std::int64_t j = 0; j < tile.width; j += Simd<T>::lanes) {
            store(line + j, exponential(load(line + j) - normaliser));
        }
        layout.hide(tile, row, line, T(0));
    }
}

// rowsum(P o S.) of one row, S. = w scale raw.
template <class T>
HEAT_INLINE T moved_mean(const T* weights, const T* raw, const T* slope, std::int64_t width,
                         const Masking& masking) {
    using V = Vector<T>;
    V sums{};
    for (std::int64_t j = 0; j < width; j += Simd<T>::lanes) {
        V term = load(weights + j) * load(raw + j);
        if (masking.softcap != 0) {
            term *= load(slope + j);
        }
        sums += term;
    }
    return sum<T>(sums) * static_cast<T>(masking.scale);
}

template <class T>
Layout primal_layout(const Primal& primal) {
    return Layout::make<T>(primal.masking, primal.start, primal.key.shape[1] - primal.start,
                           primal.query.shape[2]);
}

template <class T>
std::int64_t attention_tangent_workspace(const AttentionTangent& call) {
    const std::int64_t heads = call.query.shape[0], batch = call.query.shape[1];
    const std::int64_t depth = call.query.shape[4], start = call.primal.start;
    const std::int64_t own = call.primal.key.shape[1] - start;
    const Layout layout = primal_layout<T>(call.primal);
    const std::int64_t packed = heads * PackedKeys<T>::size(start, own, depth) +
                                heads * batch * padded<T>(own) * depth;
    return packed + call.threads * 4 * layout.rows * layout.width;
}

template <class T>
void attention_tangent(const AttentionTangent& call) {
    using V = Vector<T>;
    constexpr std::int64_t lanes = Simd<T>::lanes, columns = panel_columns<T>;
    const Primal& primal = call.primal;
    const std::int64_t heads = call.query.shape[0], batch = call.query.shape[1];
    const std::int64_t group = call.query.shape[2], depth = call.query.shape[4];
    const std::int64_t start = primal.start, own = primal.key.shape[1] - start;
    const Layout layout = primal_layout<T>(primal);
    const bool capped = primal.masking.softcap != 0;
    const T scale = static_cast<T>(primal.masking.scale);

    const PackedKeys<T> keys{static_cast<T*>(call.workspace), start, own, depth};
    const std::int64_t own_size = padded<T>(own) * depth;
    T* const moved_packed = keys.data + heads * PackedKeys<T>::size(start, own, depth);
    T* const scratch = moved_packed + heads * batch * own_size;

    parallel_for(heads * (batch + 1), call.threads, [&](std::int64_t item, int) {
        const std::int64_t head = item / (batch + 1), member = item % (batch + 1);
        if (member == batch) {
            keys.pack(primal.key, head);
        } else {
            pack_transposed(call.key.at<T>(head, member), call.key.stride[2], own, depth,
                            moved_packed + (head * batch + member) * own_size);
        }
    });

    const std::int64_t tiles = layout.tiles(), width = layout.width;
    parallel_for(heads * group * tiles, call.threads, [&](std::int64_t item, int worker) {
        const Tile tile = layout.tile<T>(item % tiles);
        const std::int64_t g = item / tiles % group, head = item / tiles / group;
        T* const weights = scratch + worker * 4 * layout.rows * width;
        T* const moved = weights + layout.rows * width;
        T* const slope = moved + layout.rows * width;
        T* const bend = slope + layout.rows * width;
        primal_weights<T>(primal, layout, tile, keys, head, g, weights, slope, bend);
        const T* const query = primal.query.at<T>(head, g, tile.row);
        for (std::int64_t member = 0; member < batch; ++member) {
            const Panels<T> key_dot{moved_packed + (head * batch + member) * own_size, columns,
                                    columns * depth};
            const Product<T> second{query, primal.query.stride[2], 1, key_dot, depth};
            over_keys<T>(tile, call.query.at<T>(head, member, g, tile.row), call.query.stride[3],
                         depth, keys.prefix_panels(head), keys.own_panels(head), moved, width,
                         &second);
            for (std::int64_t row = 0; row < tile.rows; ++row) {
                const T* const p = weights + row * width;
                const T* const w = slope + row * width;
                T* const line = moved + row * width;
                const T mean = moved_mean<T>(p, line, w, tile.width, primal.masking);
                for (std::int64_t j = 0; j < tile.width; j += lanes) {
                    V raw = load(line + j) * scale;
                    if (capped) {
                        raw *= load(w + j);
                    }
                    store(line + j, (raw - mean) * load(p + j));
                }
            }
            const std::int64_t value_row = call.value.stride[2];
            const Product<T> third{
                weights + tile.own_column, width, 1,
                rows_in_place(call.value.at<T>(head, member) + tile.own * value_row, value_row),
                tile.own_keys};
            over_values<T>(tile, moved, width, primal.value.at<T>(head), primal.value.stride[1],
                           primal.value.at<T>(head, start), primal.value.stride[1], depth,
                           call.output.at<T>(head, member, g, tile.row), call.output.stride[3],
                           &third);
        }
    });
}

// How the work on key and value results is divided: members of a batch in chunks that share a
// tile's primal rows, and, where that gives too few items, query tiles in parts with sums of their
// own.
struct Division {
    std::int64_t chunks, parts;

    static Division make(std::int64_t heads, std::int64_t batch, std::int64_t tiles, int threads) {
        const std::int64_t wanted = threads > 1 ? 3 * threads : 1;
        Division division;
        division.chunks = std::clamp<std::int64_t>((wanted + heads - 1) / heads, 1, batch);
        const std::int64_t items = heads * division.chunks;
        division.parts = std::clamp<std::int64_t>((wanted + items - 1) / items, 1, tiles);
        return division;
    }
};

template <class T>
std::int64_t attention_adjoint_tangent_workspace(const AttentionAdjointTangent& call) {
    const std::int64_t heads = call.query.shape[0], batch = call.query.shape[1];
    const std::int64_t group = call.query.shape[2];
    const std::int64_t depth = call.query.shape[4], start = call.primal.start;
    const std::int64_t own = call.primal.key.shape[1] - start;
    const Layout layout = primal_layout<T>(call.primal);
    const Division division =
        Division::make(heads, batch, group * layout.tiles(), call.threads);
    const std::int64_t packed = 2 * heads * PackedKeys<T>::size(start, own, depth) +
                                2 * heads * batch * padded<T>(own) * depth;
    const std::int64_t sums = (division.parts - 1) * 2 * heads * batch * own * depth;
    return packed + sums + call.threads * 7 * layout.rows * layout.width;
}

template <class T>
void attention_adjoint_tangent(const AttentionAdjointTangent& call) {
    using V = Vector<T>;
    constexpr std::int64_t lanes = Simd<T>::lanes, columns = panel_columns<T>;
    const Primal& primal = call.primal;
    const std::int64_t heads = call.query.shape[0], batch = call.query.shape[1];
    const std::int64_t group = call.query.shape[2], depth = call.query.shape[4];
    const std::int64_t start = primal.start, own = primal.key.shape[1] - start;
    const Layout layout = primal_layout<T>(primal);
    const bool capped = primal.masking.softcap != 0;
    const T scale = static_cast<T>(primal.masking.scale);
    const std::int64_t tiles = layout.tiles(), width = layout.width;
    const Division division = Division::make(heads, batch, group * tiles, call.threads);

    const std::int64_t keys_size = heads * PackedKeys<T>::size(start, own, depth);
    const PackedKeys<T> keys{static_cast<T*>(call.workspace), start, own, depth};
    const PackedKeys<T> values{keys.data + keys_size, start, own, depth};
    const std::int64_t own_size = padded<T>(own) * depth;
    T* const key_packed = values.data + keys_size;
    T* const value_packed = key_packed + heads * batch * own_size;
    const std::int64_t sums_size = 2 * heads * batch * own * depth;
    T* const extra = value_packed + heads * batch * own_size;
    T* const scratch = extra + (division.parts - 1) * sums_size;

    parallel_for(heads * (batch + 1), call.threads, [&](std::int64_t item, int) {
        const std::int64_t head = item / (batch + 1), member = item % (batch + 1);
        if (member == batch) {
            keys.pack(primal.key, head);
            values.pack(primal.value, head);
        } else {
            const std::int64_t offset = (head * batch + member) * own_size;
            pack_transposed(call.key.at<T>(head, member), call.key.stride[2], own, depth,
                            key_packed + offset);
            pack_transposed(call.value.at<T>(head, member), call.value.stride[2], own, depth,
                            value_packed + offset);
        }
    });

    // Where part `part` sums the results of a head and a member: the first in the results proper.
    const auto key_sums = [&](std::int64_t part, std::int64_t head, std::int64_t member) {
        return part == 0 ? call.key_result.at<T>(head, member)
                         : extra + (part - 1) * sums_size + (head * batch + member) * own * depth;
    };
    const auto value_sums = [&](std::int64_t part, std::int64_t head, std::int64_t member) {
        return part == 0 ? call.value_result.at<T>(head, member)
                         : key_sums(part, head, member) + sums_size / 2;
    };
    const auto sums_row = [&](std::int64_t part, const Array& result) {
        return part == 0 ? result.stride[2] : depth;
    };

    const std::int64_t items = heads * division.chunks * division.parts;
    parallel_for(items, call.threads, [&](std::int64_t item, int worker) {
        const std::int64_t part = item % division.parts;
        const std::int64_t chunk = item / division.parts % division.chunks;
        const std::int64_t head = item / division.parts / division.chunks;
        const std::int64_t begin = batch * chunk / division.chunks;
        const std::int64_t end = batch * (chunk + 1) / division.chunks;
        const std::int64_t area = layout.rows * width;
        T* const weights = scratch + worker * 7 * area;  // P
        T* const centred = weights + area;               // dP - D
        T* const plain = centred + area;                 // dS
        T* const moved = plain + area;                   // S., then P.
        T* const dotted = moved + area;                  // dP., then dS.
        T* const slope = dotted + area;
        T* const bend = slope + area;
        const std::int64_t key_row = sums_row(part, call.key_result);
        const std::int64_t value_row = sums_row(part, call.value_result);
        for (std::int64_t member = begin; member < end; ++member) {
            for (std::int64_t row = 0; row < own; ++row) {
                T* const key_line = key_sums(part, head, member) + row * key_row;
                T* const value_line = value_sums(part, head, member) + row * value_row;
                std::fill(key_line, key_line + depth, T(0));
                std::fill(value_line, value_line + depth, T(0));
            }
        }
        const std::int64_t count = group * tiles;
        for (std::int64_t index = count * part / division.parts;
             index < count * (part + 1) / division.parts; ++index) {
            const std::int64_t g = index / tiles;
            const Tile tile = layout.tile<T>(index % tiles);
            primal_weights<T>(primal, layout, tile, keys, head, g, weights, slope, bend);
            const T* const query = primal.query.at<T>(head, g, tile.row);
            const std::int64_t query_row = primal.query.stride[2];
            const T* const bar = call.output_bar.at<T>(head, g, tile.row);
            const std::int64_t bar_row = call.output_bar.stride[2];
            const T* const output = primal.output.at<T>(head, g, tile.row);
            const std::int64_t output_row = primal.output.stride[2];
            over_keys<T>(tile, bar, bar_row, depth, values.prefix_panels(head),
                         values.own_panels(head), centred, width);
            for (std::int64_t row = 0; row < tile.rows; ++row) {
                V shifts{};
                for (std::int64_t j = 0; j < depth; j += lanes) {
                    shifts += load(bar + row * bar_row + j) * load(output + row * output_row + j);
                }
                const T shift = sum<T>(shifts);
                T* const c = centred + row * width;
                T* const s = plain + row * width;
                for (std::int64_t j = 0; j < tile.width; j += lanes) {
                    const V value = load(c + j) - shift;
                    V score = value * load(weights + row * width + j);
                    if (capped) {
                        score *= load(slope + row * width + j);
                    }
                    store(c + j, value);
                    store(s + j, score);
                }
            }
            for (std::int64_t member = begin; member < end; ++member) {
                const std::int64_t offset = (head * batch + member) * own_size;
                const T* const query_dot = call.query.at<T>(head, member, g, tile.row);
                const std::int64_t query_dot_row = call.query.stride[3];
                const T* const bar_dot = call.output_bar_dot.at<T>(head, member, g, tile.row);
                const std::int64_t bar_dot_row = call.output_bar_dot.stride[3];
                const T* const output_dot = call.output.at<T>(head, member, g, tile.row);
                const Product<T> key_dot{query, query_row, 1,
                                         {key_packed + offset, columns, columns * depth}, depth};
                over_keys<T>(tile, query_dot, query_dot_row, depth, keys.prefix_panels(head),
                             keys.own_panels(head), moved, width, &key_dot);
                const Product<T> value_dot{bar, bar_row, 1,
                                           {value_packed + offset, columns, columns * depth},
                                           depth};
                over_keys<T>(tile, bar_dot, bar_dot_row, depth, values.prefix_panels(head),
                             values.own_panels(head), dotted, width, &value_dot);
                for (std::int64_t row = 0; row < tile.rows; ++row) {
                    V shifts{};
                    for (std::int64_t j = 0; j < depth; j += lanes) {
                        shifts += load(bar_dot + row * bar_dot_row + j) *
                                  load(output + row * output_row + j);
                        shifts += load(bar + row * bar_row + j) *
                                  load(output_dot + row * call.output.stride[3] + j);
                    }
                    const T shift_dot = sum<T>(shifts);
                    const T* const p = weights + row * width;
                    const T* const c = centred + row * width;
                    const T* const w = slope + row * width;
                    T* const m = moved + row * width;
                    T* const d = dotted + row * width;
                    const T mean = moved_mean<T>(p, m, w, tile.width, primal.masking);
                    for (std::int64_t j = 0; j < tile.width; j += lanes) {
                        const V weight = load(p + j), raw = load(m + j) * scale;
                        const V score_dot = capped ? raw * load(w + j) : raw;
                        const V weight_dot = (score_dot - mean) * weight;
                        V result = weight_dot * load(c + j) + weight * (load(d + j) - shift_dot);
                        if (capped) {
                            // dU. = w dS. + w. dS, and w dS is what is kept: w. dS = bend U. dS.
                            const V curved = load(bend + row * width + j) * raw;
                            result = result * load(w + j) + curved * weight * load(c + j);
                        }
                        store(m + j, weight_dot);
                        store(d + j, result);
                    }
                }
                // Q_. = c (dS. K + dS K.)
                T* const query_bar = call.query_result.at<T>(head, member, g, tile.row);
                const std::int64_t moved_row = call.key.stride[2];
                const Product<T> third{
                    plain + tile.own_column, width, 1,
                    rows_in_place(call.key.at<T>(head, member) + tile.own * moved_row, moved_row),
                    tile.own_keys};
                over_values<T>(tile, dotted, width, primal.key.at<T>(head), primal.key.stride[1],
                               primal.key.at<T>(head, start), primal.key.stride[1], depth,
                               query_bar, call.query_result.stride[3], &third);
                for (std::int64_t row = 0; row < tile.rows; ++row) {
                    T* const line = query_bar + row * call.query_result.stride[3];
                    for (std::int64_t j = 0; j < depth; j += lanes) {
                        store(line + j, load(line + j) * scale);
                    }
                }
                // K_. = dS.' Q + dS' Q. (scaled at the end),  V_. = P.' O_ + P' O_.
                const Product<T> key_products[2] = {
                    {dotted + tile.own_column, 1, width, rows_in_place(query, query_row),
                     tile.rows},
                    {plain + tile.own_column, 1, width, rows_in_place(query_dot, query_dot_row),
                     tile.rows}};
                multiply<T>(tile.own_keys, depth, key_products, 2,
                            key_sums(part, head, member) + tile.own * key_row, key_row, true);
                const Product<T> value_products[2] = {
                    {moved + tile.own_column, 1, width, rows_in_place(bar, bar_row), tile.rows},
                    {weights + tile.own_column, 1, width, rows_in_place(bar_dot, bar_dot_row),
                     tile.rows}};
                multiply<T>(tile.own_keys, depth, value_products, 2,
                            value_sums(part, head, member) + tile.own * value_row, value_row,
                            true);
            }
        }
    });

    parallel_for(heads * batch, call.threads, [&](std::int64_t item, int) {
        const std::int64_t head = item / batch, member = item % batch;
        for (std::int64_t row = 0; row < own; ++row) {
            T* const key_line = call.key_result.at<T>(head, member, row);
            T* const value_line = call.value_result.at<T>(head, member, row);
            for (std::int64_t j = 0; j < depth; j += lanes) {
                V key_sum = load(key_line + j), value_sum = load(value_line + j);
                for (std::int64_t part = 1; part < division.parts; ++part) {
                    key_sum += load(key_sums(part, head, member) + row * depth + j);
                    value_sum += load(value_sums(part, head, member) + row * depth + j);
                }
                store(key_line + j, key_sum * scale);
                store(value_line + j, value_sum);
            }
        }
    });
}
