// Causal attention of the last rows of a prompt over all of it, in bf16 on AMX tiles, for one thread.
//
// Two passes over 16 rows of queries: their scores with all keys that the last of them sees, then the mean of the
// values by the softmax of these. Keys and values are put in the order of tiles once for all heads that share them.

#include <cmath>

#include "tiles.h"

namespace {

// Keys [tokens, dim], `stride` apart, as tiles [tokens / 16, dim / 32] of 16 pairs of dimensions by 16 keys.
void pack_keys(bf16* to, const bf16* keys, int64_t tokens, int64_t padded, int64_t dim, int64_t stride) {
    for (int64_t start = 0; start < padded; start += SIDE)
        for (int64_t d = 0; d < dim; d += DEPTH)
            for (int64_t pair = 0; pair < DEPTH; pair += 2)
                for (int64_t key = start; key < start + SIDE; ++key, to += 2)
                    if (key < tokens)
                        std::memcpy(to, keys + key * stride + d + pair, 2 * sizeof(bf16));
                    else
                        std::memset(to, 0, 2 * sizeof(bf16));
}

// Values [tokens, dim] as tiles [tokens / 32, dim / 16] of 16 pairs of tokens by 16 dimensions.
void pack_values(bf16* to, const bf16* values, int64_t tokens, int64_t padded, int64_t dim, int64_t stride) {
    constexpr bf16 none[SIDE] = {};
    for (int64_t start = 0; start < padded; start += DEPTH)
        for (int64_t d = 0; d < dim; d += SIDE)
            for (int64_t token = start; token < start + DEPTH; token += 2, to += DEPTH) {
                const bf16* even = token < tokens ? values + token * stride + d : none;
                const bf16* odd = token + 1 < tokens ? values + (token + 1) * stride + d : none;
                for (int64_t i = 0; i < SIDE; ++i) {
                    to[2 * i] = even[i];
                    to[2 * i + 1] = odd[i];
                }
            }
}

// The softmax of scores [16, seen], of which row i sees the `window` keys up to `first` + i, as shares
// [seen / 32, 16, 32] in tiles; what a row's shares add up to goes into totals.
AMX void softmax(bf16* shares, float* scores, float* totals, int64_t first, int64_t seen, int64_t window, float scale) {
    for (int64_t row = 0; row < SIDE; ++row) {
        const int64_t stop = std::min(first + row + 1, seen), start = std::max<int64_t>(stop - window, 0);
        float *mine = scores + row * seen, highest = mine[start], total = 0;
        for (int64_t key = 0; key < start; ++key) mine[key] = 0;
        for (int64_t key = start; key < stop; ++key) highest = mine[key] > highest ? mine[key] : highest;
        for (int64_t key = start; key < stop; ++key) total += mine[key] = exponential((mine[key] - highest) * scale);
        for (int64_t key = stop; key < seen; ++key) mine[key] = 0;
        for (int64_t key = 0; key < seen; key += DEPTH)
            for (int64_t i = 0; i < DEPTH; i += SIDE) put(shares + key * SIDE + row * DEPTH + i, mine + key + i, 1, 0);
        totals[row] = total;
    }
}

// So many rows of one head, up to 16, the first of them at place `first`: q [rows, dim], `stride` apart, to y, which is
// as far apart.
AMX void attend(bf16* y, const bf16* q, const bf16* keys, const bf16* values, int64_t rows, int64_t first,
                int64_t padded, int64_t window, int64_t dim, int64_t stride, float* scores, bf16* shares) {
    const int64_t seen = std::min((first + rows + DEPTH - 1) / DEPTH * DEPTH, padded);
    const float scale = 1.0f / std::sqrt(float(dim));
    alignas(64) float sums[2 * SQUARE], totals[SIDE];
    configure({rows, rows, 1, 1, rows, 1, SIDE, SIDE});  // two tiles of sums, queries or shares, two of keys or values
    for (int64_t key = 0; key < seen; key += 2 * SIDE) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < dim; d += DEPTH) {
            _tile_loadd(4, q + d, stride * 2);
            _tile_loadd(6, keys + key * dim + d * SIDE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, keys + (key + SIDE) * dim + d * SIDE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, scores + key, seen * 4);
        _tile_stored(1, scores + key + SIDE, seen * 4);
    }
    softmax(shares, scores, totals, first, seen, window, scale);
    for (int64_t d = 0; d < dim; d += 2 * SIDE) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t key = 0; key < seen; key += DEPTH) {
            _tile_loadd(4, shares + key * SIDE, 64);
            _tile_loadd(6, values + key * dim + d * DEPTH, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, values + key * dim + (d + SIDE) * DEPTH, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, sums, 128);
        _tile_stored(1, sums + SIDE, 128);
        for (int64_t row = 0; row < rows; ++row) {
            const float share = 1.0f / totals[row];
            for (int64_t i = 0; i < 2 * SIDE; ++i) sums[row * 2 * SIDE + i] *= share;
            for (int64_t i = 0; i < 2 * SIDE; i += SIDE) put(y + row * stride + d + i, sums + row * 2 * SIDE + i, 1, 0);
        }
    }
}

}  // namespace

// q [rows, heads, dim], the last rows of a prompt, over its keys and values [tokens, kv heads, dim], of which rows and
// heads are so far apart -> y as q. A row sees `window` keys up to its own; dim is a multiple of 32.
extern "C" AMX void prompt_bf16(bf16* y, const bf16* q, const bf16* keys, const bf16* values, int64_t rows,
                                int64_t tokens, int64_t window, int64_t heads, int64_t kv_heads, int64_t dim,
                                int64_t key_row, int64_t key_head, int64_t value_row, int64_t value_head) {
    static thread_local std::vector<Line> key_lines, value_lines, score_lines, share_lines;
    const int64_t padded = (tokens + DEPTH - 1) / DEPTH * DEPTH, group = heads / kv_heads, stride = heads * dim;
    bf16 *packed_keys = room<bf16>(key_lines, padded * dim), *packed_values = room<bf16>(value_lines, padded * dim);
    float* scores = room<float>(score_lines, SIDE * padded);
    bf16* shares = room<bf16>(share_lines, SIDE * padded);
    for (int64_t kv = 0; kv < kv_heads; ++kv) {
        pack_keys(packed_keys, keys + kv * key_head, tokens, padded, dim, key_row);
        pack_values(packed_values, values + kv * value_head, tokens, padded, dim, value_row);
        for (int64_t head = kv * group; head < (kv + 1) * group; ++head)
            for (int64_t row = 0; row < rows; row += SIDE) {
                const int64_t at = row * stride + head * dim;
                attend(y + at, q + at, packed_keys, packed_values, std::min(SIDE, rows - row), tokens - rows + row,
                       padded, window, dim, stride, scores, shares);
            }
    }
    _tile_release();
}
