// Ground shared by the CUDA kernels of this folder: storage types, guarded memory access, blocks that run in phases.
//
// A kernel is a type K with
//   K::THREADS, K::PHASES            threads per block; number of phases
//   K::Shared                        its shared memory, a plain struct of Cells
//   K::phase<I>(params, shared, block, thread)
// A barrier stands between two phases and nothing but Shared survives it. On a GPU the .cu files run the phases of a
// block's threads side by side; on a host the tests run them one thread after the other, every access checked.
// Nothing here knows of torch, so that nvcc has little to read.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SGR_DEVICE __device__ __forceinline__
#define SGR_BOTH __host__ __device__ __forceinline__
#else
#define SGR_DEVICE inline
#define SGR_BOTH inline
#endif

#if defined(__CUDA_ARCH__)
#define SGR_UNROLL _Pragma("unroll")
#else
#define SGR_UNROLL
#endif

// The host emulation defines these before it includes this file, to check every access.
#if !defined(SGR_MAY_READ)
#define SGR_MAY_READ(pointer, bytes) true
#define SGR_MAY_WRITE(pointer, bytes) true
#define SGR_CHECK_SHARED(index, size)
#endif

namespace sgr {

constexpr int64_t MAX_BLOCKS = std::numeric_limits<int32_t>::max();  // of a one-dimensional grid
constexpr int MAX_TAPS = 32;                                         // per axis of a filter

enum Dtype : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, FLOAT64 = 3 };

// 16-bit numbers as they lie in memory; arithmetic is float32.
struct Half {
    uint16_t bits;
};
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

template <class To, class From> SGR_BOTH To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

SGR_BOTH float widen(float v) { return v; }
SGR_BOTH double widen(double v) { return v; }

SGR_BOTH float widen(Bfloat v) { return bits_as<float>(static_cast<uint32_t>(v.bits) << 16); }

SGR_BOTH float widen(Half v) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(v.bits));
#else
    const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16, exponent = (v.bits >> 10) & 31u,
                   mantissa = v.bits & 1023u;
    if (exponent == 31) return bits_as<float>(sign | 0x7f800000u | (mantissa << 13));
    if (exponent) return bits_as<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    const float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -tiny : tiny;
#endif
}

// To the nearest, ties to even.
template <class T> SGR_BOTH T narrow(compute_t<T> v) { return v; }

template <> SGR_BOTH Bfloat narrow<Bfloat>(float v) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
    const uint32_t u = bits_as<uint32_t>(v);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
    return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}

template <> SGR_BOTH Half narrow<Half>(float v) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(v))};
#else
    const uint32_t u = bits_as<uint32_t>(v), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (a >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more
    if (a < 0x38800000u)                                                     // below 2^-14: in units of 2^-24
        return {static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyintf(bits_as<float>(a) * 16777216.0f)))};
    return {static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13))};
#endif
}

// Neighbours in memory that travel in one access.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T v[N];
};

template <int BYTES> struct Word;
#if defined(__CUDACC__)
template <> struct Word<2> {
    using type = unsigned short;
};
template <> struct Word<4> {
    using type = unsigned int;
};
template <> struct Word<8> {
    using type = uint2;
};
template <> struct Word<16> {
    using type = uint4;
};
#endif

// Read what no thread of the launch writes.
template <class V> SGR_DEVICE V load(const V* p) {
#if defined(__CUDA_ARCH__)
    using W = typename Word<sizeof(V)>::type;
    return bits_as<V>(__ldg(reinterpret_cast<const W*>(p)));
#else
    return SGR_MAY_READ(p, sizeof(V)) ? *p : V{};
#endif
}

template <class V> SGR_DEVICE void store(V* p, const V& v) {
#if defined(__CUDA_ARCH__)
    using W = typename Word<sizeof(V)>::type;
    *reinterpret_cast<W*>(p) = bits_as<W>(v);
#else
    if (SGR_MAY_WRITE(p, sizeof(V))) *p = v;
#endif
}

// An array in shared memory.
template <class T, int N> struct alignas(16) Cells {
    T cell[N];
    SGR_DEVICE T get(int i) const {
        SGR_CHECK_SHARED(i, N);
        return cell[i];
    }
    SGR_DEVICE void set(int i, T v) {
        SGR_CHECK_SHARED(i, N);
        cell[i] = v;
    }
    // Four neighbours; i is a multiple of four.
    SGR_DEVICE void set4(int i, const Pack<T, 4>& v) {
        SGR_CHECK_SHARED(i, N);
        SGR_CHECK_SHARED(i + 3, N);
        *reinterpret_cast<Pack<T, 4>*>(cell + i) = v;
    }
};

// Division of n < 2^31 by a fixed d in [1, 2^31], as a product: with s = ceil(log2 d) and m = floor(2^(32+s) / d) + 1,
// m d exceeds 2^(32+s) by at most 2^s, so n m / 2^(32+s) exceeds n / d by less than 1 / d, which no floor notices.
struct Divider {
    uint32_t divisor, factor, shift;
    Divider() = default;
    explicit Divider(uint32_t d) : divisor(d), factor(0), shift(0) {
        while ((uint64_t{1} << shift) < d) shift++;
        factor = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);  // m - 2^32
    }
    // For counts whose launch would be refused beyond 2^31 anyway.
    static Divider of(int64_t d) {
        constexpr int64_t most = int64_t{1} << 31;
        return Divider(static_cast<uint32_t>(d < most ? d : most));
    }
    SGR_DEVICE uint32_t quotient(uint32_t n) const {
        return (static_cast<uint32_t>((static_cast<uint64_t>(n) * factor) >> 32) + n) >> shift;
    }
    // The remainder; n becomes the quotient.
    SGR_DEVICE uint32_t split(uint32_t& n) const {
        const uint32_t q = quotient(n), r = n - q * divisor;
        n = q;
        return r;
    }
};

SGR_BOTH int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
SGR_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__CUDACC__)
template <class K, int I, class Params>
SGR_DEVICE void run_phases(const Params& p, typename K::Shared& shared, int64_t block, int thread) {
    K::template phase<I>(p, shared, block, thread);
    if constexpr (I + 1 < K::PHASES) {
        __syncthreads();
        run_phases<K, I + 1>(p, shared, block, thread);
    }
}

template <class K, class Params> __global__ void __launch_bounds__(K::THREADS) kernel_entry(const Params p) {
    __shared__ typename K::Shared shared;
    run_phases<K, 0>(p, shared, blockIdx.x, static_cast<int>(threadIdx.x));
}
#endif

}  // namespace sgr
