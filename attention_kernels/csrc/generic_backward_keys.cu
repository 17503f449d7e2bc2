// Backward, compute capability 8.0 and up: KEYS keys of one head a block, looping over all queries.
//
// Build: -DHEAD_DIM={16,32,64,96,128} -DDTYPE_BF16={0,1} -DDROPOUT={0,1} and the tile numbers of kernel_plan.py:
//   WARPS, ROW_TILES (16-key tiles a warp), QUERY_TILE (queries a stage), STAGES, MIN_BLOCKS,
//   SHARED_OPERANDS (0: k and v as fragments in registers; 1: v, 2: both in shared memory),
//   WITH_DQ (1: dQ too, through float32 atomics; 0: dK and dV alone, see generic_backward_queries.cu for dQ).
//
// Scores are computed transposed (keys x queries): rounded and packed they are at once the A of dV = P^T dO and
// dK = dS^T Q, so each warp owns its keys' sums and dK and dV are the same bits every time.
//
//     S^T = K Q^T    P^T = exp2(S^T c - lse2)    dP^T = V dO^T    dS^T = P^T (keep dP^T - D)    D = rowsum(dO O) - dlse
//
// dQ = dS K runs over all keys, of all warps and all blocks. The warps of a block lay their dS^T into shared memory;
// after a barrier each takes 16 queries (or a part of their columns) against all the block's keys and adds the result
// to a float32 buffer. Its rows hold the columns in the order of the accumulators, so that a lane adds 16 bytes at a time:
// in each group of 16 columns, place 4 t + i (t < 4) is column 2 t + (i & 1) + 8 (i >> 1).
#include "common/philox.cuh"
#include "common/tiles.cuh"
#include "common/walk.cuh"

#define WARP_KEYS (ROW_TILES * 16)
#define KEYS (WARPS * WARP_KEYS)
#define TILE_BYTES (QUERY_TILE * ROW_BYTES)
#define STAGE_BYTES (2 * TILE_BYTES + QUERY_TILE * 8)
#define SHARED_VALUES (SHARED_OPERANDS >= 1)
#define SHARED_KEYS (SHARED_OPERANDS >= 2)
// Shared memory: STAGES x (q, dO, statistics) | K, where read from there | V, where read from there | dS^T
#define K_AT (STAGES * STAGE_BYTES)
#define V_AT (K_AT + (SHARED_KEYS || WITH_DQ ? KEYS * ROW_BYTES : 0))
#define DS_AT (V_AT + (SHARED_VALUES ? KEYS * ROW_BYTES : 0))
#define DS_ROW (QUERY_TILE * 2)
static_assert(!WITH_DQ || QUERY_TILE == 64, "a row of dS^T is the 8 chunks that ds_place turns");
static_assert(QUERY_TILE <= THREADS, "a thread copies one row's statistics");
// Block-sparse: see walk.cuh. The tile's halves have different lists where blocks are of 64.
#define HALVES (KEYS / STRETCH)
#define PART part_rows(HALVES, QUERY_TILE, 16)
static_assert(STAGES <= 3, "a route is kept for four stages");
static_assert(KEYS == HALVES * STRETCH && STRETCH % WARP_KEYS == 0, "a warp lies in one stretch of a walk");
#define SLICES (QUERY_TILE / 16)
#define PARTS (WARPS / SLICES)
#define PART_STEPS (K_STEPS / PARTS)
static_assert(!WITH_DQ || (PARTS * SLICES == WARPS && PART_STEPS * PARTS == K_STEPS), "warps share dQ evenly");

typedef float Block[2][4];  // 16 keys x 16 queries

struct Keys {
#if !SHARED_KEYS
    u32 k[ROW_TILES][K_STEPS][4];
#endif
#if !SHARED_VALUES
    u32 v[ROW_TILES][K_STEPS][4];
#endif
    float dk[ROW_TILES][HEAD_DIM / 8][4], dv[ROW_TILES][HEAD_DIM / 8][4];
};

