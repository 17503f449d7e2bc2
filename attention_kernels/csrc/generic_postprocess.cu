// dq from the float32 sums: puts the columns back in order, scales, rounds. Four sums a lane.
//
// Build: -DHEAD_DIM={16,32,64,96,128} -DDTYPE_BF16={0,1} -DWARPS=8 -DTILED={0,1}: 0 rows as generic_backward_keys.cu lays them,
// 1 tiles (dq_tiles.cuh).
#include "common/dq_tiles.cuh"
#include "common/overlap.cuh"
#include "common/tiles.cuh"

#if !TILED
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
// A block has one tile of 64 queries.
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
    for (int block = threadIdx.x / 32; block < HEAD_DIM / 2; block += WARPS) {
        const int row = w.tile * 64 + block / (HEAD_DIM / 8) * 16 + (lane >> 2), column = block % (HEAD_DIM / 8) * 8 + 2 * (lane & 3);
        const float4 x = tile[block * 32 + lane];
        u16* to = dq + row * p.dq_strides.row + column;
        if (column >= p.head_dim) continue;
        if (row < w.q_len) *(u32*)to = pack(x.x * p.scale, x.y * p.scale);
        if (row + 8 < w.q_len) *(u32*)(to + 8 * p.dq_strides.row) = pack(x.z * p.scale, x.w * p.scale);
    }
}
#endif
