// Warp specialisation: barriers between the warpgroup that copies and those that compute, their registers, and copies into
// the tiles of wgmma.cuh.
//
// Why cp.async and not the tensor copy engine (TMA): rows past a sequence's end must not be read, whatever lies there, and
// are zeros in the tile; TMA knows the bounds of a tensor, not of a packed sequence or of key_lengths. At head dims up to
// 128 a tile costs its copiers a few percent of the issue slots, and there is no tensor map to encode for each call.
#pragma once
#include "tiles.cuh"
#include "walk.cuh"
#include "wgmma.cuh"

// A block's computing groups and its four copying warps fall into TEAMS that share nothing but the multiprocessor: each has
// pieces of work, stages and copiers of its own. Why, and not a block each: four warps that copy are then enough for all, and
// registers are handed over by the four warps. Block-sparse, a team of one group, or of those of one block of the layout, has
// one list, and no group waits through stages that only others want.
#define GROUPS (WARPS / 4 / TEAMS)
// Block-sparse, how many lists the groups of a team follow: one where the layout's blocks hold all of the team's rows. Every
// stage is every group's then, as in the dense kernels.
#define LISTS (ONE_LIST ? 1 : GROUPS)
#define COPYING 128
#define COPIERS (TEAMS == 1 ? 128 : TEAMS == 2 ? 64 : 32)

// Beyond the last team where three share four copying warps.
__device__ __forceinline__ u32 this_team() {
    if (TEAMS == 1) return 0;
    const u32 thread = afresh(threadIdx.x);
    return thread < THREADS ? thread / TEAM_THREADS : (thread - THREADS) / COPIERS;
}
__device__ __forceinline__ u32 this_group() { return team_thread() / 128; }
__device__ __forceinline__ u32 this_warp() { return team_thread() >> 5; }

// Registers a thread: the block starts with an even share; copiers give up what the computing warpgroups take. A team's few
// copiers have more to count, and keep as many as its kernel (TEAM_COPIER_REGISTERS) can spare.
__device__ constexpr int even_share(int groups, int blocks) { return 65536 / (blocks * (groups + 1) * 128) / 8 * 8; }
__device__ constexpr int copier_registers(int groups, int blocks) {
    return TEAMS > 1 ? TEAM_COPIER_REGISTERS : even_share(groups, blocks) >= 168 ? 40 : 32;
}
__device__ constexpr int computer_registers(int groups, int blocks) {
    const int share = (even_share(groups, blocks) * (groups + 1) - copier_registers(groups, blocks)) / groups / 8 * 8;
    return share < 240 ? share : 240;
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void make_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Once for the warp, after all its lanes.
__device__ __forceinline__ void arrive_warp(u32 barrier) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) arrive(barrier);
}

// Until the barrier's phase of this parity is complete.
__device__ __forceinline__ void await(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
            : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

// Whether that phase is complete already.
__device__ __forceinline__ bool completed(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}

// What this thread wrote to shared memory becomes visible to the tensor cores; before it tells them that it is there.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A place in a ring of buffers: `filled` is arrived at by copiers, `emptied` by readers, and round r of a buffer waits for
// parity r % 2. In one register: slot in bits 0 to 3, the round's parity in bit 4.
struct Ring {
    u32 at;

    __device__ __forceinline__ u32 slot() const { return at & 15; }
    __device__ __forceinline__ u32 filled() const { return at >> 4; }
    __device__ __forceinline__ u32 emptied() const { return at >> 4 ^ 1; }  // passes at once in the first round
    template <int SLOTS>
    __device__ __forceinline__ void next() {
        at = slot() + 1 == SLOTS ? (at & 16) ^ 16 : at + 1;
    }
};

__device__ __forceinline__ void copy4(u32 to, const void* from, bool read) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(read ? 4 : 0) : "memory");
}

// Tells readers of copies once they have arrived: usually BEHIND tiles behind the newest, so that BEHIND + 1 are on their way.
template <int BEHIND>
struct Announcer {
    u32 filled[BEHIND];  // the barriers of copies not yet announced, oldest first, or 0
    __device__ __forceinline__ void flush() {
        if (filled[BEHIND - 1] == 0) return;
        wait_copies<0>();
        show_to_products();
#pragma unroll
        for (int i = 0; i < BEHIND; ++i) {
            if (BEHIND == 1 || filled[i] != 0) arrive(filled[i]);
            filled[i] = 0;
        }
    }
    // Before copying to a buffer that may still be read. Why the flush: its readers may be waiting for those very copies.
    __device__ __forceinline__ void await_empty(u32 barrier, u32 parity) {
        if (!completed(barrier, parity)) flush();
        await(barrier, parity);
    }
    // After the copies of a tile were issued.
    __device__ __forceinline__ void next(u32 barrier) {
        commit_copies();
        if (filled[0] != 0) {
            wait_copies<BEHIND>();
            show_to_products();
            arrive(filled[0]);
        }
#pragma unroll
        for (int i = 1; i < BEHIND; ++i) filled[i - 1] = filled[i];
        filled[BEHIND - 1] = barrier;
    }
};