__device__ __forceinline__ void load_keys(Keys& keys, const Params& p, const Work& w, int first_key) {
#if !SHARED_KEYS
    const u16* k = at(p.k, p.k_strides, w, w.k_start);
#endif
#if !SHARED_VALUES
    const u16* v = at(p.v, p.v_strides, w, w.k_start);
#endif
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int kk = 0; kk < K_STEPS; ++kk) {
#if !SHARED_KEYS
            load_fragment(keys.k[m][kk], k, p.k_strides.row, first_key + 16 * m, w.k_len, 16 * kk, p.head_dim);
#endif
#if !SHARED_VALUES
            load_fragment(keys.v[m][kk], v, p.v_strides.row, first_key + 16 * m, w.k_len, 16 * kk, p.head_dim);
#endif
        }
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d)
#pragma unroll
            for (int c = 0; c < 4; ++c) keys.dk[m][d][c] = keys.dv[m][d][c] = 0.f;
    }
}

// Zeros the rows of dk and dv from `from` on (padding keys, or rows of no sequence), shared out by tile.
__device__ __forceinline__ void zero_keys(const Params& p, const Work& w, i64 start, int num_rows) {
    zero_rows(at(p.dk, p.dkv_strides, w, start), p.dkv_strides.row, num_rows, p.head_dim, w.tile, p.tiles);
    zero_rows(at(p.dv, p.dkv_strides, w, start), p.dkv_strides.row, num_rows, p.head_dim, w.tile, p.tiles);
}

// The masks of a 16 query x 32 key tile turned to keys x queries: [key block of 8][query block of 8].
__device__ __forceinline__ void turned_masks(u32 (&masks)[2 * ROW_TILES][2], const u32 (&keep)[4], bool upper_half) {
#pragma unroll
    for (int j = 0; j < 2 * ROW_TILES; ++j) {
        const u32 bits = ROW_TILES == 1 && upper_half ? keep[(j + 2) & 3] : keep[j];
        masks[j][0] = transpose8x8(pair_mask<0>(bits));
        masks[j][1] = transpose8x8(pair_mask<1>(bits));
    }
}

// P of pairs that do not see each other becomes 0. Why a block of its own: mixed into the main path, the compiler turns
// each test into a select and every step pays for it.
__device__ __forceinline__ void hide(Block (&s)[ROW_TILES], const Params& p, const Work& w, int first_key, int row) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int key = first_key + 16 * m + 8 * h + (lane >> 2);
            const int first_seen = (key >= w.k_len ? 0x7fffffff : p.causal ? key - w.offset : 0);
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (row + 8 * n + 2 * (lane & 3) + e < first_seen) s[m][n][2 * h + e] = 0.f;
        }
}

#if WITH_DQ
// Byte of dS^T at (key, 8-query chunk): rows of 8 chunks, chunk c at place c ^ (key % 8), as in tiles.cuh.
__device__ __forceinline__ u32 ds_place(int key, int chunk) { return key * DS_ROW + ((chunk ^ (key & 7)) << 4); }

__device__ __forceinline__ void write_ds(u32 to, const u32 (&ds)[ROW_TILES][4], int warp_key, int query) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // i = 2 (query block) + key half
            const int key = warp_key + 16 * m + 8 * (i & 1) + (lane >> 2);
            const u32 place = to + ds_place(key, query / 8 + (i >> 1)) + 4 * (lane & 3);
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(place), "r"(ds[m][i]) : "memory");
        }
}

__device__ __forceinline__ void add4(float* to, const float (&x)[4], const float (&y)[4], int i) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[i]), "f"(x[i + 1]), "f"(y[i]),
                 "f"(y[i + 1]) : "memory");
#else
    atomicAdd(to, x[i]), atomicAdd(to + 1, x[i + 1]), atomicAdd(to + 2, y[i]), atomicAdd(to + 3, y[i + 1]);
#endif
}

// dQ of one slice of 16 queries, the first of which is `first_query`, from the block's keys [from, to) (one part of its
// columns, where warps share a slice).
__device__ __forceinline__ void add_dq(u32 shared, const LanePlace& transposed, const Params& p, const Work& w, int first_query,
                                       int from, int to) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int slice = warp % SLICES, first_step = warp / SLICES * PART_STEPS;
    if (first_query >= w.q_len) return;
    float dq[PART_STEPS * 2][4];
