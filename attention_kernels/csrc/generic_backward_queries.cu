// Gradient of q, compute capability 8.0 and up: ROWS queries of one head a block, looping over all keys.
//
// Build: -DHEAD_DIM={16,32,64,96,128} -DDTYPE_BF16={0,1} -DDROPOUT={0,1} and the tile numbers of kernel_plan.py:
//   WARPS, ROW_TILES (16-row tiles a warp), KEY_TILE (keys a stage), STEP (keys at a time), STAGES, MIN_BLOCKS.
//
// The mirror of generic_backward_keys.cu: q and dO stay as A fragments, scores are queries x keys, and dS rounded
// and packed is the A of dQ = dS K. No sum is shared between warps, so the result is the same bits every time.
#include "common/philox.cuh"
#include "common/tiles.cuh"
#include "common/walk.cuh"

#define WARP_ROWS (ROW_TILES * 16)
#define ROWS (WARPS * WARP_ROWS)
#define TILE_BYTES (KEY_TILE * ROW_BYTES)
#define BLOCKS (STEP / 8)
static_assert(KEY_TILE % STEP == 0, "a stage is whole steps");
static_assert(STEP <= 32, "one call of Philox serves 32 keys");
// Block-sparse: see walk.cuh. The tile's halves have different lists where blocks are of 64.
#define HALVES (ROWS / STRETCH)
#define PART part_rows(HALVES, KEY_TILE, STEP)
static_assert(STAGES <= 3, "a route is kept for four stages");
static_assert(ROWS == HALVES * STRETCH && STRETCH % WARP_ROWS == 0, "a warp lies in one stretch of a walk");

struct Queries {
    u32 q[ROW_TILES][K_STEPS][4], dout[ROW_TILES][K_STEPS][4];
    float dq[ROW_TILES][HEAD_DIM / 8][4];
    float lse[ROW_TILES][2], delta[ROW_TILES][2];
};

__device__ __forceinline__ void load_queries(Queries& rows, const Params& p, const Work& w, int first_row) {
    const int lane = threadIdx.x & 31;
    const u16* q = at(p.q, p.q_strides, w, w.q_start);
    const u16* dout = at(p.dout, p.dout_strides, w, w.q_start);
    const float2* stats = p.stats + stats_at(p, w);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int kk = 0; kk < K_STEPS; ++kk) {
            load_fragment(rows.q[m][kk], q, p.q_strides.row, first_row + 16 * m, w.q_len, 16 * kk, p.head_dim);
            load_fragment(rows.dout[m][kk], dout, p.dout_strides.row, first_row + 16 * m, w.q_len, 16 * kk, p.head_dim);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + 16 * m + 8 * i + (lane >> 2);
            const float2 s = row < w.q_len ? stats[row] : make_float2(INFINITE, 0.f);
            rows.lse[m][i] = s.x, rows.delta[m][i] = s.y;
        }
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d)
#pragma unroll
            for (int c = 0; c < 4; ++c) rows.dq[m][d][c] = 0.f;
    }
}

// P of hidden keys becomes 0. Why a block of its own: mixed into the main path, the compiler turns each test into a
// select and every step pays for it.
__device__ __forceinline__ void hide(float (&s)[ROW_TILES][BLOCKS][4], const Params& p, const Work& w, int first_row, int column) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + 16 * m + 8 * i + (lane >> 2);
            const int seen = (p.causal ? min(w.k_len, row + w.offset + 1) : w.k_len) - column - 2 * (lane & 3);
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (8 * n + e >= seen) s[m][n][2 * i + e] = 0.f;
        }
}

// Dense, it walks over all keys in order; SPARSE over those of the layout. The steps are the same.
template <bool SPARSE>
__device__ __forceinline__ void differentiate(const Params& p) {
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    const u32 shared = (u32)__cvta_generic_to_shared(shared_bytes);
    __shared__ Route<HALVES, PART, KEY_TILE> route;
    const Work w = find_work(p, blockIdx.x, p.causal);
    u16* dq = at(p.dq, p.dq_strides, w, w.q_start);
    if (w.tail) return zero_rows(dq, p.dq_strides.row, w.q_len, p.head_dim, w.tile, p.tiles);
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
        commit_copies();
    };
    if (SPARSE) {
        if (threadIdx.x == 0) route.start_queries(p, w, w.tile * ROWS, STAGES);
        __syncthreads();
    }
