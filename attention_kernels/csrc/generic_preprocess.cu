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
    // Why not unrolled: the number of rounds, one or two, would take a division.
#pragma unroll 1
    for (i64 i = (i64)(blockIdx.x - ordering) * THREADS + threadIdx.x; i < words; i += (i64)(gridDim.x - ordering) * THREADS)
        ((uint4*)p.dq_sums)[i] = {0, 0, 0, 0};
}

// Row `index` of `count`: its sample and head, and its place in the sequence. Why heads are innermost: (B, L, H, D) then is read
// in memory's order.
template <typename Number>
__device__ __forceinline__ bool find_row(const Params& p, Number index, Number count, Work& w, i64& local) {
    const Number heads = p.heads, len_q = p.len_q, row = index / heads;
    const Number sample = p.cu_q == nullptr ? row / len_q : 0;
    w.head = (int)(index - row * heads);
    w.sample = (int)sample;
    local = row - sample * len_q;
    return index < count;
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_preprocess(const __grid_constant__ Params p) {
    let_successor_start();
    if (p.order != nullptr && blockIdx.x == 0) return make_order<true, THREADS>(p);
    if (p.dq_sums != nullptr) zero_sums(p);
    int shift = 0;  // of the lanes a row
    while (8 << shift < p.head_dim) ++shift;
    const int part = threadIdx.x & ((1 << shift) - 1);
    const u32 block = blockIdx.x - (p.order != nullptr), in_block = threadIdx.x >> shift, rows = THREADS >> shift;
    const i64 count = p.total_q * p.heads;
    Work w;
    w.q_start = 0;
    i64 local;
    bool live;
    // Why two ways: a division of 64-bit numbers takes twice the instructions of one of 32 bits, even of small numbers.
    if (count < 0x7fffffff) live = find_row(p, block * rows + in_block, (u32)count, w, local);
    else live = find_row(p, (u64)block * rows + in_block, (u64)count, w, local);

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
    for (int other = (1 << shift) / 2; other > 0; other /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, other);
    if (!live || part != 0) return;
    const i64 place = stats_at(p, w) + local;
    const float lse = p.lse[place];
    // Why +inf: a row that sees nothing then has exp2(score - inf) = 0 everywhere, and no gradient.
    const bool empty = lse == -INFINITE;
    const float dlse = p.dlse == nullptr ? 0.f : p.dlse[place];
    p.stats[place] = make_float2(empty ? INFINITE : lse * LOG2_E, empty ? 0.f : sum - dlse);
}
