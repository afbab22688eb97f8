// Rademacher signs from a counter: the generator of kernels/rademacher/reference.py.

HEAT_INLINE std::uint32_t mix(std::uint32_t x) {
    x += 0x9E3779B9u;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

constexpr std::int64_t signs_per_word = 32;

HEAT_INLINE std::uint32_t seed_key(std::uint64_t seed) {
    return mix(mix(static_cast<std::uint32_t>(seed)) ^ static_cast<std::uint32_t>(seed >> 32));
}

// The key of (seed, sample, token); `mix(key ^ word)` has the signs of its dimensions.
HEAT_INLINE std::uint32_t sign_key(std::uint32_t seed, std::int64_t sample, std::int64_t token) {
    return mix(mix(seed ^ static_cast<std::uint32_t>(sample)) ^ static_cast<std::uint32_t>(token));
}

template <class T>
HEAT_INLINE T sign_of(std::uint32_t word, std::int64_t dimension) {
    return word >> dimension % signs_per_word & 1 ? T(-1) : T(1);
}
