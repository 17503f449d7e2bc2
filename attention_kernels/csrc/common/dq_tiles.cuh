// dQ's float32 sums as tiles of 64 rows, in the order in which the Hopper backward's lanes hold them: 16 rows a warp, eight
// columns at a time, 16 bytes a lane (mma.cuh's C block). A sequence begins with a tile of its own, so nothing asks where it ends.
#pragma once
#include "types.cuh"

__device__ __forceinline__ i64 tiles_a_head(const Params& p) {
    return p.cu_q == nullptr ? (p.len_q + 63) / 64 : p.total_q / 64 + p.batch + 1;
}

// The first tile of a sequence of one head. Packed, sample s has begun s tiles after it would without gaps: each rounds up once.
__device__ __forceinline__ i64 sums_tile(const Params& p, const Work& w) {
    if (p.cu_q == nullptr) return ((i64)w.sample * p.heads + w.head) * tiles_a_head(p);
    return w.head * tiles_a_head(p) + w.q_start / 64 + w.sample;
}
