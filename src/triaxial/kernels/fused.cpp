// Norms, gates, rotations and the way into the cache, each in one pass over memory, for one thread.
//
// Tensors are contiguous, except where a stride (in elements) is given. Loops are written so that the compiler makes
// vector instructions of them (pyproject.toml has its flags).

#include <cmath>

#include "numbers.h"

namespace {

// Root-mean-square norm of rows x [rows, width], times weight [width].
template <class T>
void rms_norm(T* y, const T* x, const T* weight, int64_t rows, int64_t width, float eps) {
    for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
        float squares = 0;
        for (int64_t i = 0; i < width; ++i) squares += widen(x[i]) * widen(x[i]);
        const float scale = 1.0f / std::sqrt(squares / float(width) + eps);
        for (int64_t i = 0; i < width; ++i) narrow(widen(x[i]) * scale * widen(weight[i]), y + i);
    }
}

// x, added to y.
template <class T>
void add(T* y, const T* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) narrow(widen(x[i]) + widen(y[i]), y + i);
}

// silu(gate) * up of rows x that hold gate and up side by side [rows, 2 * width].
template <class T>
void gate(T* y, const T* x, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, x += 2 * width, y += width)
        for (int64_t i = 0; i < width; ++i) {
            const float g = widen(x[i]);
            narrow(g / (1.0f + exponential(-g)) * widen(x[width + i]), y + i);
        }
}

// Rotary embedding by halves of x [rows, heads, 2 * half], whose rows are `stride` apart; cos, sin [rows, half].
template <class T>
void rotate(T* y, const T* x, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t half, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row, x += stride, cos += half, sin += half)
        for (int64_t head = 0; head < heads; ++head, y += 2 * half) {
            const T* from = x + head * 2 * half;
            for (int64_t i = 0; i < half; ++i) {
                const float a = widen(from[i]), b = widen(from[half + i]), c = widen(cos[i]), s = widen(sin[i]);
                narrow(a * c - b * s, y + i);
                narrow(b * c + a * s, y + half + i);
            }
        }
}

// Rows x [rows, heads, dim], `stride` apart, to their places in a cache [heads, room, dim].
template <class T>
void store(T* cache, const T* x, const int64_t* places, int64_t rows, int64_t heads, int64_t dim, int64_t room,
           int64_t stride) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t head = 0; head < heads; ++head)
            std::memcpy(cache + (head * room + places[row]) * dim, x + row * stride + head * dim, dim * sizeof(T));
}

}  // namespace

#define KERNELS(T, SUFFIX)                                                                                        \
    void rms_norm_##SUFFIX(T* y, const T* x, const T* weight, int64_t rows, int64_t width, float eps) {           \
        rms_norm(y, x, weight, rows, width, eps);                                                                 \
    }                                                                                                             \
    void add_##SUFFIX(T* y, const T* x, int64_t count) { add(y, x, count); }                                      \
    void gate_##SUFFIX(T* y, const T* x, int64_t rows, int64_t width) { gate(y, x, rows, width); }                \
    void rotate_##SUFFIX(T* y, const T* x, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t half, \
                         int64_t stride) {                                                                        \
        rotate(y, x, cos, sin, rows, heads, half, stride);                                                        \
    }                                                                                                             \
    void store_##SUFFIX(T* cache, const T* x, const int64_t* places, int64_t rows, int64_t heads, int64_t dim,    \
                        int64_t room, int64_t stride) {                                                           \
        store(cache, x, places, rows, heads, dim, room, stride);                                                  \
    }

extern "C" {
KERNELS(float, fp32)
KERNELS(bf16, bf16)
}
