// Block-sparse attention: which rows of the streamed side a tile of stationary rows visits, and in what order.
//
// A layout's compressed lists (struct Params) name, for each block of stationary rows, the blocks of streamed rows that
// exist. A tile of stationary rows is LISTS stretches of 64 rows; a stretch lies in one block, so it has one list, and
// with blocks of 64 neighbouring stretches have different ones. The walk goes over all of them at once, PART rows a
// step (PART divides the block), and says with each step which stretches take part. Each stretch gets its own rows
// once, ascending; what lies beyond the sequence's end, or is hidden from the stretch by the causal mask, is left out.
//
//     list of stretch 0:  2  5  7      steps (row / PART, who):  2 a   3 b   5 ab   7 a   9 b
//     list of stretch 1:  3  5  9
//
// Why not the plain ascending union: warps of a tile wait for each other, so the steps of stretches with different
// lists should alternate. Next comes the stretch that has had the fewest steps, in a tie the one with the smallest
// row, and every stretch whose next row is the same joins in. A layout with every block is walked as the dense kernels
// walk, from the first row to the last with everyone taking part.
//
// One thread walks, with the state in shared memory (Route), or a warp that copies does, a stretch a lane (WarpWalk).
#pragma once
#include "types.cuh"

#define STRETCH 64
#define NO_ROW 0x7fff0000  // a thread's row beside it is one past every end too

struct Step {
    int row;  // the first of PART streamed rows, counted within the sequence
    u32 who;  // bit s: stretch s takes part; 0: the walk is over
};

// One stretch's way through its list.
struct Stretch {
    int at, end;  // places in the entries
    int part;     // within the block at hand
    int row;      // of the next step, NO_ROW where there is none
    int limit;    // rows from here on are not visited
    int served;   // steps so far

    // The list of the stretch whose first row is `own` of `own_rows`, from streamed row `first` on and below `bound`.
    template <int PART>
    __device__ __forceinline__ void open(const Params& p, const Work& w, int own, int own_rows, int first, int bound) {
        static_assert(STRETCH % PART == 0 || PART % STRETCH == 0, "parts and stretches are counted in powers of two");
        at = end = part = served = 0;
        limit = bound;
        const int line = own / p.block_size;
        // Why the second test: a packed sequence may be longer than its caller said, and then than the layout.
        if (own < own_rows && line < p.num_blocks) {
            const i64 lists = (i64)p.head_to_pattern[w.head * p.pattern_stride] * p.num_blocks + line;
            at = p.row_ptr[lists];
            end = p.row_ptr[lists + 1];
        }
        if (first > 0) skip<PART>(p, first);
        fetch<PART>(p.col_idx, p.block_size);
    }
    // `rows` queries from `own` on, and the keys that they see.
    template <int PART>
    __device__ __forceinline__ void open_queries(const Params& p, const Work& w, int own, int rows = STRETCH) {
        const int last = min(own + rows, w.q_len) - 1;
        open<PART>(p, w, own, w.q_len, 0, p.causal ? min(w.k_len, last + w.offset + 1) : w.k_len);
    }
    // Keys from `own` on, and the queries that see them.
    template <int PART>
    __device__ __forceinline__ void open_keys(const Params& p, const Work& w, int own) {
        open<PART>(p, w, own, w.k_len, p.causal ? max(0, own - w.offset) : 0, w.q_len);
    }

    template <int PART>
    __device__ __forceinline__ void advance(const int* entries, int block) {
        ++served;
        if (++part == block / PART) part = 0, ++at;
        fetch<PART>(entries, block);
    }

   private:
    // To the first entry whose block reaches row `first`, by halving: a causal tile may have most of a long list behind it.
    template <int PART>
    __device__ __forceinline__ void skip(const Params& p, int first) {
        const int wanted = first / p.block_size;
        int low = at, high = end;
        while (low < high) {
            const int middle = low + (high - low) / 2;
            if (p.col_idx[middle] < wanted) low = middle + 1;
            else high = middle;
        }
        at = low;
        if (low < end && p.col_idx[low] == wanted) part = (first - wanted * p.block_size) / PART;
    }

    template <int PART>
    __device__ __forceinline__ void fetch(const int* entries, int block) {
        row = NO_ROW;
        if (at >= end) return;
        const int found = entries[at] * block + part * PART;
        if (found < limit) row = found;
    }
};

template <int LISTS, int PART>
struct Walk {
    const int* entries;
    int block;
    Stretch stretches[LISTS];

    // The stationary rows are queries, `first_row` the tile's first; p has the rows' lists. Keys are streamed.
    __device__ __forceinline__ void start_queries(const Params& p, const Work& w, int first_row) {
        entries = p.col_idx, block = p.block_size;
#pragma unroll
        for (int s = 0; s < LISTS; ++s) stretches[s].template open_queries<PART>(p, w, first_row + s * STRETCH);
    }

