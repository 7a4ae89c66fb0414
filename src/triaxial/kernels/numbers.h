// fp32 and bf16 numbers; all arithmetic is fp32.

#pragma once

#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};

template <class To, class From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }

inline void narrow(float x, float* to) { *to = x; }

inline void narrow(float x, bf16* to) {  // to the nearest, ties to even; what is not a number stays that
    const uint32_t bits = same_bits<uint32_t>(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// 2^n e^r with |r| <= log(2) / 2, by the polynomial of the Cephes library's expf.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = __builtin_floorf(x * 1.44269504f + 0.5f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * same_bits<float>((int32_t(n) + 127) << 23);
}
