// What the backward needs of each query row, once: stats = (lse in base 2, rowsum(dO * O) - dlse), in float32.
// Zeros dQ's sums as well where they are tiles (dq_tiles.cuh) and so given. Where the backward has an order of its pieces of work,
// one block more, the first, makes it.
//
// Build: -DDTYPE_BF16={0,1} -DWARPS=8 -DHEAD_DIM=128 (an upper bound; the width itself is a run-time number).
// Eight elements a lane; as many neighbouring lanes as a row needs, rounded up to a power of two, share a row.
#include "common/dq_tiles.cuh"
#include "common/order.cuh"
#include "common/overlap.cuh"
#include "common/tiles.cuh"

__device__ __forceinline__ void zero_sums(const Params& p) {
    const int width = (p.head_dim + 31) / 32 * 32;
    const i64 words = tiles_a_head(p) * p.heads * (p.cu_q == nullptr ? p.batch : 1) * (16 * width);
    const u32 ordering = p.order != nullptr;
    for (i64 i = (i64)(blockIdx.x - ordering) * THREADS + threadIdx.x; i < words; i += (i64)(gridDim.x - ordering) * THREADS)
        ((uint4*)p.dq_sums)[i] = {0, 0, 0, 0};
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_preprocess(const __grid_constant__ Params p) {
    let_successor_start();
    if (p.order != nullptr && blockIdx.x == 0) return make_order<true, THREADS>(p);
    if (p.dq_sums != nullptr) zero_sums(p);
    int lanes = 1;
    while (lanes * 8 < p.head_dim) lanes *= 2;
    const u32 block = blockIdx.x - (p.order != nullptr);
    const i64 index = ((i64)block * THREADS + threadIdx.x) / lanes;
    const int part = threadIdx.x % lanes;
    const bool live = index < p.total_q * p.heads;
    // Why heads are innermost: (B, L, H, D) then is read in memory's order.
    const i64 row = index / p.heads;
    Work w;
    w.head = (int)(index % p.heads);
    w.sample = p.cu_q == nullptr ? (int)(row / p.len_q) : 0;
    const i64 local = p.cu_q == nullptr ? row - (i64)w.sample * p.len_q : row;
    w.q_start = 0;

    float sum = 0.f;
    if (live && part * 8 < p.head_dim) {
        const uint4 a = *(const uint4*)(at(p.out, p.out_strides, w, local) + part * 8);
        const uint4 b = *(const uint4*)(at(p.dout, p.dout_strides, w, local) + part * 8);
        const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 o = unpack(x[i]), g = unpack(y[i]);
            sum = fmaf(o.x, g.x, fmaf(o.y, g.y, sum));
        }
    }
    for (int other = lanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, other);
    if (!live || part != 0) return;
    const i64 place = stats_at(p, w) + local;
    const float lse = p.lse[place];
    // Why +inf: a row that sees nothing then has exp2(score - inf) = 0 everywhere, and no gradient.
    const bool empty = lse == -INFINITE;
    const float dlse = p.dlse == nullptr ? 0.f : p.dlse[place];
    p.stats[place] = make_float2(empty ? INFINITE : lse * LOG2_E, empty ? 0.f : sum - dlse);
}
