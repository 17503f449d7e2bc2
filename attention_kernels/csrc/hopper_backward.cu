// Backward for compute capability 9.0a: dK and dV of KEYS keys of one head a block, looping over all queries, and their
// share of dQ through float32 atomics. (The deterministic form is the generic family's two kernels.)
//
// Build: -DHEAD_DIM={16,32,64,96,128} -DDTYPE_BF16={0,1} -DDROPOUT={0,1} and the tile numbers of kernel_plan.py:
//   WARPS (computing, four a group), TEAMS, STAGES (of 64 queries), DS_SLOTS, PERSISTENT, MIN_BLOCKS,
//   SHARED_OPERANDS (0: k and v as fragments in registers; 1: both from shared memory), SUMS (backward_dq.cuh),
//   AHEAD (1: S^T of a tile is queued behind dV and dK of the one before), PAIRS (1: two warps share their draws of the
//   dropout mask), ONE_LIST (1: block-sparse, all groups of a team follow one list). The block-sparse kernel goes without
//   AHEAD and PAIRS.
//
// The last warpgroup copies tiles of q, dO and the row statistics; each of the others owns 64 keys:
//
//     S^T = K Q^T    P^T = exp2(S^T c - lse2)    dP^T = V dO^T    dS^T = P^T (keep dP^T - D)    D = rowsum(dO O) - dlse
//     dV += P^T dO   dK += dS^T Q   (P^T and dS^T from registers)
//
// dQ = dS K runs over the keys of all groups. They lay dS^T into a slot of shared memory; one group, another for each
// tile in turn, multiplies the whole slot with K during its next tile, when the others have long written theirs, and adds
// 64 rows to the float32 sums.
//
// Block-sparse, a stage holds queries that some groups' lists name: the others pass it by, and dQ is multiplied from the
// keys of those that took part.
#include "common/backward_dq.cuh"
#include "common/backward_dropout.cuh"
#include "common/backward_scores.cuh"

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
    const int row = this_warp() * 16 + (threadIdx.x & 15), side = threadIdx.x >> 4 & 1;
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

// Rows of dk and dv. Why the work is found anew, from a number that the compiler takes for another: what only the end needs
// holds no registers.
__device__ __forceinline__ void store_sums(const Params& p, u32 id, const Keys& keys) {
    const Work w = find_keys(p, afresh(id));
    const int key = w.first_key + this_warp() * 16;
    u16* dk = at(p.dk, p.dkv_strides, w, w.k_start);
    u16* dv = at(p.dv, p.dkv_strides, w, w.k_start);
    store_rows(dk, p.dkv_strides.row, key, w.k_len, p.head_dim, keys.dk, p.scale, p.scale);
    store_rows(dv, p.dkv_strides.row, key, w.k_len, p.head_dim, keys.dv, p.keep_scale, p.keep_scale);
}

// The part of a group whose 64 keys all lie past the end: dS is 0, and it takes its turns at dQ.
__device__ __forceinline__ void stand_by(const Params& p, const Places& places, const Work& w, u32 keys, Ring& ring, Ring& ds_ring) {
    const int group = this_group();
    float* dq_sums = sums_of(p, w);
    const Fragments none = {};
    Ring ds_before = ds_ring;
    int adding = GROUPS - 1, row_before = -1;
#pragma unroll 1
    for (QueryTiles tile(p, w);; tile.next()) {
        if (row_before >= 0 && adding == group) add_dq<false>(places, ds_before, keys, dq_sums, row_before, 0);
        if (!tile.left(w)) break;
        row_before = tile.row;
        await(places.filled(ring.slot()), ring.filled());
        arrive_warp(places.emptied(ring.slot()));
        await(places.ds_emptied(ds_ring.slot()), ds_ring.emptied());
        write_ds(places.ds(ds_ring.slot()), none, this_warp() * 16);
        show_to_products();
        arrive_warp(places.ds_filled(ds_ring.slot()));
        adding = adding + 1 == GROUPS ? 0 : adding + 1;
        ds_before = ds_ring;
        ring.next<STAGES>();
        ds_ring.next<DS_SLOTS>();
    }
}