    // The stationary rows are keys; p has the columns' lists in the rows' place. Queries are streamed.
    __device__ __forceinline__ void start_keys(const Params& p, const Work& w, int first_key) {
        entries = p.col_idx, block = p.block_size;
#pragma unroll
        for (int s = 0; s < LISTS; ++s) stretches[s].template open_keys<PART>(p, w, first_key + s * STRETCH);
    }

    __device__ __forceinline__ Step next() {
        int least = NO_ROW;
        Step step = {NO_ROW, 0};
#pragma unroll
        for (int s = 0; s < LISTS; ++s) {
            const Stretch& one = stretches[s];
            if (one.row == NO_ROW) continue;
            if (one.served < least || (one.served == least && one.row < step.row)) least = one.served, step.row = one.row;
        }
        if (step.row == NO_ROW) return step;
#pragma unroll
        for (int s = 0; s < LISTS; ++s) {
            if (stretches[s].row != step.row) continue;
            step.who |= 1u << s;
            stretches[s].template advance<PART>(entries, block);
        }
        return step;
    }
};

// The same by a whole warp: lane s holds stretch s, so a step costs a few instructions however many lists there are. With
// SLACK a stretch may be that many steps ahead of another when it has the smallest row: then stretches whose lists have
// rows in common meet more often, and one stage serves several. Groups of warps that do not wait for each other bear it.
template <int LISTS, int PART, int SLACK>
struct WarpWalk {
    Stretch own;

    // A single list may serve more `rows` than a stretch: those of one block of the layout.
    __device__ __forceinline__ void start_queries(const Params& p, const Work& w, int first_row, int rows = STRETCH) {
        if (start()) own.template open_queries<PART>(p, w, first_row + lane() * STRETCH, rows);
    }
    __device__ __forceinline__ void start_keys(const Params& p, const Work& w, int first_key) {
        if (start()) own.template open_keys<PART>(p, w, first_key + lane() * STRETCH);
    }
    __device__ __forceinline__ Step here() const {
        if (LISTS == 1) return {own.row, own.row != NO_ROW};
        const int least = __reduce_min_sync(ALL_LANES, own.row == NO_ROW ? NO_ROW : own.served);
        const int row = __reduce_min_sync(ALL_LANES, own.served - least <= SLACK ? own.row : NO_ROW);
        return {row, __ballot_sync(ALL_LANES, row != NO_ROW && own.row == row)};
    }
    // Past that step.
    __device__ __forceinline__ void next(const Params& p, const Step& step) {
        if (LISTS == 1 ? step.who : step.who >> lane() & 1) own.template advance<PART>(p.col_idx, p.block_size);
    }
    __device__ __forceinline__ bool over() const { return LISTS == 1 ? own.row == NO_ROW : __all_sync(ALL_LANES, own.row == NO_ROW); }

   private:
    // A single list all lanes hold.
    static __device__ __forceinline__ int lane() { return LISTS == 1 ? 0 : threadIdx.x & 31; }
    __device__ __forceinline__ bool start() {
        own.row = NO_ROW;
        own.served = 0;
        return lane() < LISTS;
    }
};

// How many rows a step of the walk should have where a stage is `stage` streamed rows and warps compute `least` at a time.
// Stretches with different lists get two parts a stage where they can: then both have work between two barriers.
__device__ constexpr int part_rows(int lists, int stage, int least) {
    const int share = lists > 1 && stage >= 2 * least ? stage / 2 : stage;
    return share < STRETCH ? share : STRETCH;
}

// The steps of the stages in work, STAGE rows each, in shared memory: thread 0 walks, a barrier later all may read. Why
// calls and not inlined: in the middle of a loop the walk's registers are ones that the loop then spills.
template <int LISTS, int PART, int STAGE>
struct Route {
    static constexpr int PARTS = STAGE / PART, STAGES_KEPT = 4;
    Walk<LISTS, PART> walk;
    Step steps[STAGES_KEPT][PARTS];

    // Posts the first `stages` stages. Work by value: a reference would put the caller's into memory.
    __device__ __noinline__ void start_queries(const Params& p, Work w, int first_row, int stages) {
        walk.start_queries(p, w, first_row);
        for (int stage = 0; stage < stages; ++stage) post(stage);
    }
    __device__ __noinline__ void start_keys(const Params& p, Work w, int first_key, int stages) {
        walk.start_keys(p, w, first_key);
        for (int stage = 0; stage < stages; ++stage) post(stage);
    }
    // At most STAGES_KEPT - 1 stages ahead of the one that is read.
    __device__ __noinline__ void post(int stage) {
        for (int i = 0; i < PARTS; ++i) steps[stage % STAGES_KEPT][i] = walk.next();
    }
    __device__ __forceinline__ Step step(int stage, int part) const { return steps[stage % STAGES_KEPT][part]; }
    __device__ __forceinline__ bool over(int stage) const { return step(stage, 0).who == 0; }
};
