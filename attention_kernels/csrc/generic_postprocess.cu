// dq from the float32 sums: puts the columns back in order, scales, rounds.
//
// Build: -DHEAD_DIM={16,32,64,96,128} -DDTYPE_BF16={0,1} -DWARPS={8,4} -DTILED={0,1}: 0 rows as generic_backward_keys.cu lays them,
// 1 tiles (dq_tiles.cuh).
#include "common/dq_tiles.cuh"
#include "common/overlap.cuh"
#include "common/tiles.cuh"

#if !TILED
// Four sums a lane.
extern "C" __global__ void __launch_bounds__(THREADS) attention_postprocess(const __grid_constant__ Params p) {
    await_predecessor();
    const i64 index = (i64)blockIdx.x * THREADS + threadIdx.x;
    const i64 place = index / (HEAD_DIM / 4);  // in the order of lse
    if (place >= p.total_q * p.heads) return;
    const int in_row = (int)(index % (HEAD_DIM / 4));
    const int column = in_row / 4 * 16 + 2 * (in_row & 3);
    Work w;
    w.sample = p.cu_q == nullptr ? (int)(place / p.stats_batch) : 0;
    const i64 rest = place - w.sample * p.stats_batch;
    w.head = (int)(rest / p.stats_head);
    const float4 x = ((const float4*)p.dq_sums)[index];
    u16* to = at(p.dq, p.dq_strides, w, rest % p.stats_head) + column;
    if (column < p.head_dim) *(u32*)to = pack(x.x * p.scale, x.y * p.scale);
    if (column + 8 < p.head_dim) *(u32*)(to + 8) = pack(x.z * p.scale, x.w * p.scale);
}
#else
// Lane t of a quad gives its word b to lane b.
__device__ __forceinline__ void transpose_in_quad(u32 (&x)[4]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const u32 got = __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i + step], step);
            (upper ? x[i] : x[i + step]) = got;
        }
    }
}

// Why not as a uint4: the compiler makes four stores of that.
__device__ __forceinline__ void store16(u16* to, const u32 (&x)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// A block has one tile of 64 queries, a warp 16 rows of four neighbouring blocks of eight columns at a time. Why four: each lane
// of a quad then stores one block's 16 bytes of a row, not 4 bytes four times.
extern "C" __global__ void __launch_bounds__(THREADS) attention_postprocess(const __grid_constant__ Params p) {
    await_predecessor();
    // Why from the last: its sums are the newest, and most likely in the cache.
    const Work w = find_work(p, gridDim.x - 1 - blockIdx.x, false);
    const int lane = threadIdx.x & 31;
    u16* dq = at(p.dq, p.dq_strides, w, w.q_start);
    // Rows of no sequence have no sums.
    if (w.tail) return zero_rows(dq, p.dq_strides.row, w.q_len, p.head_dim, w.tile, p.tiles);
    if (w.tile * 64 >= w.q_len) return;
    const float4* tile = (const float4*)p.dq_sums + (sums_tile(p, w) + w.tile) * (16 * HEAD_DIM);
#pragma unroll
    for (int part = threadIdx.x / 32; part < HEAD_DIM / 8; part += WARPS) {
        const int row = w.tile * 64 + part / (HEAD_DIM / 32) * 16 + (lane >> 2);
        const int column = part % (HEAD_DIM / 32) * 32 + (lane & 3) * 8;
        u32 upper[4], lower[4];  // rows: the 16's first eight, and the others
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const float4 x = tile[(part * 4 + n) * 32 + lane];
            upper[n] = pack(x.x * p.scale, x.y * p.scale);
            lower[n] = pack(x.z * p.scale, x.w * p.scale);
        }
        transpose_in_quad(upper);
        transpose_in_quad(lower);
        if (column >= p.head_dim) continue;
        u16* to = dq + row * p.dq_strides.row + column;
        if (row < w.q_len) store16(to, upper);
        if (row + 8 < w.q_len) store16(to + 8 * p.dq_strides.row, lower);
    }
}
#endif
