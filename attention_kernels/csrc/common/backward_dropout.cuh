// The dropout mask in the Hopper backward, a tile of 16 keys x 64 queries a warp in one register a lane.
#pragma once
#include "backward_stages.cuh"
#include "philox.cuh"

// The dropout mask of this lane's 32 elements in one register. Flag 2 step + half of byte 2 h + e is that of s[n][2 h + e] for
// n = 2 step + half: shifted to the top of its byte, it spreads as in philox.cuh. Here the two flags of step 0, from the two
// words that hold the warp's 16 keys; a draw has queries x keys, the other way round.
__device__ __forceinline__ u32 step_flags(u32 keys0, u32 keys1) {
    const u32 first[2] = {transpose8x8(pair_mask<0>(keys0)), transpose8x8(pair_mask<0>(keys1))};
    const u32 second[2] = {transpose8x8(pair_mask<1>(keys0)), transpose8x8(pair_mask<1>(keys1))};
    return __byte_perm(first[0], first[1], 0x6420) & 0x01010101u | __byte_perm(second[0], second[1], 0x6420) & 0x02020202u;
}

// Why: the compiler would keep what it can compute of these, fourteen round keys to begin with, through the whole loop.
__device__ __forceinline__ void forget(Philox& philox) {
    asm volatile("" : "+r"(philox.key0), "+r"(philox.key1), "+r"(philox.sample), "+r"(philox.head));
}

__device__ __forceinline__ u32 draw_flags(const Params& p, Philox philox, int row, int first_key) {
    u32 flags = 0;
    forget(philox);
#pragma unroll 2
    for (int step = 0; step < QUERY_TILE / 16; ++step) {
        u32 keep[4];
        keep_bits(keep, p, philox, (row >> 4) + step, first_key >> 5);
        // This warp's 16 keys are half of the 32 that are drawn together.
        const u32 upper = first_key & 16;
        flags |= step_flags(upper ? keep[2] : keep[0], upper ? keep[3] : keep[1]) << 2 * step;
    }
    return flags;
}

// Of the two warps that own 32 keys together.
__device__ __forceinline__ void meet_neighbour() { asm volatile("bar.sync %0, 64;" ::"r"(8 + (threadIdx.x >> 6)) : "memory"); }

#if PAIRS
// The flags of two steps, the lower half of each byte, in 16 bits. Why: beside everything else at 128 there is 1 KB left for them.
__device__ __forceinline__ u32 fold_flags(u32 flags) { return flags | flags >> 12; }
__device__ __forceinline__ u32 unfold_flags(u32 folded) { return folded & 0x0f0fu | (folded & 0xf0f0u) << 12; }

__device__ __forceinline__ void store_shared16(u32 to, u32 x) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"((u16)x) : "memory");
}

__device__ __forceinline__ u32 load_shared16(u32 from) {
    u16 x;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(from) : "memory");
    return x;
}

// The same with the neighbour's help: the warps of the lower and of the upper 16 keys draw two steps each, for both. `round`
// alternates: a warp may come here again before its neighbour has read what lies there. (It begins a piece of work behind a
// meeting, so may begin with either.)
__device__ __forceinline__ u32 share_flags(const Params& p, const Places& places, Philox philox, int row, int first_key, u32 round) {
    const u32 warp = this_warp(), upper = warp & 1, place = (threadIdx.x & 31) * 2;
    u32 lower_keys = 0, upper_keys = 0;
    forget(philox);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
        u32 keep[4];
        keep_bits(keep, p, philox, (row >> 4) + 2 * upper + step, first_key >> 5);
        lower_keys |= step_flags(keep[0], keep[1]) << 2 * step;
        upper_keys |= step_flags(keep[2], keep[3]) << 2 * step;
    }
    store_shared16(places.flags(round, warp ^ 1) + place, fold_flags(upper ? lower_keys : upper_keys));
    meet_neighbour();
    const u32 got = unfold_flags(load_shared16(places.flags(round, warp) + place));
    return (upper ? upper_keys : lower_keys) << 4 * upper | got << 4 * (upper ^ 1);
}
#endif

// The mask of the tile that begins at `row`.
__device__ __forceinline__ u32 find_flags(const Params& p, const Places& places, const Work& w, int row, int first_key) {
#if PAIRS
    return share_flags(p, places, start_philox(p, w), row, first_key, row / QUERY_TILE & 1);
#else
    return draw_flags(p, start_philox(p, w), row, first_key);
#endif
}
