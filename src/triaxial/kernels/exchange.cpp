// How ranks of one host tell each other that a message lies in shared memory, and add up what all of them sent.
//
// A rank counts its messages in a word that its peers watch. One that has watched for long says that it goes to sleep,
// looks once more, and is woken through its connection by whoever posts after that.

#include <atomic>
#include <chrono>
#include <vector>

#include "numbers.h"

namespace {

struct Board {
    alignas(64) std::atomic<int64_t> posted;
    alignas(64) std::atomic<int64_t> asleep;
};
static_assert(sizeof(Board) == 128);

bool arrived(const Board& theirs, Board& mine, int64_t number, int64_t patience_ns) {
    const auto begin = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < 100; ++i) {
            if (theirs.posted.load(std::memory_order_acquire) >= number) return true;
            __builtin_ia32_pause();
        }
    } while ((std::chrono::steady_clock::now() - begin).count() < patience_ns);
    mine.asleep.store(1);
    if (theirs.posted.load() < number) return false;
    mine.asleep.store(0);
    return true;
}

// The sum over all ranks in their order, so that every one gets the same bits.
template <class T>
void add_up(T* x, const T* const* messages, int64_t size, int64_t count) {
    constexpr int64_t AT_ONCE = 256;
    for (int64_t start = 0; start < count; start += AT_ONCE) {
        const int64_t width = count - start < AT_ONCE ? count - start : AT_ONCE;
        float sums[AT_ONCE] = {};
        for (int64_t rank = 0; rank < size; ++rank)
            for (int64_t i = 0; i < width; ++i) sums[i] += widen(messages[rank][start + i]);
        for (int64_t i = 0; i < width; ++i) narrow(sums[i], x + start + i);
    }
}

}  // namespace

extern "C" {

// Put a message of so many bytes where the peers look for it, and count it as this rank's; whether a peer sleeps.
int64_t post(Board* const* boards, int64_t size, int64_t index, int64_t number, char* slot, const char* message,
             int64_t bytes) {
    std::memcpy(slot, message, bytes);
    boards[index]->posted.store(number);
    int64_t asleep = 0;
    for (int64_t rank = 0; rank < size; ++rank) asleep |= rank != index && boards[rank]->asleep.load();
    return asleep;
}

// Wait until every peer has posted so many messages: -1, or the peer that has not within that time; then this rank
// counts as asleep.
int64_t await_all(Board* const* boards, int64_t size, int64_t index, int64_t number, int64_t patience_ns) {
    boards[index]->asleep.store(0);
    for (int64_t rank = 0; rank < size; ++rank)
        if (rank != index && !arrived(*boards[rank], *boards[index], number, patience_ns)) return rank;
    return -1;
}

void add_up_fp32(float* x, const float* const* messages, int64_t size, int64_t count) {
    add_up(x, messages, size, count);
}
void add_up_bf16(bf16* x, const bf16* const* messages, int64_t size, int64_t count) {
    add_up(x, messages, size, count);
}
}
