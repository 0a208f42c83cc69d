// Element types of the CPU operators: bfloat16 in memory is float32 in registers.

#pragma once

#include <bit>
#include <cstdint>

namespace {

struct Bfloat {
    uint16_t bits;
};

template <class T> struct Compute {
    using type = float;
};
template <> struct Compute<double> {
    using type = double;
};
template <class T> using compute_t = typename Compute<T>::type;

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(Bfloat v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }

// To the nearest, ties to even.
template <class T> inline T narrow(compute_t<T> v) { return v; }
template <> inline Bfloat narrow<Bfloat>(float v) {
    const uint32_t u = std::bit_cast<uint32_t>(v);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

}  // namespace