#pragma unroll
    for (int d = 0; d < PART_STEPS * 2; ++d)
#pragma unroll
        for (int c = 0; c < 4; ++c) dq[d][c] = 0.f;
#pragma unroll 4
    for (int key = from; key < to; key += 16) {
        u32 a[4];
        ldmatrix_transposed(a, shared + DS_AT + ds_place(key + (lane & 7) + (lane >> 4) * 8, 2 * slice + ((lane >> 3) & 1)));
#pragma unroll
        for (int d = 0; d < PART_STEPS; ++d) {
            u32 b[4];
            ldmatrix_transposed(b, transposed.at(shared + K_AT, key, first_step + d));
            mma(dq[2 * d], a, b[0], b[1]);
            mma(dq[2 * d + 1], a, b[2], b[3]);
        }
    }
    const int row = first_query + (lane >> 2);
    float* sums = p.dq_sums + (stats_at(p, w) + row) * HEAD_DIM + first_step * 16 + 4 * (lane & 3);
#pragma unroll
    for (int d = 0; d < PART_STEPS; ++d) {
        if ((first_step + d) * 16 >= p.head_dim) break;
        if (row < w.q_len) add4(sums + 16 * d, dq[2 * d], dq[2 * d + 1], 0);
        if (row + 8 < w.q_len) add4(sums + 8 * HEAD_DIM + 16 * d, dq[2 * d], dq[2 * d + 1], 2);
    }
}
#endif

