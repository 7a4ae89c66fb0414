// AMX: products of tiles of 16 rows of 64 bytes, in bf16 with sums in fp32.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "numbers.h"

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512bf16")))

namespace {

constexpr int64_t SIDE = 16;             // rows of a tile, outputs of a tile of weights
constexpr int64_t DEPTH = 32;            // inputs of a tile
constexpr int64_t TILE = SIDE * DEPTH;   // numbers
constexpr int64_t SQUARE = SIDE * SIDE;  // numbers of a tile of sums

// What is loaded as a tile lies on cache lines.
struct alignas(64) Line {
    uint8_t bytes[64];
};

template <class T>
T* room(std::vector<Line>& lines, int64_t numbers) {
    const size_t needed = (numbers * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
    if (lines.size() < needed) lines.resize(needed);
    return reinterpret_cast<T*>(lines.data());
}

struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Eight tiles of so many rows each.
AMX inline void configure(const int64_t (&rows)[8]) {
    Configuration c;
    for (int64_t i = 0; i < 8; ++i) {
        c.bytes[i] = 64;
        c.rows[i] = uint8_t(rows[i]);
    }
    _tile_loadconfig(&c);
}

// Sums [rows, 16] to numbers [rows, 16], which are `stride` apart.
AMX inline void put(bf16* y, const float* sums, int64_t rows, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row) {
        const __m256bh narrowed = _mm512_cvtneps_pbh(_mm512_loadu_ps(sums + row * SIDE));
        std::memcpy(y + row * stride, &narrowed, sizeof narrowed);
    }
}

}  // namespace
