// Forward of exact attention for compute capability 9.0a: out and lse for ROWS queries of one head at a time.
//
// Build: -DHEAD_DIM={16,32,64,96,128} -DDTYPE_BF16={0,1} -DDROPOUT={0,1} and the tile numbers of kernel_plan.py:
//   WARPS (computing, four a group), KEY_TILE (keys a stage), STAGES, MIN_BLOCKS,
//   SHARED_OPERANDS (1: queries in shared memory instead of registers), TURNS (1: groups queue products in turn; not
//   block-sparse), ONE_LIST (1: block-sparse, all groups of a team follow one list of blocks).
//
// The last warpgroup copies tiles of keys and values; each of the others owns 64 queries and runs through them:
//     S = Q K^T (Q from registers, K rows outside)    P = exp2(S c - reference)    O += P V (P from registers, V rows inside)
// A group queues S of a tile and, behind it, O += P V of the tile before, and exponentiates S while P V still runs. Groups
// queue in turn (Turn, warpgroups.cuh).
//
// Softmax is exact under any reference that keeps its terms in range (softmax.cuh), so the main path takes no maximum:
// exp2 replaces the scores in their own registers, and the sums tell whether all was in range. Where it was not, the warp
// multiplies its 16 queries with the tile's keys once more, on mma.sync, and goes the careful way; so do the first tile
// and those that are partly hidden.
//
// Persistent: a block goes from one piece of work to the next, and copies run ahead into the next piece.
//
// Block-sparse, the copiers walk the groups' lists. With one list a team every stage is for all of its groups. With several
// a stage holds keys that some groups want and others pass by: a group that meets its next stage soon keeps to the order
// above, and else is done with O += P V before it goes to look for it.
#define ROW_TILES 1
#define BLOCKS (KEY_TILE / 8)
#include "common/forward_stages.cuh"
#include "common/softmax.cuh"
#include "common/forward_dropout.cuh"

struct Queries {
#if SHARED_OPERANDS
    u32 shared;
    Ring place;  // block-sparse, as in QueryCopies
    __device__ __forceinline__ u32 tile() const { return Stages{shared}.queries(this_group()); }
#else
    u32 fragments[K_STEPS][4];
#endif
};

__device__ __forceinline__ void load_queries(Queries& q, const Params& p, const Stages& stages, const Work& w) {
    const u16* rows = at(p.q, p.q_strides, w, w.q_start);
#if SHARED_OPERANDS
    copy_panels<64, 128>(q.tile(), rows, p.q_strides.row, w.tile * ROWS + this_group() * 64, w.q_len, p.head_dim);
    commit_copies();
    wait_copies<0>();
    show_to_products();
    asm volatile("bar.sync %0, 128;" ::"r"(1 + WARPS / 4 + threadIdx.x / 128) : "memory");
#else
#pragma unroll
    for (int kk = 0; kk < K_STEPS; ++kk)
        load_fragment(q.fragments[kk], rows, p.q_strides.row, w.tile * ROWS + this_warp() * 16, w.q_len, 16 * kk, p.head_dim);
#endif
}

// Queries in registers are loaded one piece of work ahead, while the rows of the one before are stored. Those in shared memory
// the copiers bring where the kernel is block-sparse.
#define QUERIES_AHEAD (!SHARED_OPERANDS)

__device__ __forceinline__ void load_ahead(Queries& q, const Params& p, const Stages& stages, const Works& works) {
    if (!QUERIES_AHEAD || !works.left(p)) return;
    const Work w = find_work(p, works.id, p.causal);
    if (has_rows(w)) load_queries(q, p, stages, w);
}

__device__ __forceinline__ void load_next(Queries& q, const Params& p, const Stages& stages, Works works) {
    works.next();
    load_ahead(q, p, stages, works);
}

// Until the copiers have brought them; and back to the copiers, after the last scores.
__device__ __forceinline__ void await_queries(const Queries& q, const Stages& stages) {
#if SHARED_OPERANDS
    await(stages.queries_filled(), q.place.filled());
    __syncwarp();
#endif
}

__device__ __forceinline__ void free_queries(Queries& q, const Stages& stages) {
#if SHARED_OPERANDS
    arrive_warp(stages.queries_emptied());
    q.place.next<1>();
#endif
}

