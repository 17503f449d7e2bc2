// Forward of exact attention for compute capability 9.0a: out and lse for ROWS queries of one head at a time.
//
// Build: -DHEAD_DIM={16,32,64,96,128} -DDTYPE_BF16={0,1} -DDROPOUT={0,1} and the tile numbers of kernel_plan.py:
//   WARPS (computing, four a group), KEY_TILE (keys a stage), STEP (keys at a time), STAGES, MIN_BLOCKS,
//   SHARED_OPERANDS (1: queries in shared memory instead of registers).
//
// The last warpgroup copies tiles of keys and values; each of the others owns 64 queries and runs through them:
//     S = Q K^T (Q from registers, K rows outside)    P = exp2(S c - reference)    O += P V (P from registers, V rows inside)
// A group's two products are queued back to back (O += P V of one step, S of the next), and it waits for both before its
// next softmax. Nothing couples the groups but the stages, so while one waits for the tensor cores the others keep the
// exponential unit busy. softmax.cuh says why no maximum is taken in the main path.
//
// Persistent: a block goes from one piece of work to the next, and copies run ahead into the next piece.
#define ROW_TILES 1
#define BLOCKS (STEP / 8)
#include "common/philox.cuh"
#include "common/warpgroups.cuh"
#include "common/softmax.cuh"

#define GROUPS (WARPS / 4)
#define ROWS (WARPS * 16)
#define TILE_BYTES (KEY_TILE * ROW_BYTES)
#define GROUP_BYTES (64 * ROW_BYTES)
// Shared memory: STAGES x (K, V) | a tile of 64 queries a group, where read from there | barriers: filled, emptied
#define QUERIES_AT (STAGES * 2 * TILE_BYTES)
#define BARRIERS_AT (QUERIES_AT + SHARED_OPERANDS * GROUPS * GROUP_BYTES)
static_assert(KEY_TILE % STEP == 0, "a stage is whole steps");

struct Stages {
    u32 shared;
    __device__ __forceinline__ u32 keys(const Ring& r) const { return shared + r.slot * 2 * TILE_BYTES; }
    __device__ __forceinline__ u32 filled(u32 slot) const { return shared + BARRIERS_AT + slot * 8; }
    __device__ __forceinline__ u32 emptied(u32 slot) const { return shared + BARRIERS_AT + (STAGES + slot) * 8; }
};

// The number of key tiles that any of the block's rows sees; none for work that has no rows.
__device__ __forceinline__ int count_tiles(const Params& p, const Work& w) {
    if (w.tail || w.tile * ROWS >= w.q_len) return 0;
    const int last_row = min(w.tile * ROWS + ROWS, w.q_len) - 1;
    const int keys = p.causal ? min(w.k_len, last_row + w.offset + 1) : w.k_len;
    return keys <= 0 ? 0 : (keys + KEY_TILE - 1) / KEY_TILE;
}

__device__ __forceinline__ void copy_all(const Params& p, const Stages& stages, u32 num_works) {
    Ring ring = {0, 0};
    u32 behind = STAGES;  // the slot whose copies are on their way, none at first
    for (u32 id = blockIdx.x; id < num_works; id += gridDim.x) {
        const Work w = find_work(p, id, p.causal);
        const int num_tiles = count_tiles(p, w);
        const u16* k = at(p.k, p.k_strides, w, w.k_start);
        const u16* v = at(p.v, p.v_strides, w, w.k_start);
        for (int tile = 0; tile < num_tiles; ++tile) {
            await(stages.emptied(ring.slot), ring.emptied());
            copy_panels<KEY_TILE>(stages.keys(ring), k, p.k_strides.row, tile * KEY_TILE, w.k_len, p.head_dim);
            copy_panels<KEY_TILE>(stages.keys(ring) + TILE_BYTES, v, p.v_strides.row, tile * KEY_TILE, w.k_len, p.head_dim);
            commit_copies();
            if (behind < STAGES) {
                wait_copies<1>();
                show_to_products();
                arrive(stages.filled(behind));
            }
            behind = ring.slot;
            ring.next<STAGES>();
        }
    }
    if (behind == STAGES) return;
    wait_copies<0>();
    show_to_products();
    arrive(stages.filled(behind));
}

struct Queries {
#if SHARED_OPERANDS
    u32 tile;
#else
    u32 fragments[K_STEPS][4];
#endif
};

__device__ __forceinline__ void load_queries(Queries& q, const Params& p, const Stages& stages, const Work& w) {
    const u16* rows = at(p.q, p.q_strides, w, w.q_start);
#if SHARED_OPERANDS
    const int group = threadIdx.x / 128;
    q.tile = stages.shared + QUERIES_AT + group * GROUP_BYTES;
    copy_panels<64>(q.tile, rows, p.q_strides.row, w.tile * ROWS + group * 64, w.q_len, p.head_dim);
    commit_copies();
    wait_copies<0>();
    show_to_products();
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
#else
#pragma unroll
    for (int kk = 0; kk < K_STEPS; ++kk)
        load_fragment(q.fragments[kk], rows, p.q_strides.row, w.tile * ROWS + (threadIdx.x >> 5) * 16, w.q_len, 16 * kk, p.head_dim);
#endif
}

