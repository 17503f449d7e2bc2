// csrc/common/walk.cuh compiled for the host, for test_walk.py.
#include <algorithm>
#define __device__
#define __forceinline__ inline
#define __noinline__
using std::max;
using std::min;
struct float2 {
    float x, y;
};
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

// numbers: head, q_len, k_len, offset, causal, num_blocks, block_size, pattern_stride. Returns the number of steps.
extern "C" int run_walk(int lists, int part, int keys, int first, const int* numbers, const int* row_ptr, const int* col_idx,
                        const int* head_to_pattern, int* rows, int* who) {
    Params p = {};
    Work w = {};
    w.head = numbers[0], w.q_len = numbers[1], w.k_len = numbers[2], w.offset = numbers[3];
    p.causal = numbers[4], p.num_blocks = numbers[5], p.block_size = numbers[6], p.pattern_stride = numbers[7];
    p.row_ptr = row_ptr, p.col_idx = col_idx, p.head_to_pattern = head_to_pattern;
    if (lists == 1) return with_part<1>(part, p, w, keys, first, rows, who);
    if (lists == 2) return with_part<2>(part, p, w, keys, first, rows, who);
    return with_part<3>(part, p, w, keys, first, rows, who);
}