__device__ __forceinline__ void multiply_keys(Scores& s, const Queries& q, u32 k_tile) {
    const u32 place = place_of(k_tile);
#if SHARED_OPERANDS
    const u32 q_place = place_of(q.tile());
#endif
#pragma unroll
    for (int kk = 0; kk < K_STEPS; ++kk) {
        const u64 keys = rows_outside<KEY_TILE>(place, 0, kk);
#if SHARED_OPERANDS
        Product<KEY_TILE>::shared<false, false>(s[0], rows_outside<64>(q_place, 0, kk), keys, kk > 0);
#else
        Product<KEY_TILE>::registers<false>(s[0], q.fragments[kk], keys, kk > 0);
#endif
    }
}

__device__ __forceinline__ void multiply_values(Rows& rows, const Weights& weights, u32 v_tile) {
    const u32 place = place_of(v_tile);
#pragma unroll
    for (int n = 0; n < BLOCKS; n += 2) {
        const u32 a[4] = {weights[0][n][0], weights[0][n][1], weights[0][n + 1][0], weights[0][n + 1][1]};
        Product<HEAD_DIM>::registers<true>(rows.out[0], a, rows_inside<KEY_TILE>(place, 8 * n), true);
    }
}

// The same scores for one warp, which may be alone in wanting them: on mma.sync, from the tile as it lies.
__device__ __forceinline__ void multiply_keys_again(Scores& s, const Queries& q, u32 k_tile) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) s[0][n][c] = 0.f;
#pragma unroll SHARED_OPERANDS ? 1 : K_STEPS
    for (int kk = 0; kk < K_STEPS; ++kk) {
        const int panel = kk / PANEL_STEPS, chunk = kk % PANEL_STEPS * 2;
#if SHARED_OPERANDS
        u32 a[4];
        const int row = (threadIdx.x >> 5 & 3) * 16 + (lane & 15);
        ldmatrix(a, q.tile() + panel * 64 * PANEL_ROW + row * PANEL_ROW + ((chunk + (lane >> 4) ^ turn(row)) << 4));
#else
        const u32(&a)[4] = q.fragments[kk];
#endif
        const int key = (lane & 7) + (lane >> 4) * 8;
        const u32 from = k_tile + panel * KEY_TILE * PANEL_ROW + key * PANEL_ROW + ((chunk + (lane >> 3 & 1) ^ turn(key)) << 4);
#pragma unroll
        for (int n = 0; n < BLOCKS; n += 2) {
            u32 b[4];
            ldmatrix(b, from + 8 * n * PANEL_ROW);
            mma(s[0][n], a, b[0], b[1]);
            mma(s[0][n + 1], a, b[2], b[3]);
        }
    }
}

// Puts exp2 under the present reference in place of the scores; false where a lane's sums have left the safe range.
__device__ __forceinline__ bool exponentiate(Scores& s, float (&sums)[1][2], const Rows& rows, float scale) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float minus = -rows.reference[0][i];
        float even = 0.f, odd = 0.f;
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n) {
            even += s[0][n][2 * i] = exp2_fast(fmaf(s[0][n][2 * i], scale, minus));
            odd += s[0][n][2 * i + 1] = exp2_fast(fmaf(s[0][n][2 * i + 1], scale, minus));
        }
        sums[0][i] = even + odd;
    }
    return sums[0][0] <= SUM_LIMIT && sums[0][1] <= SUM_LIMIT;
}

__device__ __forceinline__ void round_weights(Weights& weights, const Scores& s) {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) weights[0][n][i] = pack(s[0][n][2 * i], s[0][n][2 * i + 1]);
}

__device__ __forceinline__ int first_row_of(const Work& w) { return w.tile * ROWS + this_warp() * 16; }

// The work of number `id`, which is `w`. Teams have few registers: what only the careful way wants is found anew.
__device__ __forceinline__ Work again(const Params& p, const Work& w, u32 id) { return TEAMS > 1 ? find_work(p, afresh(id), p.causal) : w; }

