// The order in which a packed batch's pieces of work begin: those of long sequences first, so that no block is left with a long
// one at the end. Made on the GPU by one block, since only there the lengths are known. Every entry is a number that find_work
// takes apart; empty tiles of shorter sequences are not listed, and NO_WORK fills what is left of the list.
//
// Sorted by counting: eight classes of length for each power of two, in any order within a class.
#pragma once
#include "types.cuh"

#define CLASSES 256

// 0 for the longest, the last for sequences that cost next to nothing.
__device__ __forceinline__ u32 class_of(int length) { return length <= 0 ? CLASSES - 1 : 1264 - (__float_as_uint((float)length) >> 20); }

struct Listed {
    u32 tiles, length_class;  // tiles of each head
};

// The sequence's pieces, of rows that are keys (OVER_KEYS) or queries; `sample` p.batch is the rows of no sequence.
template <bool OVER_KEYS>
__device__ __forceinline__ Listed list_sequence(const Params& p, int sample) {
    const Work w = find_sequence(p, sample);
    const int stationary = OVER_KEYS ? w.k_len : w.q_len, streamed = OVER_KEYS ? w.q_len : w.k_len;
    if (w.tail) return {w.q_len > 0 || w.k_len > 0 ? (u32)p.tiles : 0, CLASSES - 1};
    return {(u32)min((stationary + p.rows - 1) / p.rows, p.tiles), class_of(streamed)};
}

// Turns counts into the places where each class begins, and returns the sum of all; by the first warp.
__device__ __forceinline__ void sum_before(u32* counts, u32* total) {
    constexpr int EACH = CLASSES / 32;
    if (threadIdx.x >= 32) return;
    u32 mine = 0;
    for (int i = 0; i < EACH; ++i) mine += counts[threadIdx.x * EACH + i];
    u32 before = mine;
    for (int step = 1; step < 32; step *= 2) {
        const u32 other = __shfl_up_sync(ALL_LANES, before, step);
        if (threadIdx.x >= step) before += other;
    }
    if (threadIdx.x == 31) *total = before;
    before -= mine;
    for (int i = 0; i < EACH; ++i) {
        const u32 count = counts[threadIdx.x * EACH + i];
        counts[threadIdx.x * EACH + i] = before;
        before += count;
    }
}

// By one block of COUNT threads.
template <bool OVER_KEYS, int COUNT>
__device__ __forceinline__ void make_order(const Params& p) {
    __shared__ u32 places[CLASSES], total;
    for (int i = threadIdx.x; i < CLASSES; i += COUNT) places[i] = 0;
    __syncthreads();
    for (int sample = threadIdx.x; sample <= p.batch; sample += COUNT) {
        const Listed listed = list_sequence<OVER_KEYS>(p, sample);
        if (listed.tiles > 0) atomicAdd(&places[listed.length_class], listed.tiles * p.heads);
    }
    __syncthreads();
    sum_before(places, &total);
    __syncthreads();
    // A thread finds the place of a sequence, and its warp writes the pieces of 32 of them one after another.
    for (int first = threadIdx.x / 32 * 32; first <= p.batch; first += COUNT) {
        const int sample = first + threadIdx.x % 32;
        Listed listed = {0, 0};
        if (sample <= p.batch) listed = list_sequence<OVER_KEYS>(p, sample);
        const u32 place = listed.tiles > 0 ? atomicAdd(&places[listed.length_class], listed.tiles * p.heads) : 0;
        for (int lane = 0; lane < 32; ++lane) {
            const u32 tiles = __shfl_sync(ALL_LANES, listed.tiles, lane), to = __shfl_sync(ALL_LANES, place, lane);
            // Why the bound: offsets that fall would list more than the host made room for.
            for (u32 i = threadIdx.x % 32; i < tiles * p.heads && to + i < p.pieces; i += 32) {
                const u32 tile = !OVER_KEYS && p.causal ? tiles - 1 - i % tiles : i % tiles;  // as find_work's last_tile_first
                p.order[to + i] = ((first + lane) * p.heads + i / tiles) * p.tiles + tile;
            }
        }
    }
    for (u32 i = total + threadIdx.x; i < p.pieces; i += COUNT) p.order[i] = NO_WORK;
}
