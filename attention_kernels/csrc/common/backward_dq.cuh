// dQ of the Hopper backward: dS of a tile times K, and its way into the float32 sums, which are tiles as the lanes hold them
// (dq_tiles.cuh).
//
// SUMS 1: a warp adds to 512 bytes side by side, 16 a lane. 2: by way of shared memory: a warp's 16 rows are one bulk reduction,
// and no lane waits for the memory system.
#pragma once
#include "backward_stages.cuh"
#include "dq_tiles.cuh"

__device__ __forceinline__ void add4(float* to, const float (&x)[4]) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}

__device__ __forceinline__ void store4(u32 to, const float (&x)[4]) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}

// Adds `bytes` of shared memory to float32 sums; done when the thread's bulk group is.
__device__ __forceinline__ void add_bulk(float* to, u32 from, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until what this thread's bulk groups read of shared memory may be written again.
__device__ __forceinline__ void await_bulk_reads() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Before the block ends: shared memory must not go while a reduction reads it.
__device__ __forceinline__ void finish_sums() {
    if (SUMS == 2 && threadIdx.x % 32 == 0) await_bulk_reads();
}

__device__ __forceinline__ float* sums_of(const Params& p, const Work& w) { return p.dq_sums + sums_tile(p, w) * (QUERY_TILE * HEAD_DIM); }

// This lane's accumulators of 64 queries, to the tile that begins at `sums`.
__device__ __forceinline__ void add_rows(const Places& places, float* sums, const Sums& dq) {
    const int lane = threadIdx.x & 31, warp = this_warp();
    float* part = sums + (warp & 3) * 16 * HEAD_DIM;
#if SUMS == 1
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) add4(part + n * 128 + lane * 4, dq[n]);
#else
    const u32 from = places.dq(warp);
    // Why in lane 0 alone: it is the one whose bulk groups they are.
    if (lane == 0) await_bulk_reads();
    __syncwarp();
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) store4(from + n * 512 + lane * 16, dq[n]);
    show_to_products();
    __syncwarp();
    if (lane == 0) add_bulk(part, from, HEAD_DIM * 64);
#endif
}

// dQ of 64 queries from the keys of all groups, or LISTED of those whose bits stand in `who`, by one group. Products that it
// has queued before end here too; then it hands `stage` back, which they read, unless it is 0.
template <bool LISTED>
__device__ __forceinline__ void add_dq(const Places& places, const Ring& ds, u32 keys, float* sums, int first_query, u32 who, u32 stage = 0) {
    const u32 ds_place = place_of(places.ds(ds.slot())), k_place = place_of(keys);
    await(places.ds_filled(ds.slot()), ds.filled());
    Sums dq;
    if (LISTED) {
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d)
#pragma unroll
            for (int c = 0; c < 4; ++c) dq[d][c] = 0.f;
    } else {
        open_products();
    }
#pragma unroll
    for (int from = 0; from < KEYS; from += 64) {
        if (LISTED) {
            if (!(who >> from / 64 & 1)) continue;
            open_products();
        }
#pragma unroll
        for (int key = from; key < from + 64; key += 16)
            Product<HEAD_DIM>::shared<true, true>(dq, descriptor(ds_place + key * DS_ROW / 16, 16, 8 * DS_ROW, SWIZZLE_128),
                                                  rows_inside<KEYS>(k_place, key), LISTED || key > 0);
        // Why a wait each: products that only some tiles have must not be left running when the ways meet again.
        if (LISTED) close_products(), wait_products<0>();
    }
    if (!LISTED) close_products(), wait_products<0>();
    arrive_warp(places.ds_emptied(ds.slot()));
    if (stage != 0) arrive_warp(stage);
    if (!LISTED || (who & ~LAST_STAGE) != 0) add_rows(places, sums + (i64)first_query * HEAD_DIM, dq);
}