// A tile before which no other is at work. For a row's first, the largest of 8 scores will nearly always do as its reference.
__device__ __forceinline__ void begin(Scores& s, Weights& weights, float (&sums)[1][2], Rows& rows, const Queries& q, u32 k_tile,
                                      const Params& p, int column, bool whole, const Work& w, u32 id) {
    if (whole) {
        float before[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            before[i] = rows.reference[0][i];
            const float top = max_of_quad(fmaxf(s[0][0][2 * i] * p.scale_log2, s[0][0][2 * i + 1] * p.scale_log2));
            if (before[i] == -INFINITE) rows.reference[0][i] = top;
        }
        if (__all_sync(ALL_LANES, exponentiate(s, sums, rows, p.scale_log2))) return round_weights(weights, s);
        multiply_keys_again(s, q, k_tile);
        rows.reference[0][0] = before[0], rows.reference[0][1] = before[1];
    }
    const Work here = again(p, w, id);
    settle(s, weights, sums, rows, p, first_row_of(here), column, here.k_len, here.offset);
}

template <bool LISTED>
__device__ __forceinline__ void attend(const Params& p, const Stages& stages, Ring& ring, const Turn<TURNS ? GROUPS : 1>& turn,
                                       Queries& q, Works works) {
    const Work w = find_work(p, works.id, p.causal);
    const int num_tiles = LISTED ? 0 : count_tiles(p, w);
    const int first_row = w.tile * ROWS + this_warp() * 16;
    const int unmasked = p.causal ? min(w.k_len, first_row + w.offset + 1) : w.k_len;
    constexpr bool QUERIES_COPIED = LISTED && SHARED_OPERANDS, SEEKS = LISTED && !ONE_LIST;
    static_assert(!LISTED || !TURNS, "groups that pass a stage by would have to pass on a turn");
    if (QUERIES_COPIED) await_queries(q, stages);
    else if (!QUERIES_AHEAD) load_queries(q, p, stages, w);
    Rows rows;
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; ++d)
#pragma unroll
        for (int c = 0; c < 4; ++c) rows.out[0][d][c] = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) rows.reference[0][i] = -INFINITE, rows.sum[0][i] = 0.f;
#if DROPOUT
    const Philox philox = start_philox(p, w);
    Mask keep;
#endif
    Seeker seeker = {false, false};
    if (SEEKS ? !seeker.find(stages, ring, 0x7fffffff, unmasked) : LISTED ? !seeker.enter(stages, ring) : num_tiles == 0) {
        if (QUERIES_COPIED) free_queries(q, stages);
        load_next(q, p, stages, works);
        return finish(rows, p, w, first_row);
    }

    Scores s;
    Weights weights;
    float sums[1][2];
    // Once: the first tile, the others, the last one's values. Where groups seek theirs, for each run of tiles near each other.
    do {
        if (!LISTED) await(stages.filled(ring.slot()), ring.filled());
        turn.take();
        open_products();
        multiply_keys(s, q, stages.keys(ring.slot()));
        close_products();
        turn.pass();
        wait_products<0>();
        const bool whole = LISTED ? !seeker.careful : KEY_TILE <= unmasked;
        const int first_column = LISTED ? Seeker::column(stages, ring) : 0;
        begin(s, weights, sums, rows, q, stages.keys(ring.slot()), p, first_column, whole, w, works.id);
        rows.sum[0][0] += sums[0][0], rows.sum[0][1] += sums[0][1];
#if DROPOUT
        draw(keep, p, philox, first_row, first_column);
        drop(weights, keep);
#endif
        u32 before = ring.slot();  // of the tile whose values are still to be multiplied
        ring.next<STAGES>();

        // Why not further than STAGES - 2: the copiers wait for `before`.
#pragma unroll 1
        for (int next = KEY_TILE; SEEKS    ? seeker.find(stages, ring, STAGES - 2, unmasked)
                                  : LISTED ? !seeker.last
                                           : next < num_tiles * KEY_TILE;
             next += KEY_TILE) {
            if (!SEEKS) await(stages.filled(ring.slot()), ring.filled());
            turn.take();
            open_products();
            multiply_keys(s, q, stages.keys(ring.slot()));
            close_products();
            open_products();
            multiply_values(rows, weights, stages.keys(before) + TILE_BYTES);
            close_products();
            turn.pass();
            if (LISTED && !SEEKS) seeker.read(stages, ring);
#if DROPOUT
            // While the products run.
            draw(keep, p, philox, first_row, LISTED ? Seeker::column(stages, ring) : next);
#endif
            wait_products<1>();
            bool careful = LISTED ? seeker.careful : next + KEY_TILE > unmasked;
            if (!careful) {
                careful = !__all_sync(ALL_LANES, exponentiate(s, sums, rows, p.scale_log2));
                if (careful) multiply_keys_again(s, q, stages.keys(ring.slot()));
            }
            wait_products<0>();
            arrive_warp(stages.emptied(before));
            // Only now may the weights change: until here the products read them.
            if (careful) {
                const Work here = again(p, w, works.id);
                settle(s, weights, sums, rows, p, first_row_of(here), LISTED ? Seeker::column(stages, ring) : next, here.k_len, here.offset);
            } else {
                round_weights(weights, s);
            }
            rows.sum[0][0] += sums[0][0], rows.sum[0][1] += sums[0][1];
#if DROPOUT
            drop(weights, keep);
#endif
            before = ring.slot();
            ring.next<STAGES>();
        }
        if (QUERIES_COPIED && !SEEKS) free_queries(q, stages);
        open_products();
        multiply_values(rows, weights, stages.keys(before) + TILE_BYTES);
        close_products();
        wait_products<0>();
        arrive_warp(stages.emptied(before));
    } while (SEEKS && seeker.find(stages, ring, 0x7fffffff, unmasked));
    if (QUERIES_COPIED && SEEKS) free_queries(q, stages);
    load_next(q, p, stages, works);
    // Why found anew, from a number that the compiler takes for another: what only the end needs holds no registers.
    u32 id = works.id;
    asm volatile("" : "+r"(id));
    const Work end = find_work(p, id, p.causal);
    finish(rows, p, end, end.tile * ROWS + this_warp() * 16);
}