// Block-sparse: what a stage holds, beside its barriers. Copiers walk the lists (walk.cuh) and post each step before they
// announce the stage; the computing groups read it behind `filled`. With the bits of the groups that take part, whether
// the work's last stage has come, and whether some of the team's rows do not see all of it.
#define LAST_STAGE 0x80000000u
#define PARTLY_SEEN 0x40000000u
#define WHO(step) ((step).who & ~(LAST_STAGE | PARTLY_SEEN))

__device__ __forceinline__ void post_step(u32 to, const Step& step, u32 flags) {
    if (threadIdx.x % COPIERS == 0)
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(step.row), "r"(step.who | flags) : "memory");
}

__device__ __forceinline__ Step read_step(u32 from) {
    Step step;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(step.row), "=r"(step.who) : "r"(from) : "memory");
    return step;
}

// The computing groups take turns at queueing products. Why: the tensor cores serve queued products of several groups side
// by side, so groups that queue together also finish together, and then compete for the exponential unit; in turn, one
// multiplies while another exponentiates. Named barriers 1 to the number of the block's groups, COUNT; every group must take
// equally many turns.
template <int COUNT>
struct Turn {
    int group;
    __device__ __forceinline__ explicit Turn(int group) : group(group) {
        if (COUNT > 1 && group == COUNT - 1) pass();
    }
    __device__ __forceinline__ void take() const {
        if (COUNT > 1) asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
    }
    __device__ __forceinline__ void pass() const {
        const int next = group + 1 == COUNT ? 0 : group + 1;
        if (COUNT > 1) asm volatile("bar.arrive %0, 256;" ::"r"(1 + next) : "memory");
    }
};

// The pieces of work of one team, when as many blocks are launched as run at a time: one of each round of all teams, the
// next one along in the next round. Why along: lengths of work repeat with the tiles of a sequence, and a fixed place
// would give one team the short ones and another the long ones whenever their number divides that of the teams.
// One number and the rest found anew: it lives through the whole kernel.
struct Works {
    u32 id;

    __device__ __forceinline__ Works() : id(blockIdx.x * TEAMS + this_team()) {}
    __device__ __forceinline__ bool left(const Params& p) const { return id < p.pieces; }
    __device__ __forceinline__ void next() {
        const u32 teams = afresh(gridDim.x) * TEAMS;
        id += id % teams == teams - 1 ? 1 : teams + 1;
    }
    // Pieces of two sizes: the last round, if it is not a whole one, goes to the other end of the places. There are the teams
    // that had no tile in the round of the last tiles.
    __device__ __forceinline__ void next_keys(const Params& p) {
        next();
        if (p.parts == 0) return;
        const u32 teams = afresh(gridDim.x) * TEAMS, place = id % teams, first = id - place;
        if (first + teams > p.pieces) id = first + teams - 1 - place;
    }
};

// Copies rows [first, first + ROWS) of a matrix to a tile with THREADS_OF_COPY threads. Rows from `num_rows` on and columns
// from `head_dim` on are zeros in the tile and are not read: what lies there may be anything, NaN included. A pass has a
// power of two of rows, so turn(row + r) is turn(row) ^ turn(r).
template <int ROWS, int THREADS_OF_COPY = COPIERS>
__device__ __forceinline__ void copy_panels(u32 tile, const u16* base, i64 row_stride, int first, int num_rows, int head_dim) {
    constexpr int ROW_CHUNKS = HEAD_DIM / 8, PANEL_CHUNKS = PANEL / 8, MOST = THREADS_OF_COPY / ROW_CHUNKS;
    constexpr int ROWS_A_PASS = MOST >= 64 ? 64 : MOST >= 32 ? 32 : MOST >= 16 ? 16 : MOST >= 8 ? 8 : MOST >= 4 ? 4 : 2;
    static_assert(ROWS % ROWS_A_PASS == 0, "threads share the chunks evenly");
    // Why: few threads make many passes, and the compiler would keep the distances of all of them in registers.
    u32 at_block = threadIdx.x;
    if (COPIERS < 128) asm volatile("" : "+l"(row_stride), "+r"(at_block));
    const int thread = at_block % THREADS_OF_COPY, row = thread / ROW_CHUNKS, chunk = thread % ROW_CHUNKS;
    if (row >= ROWS_A_PASS) return;
    const u16* from = base + (i64)(first + row) * row_stride + chunk * 8;
    const int left = chunk * 8 < head_dim ? num_rows - first - row : 0;
    const u32 to = tile + chunk / PANEL_CHUNKS * (ROWS * PANEL_ROW) + row * PANEL_ROW + ((chunk % PANEL_CHUNKS ^ turn(row)) << 4);
#pragma unroll
    for (int r = 0; r < ROWS; r += ROWS_A_PASS) {
        copy16((to + r * PANEL_ROW) ^ turn(r) << 4, from, r < left);
        from += ROWS_A_PASS * row_stride;
        if (COPIERS < 128) asm volatile("" : "+l"(from));
    }
}
