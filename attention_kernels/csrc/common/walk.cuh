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
// One thread walks: a producer with the state in its registers, or any thread with the state in shared memory (Route).
#pragma once
#include "types.cuh"

#define STRETCH 64
#define NO_ROW 0x7fff0000  // a thread's row beside it is one past every end too

struct Step {
    int row;  // the first of PART streamed rows, counted within the sequence
    u32 who;  // bit s: stretch s takes part; 0: the walk is over
};

template <int LISTS, int PART>
struct Walk {
    const int* entries;
    int block;
    int at[LISTS], end[LISTS];          // places in `entries`
    int part[LISTS];                    // within the block at hand
    int row[LISTS];                     // of the next step, NO_ROW where there is none
    int limit[LISTS];                   // rows from here on are not visited
    int served[LISTS];                  // steps so far

    // The stationary rows are queries, `first_row` the tile's first; p has the rows' lists. Keys are streamed.
    __device__ __forceinline__ void start_queries(const Params& p, const Work& w, int first_row) {
#pragma unroll
        for (int s = 0; s < LISTS; ++s) {
            const int row = first_row + s * STRETCH, last = min(row + STRETCH, w.q_len) - 1;
            open(s, p, w, row, w.q_len, 0, p.causal ? min(w.k_len, last + w.offset + 1) : w.k_len);
        }
    }

    // The stationary rows are keys; p has the columns' lists in the rows' place. Queries are streamed.
    __device__ __forceinline__ void start_keys(const Params& p, const Work& w, int first_key) {
#pragma unroll
        for (int s = 0; s < LISTS; ++s) {
            const int key = first_key + s * STRETCH;
            open(s, p, w, key, w.k_len, p.causal ? max(0, key - w.offset) : 0, w.q_len);
        }
    }

    __device__ __forceinline__ Step next() {
        int least = NO_ROW;
        Step step = {NO_ROW, 0};
#pragma unroll
        for (int s = 0; s < LISTS; ++s) {
            if (row[s] == NO_ROW) continue;
            if (served[s] < least || (served[s] == least && row[s] < step.row)) least = served[s], step.row = row[s];
        }
        if (step.row == NO_ROW) return step;
#pragma unroll
        for (int s = 0; s < LISTS; ++s) {
            if (row[s] != step.row) continue;
            step.who |= 1u << s;
            ++served[s];
            if (++part[s] == block / PART) part[s] = 0, ++at[s];
            fetch(s);
        }
        return step;
    }

   private:
    // The list of the stretch whose first row is `own` of `own_rows`, from streamed row `first` on and below `bound`.
    __device__ __forceinline__ void open(int s, const Params& p, const Work& w, int own, int own_rows, int first, int bound) {
        static_assert(STRETCH % PART == 0 || PART % STRETCH == 0, "parts and stretches are counted in powers of two");
        entries = p.col_idx;
        block = p.block_size;
        at[s] = end[s] = part[s] = served[s] = 0;
        limit[s] = bound;
        const int line = own / block;
        // Why the second test: a packed sequence may be longer than its caller said, and then than the layout.
        if (own < own_rows && line < p.num_blocks) {
            const i64 lists = (i64)p.head_to_pattern[w.head * p.pattern_stride] * p.num_blocks + line;
            at[s] = p.row_ptr[lists];
            end[s] = p.row_ptr[lists + 1];
        }
        if (first > 0) skip(s, first);
        fetch(s);
    }

    // To the first entry whose block reaches row `first`, by halving: a causal tile may have most of a long list behind it.
    __device__ __forceinline__ void skip(int s, int first) {
        const int wanted = first / block;
        int low = at[s], high = end[s];
        while (low < high) {
            const int middle = low + (high - low) / 2;
            if (entries[middle] < wanted) low = middle + 1;
            else high = middle;
        }
        at[s] = low;
        if (low < end[s] && entries[low] == wanted) part[s] = (first - wanted * block) / PART;
    }

    __device__ __forceinline__ void fetch(int s) {
        row[s] = NO_ROW;
        if (at[s] >= end[s]) return;
        const int found = entries[at[s]] * block + part[s] * PART;
        if (found < limit[s]) row[s] = found;
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
