// Scores of the Hopper backward between its products: P and dS of 64 keys x 64 queries, the mask and dropout laid over them.
#pragma once
#include "backward_stages.cuh"
#include "philox.cuh"

// P of pairs that do not see each other becomes 0. Keys past the end are such too: what they hold stays in rows of their
// own in dK and dV, but dQ sums over keys. Why a block of its own: mixed into the main path, every step pays for it.
__device__ __forceinline__ void hide(Block& s, const Params& p, const Work& w, int first_key, int row) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int key = first_key + 8 * h + (lane >> 2);
        const int first_seen = (key >= w.k_len ? 0x7fffffff : p.causal ? key - w.offset : 0) - row - 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < QUERY_TILE / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (8 * n + e < first_seen) s[n][2 * h + e] = 0.f;
    }
}

// One statistic of the queries that this lane sees in blocks n and n + 1 of 8: 2t and 2t + 1 of each.
__device__ __forceinline__ float4 load_pairs(u32 from, int n) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(from + n * 32 + (threadIdx.x & 3) * 16));
    return x;
}

// Loaded ahead, while products run, where registers allow, else when wanted.
#if HEAD_DIM <= 32 || WARPS == 8 && (HEAD_DIM < 128 || !DROPOUT)
struct RowPairs {
    float4 pairs[QUERY_TILE / 16];
    __device__ __forceinline__ explicit RowPairs(u32 from) {
#pragma unroll
        for (int n = 0; n < QUERY_TILE / 8; n += 2) pairs[n / 2] = load_pairs(from, n);
    }
    __device__ __forceinline__ float4 operator[](int n) const { return pairs[n / 2]; }
};
#else
struct RowPairs {
    u32 from;
    __device__ __forceinline__ explicit RowPairs(u32 from) : from(from) {}
    __device__ __forceinline__ float4 operator[](int n) const { return load_pairs(from, n); }
};
#endif

// P and dS from scores that hold P already: rounds both, with the dropout mask laid over them.
__device__ __forceinline__ void differentiate(Fragments& weights, Fragments& ds, const Block& s, const Block& dp, const RowPairs& d_pairs,
                                              u32 flags, float keep_scale) {
    float4 d;  // of blocks n and n + 1, for an even n
#pragma unroll
    for (int n = 0; n < QUERY_TILE / 8; ++n) {
        if (n % 2 == 0) d = d_pairs[n];
        const float d0 = n % 2 ? d.z : d.x, d1 = n % 2 ? d.w : d.y;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float x = s[n][2 * h], y = s[n][2 * h + 1];
            float gx = dp[n][2 * h], gy = dp[n][2 * h + 1];
            u32 rounded = pack(x, y);
#if DROPOUT
            const u32 pair = h ? pair_mask<1>(flags << 7 - n) : pair_mask<0>(flags << 7 - n);
            rounded &= pair;
            gx = masked(gx, low_mask(pair)) * keep_scale;
            gy = masked(gy, high_mask(pair)) * keep_scale;
#endif
            weights[n / 2][n % 2 * 2 + h] = rounded;
            ds[n / 2][n % 2 * 2 + h] = pack(x * (gx - d0), y * (gy - d1));
        }
    }
}

__device__ __forceinline__ void exponentiate(Block& s, const RowPairs& lse_pairs, float scale_log2) {
#pragma unroll
    for (int n = 0; n < QUERY_TILE / 8; n += 2) {
        const float4 lse = lse_pairs[n];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            s[n][c] = exp2_fast(fmaf(s[n][c], scale_log2, -(c & 1 ? lse.y : lse.x)));
            s[n + 1][c] = exp2_fast(fmaf(s[n + 1][c], scale_log2, -(c & 1 ? lse.w : lse.z)));
        }
    }
}
