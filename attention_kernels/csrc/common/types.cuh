// Types and the one parameter block that every kernel of the generic family takes by value.
// No header of the standard library or of CUDA is needed: NVRTC compiles this with nothing beside it.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define INFINITE __int_as_float(0x7f800000)
#define ALL_LANES 0xffffffffu

// Strides count elements. Packed batches have batch stride 0 and start at row cu[sample] instead.
struct Strides {
    i64 batch, row, head;
};

// launcher.py packs this: pointers and 64-bit numbers first, so that there is no padding inside.
struct Params {
    const u16 *q, *k, *v, *out, *dout;
    u16 *out_written, *dq, *dk, *dv;
    float* lse;          // (B, H, Lq) or (H, Tq)
    const float* dlse;   // same shape, or null
    float2* stats;       // same shape: (lse in base 2, rowsum(dO * O) - dlse)
    float* dq_sums;      // rows as generic_backward_keys.cu lays them, zeros at first, or the tiles of dq_tiles.cuh
    const int *cu_q, *cu_k, *key_lengths;  // null where the batch is not packed / has no lengths
    const u64* seed;     // two words, null without dropout
    // Block-sparse, else null: see walk.cuh. Kernels over keys get the layout's columns in the place of its rows.
    const int *row_ptr, *col_idx, *head_to_pattern;
    u32* order;  // of pieces of work, the longest first, or null: see order.cuh
    Strides q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides, dkv_strides;
    i64 stats_batch, stats_head;
    i64 total_q, total_k;  // rows of q and of k in memory (B Lq or Tq)
    i64 pattern_stride;    // head h follows pattern head_to_pattern[h * pattern_stride]
    int batch, heads, len_q, len_k, head_dim;
    int tiles, pieces, rows;  // of one head of the longest sequence; of work in all; stationary ones of a piece
    int causal;
    int num_blocks, block_size;  // of the layout: lists a pattern, rows a block
    u32 drop_step, drop_high;  // see philox.cuh
    int parts, part;  // of a head beside its tiles, and their rows: see find_keys in backward_stages.cuh
    float scale, scale_log2, keep_scale;
};

// In the place of a piece of work where there are fewer than the host could tell.
#define NO_WORK 0xffffffffu

// What one block works on. A packed batch has one sequence more than cu names: the rows after the last one.
struct Work {
    int sample, head, tile;
    int first_key;  // of find_keys alone
    bool tail;
    i64 q_start, k_start;
    int q_len, k_len;
    int offset;  // causal: row r sees column c when c <= r + offset
};

// Why the clamps: cu_seqlens are read here without the host having looked; whatever they say, rows stay inside.
__device__ __forceinline__ i64 clamp_row(i64 row, i64 low, i64 high) {
    return row < low ? low : row > high ? high : row;
}

// The same number, of which the compiler cannot know that. Why: what can be computed of it before a loop, the reciprocals of
// divisions to begin with, the compiler would keep in registers through the loop.
__device__ __forceinline__ u32 afresh(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// A sequence's rows of q and of k; of its head and tile nothing is set.
__device__ __forceinline__ Work find_sequence(const Params& p, int sample) {
    Work w;
    w.sample = sample;
    w.tail = false;
    w.q_start = w.k_start = 0;
    if (p.cu_q == nullptr) {
        w.q_len = p.len_q;
        w.k_len = p.len_k;
        w.offset = p.len_k - p.len_q;
        if (p.key_lengths != nullptr) w.k_len = (int)clamp_row(p.key_lengths[w.sample], 0, p.len_k);
        return w;
    }
    w.q_start = clamp_row(p.cu_q[w.sample], 0, p.total_q);
    w.k_start = clamp_row(p.cu_k[w.sample], 0, p.total_k);
    w.tail = w.sample == p.batch;
    const i64 q_end = w.tail ? p.total_q : clamp_row(p.cu_q[w.sample + 1], w.q_start, p.total_q);
    const i64 k_end = w.tail ? p.total_k : clamp_row(p.cu_k[w.sample + 1], w.k_start, p.total_k);
    w.q_len = (int)(q_end - w.q_start);
    w.k_len = (int)(k_end - w.k_start);
    w.offset = w.k_len - w.q_len;
    return w;
}

// `id` counts tiles, then heads, then sequences: blockIdx.x, or what a persistent block takes next; or it is a place in `order`,
// where that number stands.
__device__ __forceinline__ Work find_work(const Params& p, u32 id, bool last_tile_first) {
    if (p.order != nullptr) {
        id = p.order[id];
        if (id == NO_WORK) {
            Work none = {};
            none.tail = true;
            return none;
        }
    }
    const u32 tiles = afresh(p.tiles), heads = afresh(p.heads), head = id / tiles;
    Work w = find_sequence(p, head / heads);
    w.head = head % heads;
    w.tile = id % tiles;
    // Why: under a causal mask the last rows have most to do; started first, they leave no long tail.
    if (last_tile_first && p.order == nullptr) w.tile = tiles - 1 - w.tile;
    return w;
}

template <typename T>
__device__ __forceinline__ T* at(T* base, const Strides& s, const Work& w, i64 start) {
    return base + (w.sample * s.batch + start * s.row + w.head * s.head);
}

__device__ __forceinline__ i64 stats_at(const Params& p, const Work& w) {
    return w.sample * p.stats_batch + w.head * p.stats_head + w.q_start;
}
