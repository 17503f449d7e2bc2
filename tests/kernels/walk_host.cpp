// csrc/common/walk.cuh compiled for the host, for test_walk.py. The lanes of a warp are threads that meet at a barrier.
#include <pthread.h>

#include <algorithm>
#include <thread>
#include <vector>
#define __device__
#define __forceinline__ inline
#define __noinline__
using std::max;
using std::min;
struct float2 {
    float x, y;
};
static thread_local struct {
    unsigned x;
} threadIdx;
static pthread_barrier_t meeting;
static int said[32], lanes;

static int least_of(unsigned, int mine) {
    said[threadIdx.x] = mine;
    pthread_barrier_wait(&meeting);
    const int least = *std::min_element(said, said + lanes);
    pthread_barrier_wait(&meeting);
    return least;
}
static unsigned bits_of(unsigned, bool mine) {
    said[threadIdx.x] = mine;
    pthread_barrier_wait(&meeting);
    unsigned bits = 0;
    for (int lane = 0; lane < lanes; ++lane) bits |= (unsigned)said[lane] << lane;
    pthread_barrier_wait(&meeting);
    return bits;
}
#define __reduce_min_sync least_of
#define __ballot_sync bits_of
#define __all_sync(mask, mine) (bits_of(mask, !(mine)) == 0)
#include "common/walk.cuh"

template <int LISTS, int PART>
static int walk(const Params& p, const Work& w, bool keys, int first, int* rows, int* who) {
    Walk<LISTS, PART> walk;
    if (keys) walk.start_keys(p, w, first);
    else walk.start_queries(p, w, first);
    int steps = 0;
    for (Step step = walk.next(); step.who != 0; step = walk.next(), ++steps) rows[steps] = step.row, who[steps] = step.who;
    return walk.next().who == 0 ? steps : -1;  // over stays over
}

template <int LISTS>
static int with_part(int part, const Params& p, const Work& w, bool keys, int first, int* rows, int* who) {
    if (part == 32) return walk<LISTS, 32>(p, w, keys, first, rows, who);
    if (part == 64) return walk<LISTS, 64>(p, w, keys, first, rows, who);
    return walk<LISTS, 128>(p, w, keys, first, rows, who);
}

// numbers: head, q_len, k_len, offset, causal, num_blocks, block_size, pattern_stride.
static std::pair<Params, Work> call_of(const int* numbers, const int* row_ptr, const int* col_idx, const int* head_to_pattern) {
    Params p = {};
    Work w = {};
    w.head = numbers[0], w.q_len = numbers[1], w.k_len = numbers[2], w.offset = numbers[3];
    p.causal = numbers[4], p.num_blocks = numbers[5], p.block_size = numbers[6], p.pattern_stride = numbers[7];
    p.row_ptr = row_ptr, p.col_idx = col_idx, p.head_to_pattern = head_to_pattern;
    return {p, w};
}

// Returns the number of steps.
extern "C" int run_walk(int lists, int part, int keys, int first, const int* numbers, const int* row_ptr, const int* col_idx,
                        const int* head_to_pattern, int* rows, int* who) {
    const auto [p, w] = call_of(numbers, row_ptr, col_idx, head_to_pattern);
    if (lists == 1) return with_part<1>(part, p, w, keys, first, rows, who);
    if (lists == 2) return with_part<2>(part, p, w, keys, first, rows, who);
    return with_part<3>(part, p, w, keys, first, rows, who);
}

// A warp's walk in parts of 64 rows; one lane more than lists, which must keep out of it. A single list is that of `served`
// rows, and all lanes walk it.
template <int LISTS, int SLACK>
static int warp_walk(const Params& p, const Work& w, bool keys, int first, int* rows, int* who, int served) {
    int steps = 0;
    lanes = LISTS + 1;
    pthread_barrier_init(&meeting, nullptr, lanes);
    const auto lane = [&](int number) {
        threadIdx.x = number;
        WarpWalk<LISTS, 64, SLACK> walk;
        if (keys) walk.start_keys(p, w, first);
        else walk.start_queries(p, w, first, served);
        for (int step = 0; !walk.over(); ++step) {
            const Step here = walk.here();
            if (number == 0) rows[step] = here.row, who[step] = here.who, steps = step + 1;
            walk.next(p, here);
        }
        if (walk.here().who != 0) steps = -1;
    };
    std::vector<std::thread> others;
    for (int number = 1; number < lanes; ++number) others.emplace_back(lane, number);
    lane(0);
    for (std::thread& one : others) one.join();
    pthread_barrier_destroy(&meeting);
    return steps;
}

extern "C" int run_warp_walk(int lists, int slack, int keys, int first, const int* numbers, const int* row_ptr, const int* col_idx,
                             const int* head_to_pattern, int* rows, int* who) {
    const auto [p, w] = call_of(numbers, row_ptr, col_idx, head_to_pattern);
    if (lists == 1) return warp_walk<1, 0>(p, w, keys, first, rows, who, p.block_size);
    if (lists == 2) return (slack ? warp_walk<2, 2> : warp_walk<2, 0>)(p, w, keys, first, rows, who, STRETCH);
    return (slack ? warp_walk<4, 2> : warp_walk<4, 0>)(p, w, keys, first, rows, who, STRETCH);
}
