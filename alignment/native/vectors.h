// Vectors of the widest registers that the compiler was allowed to use, and what the kernels share.
//
// Every sum of a kernel runs in an order that depends on its own row alone: a row's result is the same, bit for bit, in
// whatever batch it is computed. Arrays are row-major and float32 unless said otherwise.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 12;  // TILE rows by two vectors of sums fit the registers
#else
constexpr int LANES = 8, TILE = 6;
#endif
constexpr int PANEL = 2 * LANES;

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef double wide __attribute__((vector_size(LANES * 8)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline vec load(const float* from) { return *reinterpret_cast<const vec*>(from); }
static inline void store(float* to, vec value) { *reinterpret_cast<vec*>(to) = value; }

// The first `count` lanes of memory (all of them if it is more), zeros behind.
static inline vec load_some(const float* from, int64_t count) {
    if (count >= LANES) return load(from);
    vec value{};
    std::memcpy(&value, from, count * sizeof(float));
    return value;
}
static inline void store_some(float* to, vec value, int64_t count) {
    if (count >= LANES)
        store(to, value);
    else
        std::memcpy(to, &value, count * sizeof(float));
}

static inline vec splat(float value) { return vec{} + value; }

// Sum of the lanes, by halves.
static inline float sum_of(vec value) {
    typedef float half __attribute__((vector_size(LANES * 2)));
    typedef float quarter __attribute__((vector_size(LANES)));
    half halves[2];
    quarter quarters[2];
    std::memcpy(halves, &value, sizeof(value));
    halves[0] += halves[1];
    std::memcpy(quarters, halves, sizeof(half));
    quarters[0] += quarters[1];
    float sum = 0;
    for (int i = 0; i < LANES / 4; i++) sum += quarters[0][i];
    return sum;
}

// exp, correct to 2 units in the last place; beyond -87 and 88 it stays. (Polynomial of the Cephes library.)
static inline vec exp_of(vec x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vec n = x * 1.44269504f + magic;
    const ivec exponent = (reinterpret_cast<const ivec&>(n) - 0x4B400000 + 127) << 23;
    n -= magic;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * reinterpret_cast<const vec&>(exponent);
}
