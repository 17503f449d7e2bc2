// The softmax of the forward pass: scores to weights under a running reference value, row sums, output and lse.
//
// Made for the accumulator layout of mma.cuh (wgmma's is the same for 16 rows a warp): lane 4 g + t holds rows g and
// g + 8 of each 16-row tile, columns 2t and 2t + 1 of each block of 8. The file that includes this defines ROW_TILES
// (16-row tiles a warp), BLOCKS (blocks of 8 columns a step) and what tiles.cuh asks for. Nothing here reads blockIdx.
#pragma once
#include "tiles.cuh"

// A partial sum bounds each of its terms: under 2^15 no term overflows float16. bfloat16 has float32's range.
#if DTYPE_BF16
#define SUM_LIMIT 1.0e9f
#else
#define SUM_LIMIT 3.0e4f
#endif

struct Rows {
    float out[ROW_TILES][HEAD_DIM / 8][4];
    float reference[ROW_TILES][2];  // log2 units, of the scaled scores
    float sum[ROW_TILES][2];        // this lane's columns only
};

typedef float Scores[ROW_TILES][BLOCKS][4];
typedef u32 Weights[ROW_TILES][BLOCKS][2];

// exp2 under the present reference; false where a lane's partial sums have left the safe range.
__device__ __forceinline__ bool weigh(const Scores& s, Weights& w, float (&sums)[ROW_TILES][2], const Rows& rows, float scale) {
    bool safe = true;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float minus = -rows.reference[m][i];
            float even = 0.f, odd = 0.f;
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n) {
                const float x = exp2_fast(fmaf(s[m][n][2 * i], scale, minus));
                const float y = exp2_fast(fmaf(s[m][n][2 * i + 1], scale, minus));
                even += x, odd += y;
                w[m][n][i] = pack(x, y);
            }
            sums[m][i] = even + odd;
            safe = safe && sums[m][i] <= SUM_LIMIT;
        }
    }
    return safe;
}

// The careful path: masks, takes each row's maximum, rescales what was summed before, and weighs anew.
__device__ __forceinline__ void settle(const Scores& s, Weights& w, float (&sums)[ROW_TILES][2], Rows& rows, const Params& p,
                                       int first_row, int column, int k_len, int offset) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + 16 * m + 8 * i + (lane >> 2);
            const int seen = (p.causal ? min(k_len, row + offset + 1) : k_len) - column - 2 * (lane & 3);
            float top = rows.reference[m][i];
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (8 * n + e < seen) top = fmaxf(top, s[m][n][2 * i + e] * p.scale_log2);
            top = max_of_quad(top);
            // Why: a row that has seen nothing keeps -inf as its maximum, and -inf - -inf would be NaN.
            const float base = top == -INFINITE ? 0.f : top;
            const float shrink = exp2_fast(rows.reference[m][i] - base);
            rows.reference[m][i] = top;
            rows.sum[m][i] *= shrink;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; ++d) rows.out[m][d][2 * i] *= shrink, rows.out[m][d][2 * i + 1] *= shrink;
            float total = 0.f;
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n) {
                float x = exp2_fast(fmaf(s[m][n][2 * i], p.scale_log2, -base));
                float y = exp2_fast(fmaf(s[m][n][2 * i + 1], p.scale_log2, -base));
                x = 8 * n < seen ? x : 0.f;
                y = 8 * n + 1 < seen ? y : 0.f;
                total += x + y;
                w[m][n][i] = pack(x, y);
            }
            sums[m][i] = total;
        }
    }
}

__device__ __forceinline__ void finish(const Rows& rows, const Params& p, const Work& w, int first_row) {
    const int lane = threadIdx.x & 31;
    u16* out = at(p.out_written, p.out_strides, w, w.q_start);
    float* lse = p.lse + stats_at(p, w);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float sum = sum_of_quad(rows.sum[m][i]);
            factor[i] = sum == 0.f ? 0.f : p.keep_scale / sum;
            const int row = first_row + 16 * m + 8 * i + (lane >> 2);
            const float value = sum == 0.f ? -INFINITE : (rows.reference[m][i] + log2_fast(sum)) * LN_2;
            if ((lane & 3) == 0 && row < w.q_len) lse[row] = value;
        }
        store_rows(out, p.out_strides.row, first_row + 16 * m, w.q_len, p.head_dim, rows.out[m], factor[0], factor[1]);
    }
}

__device__ __forceinline__ void empty_rows(const Params& p, const Work& w) {
    zero_rows(at(p.out_written, p.out_strides, w, w.q_start), p.out_strides.row, w.q_len, p.head_dim, w.tile, p.tiles);
    for (int row = w.tile * TEAM_THREADS + team_thread(); row < w.q_len; row += p.tiles * TEAM_THREADS)
        p.lse[stats_at(p, w) + row] = -INFINITE;
}
