// Forward of exact attention, compute capability 8.0 and up: out and lse for ROWS queries of one head a block.
//
// Build: -DHEAD_DIM={16,32,64,96,128} -DDTYPE_BF16={0,1} -DDROPOUT={0,1} and the tile numbers of kernel_plan.py:
//   WARPS, ROW_TILES (16-row tiles a warp), KEY_TILE (keys a stage), STEP (keys at a time), STAGES, MIN_BLOCKS.
//
// A warp keeps its queries as A fragments and its accumulators in registers; keys and values stream through shared
// memory. Why no maximum is taken in the main path: small head dims are bound by issue slots and by the exponential
// unit, and a maximum costs one slot a score, two shuffles a row and a wait before the first exponential. Softmax is
// exact under any reference value that keeps sums in range, so the scores go straight into exp2 under the reference
// at hand, and only a lane that sees a partial sum above SUM_LIMIT (or NaN) sends its warp to `settle`, which takes
// the true maximum, rescales, and computes the step again. The first step and masked steps always go there.
#include "common/philox.cuh"
#include "common/tiles.cuh"

#define WARP_ROWS (ROW_TILES * 16)
#define ROWS (WARPS * WARP_ROWS)
#define TILE_BYTES (KEY_TILE * ROW_BYTES)
#define BLOCKS (STEP / 8)
static_assert(KEY_TILE % STEP == 0, "a stage is whole steps");
#include "common/softmax.cuh"  // wants ROW_TILES and BLOCKS
#include "common/walk.cuh"
// Block-sparse: see walk.cuh. The tile's halves have different lists where blocks are of 64.
#define HALVES (ROWS / STRETCH)
#define PART part_rows(HALVES, KEY_TILE, STEP)
static_assert(STAGES <= 3, "a route is kept for four stages");
static_assert(ROWS == HALVES * STRETCH && STRETCH % WARP_ROWS == 0, "a warp lies in one stretch of a walk");

// Dense, it walks over all keys in order; SPARSE over those of the layout. The steps are the same.
template <bool SPARSE>
__device__ __forceinline__ void attend(const Params& p) {
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    const u32 shared = (u32)__cvta_generic_to_shared(shared_bytes);
    __shared__ Route<HALVES, PART, KEY_TILE> route;
    const Work w = find_work(p, blockIdx.x, p.causal);
    if (w.tail) return empty_rows(p, w);
    if (w.tile * ROWS >= w.q_len) return;

    const int half = HALVES == 1 ? 0 : (threadIdx.x >> 5) * WARP_ROWS / STRETCH;
    const int first_row = w.tile * ROWS + (threadIdx.x >> 5) * WARP_ROWS;
    const int last_row = min(w.tile * ROWS + ROWS, w.q_len) - 1;
    const int block_keys = p.causal ? min(w.k_len, last_row + w.offset + 1) : w.k_len;
    const int warp_keys = p.causal ? min(w.k_len, first_row + WARP_ROWS + w.offset) : w.k_len;
    const int unmasked = p.causal ? min(w.k_len, first_row + w.offset + 1) : w.k_len;
    const int num_tiles = block_keys <= 0 ? 0 : (block_keys + KEY_TILE - 1) / KEY_TILE;
    TileCopy k(at(p.k, p.k_strides, w, w.k_start), p.k_strides.row, 0, w.k_len, p.head_dim);
    TileCopy v(at(p.v, p.v_strides, w, w.k_start), p.v_strides.row, 0, w.k_len, p.head_dim);

    auto load = [&](int tile) {
        const u32 to = shared + (tile % STAGES) * 2 * TILE_BYTES;
        if (SPARSE) {
#pragma unroll 1
            for (int i = 0; i < KEY_TILE / PART; ++i) {
                const Step step = route.step(tile, i);
                if (step.who == 0) break;
                k.jump<PART>(to + i * PART * ROW_BYTES, step.row);
                v.jump<PART>(to + i * PART * ROW_BYTES + TILE_BYTES, step.row);
            }
        } else if (tile < num_tiles) {
            k.next<KEY_TILE>(to);
            v.next<KEY_TILE>(to + TILE_BYTES);
        }
        commit_copies();  // an empty group too: wait_copies counts groups
    };
    if (SPARSE) {
        if (threadIdx.x == 0) route.start_queries(p, w, w.tile * ROWS, STAGES);
        __syncthreads();
    }
#pragma unroll
    for (int tile = 0; tile < STAGES - 1; ++tile) load(tile);

    u32 q[ROW_TILES][K_STEPS][4];
    Rows rows;
    const u16* q_rows = at(p.q, p.q_strides, w, w.q_start);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int kk = 0; kk < K_STEPS; ++kk)
            load_fragment(q[m][kk], q_rows, p.q_strides.row, first_row + 16 * m, w.q_len, 16 * kk, p.head_dim);
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d)
#pragma unroll
            for (int c = 0; c < 4; ++c) rows.out[m][d][c] = 0.f;
