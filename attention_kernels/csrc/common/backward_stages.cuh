// The stages of the Hopper backward: what lies where in shared memory, which queries a piece of work goes through, and the
// copies that fill the stages. hopper_backward.cu includes this and reads them.
#pragma once
#define TEAM_COPIER_REGISTERS (WARPS < 12 || !DROPOUT ? 56 : 32)
#include "overlap.cuh"
#include "warpgroups.cuh"

#define KEYS (GROUPS * 64)
#define QUERY_TILE 64
#define KEYS_BYTES (KEYS * ROW_BYTES)
#define TILE_BYTES (QUERY_TILE * ROW_BYTES)
#define DS_ROW (QUERY_TILE * 2)
// Persistent: a block goes from one piece of work to the next, and copies run ahead into it. That takes registers and
// shared memory, which the wider heads want elsewhere: there a block does one piece, and so many blocks are launched.
#define KEY_SLOTS (1 + PERSISTENT)
// Shared memory of a team: KEY_SLOTS x (K, V) | STAGES x (q, dO) | DS_SLOTS x dS^T (KEYS rows of 64 queries) | STAGES x statistics |
// dQ of a tile a group (SUMS 2) | two halfwords of flags a lane (PAIRS) | barriers | STAGES x step
#define TILES_AT (KEY_SLOTS * 2 * KEYS_BYTES)
#define DS_AT (TILES_AT + STAGES * 2 * TILE_BYTES)
#define STATS_AT (DS_AT + DS_SLOTS * KEYS * DS_ROW)
#define DQ_AT (STATS_AT + STAGES * QUERY_TILE * 8)
#define FLAGS_AT (DQ_AT + (SUMS == 2) * KEYS * HEAD_DIM * 4)
#define BARRIERS_AT (FLAGS_AT + PAIRS * GROUPS * 128 * 4)
#define TEAM_BYTES ((BARRIERS_AT + STAGES * 24 + (DS_SLOTS + KEY_SLOTS) * 16 + 1023) / 1024 * 1024)

typedef float Block[QUERY_TILE / 8][4];    // 64 keys x 64 queries a group
typedef u32 Fragments[QUERY_TILE / 16][4];  // the same rounded: A of the products over queries
typedef float Sums[HEAD_DIM / 8][4];

struct Places {
    u32 shared;
    __device__ __forceinline__ u32 keys(u32 slot) const { return shared + slot * 2 * KEYS_BYTES; }
    __device__ __forceinline__ u32 queries(u32 slot) const { return shared + TILES_AT + slot * 2 * TILE_BYTES; }
    __device__ __forceinline__ u32 ds(u32 slot) const { return shared + DS_AT + slot * KEYS * DS_ROW; }
    __device__ __forceinline__ u32 stats(u32 slot) const { return shared + STATS_AT + slot * QUERY_TILE * 8; }
    __device__ __forceinline__ u32 dq(u32 warp) const { return shared + DQ_AT + warp * 16 * HEAD_DIM * 4; }
    __device__ __forceinline__ u32 flags(u32 round, u32 warp) const { return shared + FLAGS_AT + (round * GROUPS * 4 + warp) * 64; }
    __device__ __forceinline__ u32 filled(u32 slot) const { return shared + BARRIERS_AT + slot * 8; }
    __device__ __forceinline__ u32 emptied(u32 slot) const { return shared + BARRIERS_AT + (STAGES + slot) * 8; }
    __device__ __forceinline__ u32 ds_filled(u32 slot) const { return shared + BARRIERS_AT + (2 * STAGES + slot) * 8; }
    __device__ __forceinline__ u32 ds_emptied(u32 slot) const { return shared + BARRIERS_AT + (2 * STAGES + DS_SLOTS + slot) * 8; }
    __device__ __forceinline__ u32 keys_filled(u32 slot) const { return shared + BARRIERS_AT + (2 * (STAGES + DS_SLOTS) + slot) * 8; }
    __device__ __forceinline__ u32 keys_emptied(u32 slot) const {
        return shared + BARRIERS_AT + (2 * (STAGES + DS_SLOTS) + KEY_SLOTS + slot) * 8;
    }
    __device__ __forceinline__ u32 step(u32 slot) const {
        return shared + BARRIERS_AT + (2 * (STAGES + DS_SLOTS + KEY_SLOTS) + slot) * 8;
    }
};

// The keys of piece `id`. Persistent, behind the tiles of all heads may come the parts (pieces.py) that the rest of each head's
// keys are cut into: a part ends where the next one begins, and groups beyond its end stand by.
__device__ __forceinline__ Work find_keys(const Params& p, u32 id) {
    const u32 heads = afresh(p.heads), whole = p.tiles * heads * p.batch;
    if (!PERSISTENT || p.parts == 0 || id < whole) {
        Work w = find_work(p, id, false);
        w.first_key = w.tile * KEYS;
        return w;
    }
    const u32 parts = afresh(p.parts), head = (id - whole) / parts;
    Work w = find_sequence(p, head / heads);
    w.head = head % heads;
    w.tile = p.tiles;
    w.first_key = p.tiles * KEYS + (id - whole) % parts * p.part;
    w.k_len = min(w.k_len, w.first_key + p.part);
    return w;
}

