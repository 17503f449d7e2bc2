// dQ of the Hopper backward: dS of a tile times K, and its way into the float32 sums.
//
// SUMS 0: rows of the sums as generic_backward_keys.cu lays them; a lane adds 16 bytes at a time, a warp to 64 bytes of
// 8 rows. 1: tiles as the lanes hold them (dq_tiles.cuh), so that a warp adds to 512 bytes side by side. 2: the same tiles,
// by way of shared memory: a warp's 16 rows are one bulk reduction, and no lane waits for the memory system.
#pragma once
#include "backward_stages.cuh"
#include "dq_tiles.cuh"

//
// SPLIT 0: one group multiplies a tile, another the next one. 1: each group multiplies columns of its own of every tile.
// Why in halves at 128: beside the scores of the next tile there are no registers for sums of 128 columns.
#define DQ_COLUMNS (SPLIT ? HEAD_DIM / GROUPS : AHEAD && HEAD_DIM == 128 ? 64 : HEAD_DIM)
static_assert(DQ_COLUMNS == HEAD_DIM || DQ_COLUMNS % PANEL == 0, "columns are whole panels");
typedef float DqSums[DQ_COLUMNS / 8][4];

__device__ __forceinline__ void add4(float* to, float a, float b, float c, float d) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

__device__ __forceinline__ void store4(u32 to, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// Adds `bytes` of shared memory to float32 sums; done when the thread's bulk group is.
__device__ __forceinline__ void add_bulk(float* to, u32 from, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until what this thread's bulk groups read of shared memory may be written again.
__device__ __forceinline__ void await_bulk_reads() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ float* sums_of(const Params& p, const Work& w) {
    return p.dq_sums + (SUMS ? sums_tile(p, w) * QUERY_TILE : stats_at(p, w)) * HEAD_DIM;
}

// This lane's accumulators of columns `column` to `column + DQ_COLUMNS - 1`.
__device__ __forceinline__ void add_columns(const Places& places, const Params& p, float* sums, int q_len, int first_query, int column,
                                            const DqSums& dq) {
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
#if SUMS == 0
    const int row = first_query + warp * 16 + (lane >> 2);
    float* to = sums + (i64)row * HEAD_DIM + column + 4 * (lane & 3);
#pragma unroll
    for (int d = 0; d < DQ_COLUMNS / 16; ++d) {
        if (column + 16 * d >= p.head_dim) break;
        if (row < q_len) add4(to + 16 * d, dq[2 * d][0], dq[2 * d][1], dq[2 * d + 1][0], dq[2 * d + 1][1]);
        if (row + 8 < q_len) add4(to + 8 * HEAD_DIM + 16 * d, dq[2 * d][2], dq[2 * d][3], dq[2 * d + 1][2], dq[2 * d + 1][3]);
    }
#else
    float* part = sums + (i64)first_query * HEAD_DIM + warp * 16 * HEAD_DIM + column * 16;
#if SUMS == 1
#pragma unroll
    for (int n = 0; n < DQ_COLUMNS / 8; ++n) add4(part + n * 128 + lane * 4, dq[n][0], dq[n][1], dq[n][2], dq[n][3]);
#else
    const u32 from = places.dq(threadIdx.x >> 5) + (SPLIT ? 0 : column * 64);
    // Why in lane 0 alone: it is the one whose bulk groups they are.
    if (lane == 0) await_bulk_reads();
    __syncwarp();
#pragma unroll
    for (int n = 0; n < DQ_COLUMNS / 8; ++n) store4(from + n * 512 + lane * 16, dq[n][0], dq[n][1], dq[n][2], dq[n][3]);
    show_to_products();
    __syncwarp();
    if (lane == 0) add_bulk(part, from, DQ_COLUMNS * 64);
#endif
#endif
}

// Whether this group has a share in the tile that is `adding`'s.
__device__ __forceinline__ bool has_share(int adding) { return SPLIT || adding == threadIdx.x / 128; }

// dQ of 64 queries from the keys of all groups, or LISTED of those whose bits stand in `who`, by one group (or its columns).
template <bool LISTED>
__device__ __forceinline__ void add_dq(const Places& places, const Ring& ds, u32 keys, const Params& p, float* sums, int q_len, int first_query,
                                       u32 who) {
    const u32 ds_place = place_of(places.ds(ds.slot())), k_place = place_of(keys);
    await(places.ds_filled(ds.slot()), ds.filled());
    const int first_column = SPLIT ? threadIdx.x / 128 * DQ_COLUMNS : 0;
#pragma unroll
    for (int pass = 0; pass < (SPLIT ? 1 : HEAD_DIM / DQ_COLUMNS); ++pass) {
        const int column = first_column + pass * DQ_COLUMNS;
        const u32 offset = column / PANEL * (KEYS * PANEL_ROW), panel = k_place + (SPLIT ? place_of(offset) : offset / 16);
        DqSums dq;
        if (LISTED) {
#pragma unroll
            for (int d = 0; d < DQ_COLUMNS / 8; ++d)
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
                Product<DQ_COLUMNS>::template shared<true, true>(dq, descriptor(ds_place + key * DS_ROW / 16, 16, 8 * DS_ROW, SWIZZLE_128),
                                                        rows_inside<KEYS>(panel, key), LISTED || key > 0);
            // Why a wait each: products that only some tiles have must not be left running when the ways meet again.
            if (LISTED) close_products(), wait_products<0>();
        }
        if (!LISTED) close_products(), wait_products<0>();
        if (SPLIT || column + DQ_COLUMNS == HEAD_DIM) arrive_warp(places.ds_emptied(ds.slot()));
        if (!LISTED || (who & ~LAST_STAGE) != 0) add_columns(places, p, sums, q_len, first_query, column, dq);
    }
}
