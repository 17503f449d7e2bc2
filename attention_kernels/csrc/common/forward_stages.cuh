// The stages of the Hopper forward: what lies where in shared memory, the copies that fill the stages, and how a group finds
// its own among them. hopper_forward.cu includes this and reads them.
#pragma once
#define TEAM_COPIER_REGISTERS (WARPS < 16 || TEAMS > 2 || ONE_LIST && HEAD_DIM < 64 ? 56 : 32)
#include "overlap.cuh"
#include "warpgroups.cuh"

#define ROWS (GROUPS * 64)
#define TILE_BYTES (KEY_TILE * ROW_BYTES)
#define GROUP_BYTES (64 * ROW_BYTES)
// Shared memory of a team: STAGES x (K, V) | a tile of 64 queries a group, where read from there | barriers: filled, emptied | steps |
// barriers of the queries
#define QUERIES_AT (STAGES * 2 * TILE_BYTES)
#define BARRIERS_AT (QUERIES_AT + SHARED_OPERANDS * GROUPS * GROUP_BYTES)
#define TEAM_BYTES ((BARRIERS_AT + STAGES * 24 + SHARED_OPERANDS * 16 + 1023) / 1024 * 1024)

struct Stages {
    u32 shared;
    __device__ __forceinline__ u32 keys(u32 slot) const { return shared + slot * 2 * TILE_BYTES; }
    __device__ __forceinline__ u32 queries(u32 group) const { return shared + QUERIES_AT + group * GROUP_BYTES; }
    __device__ __forceinline__ u32 filled(u32 slot) const { return shared + BARRIERS_AT + slot * 8; }
    __device__ __forceinline__ u32 emptied(u32 slot) const { return shared + BARRIERS_AT + (STAGES + slot) * 8; }
    __device__ __forceinline__ u32 step(u32 slot) const { return shared + BARRIERS_AT + (2 * STAGES + slot) * 8; }
    __device__ __forceinline__ u32 queries_filled() const { return step(STAGES); }
    __device__ __forceinline__ u32 queries_emptied() const { return step(STAGES + 1); }
};

__device__ __forceinline__ bool has_rows(const Work& w) { return !w.tail && w.tile * ROWS < w.q_len; }

// The number of key tiles that any of the team's rows sees; none for work that has no rows.
__device__ __forceinline__ int count_tiles(const Params& p, const Work& w) {
    if (!has_rows(w)) return 0;
    const int last_row = min(w.tile * ROWS + ROWS, w.q_len) - 1;
    const int keys = p.causal ? min(w.k_len, last_row + w.offset + 1) : w.k_len;
    return keys <= 0 ? 0 : (keys + KEY_TILE - 1) / KEY_TILE;
}

__device__ __forceinline__ void copy_all(const Params& p, const Stages& stages) {
    Ring ring = {0};
    Announcer<1> announcer = {0};
    for (Works works; works.left(p); works.next()) {
        const Work w = find_work(p, works.id, p.causal);
        const int num_tiles = count_tiles(p, w);
        const u16* k = at(p.k, p.k_strides, w, w.k_start);
        const u16* v = at(p.v, p.v_strides, w, w.k_start);
        for (int tile = 0; tile < num_tiles; ++tile) {
            announcer.await_empty(stages.emptied(ring.slot()), ring.emptied());
            copy_panels<KEY_TILE>(stages.keys(ring.slot()), k, p.k_strides.row, tile * KEY_TILE, w.k_len, p.head_dim);
            copy_panels<KEY_TILE>(stages.keys(ring.slot()) + TILE_BYTES, v, p.v_strides.row, tile * KEY_TILE, w.k_len, p.head_dim);
            announcer.next(stages.filled(ring.slot()));
            ring.next<STAGES>();
        }
    }
    announcer.flush();
}

// A team's queries, block-sparse and in shared memory. Their place is free once the last scores of the piece before are there.
// Until then keys are copied, into all stages but one.
struct QueryCopies {
    Ring place;  // a ring of one: whose turn it is, the copiers' or the groups'
    int left;  // stages that may be filled before this piece's queries are copied; 0: they were

