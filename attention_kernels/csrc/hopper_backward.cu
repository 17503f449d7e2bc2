// Backward for compute capability 9.0a: dK and dV of KEYS keys of one head a block, looping over all queries, and their
// share of dQ through float32 atomics. (The deterministic form is the generic family's two kernels.)
//
// Build: -DHEAD_DIM={16,32,64,96,128} -DDTYPE_BF16={0,1} -DDROPOUT={0,1} and the tile numbers of kernel_plan.py:
//   WARPS (computing, four a group), STAGES (of 64 queries), DS_SLOTS, PERSISTENT, MIN_BLOCKS,
//   SHARED_OPERANDS (0: k and v as fragments in registers; 1: both from shared memory), SUMS (backward_dq.cuh),
//   AHEAD (1: S^T of a tile is queued behind dV and dK of the one before), TURNS (1: groups queue in turn, warpgroups.cuh),
//   PAIRS (1: two warps share their draws of the dropout mask), SPLIT (backward_dq.cuh).
//
// The last warpgroup copies tiles of q, dO and the row statistics; each of the others owns 64 keys:
//
//     S^T = K Q^T    P^T = exp2(S^T c - lse2)    dP^T = V dO^T    dS^T = P^T (keep dP^T - D)    D = rowsum(dO O) - dlse
//     dV += P^T dO   dK += dS^T Q   (P^T and dS^T from registers)
//
// dQ = dS K runs over the keys of all groups. They lay dS^T into a slot of shared memory; one group, another for each
// tile in turn, multiplies the whole slot with K during its next tile, when the others have long written theirs, and adds
// 64 rows to the float32 buffer whose order of columns generic_backward_keys.cu describes.
//
// Block-sparse, a stage holds queries that some groups' lists name: the others pass it by, and dQ is multiplied from the
// keys of those that took part.
#include "common/backward_stages.cuh"
#include "common/backward_dq.cuh"
#include "common/backward_dropout.cuh"

typedef Turn<TURNS ? GROUPS : 1> Turns;

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

// Lays this warp's dS^T into the slot: key rows of 8 chunks, chunk c at place c ^ (key % 8): the 128-byte swizzle.
__device__ __forceinline__ void write_ds(u32 slot, const Fragments& ds, int warp_key) {
    const int lane = threadIdx.x & 31, key = warp_key + (lane & 15);
#pragma unroll
    for (int step = 0; step < QUERY_TILE / 16; ++step) {
        const u32 place = slot + key * DS_ROW + ((2 * step + (lane >> 4) ^ (key & 7)) << 4);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(ds[step][0]),
                     "r"(ds[step][1]), "r"(ds[step][2]), "r"(ds[step][3]) : "memory");
    }
}

struct Keys {
#if !SHARED_OPERANDS
    u32 k[K_STEPS][4], v[K_STEPS][4];
#endif
    Sums dk, dv;
};

// From the tiles at `keys_at`, which are there.
__device__ __forceinline__ void load_keys(Keys& keys, u32 keys_at) {
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; ++d)
#pragma unroll
        for (int c = 0; c < 4; ++c) keys.dk[d][c] = keys.dv[d][c] = 0.f;
#if !SHARED_OPERANDS
    const int row = (threadIdx.x >> 5) * 16 + (threadIdx.x & 15), side = threadIdx.x >> 4 & 1;
#pragma unroll
    for (int kk = 0; kk < K_STEPS; ++kk) {
        const u32 from = keys_at + kk / PANEL_STEPS * KEYS * PANEL_ROW + row * PANEL_ROW + ((kk % PANEL_STEPS * 2 + side ^ turn(row)) << 4);
        ldmatrix(keys.k[kk], from);
        ldmatrix(keys.v[kk], from + KEYS_BYTES);
    }
#endif
}

// 64 keys x 64 queries: the group's rows of K with q, or of V with dO.
__device__ __forceinline__ void multiply_rows(Block& s, u32 tile_place, const u32 (&fragments)[K_STEPS][4], u32 rows_place) {
#pragma unroll
    for (int kk = 0; kk < K_STEPS; ++kk) {
        const u64 b = rows_outside<QUERY_TILE>(tile_place, 0, kk);
#if SHARED_OPERANDS
        Product<QUERY_TILE>::shared<false, false>(s, rows_outside<KEYS>(rows_place, 0, kk), b, kk > 0);
#else
        Product<QUERY_TILE>::registers<false>(s, fragments[kk], b, kk > 0);
#endif
    }
}