// Dense, it walks over all queries in order; SPARSE over those of the layout. The steps are the same.
template <bool SPARSE>
__device__ __forceinline__ void differentiate(const Params& p) {
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    const u32 shared = (u32)__cvta_generic_to_shared(shared_bytes);
    __shared__ Route<HALVES, PART, QUERY_TILE> route;
    const Work w = find_work(p, blockIdx.x, false);
    if (w.tail) return zero_keys(p, w, w.k_start, w.k_len);
    // Keys hidden by key_lengths have gradient 0.
    if (p.key_lengths != nullptr) zero_keys(p, w, w.k_len, p.len_k - w.k_len);
    if (w.tile * KEYS >= w.k_len) return;

    const int half = HALVES == 1 ? 0 : (threadIdx.x >> 5) * WARP_KEYS / STRETCH;
    const int lane = threadIdx.x & 31;
    const int first_key = w.tile * KEYS + (threadIdx.x >> 5) * WARP_KEYS;
    // Causal: key c is seen by rows from c - offset on.
    const int start = !SPARSE && p.causal ? max(0, w.tile * KEYS - w.offset) / QUERY_TILE : 0;
    const int num_tiles = (w.q_len + QUERY_TILE - 1) / QUERY_TILE;
    const int first_query = start * QUERY_TILE;
    TileCopy q(at(p.q, p.q_strides, w, w.q_start), p.q_strides.row, first_query, w.q_len, p.head_dim);
    TileCopy dout(at(p.dout, p.dout_strides, w, w.q_start), p.dout_strides.row, first_query, w.q_len, p.head_dim);
    const float2* stats = p.stats + stats_at(p, w);

    auto load = [&](int tile) {
        const u32 to = shared + (tile % STAGES) * STAGE_BYTES;
        int row = tile * QUERY_TILE + threadIdx.x;  // whose statistics this thread copies
        if (SPARSE) {
#pragma unroll 1
            for (int i = 0; i < QUERY_TILE / PART; ++i) {
                const Step step = route.step(tile, i);
                if (threadIdx.x / PART == i) row = step.row + threadIdx.x % PART;
                if (step.who == 0) break;
                q.jump<PART>(to + i * PART * ROW_BYTES, step.row);
                dout.jump<PART>(to + i * PART * ROW_BYTES + TILE_BYTES, step.row);
            }
        } else if (tile < num_tiles) {
            q.next<QUERY_TILE>(to);
            dout.next<QUERY_TILE>(to + TILE_BYTES);
        }
        // Rows past the end are zeros throughout: P is 1 there, but dO, D and q are 0 and add nothing.
        if ((SPARSE || tile < num_tiles) && threadIdx.x < QUERY_TILE)
            copy8(to + 2 * TILE_BYTES + threadIdx.x * 8, stats + row, row < w.q_len);
        commit_copies();
    };
    if (SPARSE) {
        if (threadIdx.x == 0) route.start_keys(p, w, w.tile * KEYS, STAGES);
        __syncthreads();
    }
    // These join the first stage's group of copies: there when that stage is.
#if SHARED_KEYS || WITH_DQ
    TileCopy(at(p.k, p.k_strides, w, w.k_start), p.k_strides.row, w.tile * KEYS, w.k_len, p.head_dim).next<KEYS>(shared + K_AT);
#endif
#if SHARED_VALUES
    TileCopy(at(p.v, p.v_strides, w, w.k_start), p.v_strides.row, w.tile * KEYS, w.k_len, p.head_dim).next<KEYS>(shared + V_AT);
#endif
#pragma unroll
    for (int tile = 0; tile < STAGES - 1; ++tile) load(start + tile);

    Keys keys;
    load_keys(keys, p, w, first_key);
#if DROPOUT
    const Philox philox = start_philox(p, w);
#endif
    const LanePlace plain = plain_place(), transposed = transposed_place();
    const int warp_key = (threadIdx.x >> 5) * WARP_KEYS;  // within the block

#pragma unroll 1
    for (int tile = start; SPARSE || tile < num_tiles; ++tile) {
        wait_copies<STAGES - 2>();
        // Why: as in the forward, arrival of this tile and release of the buffer loaded next.
        __syncthreads();
        if (SPARSE && route.over(tile)) break;
        load(tile + STAGES - 1);
        if (SPARSE && threadIdx.x == 0) route.post(tile + STAGES);
        const u32 q_tile = shared + (tile % STAGES) * STAGE_BYTES, dout_tile = q_tile + TILE_BYTES;
        const float4* row_stats = (const float4*)(shared_bytes + (tile % STAGES) * STAGE_BYTES + 2 * TILE_BYTES);

#pragma unroll 1
        for (int inner = 0; inner < QUERY_TILE; inner += 16) {
            int row = tile * QUERY_TILE + inner;
            if (SPARSE) {
                const Step step = route.step(tile, inner / PART);
                row = step.row + inner % PART;
                if (!(step.who >> half & 1) || row >= w.q_len) continue;
            } else if (row >= w.q_len) {
                break;
            }
            if (p.causal && row + 15 + w.offset < first_key) {
#if WITH_DQ
                const u32 none[ROW_TILES][4] = {};
                write_ds(shared + DS_AT, none, warp_key, inner);
#endif
                continue;
            }
            // Why the second term: keys past the end hold garbage in rows of their own, but dQ sums over keys.
            const bool mask = (p.causal && row + w.offset < first_key + WARP_KEYS - 1) ||
                              (WITH_DQ && first_key + WARP_KEYS > w.k_len);
            Block s[ROW_TILES], dp[ROW_TILES];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int c = 0; c < 4; ++c) s[m][n][c] = dp[m][n][c] = 0.f;
#pragma unroll
            for (int kk = 0; kk < K_STEPS; ++kk) {
                u32 b[4], g[4];
                ldmatrix(b, plain.at(q_tile, inner, kk));
                ldmatrix(g, plain.at(dout_tile, inner, kk));
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
#if SHARED_KEYS
                    u32 k[4];
                    ldmatrix(k, transposed.at(shared + K_AT, warp_key + 16 * m, kk));
#else
                    const u32(&k)[4] = keys.k[m][kk];
#endif
#if SHARED_VALUES
                    u32 v[4];
                    ldmatrix(v, transposed.at(shared + V_AT, warp_key + 16 * m, kk));
#else
                    const u32(&v)[4] = keys.v[m][kk];
#endif
                    mma(s[m][0], k, b[0], b[1]);
                    mma(s[m][1], k, b[2], b[3]);
                    mma(dp[m][0], v, g[0], g[1]);
                    mma(dp[m][1], v, g[2], g[3]);
                }
            }
#if DROPOUT
            u32 keep[4], masks[2 * ROW_TILES][2];
            keep_bits(keep, p, philox, row >> 4, first_key >> 5);
            turned_masks(masks, keep, first_key & 16);
#endif
            // (lse2, D) of queries 2t and 2t + 1 of each block of 8. From here on s holds P.
            const float4 two[2] = {row_stats[inner / 2 + (lane & 3)], row_stats[inner / 2 + 4 + (lane & 3)]};
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        s[m][n][c] = exp2_fast(fmaf(s[m][n][c], p.scale_log2, -(c & 1 ? two[n].z : two[n].x)));
            if (mask) hide(s, p, w, first_key, row);
            u32 weights[ROW_TILES][4], ds[ROW_TILES][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float x = s[m][n][2 * h], y = s[m][n][2 * h + 1];
                        weights[m][2 * n + h] = pack(x, y);
                        float gx = dp[m][n][2 * h], gy = dp[m][n][2 * h + 1];
#if DROPOUT
                        const u32 pair = masks[2 * m + h][n];
                        weights[m][2 * n + h] &= pair;
                        gx = masked(gx, low_mask(pair)) * p.keep_scale;
                        gy = masked(gy, high_mask(pair)) * p.keep_scale;
#endif
                        ds[m][2 * n + h] = pack(x * (gx - two[n].y), y * (gy - two[n].w));
                    }
#pragma unroll
            for (int d = 0; d < K_STEPS; ++d) {
                u32 b[4], g[4];
                ldmatrix_transposed(g, transposed.at(dout_tile, inner, d));
                ldmatrix_transposed(b, transposed.at(q_tile, inner, d));
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
                    mma(keys.dv[m][2 * d], weights[m], g[0], g[1]);
                    mma(keys.dv[m][2 * d + 1], weights[m], g[2], g[3]);
                    mma(keys.dk[m][2 * d], ds[m], b[0], b[1]);
                    mma(keys.dk[m][2 * d + 1], ds[m], b[2], b[3]);
                }
            }