    // After each stage of piece `id`.
    __device__ __forceinline__ void copy_once_free(const Params& p, const Stages& stages, u32 id, Announcer<2>& announcer, bool last) {
        if (left == 0) return;
        const bool wait = --left == 0 || last;
        if (!wait && !__all_sync(ALL_LANES, completed(stages.queries_emptied(), place.emptied()))) return;
        left = 0;
        // Found anew: copiers have few registers.
        const Work w = find_work(p, afresh(id), p.causal);
        announcer.await_empty(stages.queries_emptied(), place.emptied());
        const u16* rows = at(p.q, p.q_strides, w, w.q_start);
#pragma unroll 1
        for (int group = 0; group < GROUPS; ++group)
            copy_panels<64>(stages.queries(group), rows, p.q_strides.row, w.tile * ROWS + group * 64, w.q_len, p.head_dim);
        announcer.next(stages.queries_filled());
        place.next<1>();
    }
};

// The tiles that the groups' lists name.
__device__ __forceinline__ void copy_listed(const Params& p, const Stages& stages) {
    Ring ring = {0};
    Announcer<2> announcer = {0};
    QueryCopies queries = {{0}, 0};
    for (Works works; works.left(p); works.next()) {
        const Work w = find_work(p, works.id, p.causal);
        if (!has_rows(w)) continue;
        const u16* k = at(p.k, p.k_strides, w, w.k_start);
        const u16* v = at(p.v, p.v_strides, w, w.k_start);
        WarpWalk<LISTS, KEY_TILE, 2> walk;
        walk.start_queries(p, w, w.tile * ROWS, ROWS / LISTS);
        queries.left = STAGES - 1;
        const int seen_by_all = p.causal ? min(w.k_len, w.tile * ROWS + w.offset + 1) : w.k_len;
        bool last;
        do {
            announcer.await_empty(stages.emptied(ring.slot()), ring.emptied());
            const Step step = walk.here();
            if (step.who != 0) {
                copy_panels<KEY_TILE>(stages.keys(ring.slot()), k, p.k_strides.row, step.row, w.k_len, p.head_dim);
                copy_panels<KEY_TILE>(stages.keys(ring.slot()) + TILE_BYTES, v, p.v_strides.row, step.row, w.k_len, p.head_dim);
            }
            walk.next(p, step);
            last = walk.over();
            const u32 flags = (last ? LAST_STAGE : 0) | (step.row + KEY_TILE > seen_by_all ? PARTLY_SEEN : 0);
            post_step(stages.step(ring.slot()), step, flags);
            announcer.next(stages.filled(ring.slot()));
            ring.next<STAGES>();
            if (SHARED_OPERANDS) queries.copy_once_free(p, stages, works.id, announcer, last);
        } while (!last);
    }
    announcer.flush();
}

// A group's way through the stages of a block-sparse piece of work.
struct Seeker {
    bool last;     // the work has no stage after the one that was found or passed
    bool careful;  // the found one goes beyond `unmasked`, or beyond what all of the team's rows see

    // The stage at hand, where all are this group's. Returns false for one without keys, which alone stands for an empty list.
    __device__ __forceinline__ bool read(const Stages& stages, const Ring& ring) {
        const Step step = read_step(stages.step(ring.slot()));
        careful = step.who & PARTLY_SEEN;
        last = step.who & LAST_STAGE;
        return WHO(step) != 0;
    }
    // The first stage of a piece of work, if it has one with keys.
    __device__ __forceinline__ bool enter(const Stages& stages, Ring& ring) {
        await(stages.filled(ring.slot()), ring.filled());
        const bool found = read(stages, ring);
        __syncwarp();
        if (found) return true;
        arrive_warp(stages.emptied(ring.slot()));
        ring.next<STAGES>();
        return false;
    }
    // Passes the stages that are not this group's, at most `most`; false where it has not come to one that is.
    __device__ __forceinline__ bool find(const Stages& stages, Ring& ring, int most, int unmasked) {
        for (; !last; --most) {
            await(stages.filled(ring.slot()), ring.filled());
            const Step step = read_step(stages.step(ring.slot()));
            careful = step.row + KEY_TILE > unmasked;
            const bool found = step.who >> this_group() & 1;
            if (!found && most == 0) return false;
            last = step.who & LAST_STAGE;
            // Products want the whole warp, and its lanes may have left their waiting one by one.
            __syncwarp();
            if (found) return true;
            arrive_warp(stages.emptied(ring.slot()));
            ring.next<STAGES>();
        }
        return false;
    }
    // The first column of the found stage. Why read again: a register that is wanted late is one that is spilled.
    static __device__ __forceinline__ int column(const Stages& stages, const Ring& ring) { return read_step(stages.step(ring.slot())).row; }
};