__device__ __forceinline__ bool has_keys(const Work& w) { return !w.tail && w.first_key < w.k_len; }

// The query tiles of one piece of work. All blocks of a head begin with the same: what they read is then in the cache (begun
// at different places they add to different rows of dQ, and are slower by up to an eighth).
struct QueryTiles {
    int row;  // the first row of this one

    // Causal: key c is seen by rows from c - offset on.
    __device__ __forceinline__ QueryTiles(const Params& p, const Work& w)
        : row(p.causal ? max(0, w.first_key - w.offset) / QUERY_TILE * QUERY_TILE : 0) {}
    __device__ __forceinline__ bool left(const Work& w) const { return row < w.q_len; }
    __device__ __forceinline__ void next() { row += QUERY_TILE; }
};

// Where the statistic of query `row` of a tile lies: those that one lane wants of two blocks of 8 are side by side.
__device__ __forceinline__ int stats_place(int row) { return (row >> 4) * 16 + (row >> 1 & 3) * 4 + (row >> 3 & 1) * 2 + (row & 1); }

struct Sources {
    const u16 *q, *dout;
    const float2* stats;
    __device__ __forceinline__ Sources(const Params& p, const Work& w)
        : q(at(p.q, p.q_strides, w, w.q_start)), dout(at(p.dout, p.dout_strides, w, w.q_start)), stats(p.stats + stats_at(p, w)) {}

    // 64 queries from `first` on, to a stage.
    __device__ __forceinline__ void copy(const Params& p, const Places& places, const Work& w, u32 slot, int first) const {
        const int thread = (COPIERS < 128 ? afresh(threadIdx.x) : threadIdx.x) % COPIERS;
        const u32 to = places.queries(slot);
        copy_panels<QUERY_TILE>(to, q, p.q_strides.row, first, w.q_len, p.head_dim);
        copy_panels<QUERY_TILE>(to + TILE_BYTES, dout, p.dout_strides.row, first, w.q_len, p.head_dim);
        // Rows past the end are zeros throughout: P is 1 there, but dO, D and q are 0 and add nothing.
#pragma unroll
        for (int in = thread; in < QUERY_TILE; in += COPIERS) {
            const u32 stats_to = places.stats(slot) + stats_place(in) * 4;
            copy4(stats_to, &stats[first + in].x, first + in < w.q_len);
            copy4(stats_to + QUERY_TILE * 4, &stats[first + in].y, first + in < w.q_len);
        }
    }
};

template <bool LISTED, int BEHIND>
__device__ __forceinline__ void copy_work(const Params& p, const Places& places, const Work& w, Announcer<BEHIND>& announcer, Ring& keys,
                                          Ring& ring) {
    const u32 k_to = places.keys(keys.slot());
    announcer.await_empty(places.keys_emptied(keys.slot()), keys.emptied());
    copy_panels<KEYS>(k_to, at(p.k, p.k_strides, w, w.k_start), p.k_strides.row, w.first_key, w.k_len, p.head_dim);
    copy_panels<KEYS>(k_to + KEYS_BYTES, at(p.v, p.v_strides, w, w.k_start), p.v_strides.row, w.first_key, w.k_len, p.head_dim);
    announcer.next(places.keys_filled(keys.slot()));
    keys.next<KEY_SLOTS>();
    if (LISTED) {
        Work here = w;
        WarpWalk<LISTS, QUERY_TILE, 1> walk;
        walk.start_keys(p, w, w.first_key);
#if PERSISTENT
        await_predecessor();  // the statistics are preprocess's, all else is the caller's
#endif
        bool last;
        do {
            announcer.await_empty(places.emptied(ring.slot()), ring.emptied());
            const Step step = walk.here();
            // Few copiers have few registers: what they can find from two numbers, they find anew.
            if (TEAMS > 1) here.sample = afresh(w.sample), here.head = afresh(w.head);
            if (step.who != 0) Sources(p, here).copy(p, places, w, ring.slot(), step.row);
            walk.next(p, step);
            last = walk.over();
            post_step(places.step(ring.slot()), step, last ? LAST_STAGE : 0);
            announcer.next(places.filled(ring.slot()));
            ring.next<STAGES>();
        } while (!last);
    } else {
#if PERSISTENT
        await_predecessor();  // the statistics are preprocess's, k and v of the caller
#endif
        const Sources sources(p, w);
        for (QueryTiles tile(p, w); tile.left(w); tile.next()) {
            announcer.await_empty(places.emptied(ring.slot()), ring.emptied());
            sources.copy(p, places, w, ring.slot(), tile.row);
            announcer.next(places.filled(ring.slot()));
            ring.next<STAGES>();
        }
    }
}