#pragma unroll
        for (int i = 0; i < 2; ++i) rows.reference[m][i] = -INFINITE, rows.sum[m][i] = 0.f;
    }
#if DROPOUT
    const Philox philox = start_philox(p, w);
#endif
    const LanePlace plain = plain_place(), transposed = transposed_place();
    int stage = 0;

#pragma unroll 1
    for (int tile = 0; SPARSE || tile < num_tiles; ++tile) {
        wait_copies<STAGES - 2>();
        // Why: every thread's copies of this tile must be visible to all, and all must be done with the buffer
        // that the next load overwrites.
        __syncthreads();
        if (SPARSE && route.over(tile)) break;
        load(tile + STAGES - 1);
        if (SPARSE && threadIdx.x == 0) route.post(tile + STAGES);
        const u32 k_tile = shared + stage * 2 * TILE_BYTES, v_tile = k_tile + TILE_BYTES;
        stage = stage + 1 == STAGES ? 0 : stage + 1;

#pragma unroll 1
        for (int inner = 0; inner < KEY_TILE; inner += STEP) {
            int column = tile * KEY_TILE + inner;
            if (SPARSE) {
                const Step step = route.step(tile, inner / PART);
                column = step.row + inner % PART;
                if (!(step.who >> half & 1) || column >= warp_keys) continue;
            } else if (column >= warp_keys) {
                break;
            }
            Scores s;
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
                for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                    for (int c = 0; c < 4; ++c) s[m][n][c] = 0.f;
#pragma unroll
            for (int kk = 0; kk < K_STEPS; ++kk)
#pragma unroll
                for (int n = 0; n < BLOCKS; n += 2) {
                    u32 b[4];
                    ldmatrix(b, plain.at(k_tile, inner + 8 * n, kk));
#pragma unroll
                    for (int m = 0; m < ROW_TILES; ++m) {
                        mma(s[m][n], q[m][kk], b[0], b[1]);
                        mma(s[m][n + 1], q[m][kk], b[2], b[3]);
                    }
                }

            Weights weights;
            float sums[ROW_TILES][2];
            // A walk's first step may be anywhere; under the reference it finds (-inf) no sum is safe, and it settles too.
            bool careful = (!SPARSE && column == 0) || column + STEP > unmasked;
            if (!careful) careful = !__all_sync(ALL_LANES, weigh(s, weights, sums, rows, p.scale_log2));
            if (careful) settle(s, weights, sums, rows, p, first_row, column, w.k_len, w.offset);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) rows.sum[m][0] += sums[m][0], rows.sum[m][1] += sums[m][1];

#if DROPOUT
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
                for (int n = 0; n < BLOCKS; n += 4) {
                    u32 keep[4];
                    keep_bits(keep, p, philox, (first_row >> 4) + m, (column >> 5) + n / 4);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        weights[m][n + j][0] &= pair_mask<0>(keep[j]);
                        weights[m][n + j][1] &= pair_mask<1>(keep[j]);
                    }
                }
#endif
#pragma unroll
            for (int n = 0; n < BLOCKS; n += 2)
#pragma unroll
                for (int d = 0; d < K_STEPS; ++d) {
                    u32 b[4];
                    ldmatrix_transposed(b, transposed.at(v_tile, inner + 8 * n, d));
#pragma unroll
                    for (int m = 0; m < ROW_TILES; ++m) {
                        const u32 a[4] = {weights[m][n][0], weights[m][n][1], weights[m][n + 1][0], weights[m][n + 1][1]};
                        mma(rows.out[m][2 * d], a, b[0], b[1]);
                        mma(rows.out[m][2 * d + 1], a, b[2], b[3]);
                    }
                }
        }
    }
    wait_copies<0>();
    finish(rows, p, w, first_row);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_forward(const __grid_constant__ Params p) {
    attend<false>(p);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_forward_sparse(const __grid_constant__ Params p) {
    attend<true>(p);
}
