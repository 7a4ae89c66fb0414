// Attention of decoding sequences over the paged cache, for one thread: limited by how fast keys and values come.

#include <cmath>
#include <vector>

#include "numbers.h"

namespace {

constexpr int64_t LANES = 16;  // floats in a vector, and tokens in a block of the cache
constexpr int64_t PAIR = 2 * LANES;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

// 32 numbers; of bf16 first those at even places, then those at odd ones, because that takes no shuffle.
struct Pair {
    Vector first, second;
};

inline Pair load(const float* x) {
    Pair pair;
    std::memcpy(&pair, x, sizeof pair);
    return pair;
}

inline Pair load(const bf16* x) {
    Bits both;
    std::memcpy(&both, x, sizeof both);
    return {(Vector)(both << 16), (Vector)(both & 0xffff0000u)};
}

inline void save(const Pair& pair, float* y) { std::memcpy(y, &pair, sizeof pair); }

inline void save(const Pair& pair, bf16* y) {
    for (int64_t i = 0; i < LANES; ++i) {
        narrow(pair.first[i], y + 2 * i);
        narrow(pair.second[i], y + 2 * i + 1);
    }
}

// The sums of 16 vectors, one in each lane: in four rounds two vectors are folded into one.
inline Vector sums(Vector* v) {
    const Bits low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high8 = low8 + 8;
    const Bits low4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}, high4 = low4 + 4;
    const Bits low2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, high2 = low2 + 2;
    const Bits low1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}, high1 = low1 + 1;
    const auto fold = [v](int64_t width, const Bits& low, const Bits& high) {
        for (int64_t i = 0; i < width; ++i)
            v[i] = __builtin_shuffle(v[i], v[i + width], low) + __builtin_shuffle(v[i], v[i + width], high);
    };
    fold(8, low8, high8);
    fold(4, low4, high4);
    fold(2, low2, high2);
    fold(1, low1, high1);
    return v[0];
}

// Ask for a block ahead of its use.
template <class T>
inline void prefetch(const T* block, int64_t numbers) {
    for (int64_t i = 0; i < numbers * int64_t(sizeof(T)); i += 64) __builtin_prefetch((const char*)block + i);
}

// One head's query q [dim] over its sequence's keys in [first, stop), which lie in `blocks` of the caches of its kv
// head [room, dim]; DIM pairs make a head. scores: room for as many numbers as there are keys in the blocks.
template <int64_t DIM, class T>
void attend(T* y, const T* q, const T* keys, const T* values, const int64_t* blocks, int64_t first, int64_t stop,
            float scale, float* scores) {
    constexpr int64_t ROW = DIM * PAIR, BLOCK = LANES * ROW;
    const int64_t begin = first / LANES * LANES;
    Pair query[DIM];
    for (int64_t d = 0; d < DIM; ++d) {
        const Pair given = load(q + d * PAIR);
        query[d] = {given.first * scale, given.second * scale};
    }
    for (int64_t start = begin; start < stop; start += LANES) {
        const T* k = keys + blocks[start / LANES] * BLOCK;
        if (start + 2 * LANES < stop) prefetch(keys + blocks[start / LANES + 2] * BLOCK, BLOCK);
        prefetch(values + blocks[start / LANES] * BLOCK, BLOCK);
        Vector products[LANES] = {};
        for (int64_t key = 0; key < LANES; ++key)
            for (int64_t d = 0; d < DIM; ++d) {
                const Pair pair = load(k + key * ROW + d * PAIR);
                products[key] += query[d].first * pair.first + query[d].second * pair.second;
            }
        const Vector found = sums(products);
        std::memcpy(scores + start, &found, sizeof found);
    }
    float highest = scores[first], total = 0;
    for (int64_t key = first; key < stop; ++key) highest = scores[key] > highest ? scores[key] : highest;
    for (int64_t key = first; key < stop; ++key) total += scores[key] = exponential(scores[key] - highest);
    Pair mean[DIM] = {};
    for (int64_t start = begin; start < stop; start += LANES) {
        const T* v = values + blocks[start / LANES] * BLOCK;
        const int64_t from = start < first ? first : start, to = start + LANES < stop ? start + LANES : stop;
        for (int64_t key = from; key < to; ++key)
            for (int64_t d = 0; d < DIM; ++d) {
                const Pair pair = load(v + (key - start) * ROW + d * PAIR);
                const float share = scores[key] / total;
                mean[d].first += share * pair.first;
                mean[d].second += share * pair.second;
            }
    }
    for (int64_t d = 0; d < DIM; ++d) save(mean[d], y + d * PAIR);
}

// Attention of one row each of several sequences q [sequences, heads, dim] over a cache [kv heads, room, dim]. Blocks
// [sequences, width] of 16 tokens; row i sees the keys from first[i] up to stop[i], counted from its first block on.
template <int64_t DIM, class T>
void decode(T* y, const T* q, const T* keys, const T* values, const int64_t* blocks, const int64_t* first,
            const int64_t* stop, int64_t sequences, int64_t width, int64_t heads, int64_t kv_heads, int64_t room) {
    constexpr int64_t ROW = DIM * PAIR;
    const float scale = 1.0f / std::sqrt(float(ROW));
    std::vector<float> scores(width * LANES);
    for (int64_t i = 0; i < sequences; ++i, blocks += width)
        for (int64_t head = 0; head < heads; ++head, q += ROW, y += ROW) {
            const int64_t cached = head / (heads / kv_heads) * room * ROW;
            attend<DIM>(y, q, keys + cached, values + cached, blocks, first[i], stop[i], scale, scores.data());
        }
}

}  // namespace

#define DECODE(T, SUFFIX, WIDTH)                                                                                \
    void decode##WIDTH##_##SUFFIX(T* y, const T* q, const T* keys, const T* values, const int64_t* blocks,      \
                                  const int64_t* first, const int64_t* stop, int64_t sequences, int64_t width,  \
                                  int64_t heads, int64_t kv_heads, int64_t room) {                              \
        decode<WIDTH / PAIR>(y, q, keys, values, blocks, first, stop, sequences, width, heads, kv_heads, room); \
    }

#define DECODES(T, SUFFIX) \
    DECODE(T, SUFFIX, 32)  \
    DECODE(T, SUFFIX, 64)  \
    DECODE(T, SUFFIX, 96)  \
    DECODE(T, SUFFIX, 128) \
    DECODE(T, SUFFIX, 256)

extern "C" {
DECODES(float, fp32)
DECODES(bf16, bf16)
}