__device__ __forceinline__ void multiply_queries(Sums& sums, const Fragments& a, u32 tile_place) {
#pragma unroll
    for (int step = 0; step < QUERY_TILE / 16; ++step)
        Product<HEAD_DIM>::registers<true>(sums, a[step], rows_inside<QUERY_TILE>(tile_place, 16 * step), true);
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

// The part of a group whose 64 keys all lie past the end: dS is 0, and it takes its turns at dQ.
__device__ __forceinline__ void stand_by(const Params& p, const Places& places, const Work& w, u32 keys, Ring& ring, Ring& ds_ring,
                                         const Turns& turn) {
    float* dq_sums = sums_of(p, w);
    const Fragments none = {};
    Ring ds_before = ds_ring;
    int adding = GROUPS - 1, row_before = -1;
#pragma unroll 1
    for (QueryTiles tile(p, w);; tile.next()) {
        if (row_before >= 0 && has_share(adding)) add_dq<false>(places, ds_before, keys, p, dq_sums, w.q_len, row_before, 0);
        if (!tile.left(w)) break;
        row_before = tile.row;
        await(places.filled(ring.slot()), ring.filled());
        arrive_warp(places.emptied(ring.slot()));
        turn.take();
        turn.pass();
        await(places.ds_emptied(ds_ring.slot()), ds_ring.emptied());
        write_ds(places.ds(ds_ring.slot()), none, (threadIdx.x >> 5) * 16);
        show_to_products();
        arrive_warp(places.ds_filled(ds_ring.slot()));
        adding = adding + 1 == GROUPS ? 0 : adding + 1;
        ds_before = ds_ring;
        ring.next<STAGES>();
        ds_ring.next<DS_SLOTS>();
    }
}

template <bool LISTED>
__device__ __forceinline__ void differentiate_work(const Params& p, const Places& places, u32 id, u32 keys_at, Ring& ring, Ring& ds_ring,
                                                   const Turns& turn) {
    const Work w = find_work(p, id, false);
    const int warp = threadIdx.x >> 5, group = warp / 4, first_key = w.tile * KEYS + warp * 16;
    const int group_key = w.tile * KEYS + group * 64;
    if (!LISTED && group_key >= w.k_len) return stand_by(p, places, w, keys_at, ring, ds_ring, turn);
    Keys keys;
    load_keys(keys, keys_at);
#if SHARED_OPERANDS
    const u32 none[K_STEPS][4] = {};
    const u32(&k)[K_STEPS][4] = none, (&v)[K_STEPS][4] = none;
#else
    const u32(&k)[K_STEPS][4] = keys.k, (&v)[K_STEPS][4] = keys.v;
#endif
    u32 flags = 0;
#if DROPOUT
    if (PAIRS) meet_neighbour();
    if (!LISTED) flags = find_flags(p, places, w, QueryTiles(p, w).row, first_key);
#endif
    float* dq_sums = sums_of(p, w);
    Ring ds_before = ds_ring;
    int adding = GROUPS - 1, row_before = -1;  // the group that adds dQ of the tile before, and that tile's first row
    u32 who_before = 0;
    constexpr bool ahead = AHEAD && !LISTED, turns = TURNS && !LISTED;
    Block s;
    if (ahead && QueryTiles(p, w).left(w)) {
        await(places.filled(ring.slot()), ring.filled());
        open_products();
        multiply_rows(s, place_of(places.queries(ring.slot())), k, place_of(keys_at + group * 64 * PANEL_ROW));
        close_products();
        wait_products<0>();
    }

#pragma unroll 1
    for (QueryTiles tile(p, w); LISTED || tile.left(w); tile.next()) {
        if (!ahead) await(places.filled(ring.slot()), ring.filled());
        const Step step = LISTED ? read_step(places.step(ring.slot())) : Step{tile.row, 0};
        const int row = step.row;
        if (LISTED && !(step.who >> group & 1)) {
            arrive_warp(places.emptied(ring.slot()));
            // Why the wait: a group must not be counted for two tiles of a slot.
            await(places.ds_emptied(ds_ring.slot()), ds_ring.emptied());
            arrive_warp(places.ds_filled(ds_ring.slot()));
        } else {
            Block dp;
            Fragments weights, ds;
            const u32 tile_place = place_of(places.queries(ring.slot())), rows_place = place_of(keys_at + group * 64 * PANEL_ROW);
#if DROPOUT
            if (LISTED) flags = draw_flags(p, start_philox(p, w), row, first_key);
#endif
            if (!ahead) {
                if (turns) turn.take();
                open_products();
                multiply_rows(s, tile_place, k, rows_place);
                close_products();
            }
            open_products();
            multiply_rows(dp, tile_place + TILE_BYTES / 16, v, rows_place + KEYS_BYTES / 16);
            close_products();
            if (turns && !ahead) turn.pass();
            const RowPairs lse(places.stats(ring.slot()));
            if (!ahead) wait_products<1>();
            exponentiate(s, lse, p.scale_log2);
            if ((p.causal && row + w.offset < group_key + 63) || group_key + 64 > w.k_len) hide(s, p, w, first_key, row);
            const RowPairs d(places.stats(ring.slot()) + QUERY_TILE * 4);
            wait_products<0>();
            differentiate(weights, ds, s, dp, d, flags, p.keep_scale);
            await(places.ds_emptied(ds_ring.slot()), ds_ring.emptied());
            write_ds(places.ds(ds_ring.slot()), ds, warp * 16);
            show_to_products();
            arrive_warp(places.ds_filled(ds_ring.slot()));
            if (turns && ahead) turn.take();
            open_products();
            multiply_queries(keys.dv, weights, tile_place + TILE_BYTES / 16);
            multiply_queries(keys.dk, ds, tile_place);
            close_products();
            if (ahead) {
                // Behind the last tile too, from whatever lies there: products in a branch would have to be waited for in it.
                Ring next = ring;
                next.next<STAGES>();
                if (row + QUERY_TILE < w.q_len) await(places.filled(next.slot()), next.filled());
                open_products();
                multiply_rows(s, place_of(places.queries(next.slot())), k, rows_place);
                close_products();
            }
            if (turns && ahead) turn.pass();
#if DROPOUT
            // For the next tile, while the products run: now there are registers to spare.
            if (!LISTED) flags = find_flags(p, places, w, row + QUERY_TILE, first_key);
#endif
            if (ahead) wait_products<1>();
            else wait_products<0>();
            arrive_warp(places.emptied(ring.slot()));
            if (ahead) wait_products<0>();
        }
        // By now all groups have written dS of the tile before.
        if (row_before >= 0 && has_share(adding)) add_dq<LISTED>(places, ds_before, keys_at, p, dq_sums, w.q_len, row_before, who_before);
        row_before = row;
        who_before = step.who;
        adding = adding + 1 == GROUPS ? 0 : adding + 1;
        ds_before = ds_ring;
        ring.next<STAGES>();
        ds_ring.next<DS_SLOTS>();
        if (LISTED && step.who & LAST_STAGE) break;
    }
    if (row_before >= 0 && has_share(adding)) add_dq<LISTED>(places, ds_before, keys_at, p, dq_sums, w.q_len, row_before, who_before);
    // Why found anew, from a number that the compiler takes for another: what only the end needs holds no registers.
    asm volatile("" : "+r"(id));
    const Work end = find_work(p, id, false);
    const int key = end.tile * KEYS + (threadIdx.x >> 5) * 16;
    u16* dk = at(p.dk, p.dkv_strides, end, end.k_start);
    u16* dv = at(p.dv, p.dkv_strides, end, end.k_start);
    store_rows(dk, p.dkv_strides.row, key, end.k_len, p.head_dim, keys.dk, p.scale, p.scale);
    store_rows(dv, p.dkv_strides.row, key, end.k_len, p.head_dim, keys.dv, p.keep_scale, p.keep_scale);
}

// Zeros the rows of dk and dv from `from` on (padding keys, or rows of no sequence), shared out by tile.
__device__ __forceinline__ void zero_keys(const Params& p, const Work& w, i64 from, int num_rows) {
    zero_rows(at(p.dk, p.dkv_strides, w, from), p.dkv_strides.row, num_rows, p.head_dim, w.tile, p.tiles);
    zero_rows(at(p.dv, p.dkv_strides, w, from), p.dkv_strides.row, num_rows, p.head_dim, w.tile, p.tiles);
}

template <bool LISTED>
__device__ __forceinline__ void compute(const Params& p, const Places& places, u32 id, Ring& keys, Ring& ring, Ring& ds_ring, const Turns& turn) {
    const Work w = find_work(p, id, false);
    // Keys hidden by key_lengths have gradient 0, and so have rows of no sequence.
    if (w.tail) zero_keys(p, w, w.k_start, w.k_len);
    else if (p.key_lengths != nullptr) zero_keys(p, w, w.k_len, p.len_k - w.k_len);
    if (!has_keys(w)) return;
    await(places.keys_filled(keys.slot()), keys.filled());
    differentiate_work<LISTED>(p, places, id, places.keys(keys.slot()), ring, ds_ring, turn);
    arrive_warp(places.keys_emptied(keys.slot()));
    keys.next<KEY_SLOTS>();
}

template <bool LISTED, int BEHIND>
__device__ __forceinline__ void copy(const Params& p, const Places& places, u32 id, Announcer<BEHIND>& announcer, Ring& keys, Ring& ring) {
    const Work w = find_work(p, id, false);
    if (has_keys(w)) copy_work<LISTED>(p, places, w, announcer, keys, ring);
}

template <bool LISTED>
__device__ __forceinline__ void run(const Params& p) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    const Places places = {(u32)__cvta_generic_to_shared(shared_bytes)};
    if (threadIdx.x < STAGES) {
        make_barrier(places.filled(threadIdx.x), COPIERS);
        make_barrier(places.emptied(threadIdx.x), WARPS);
    }
    if (threadIdx.x < DS_SLOTS) {
        make_barrier(places.ds_filled(threadIdx.x), WARPS);
        make_barrier(places.ds_emptied(threadIdx.x), SPLIT ? WARPS : 4);
    }
    if (threadIdx.x < KEY_SLOTS) {
        make_barrier(places.keys_filled(threadIdx.x), COPIERS);
        make_barrier(places.keys_emptied(threadIdx.x), WARPS);
    }
    __syncthreads();
    Ring keys = {0}, ring = {0};
    if (threadIdx.x < THREADS) {
        take_registers<computer_registers(GROUPS, MIN_BLOCKS)>();
        Ring ds_ring = {0};
        const Turns turn(threadIdx.x / 128);
#if PERSISTENT
        for (Works works(p); works.left(); works.next())
            if (works.here()) compute<LISTED>(p, places, works.id(), keys, ring, ds_ring, turn);
#else
        compute<LISTED>(p, places, blockIdx.x, keys, ring, ds_ring, turn);
#endif
#if SUMS == 2
        if (threadIdx.x % 32 == 0) await_bulk_reads();
#endif
        return;
    }
    give_registers<copier_registers(GROUPS, MIN_BLOCKS)>();
    Announcer<LISTED ? 2 : 1> announcer = {0};
#if PERSISTENT
    for (Works works(p); works.left(); works.next())
        if (works.here()) copy<LISTED>(p, places, works.id(), announcer, keys, ring);
#else
    copy<LISTED>(p, places, blockIdx.x, announcer, keys, ring);
#endif
    announcer.flush();
}

// A build has the kernels that are asked of its tiles.
#if DENSE
extern "C" __global__ void __launch_bounds__(THREADS + COPIERS, MIN_BLOCKS) attention_hopper_backward(const __grid_constant__ Params p) {
    run<false>(p);
}
#endif
#if SPARSE
extern "C" __global__ void __launch_bounds__(THREADS + COPIERS, MIN_BLOCKS) attention_hopper_backward_sparse(const __grid_constant__ Params p) {
    run<true>(p);
}
#endif