template <bool LISTED>
__device__ __forceinline__ void differentiate_work(const Params& p, const Places& places, u32 id, u32 keys_at, Ring& ring, Ring& ds_ring) {
    const Work w = find_keys(p, id);
    const int warp = this_warp(), group = warp / 4, first_key = w.first_key + warp * 16;
    const int group_key = w.first_key + group * 64;
    if (!LISTED && group_key >= w.k_len) return stand_by(p, places, w, keys_at, ring, ds_ring);
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
    if (PAIRS && !LISTED) meet_neighbour();
    if (!LISTED) flags = find_flags(p, places, w, QueryTiles(p, w).row, first_key);
#endif
    float* dq_sums = sums_of(p, w);
    Ring ds_before = ds_ring;
    int adding = GROUPS - 1, row_before = -1;  // the group that adds dQ of the tile before, and that tile's first row
    u32 who_before = 0;
    constexpr bool SEEKS = LISTED && !ONE_LIST, ahead = AHEAD && !LISTED;
    static_assert(!ahead || GROUPS > 1, "a group alone queues dQ where S of the next tile would be");
    Block s;
    // A list without entries is one stage without queries.
    if (LISTED && ONE_LIST) {
        await(places.filled(ring.slot()), ring.filled());
        if ((read_step(places.step(ring.slot())).who & ~LAST_STAGE) == 0) {
            arrive_warp(places.emptied(ring.slot()));
            ring.next<STAGES>();
            return store_sums(p, id, keys);
        }
    }
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
        if (SEEKS && !(step.who >> group & 1)) {
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
                open_products();
                multiply_rows(s, tile_place, k, rows_place);
                close_products();
            }
            open_products();
            multiply_rows(dp, tile_place + TILE_BYTES / 16, v, rows_place + KEYS_BYTES / 16);
            close_products();
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
#if DROPOUT
            // For the next tile, while the products run: now there are registers to spare.
            if (!LISTED) flags = find_flags(p, places, w, row + QUERY_TILE, first_key);
#endif
            // Alone, a group needs wait for no other: dQ of this very tile runs beside the others.
            if (GROUPS == 1) {
                add_dq<false>(places, ds_ring, keys_at, dq_sums, row, 0, places.emptied(ring.slot()));
                ring.next<STAGES>();
                ds_ring.next<DS_SLOTS>();
                if (LISTED && step.who & LAST_STAGE) break;
                continue;
            }
            if (ahead) wait_products<1>();
            else wait_products<0>();
            arrive_warp(places.emptied(ring.slot()));
            if (ahead) wait_products<0>();
        }
        // By now all groups have written dS of the tile before.
        if (row_before >= 0 && adding == group) add_dq<SEEKS>(places, ds_before, keys_at, dq_sums, row_before, who_before);
        row_before = row;
        who_before = step.who;
        adding = adding + 1 == GROUPS ? 0 : adding + 1;
        ds_before = ds_ring;
        ring.next<STAGES>();
        ds_ring.next<DS_SLOTS>();
        if (LISTED && step.who & LAST_STAGE) break;
    }
    if (row_before >= 0 && adding == group) add_dq<SEEKS>(places, ds_before, keys_at, dq_sums, row_before, who_before);
    store_sums(p, id, keys);
}

// Zeros the rows of dk and dv from `from` on (padding keys, or rows of no sequence), shared out by tile.
__device__ __forceinline__ void zero_keys(const Params& p, const Work& w, i64 from, int num_rows) {
    zero_rows(at(p.dk, p.dkv_strides, w, from), p.dkv_strides.row, num_rows, p.head_dim, w.tile, p.tiles);
    zero_rows(at(p.dv, p.dkv_strides, w, from), p.dkv_strides.row, num_rows, p.head_dim, w.tile, p.tiles);
}