// Scores of 64 queries and STEP keys from `key` of the tile on.
__device__ __forceinline__ void multiply_keys(Scores& s, const Queries& q, u32 k_tile, int key) {
    const u32 place = place_of(k_tile + key * PANEL_ROW);
#if SHARED_OPERANDS
    const u32 q_place = place_of(q.tile);
#endif
#pragma unroll
    for (int kk = 0; kk < K_STEPS; ++kk) {
        const u64 keys = rows_outside<KEY_TILE>(place, 0, kk);
#if SHARED_OPERANDS
        Product<STEP>::shared<false, false>(s[0], rows_outside<64>(q_place, 0, kk), keys, kk > 0);
#else
        Product<STEP>::registers<false>(s[0], q.fragments[kk], keys, kk > 0);
#endif
    }
}

__device__ __forceinline__ void multiply_values(Rows& rows, const Weights& weights, u32 v_tile, int key) {
    const u32 place = place_of(v_tile + key * PANEL_ROW);
#pragma unroll
    for (int n = 0; n < BLOCKS; n += 2) {
        const u32 a[4] = {weights[0][n][0], weights[0][n][1], weights[0][n + 1][0], weights[0][n + 1][1]};
        Product<HEAD_DIM>::registers<true>(rows.out[0], a, rows_inside<KEY_TILE>(place, 8 * n), true);
    }
}

__device__ __forceinline__ void drop(Weights& weights, const Params& p, const Philox& philox, int row_tile, int column_tile) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n += 4) {
        u32 keep[4];
        keep_bits(keep, p, philox, row_tile, column_tile + n / 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            weights[0][n + j][0] &= pair_mask<0>(keep[j]);
            weights[0][n + j][1] &= pair_mask<1>(keep[j]);
        }
    }
}

__device__ __forceinline__ void attend(const Params& p, const Stages& stages, Ring& ring, const Work& w, int num_tiles) {
    const int warp = threadIdx.x >> 5, first_row = w.tile * ROWS + warp * 16;
    // What the group must look at; within it, what this warp sees whole.
    const int group_end = w.tile * ROWS + (warp / 4 + 1) * 64 + w.offset;
    const int group_keys = p.causal ? min(w.k_len, group_end) : w.k_len;
    const int unmasked = p.causal ? min(w.k_len, first_row + w.offset + 1) : w.k_len;
    Queries q;
    load_queries(q, p, stages, w);
    Rows rows;
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; ++d)
#pragma unroll
        for (int c = 0; c < 4; ++c) rows.out[0][d][c] = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) rows.reference[0][i] = -INFINITE, rows.sum[0][i] = 0.f;
#if DROPOUT
    const Philox philox = start_philox(p, w);
#endif
    u32 reading = STAGES;  // the slot that queued products may still read

#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
        await(stages.filled(ring.slot), ring.filled());
        const u32 k_tile = stages.keys(ring), v_tile = k_tile + TILE_BYTES;
#pragma unroll 1
        for (int inner = 0; inner < KEY_TILE; inner += STEP) {
            const int column = tile * KEY_TILE + inner;
            if (column >= group_keys) break;
            Scores s;
            Weights weights;
            float sums[1][2];
            open_products();
            multiply_keys(s, q, k_tile, inner);
            close_products();
            wait_products<0>();
            if (inner == 0 && reading < STAGES) arrive_warp(stages.emptied(reading));
            bool careful = column == 0 || column + STEP > unmasked;
            if (!careful) careful = !__all_sync(ALL_LANES, weigh(s, weights, sums, rows, p.scale_log2));
            if (careful) settle(s, weights, sums, rows, p, first_row, column, w.k_len, w.offset);
            rows.sum[0][0] += sums[0][0], rows.sum[0][1] += sums[0][1];
#if DROPOUT
            drop(weights, p, philox, first_row >> 4, column >> 5);
#endif
            open_products();
            multiply_values(rows, weights, v_tile, inner);
            close_products();
        }
        if (tile * KEY_TILE >= group_keys) {  // this group skips the tile: nothing has released the one before
            wait_products<0>();
            if (reading < STAGES) arrive_warp(stages.emptied(reading));
        }
        reading = ring.slot;
        ring.next<STAGES>();
    }
    wait_products<0>();
    if (reading < STAGES) arrive_warp(stages.emptied(reading));
    finish(rows, p, w, first_row);
}

extern "C" __global__ void __launch_bounds__(THREADS + COPIERS, MIN_BLOCKS) attention_hopper_forward(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    const Stages stages = {(u32)__cvta_generic_to_shared(shared_bytes)};
    if (threadIdx.x < STAGES) {
        make_barrier(stages.filled(threadIdx.x), COPIERS);
        make_barrier(stages.emptied(threadIdx.x), WARPS);
    }
    __syncthreads();
    // Packed: one sequence more, the rows after the last one.
    const u32 num_works = (u32)p.tiles * p.heads * (p.batch + (p.cu_q != nullptr));
    if (threadIdx.x >= THREADS) {
        give_registers<copier_registers(GROUPS, MIN_BLOCKS)>();
        copy_all(p, stages, num_works);
        return;
    }
    take_registers<computer_registers(GROUPS, MIN_BLOCKS)>();
    Ring ring = {0, 0};
    for (u32 id = blockIdx.x; id < num_works; id += gridDim.x) {
        const Work w = find_work(p, id, p.causal);
        if (w.tail) empty_rows(p, w);
        else if (w.tile * ROWS < w.q_len) attend(p, stages, ring, w, count_tiles(p, w));
    }
}