#pragma unroll
    for (int tile = 0; tile < STAGES - 1; ++tile) load(tile);

    Queries rows;
    load_queries(rows, p, w, first_row);
#if DROPOUT
    const Philox philox = start_philox(p, w);
#endif
    const LanePlace plain = plain_place(), transposed = transposed_place();

#pragma unroll 1
    for (int tile = 0; SPARSE || tile < num_tiles; ++tile) {
        wait_copies<STAGES - 2>();
        // Why: as in the forward, arrival of this tile and release of the buffer loaded next.
        __syncthreads();
        if (SPARSE && route.over(tile)) break;
        load(tile + STAGES - 1);
        if (SPARSE && threadIdx.x == 0) route.post(tile + STAGES);
        const u32 k_tile = shared + (tile % STAGES) * 2 * TILE_BYTES, v_tile = k_tile + TILE_BYTES;

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
            float s[ROW_TILES][BLOCKS][4], dp[ROW_TILES][BLOCKS][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
                for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                    for (int c = 0; c < 4; ++c) s[m][n][c] = dp[m][n][c] = 0.f;
#pragma unroll
            for (int kk = 0; kk < K_STEPS; ++kk)
#pragma unroll
                for (int n = 0; n < BLOCKS; n += 2) {
                    u32 b[4], g[4];
                    ldmatrix(b, plain.at(k_tile, inner + 8 * n, kk));
                    ldmatrix(g, plain.at(v_tile, inner + 8 * n, kk));
#pragma unroll
                    for (int m = 0; m < ROW_TILES; ++m) {
                        mma(s[m][n], rows.q[m][kk], b[0], b[1]);
                        mma(s[m][n + 1], rows.q[m][kk], b[2], b[3]);
                        mma(dp[m][n], rows.dout[m][kk], g[0], g[1]);
                        mma(dp[m][n + 1], rows.dout[m][kk], g[2], g[3]);
                    }
                }

            const bool mask = column + STEP > unmasked;
            // From here on s holds P.
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
                for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                    for (int c = 0; c < 4; ++c) s[m][n][c] = exp2_fast(fmaf(s[m][n][c], p.scale_log2, -rows.lse[m][c / 2]));
            // Why here and not in the keys' kernel: a hidden key's garbage would enter every row's sum.
            if (mask) hide(s, p, w, first_row, column);
            u32 ds[ROW_TILES][BLOCKS][2];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
#if DROPOUT
                // A call serves 32 keys; where a step has 16, it takes its half.
                u32 keep[4];
                keep_bits(keep, p, philox, (first_row >> 4) + m, column >> 5);
                if (STEP == 16 && (column & 16)) keep[0] = keep[2], keep[1] = keep[3];
#endif
#pragma unroll
                for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float gx = dp[m][n][2 * i], gy = dp[m][n][2 * i + 1];
#if DROPOUT
                        const u32 pair = i == 0 ? pair_mask<0>(keep[n]) : pair_mask<1>(keep[n]);
                        gx = masked(gx, low_mask(pair)) * p.keep_scale;
                        gy = masked(gy, high_mask(pair)) * p.keep_scale;
#endif
                        gx -= rows.delta[m][i], gy -= rows.delta[m][i];
                        ds[m][n][i] = pack(s[m][n][2 * i] * gx, s[m][n][2 * i + 1] * gy);
                    }
            }
#pragma unroll
            for (int n = 0; n < BLOCKS; n += 2)
#pragma unroll
                for (int d = 0; d < K_STEPS; ++d) {
                    u32 b[4];
                    ldmatrix_transposed(b, transposed.at(k_tile, inner + 8 * n, d));
#pragma unroll
                    for (int m = 0; m < ROW_TILES; ++m) {
                        const u32 a[4] = {ds[m][n][0], ds[m][n][1], ds[m][n + 1][0], ds[m][n + 1][1]};
                        mma(rows.dq[m][2 * d], a, b[0], b[1]);
                        mma(rows.dq[m][2 * d + 1], a, b[2], b[3]);
                    }
                }
        }
    }
    wait_copies<0>();
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
        store_rows(dq, p.dq_strides.row, first_row + 16 * m, w.q_len, p.head_dim, rows.dq[m], p.scale, p.scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_backward_queries(const __grid_constant__ Params p) {
    differentiate<false>(p);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_backward_queries_sparse(const __grid_constant__ Params p) {
    differentiate<true>(p);
}
