// Matrix products in bf16 on AMX tiles (16 rows of 64 bytes), for one thread.
//
// With few rows a product is as fast as its weights come from memory. They lie in the order in which tiles are loaded,
// so that they come as one stream, and are asked for ahead of their use, across products' ends too.

#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

namespace {

constexpr int64_t TILE_LINES = TILE * 2 / 64;
constexpr int64_t AHEAD = 2 * TILE;  // numbers between the weights that are asked for and those that are used
constexpr int64_t PANEL = 8;         // tiles along the inputs whose weights stay in the first cache

// Ask for `count` of the next lines of weights.
template <_mm_hint HINT>
inline void ask(const bf16* weights, int64_t line, int64_t count) {
    const char* from = reinterpret_cast<const char*>(weights) + line * 64;
    for (int64_t i = 0; i < count; ++i) _mm_prefetch(from + i * 64, HINT);
}

// Up to 16 rows.
AMX void few_rows(bf16* y, const bf16* x, const bf16* weights, int64_t rows, int64_t outputs, int64_t inputs) {
    alignas(64) float sums[SQUARE];
    configure({rows, 1, 1, 1, rows, 1, SIDE, 1});  // sums, rows of x, weights
    for (int64_t n = 0; n < outputs; n += SIDE) {
        _tile_zero(0);
        for (int64_t k = 0; k < inputs; k += DEPTH, weights += TILE) {
            ask<_MM_HINT_T0>(weights + AHEAD, 0, TILE_LINES);
            _tile_loadd(4, x + k, inputs * 2);
            _tile_loadd(6, weights, 64);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, sums, 64);
        put(y + n, sums, rows, outputs);
    }
    _tile_release();
}

// Any number of rows, of which those of a call fit the second cache: two tiles of them by two of outputs at a time, one
// panel of weights after the other, with the sums in memory in between. Meanwhile the next panel is asked for.
AMX void many_rows(bf16* y, const bf16* x, const bf16* weights, int64_t rows, int64_t outputs, int64_t inputs) {
    static thread_local std::vector<Line> row_lines, sum_lines;
    const int64_t pairs = (rows + 2 * SIDE - 1) / (2 * SIDE), depth = inputs / DEPTH;
    const int64_t lines = (TILE_LINES + pairs - 1) / pairs;  // of each of the two streams, a step
    const int64_t tail = rows % (2 * SIDE);
    bf16* last = room<bf16>(row_lines, 2 * SIDE * inputs);  // rows that do not fill a pair of tiles, and zeros
    float* sums = room<float>(sum_lines, pairs * 4 * SQUARE);
    std::memset(last, 0, 2 * SIDE * inputs * sizeof(bf16));
    std::memcpy(last, x + (rows - tail) * inputs, tail * inputs * sizeof(bf16));
    configure({SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE});
    for (int64_t n = 0; n < outputs; n += 2 * SIDE)
        for (int64_t panel = 0; panel < depth; panel += PANEL)
            for (int64_t pair = 0, asked = 0; pair < pairs; ++pair) {
                const bf16* a = 2 * SIDE * (pair + 1) <= rows ? x + pair * 2 * SIDE * inputs : last;
                const bf16* b = a + SIDE * inputs;
                const bf16 *left = weights + n / SIDE * depth * TILE, *right = left + depth * TILE;
                const int64_t stop = std::min(panel + PANEL, depth);
                float* c = sums + pair * 4 * SQUARE;
                if (panel == 0) {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                } else {
                    _tile_loadd(0, c, 64);
                    _tile_loadd(1, c + SQUARE, 64);
                    _tile_loadd(2, c + 2 * SQUARE, 64);
                    _tile_loadd(3, c + 3 * SQUARE, 64);
                }
                for (int64_t k = panel; k < stop; ++k) {
                    if (asked < PANEL * TILE_LINES) {
                        ask<_MM_HINT_T1>(left + (panel + PANEL) * TILE, asked, lines);
                        ask<_MM_HINT_T1>(right + (panel + PANEL) * TILE, asked, lines);
                        asked += lines;
                    }
                    _tile_loadd(4, a + k * DEPTH, inputs * 2);
                    _tile_loadd(6, left + k * TILE, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, right + k * TILE, 64);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_loadd(5, b + k * DEPTH, inputs * 2);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, c, 64);
                _tile_stored(1, c + SQUARE, 64);
                _tile_stored(2, c + 2 * SQUARE, 64);
                _tile_stored(3, c + 3 * SQUARE, 64);
                for (int64_t tile = 0; tile < 4 && stop == depth; ++tile) {
                    const int64_t row = (2 * pair + tile / 2) * SIDE;
                    put(y + row * outputs + n + tile % 2 * SIDE, c + tile * SQUARE,
                        std::clamp<int64_t>(rows - row, 0, SIDE), outputs);
                }
            }
    _tile_release();
}

}  // namespace

extern "C" {

// Whether this process may use tiles: Linux gives them to those that ask.
int64_t allow_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// x [rows, inputs] times weights, which are packed as tiles [outputs / 16, inputs / 32, 16, 16, 2] -> y [rows,
// outputs]; outputs and inputs are multiples of 32.
void product_bf16(bf16* y, const bf16* x, const bf16* weights, int64_t rows, int64_t outputs, int64_t inputs) {
    constexpr int64_t AT_ONCE = 512;
    for (int64_t row = 0; row < rows; row += AT_ONCE) {
        const int64_t count = std::min(AT_ONCE, rows - row);
        (count <= SIDE ? few_rows : many_rows)(y + row * outputs, x + row * inputs, weights, count, outputs, inputs);
    }
}
}