#if WITH_DQ
            write_ds(shared + DS_AT, ds, warp_key, inner);
#endif
        }
#if WITH_DQ
        // Why: dS^T of all warps must be there before any reads it. The barrier at the loop's head parts these reads
        // from the next tile's writes.
        __syncthreads();
        const int slice = (threadIdx.x >> 5) % SLICES * 16;
        if (SPARSE) {
            // A half that takes no part has left dS^T of another stage.
            const Step step = route.step(tile, slice / PART);
            const int from = step.who & 1 ? 0 : STRETCH, to = step.who & 2 ? KEYS : STRETCH;
            if (step.who != 0) add_dq(shared, transposed, p, w, step.row + slice % PART, from, to);
        } else {
            add_dq(shared, transposed, p, w, tile * QUERY_TILE + slice, 0, KEYS);
        }
#endif
    }
    wait_copies<0>();
    u16* dk = at(p.dk, p.dkv_strides, w, w.k_start);
    u16* dv = at(p.dv, p.dkv_strides, w, w.k_start);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        const int key = first_key + 16 * m;
        store_rows(dk, p.dkv_strides.row, key, w.k_len, p.head_dim, keys.dk[m], p.scale, p.scale);
        store_rows(dv, p.dkv_strides.row, key, w.k_len, p.head_dim, keys.dv[m], p.keep_scale, p.keep_scale);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_backward_keys(const __grid_constant__ Params p) {
    differentiate<false>(p);
}

// Why one block fewer for one of them: four leave 128 registers, and it spills.
#define SPARSE_BLOCKS (HEAD_DIM == 16 && DROPOUT && !WITH_DQ ? MIN_BLOCKS - 1 : MIN_BLOCKS)
extern "C" __global__ void __launch_bounds__(THREADS, SPARSE_BLOCKS) attention_backward_keys_sparse(const __grid_constant__ Params p) {
    differentiate<true>(p);
}