template <bool LISTED>
__device__ __forceinline__ void compute(const Params& p, const Places& places, u32 id, Ring& keys, Ring& ring, Ring& ds_ring) {
    const Work w = find_keys(p, id);
    // Keys hidden by key_lengths have gradient 0, and so have rows of no sequence.
    if (w.tail) zero_keys(p, w, w.k_start, w.k_len);
    else if (p.key_lengths != nullptr) zero_keys(p, w, w.k_len, p.len_k - w.k_len);
    if (!has_keys(w)) return;
    await(places.keys_filled(keys.slot()), keys.filled());
    differentiate_work<LISTED>(p, places, id, places.keys(keys.slot()), ring, ds_ring);
    arrive_warp(places.keys_emptied(keys.slot()));
    keys.next<KEY_SLOTS>();
}

template <bool LISTED, int BEHIND>
__device__ __forceinline__ void copy(const Params& p, const Places& places, u32 id, Announcer<BEHIND>& announcer, Ring& keys, Ring& ring) {
    const Work w = find_keys(p, id);
    if (has_keys(w)) copy_work<LISTED>(p, places, w, announcer, keys, ring);
}

template <bool LISTED>
__device__ __forceinline__ void run(const Params& p) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    const u32 shared = (u32)__cvta_generic_to_shared(shared_bytes);
    const Places places = {shared + this_team() * TEAM_BYTES};
    const int slot = threadIdx.x < THREADS ? team_thread() : THREADS;
    if (slot < STAGES) {
        make_barrier(places.filled(slot), COPIERS);
        make_barrier(places.emptied(slot), WARPS / TEAMS);
    }
    if (slot < DS_SLOTS) {
        make_barrier(places.ds_filled(slot), WARPS / TEAMS);
        make_barrier(places.ds_emptied(slot), 4);
    }
    if (slot < KEY_SLOTS) {
        make_barrier(places.keys_filled(slot), COPIERS);
        make_barrier(places.keys_emptied(slot), WARPS / TEAMS);
    }
    __syncthreads();
    Ring keys = {0}, ring = {0};
#if PERSISTENT
    let_successor_start();
    if (p.order != nullptr) await_predecessor();  // it makes the order of the pieces of work
#endif
    if (threadIdx.x < THREADS) {
        take_registers<computer_registers(WARPS / 4, MIN_BLOCKS)>();
        Ring ds_ring = {0};
#if PERSISTENT
        await_predecessor();
        for (Works works; works.left(p); works.next_keys(p)) compute<LISTED>(p, places, works.id, keys, ring, ds_ring);
#else
        const Works works;
        if (TEAMS == 1 || works.left(p)) compute<LISTED>(p, places, works.id, keys, ring, ds_ring);
#endif
        finish_sums();
        return;
    }
    give_registers<copier_registers(WARPS / 4, MIN_BLOCKS)>();
    // Counted anew: a number that both roles share is one that the registers of neither may hold.
    const u32 team = this_team();
    if (team >= TEAMS) return;
    const Places own = {shared + team * TEAM_BYTES};
    Announcer<LISTED ? 2 : 1> announcer = {0};
#if PERSISTENT
    for (Works works; works.left(p); works.next_keys(p)) copy<LISTED>(p, own, works.id, announcer, keys, ring);
#else
    const Works works;
    if (TEAMS == 1 || works.left(p)) copy<LISTED>(p, own, works.id, announcer, keys, ring);
#endif
    announcer.flush();
}

// A build has the kernels that are asked of its tiles.
#if DENSE
extern "C" __global__ void __launch_bounds__(THREADS + COPYING, MIN_BLOCKS) attention_hopper_backward(const __grid_constant__ Params p) {
    run<false>(p);
}
#endif
#if SPARSE
extern "C" __global__ void __launch_bounds__(THREADS + COPYING, MIN_BLOCKS) attention_hopper_backward_sparse(const __grid_constant__ Params p) {
    run<true>(p);
}
#endif