template <bool LISTED>
__device__ __forceinline__ void run(const Params& p) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    const u32 shared = (u32)__cvta_generic_to_shared(shared_bytes);
    const Stages stages = {shared + this_team() * TEAM_BYTES};
    if (threadIdx.x < THREADS && team_thread() < STAGES) {
        make_barrier(stages.filled(team_thread()), COPIERS);
        make_barrier(stages.emptied(team_thread()), WARPS / TEAMS);
    }
    if (LISTED && SHARED_OPERANDS && threadIdx.x < THREADS && team_thread() == 0) {
        make_barrier(stages.queries_filled(), COPIERS);
        make_barrier(stages.queries_emptied(), WARPS / TEAMS);
    }
    __syncthreads();
    await_predecessor();  // it makes the order of the pieces of work
    if (threadIdx.x >= THREADS) {
        give_registers<copier_registers(WARPS / 4, MIN_BLOCKS)>();
        // Counted anew: a number that both roles share is one that the registers of neither may hold.
        const u32 team = this_team();
        const Stages own = {shared + team * TEAM_BYTES};
        if (team < TEAMS) LISTED ? copy_listed(p, own) : copy_all(p, own);
        return;
    }
    take_registers<computer_registers(WARPS / 4, MIN_BLOCKS)>();
    const Turn<TURNS ? GROUPS : 1> turn(threadIdx.x / 128);
    Ring ring = {0};
    Queries q;
#if SHARED_OPERANDS
    q.shared = stages.shared, q.place = {0};
#endif
    Works works;
    load_ahead(q, p, stages, works);
    for (; works.left(p); works.next()) {
        const Work w = find_work(p, works.id, p.causal);
        if (has_rows(w)) {
            attend<LISTED>(p, stages, ring, turn, q, works);
        } else {
            if (w.tail) empty_rows(p, w);
            load_next(q, p, stages, works);
        }
    }
}

// A build has the kernels that are asked of its tiles.
#if DENSE
extern "C" __global__ void __launch_bounds__(THREADS + COPYING, MIN_BLOCKS) attention_hopper_forward(const __grid_constant__ Params p) {
    run<false>(p);
}
#endif
#if SPARSE
extern "C" __global__ void __launch_bounds__(THREADS + COPYING, MIN_BLOCKS) attention_hopper_forward_sparse(const __grid_constant__ Params p) {
    run<true>(p);
}
#endif
