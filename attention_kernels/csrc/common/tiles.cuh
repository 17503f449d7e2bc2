// Tiles of 16-bit rows in shared memory, HEAD_DIM wide, and fragments read from them or from global memory.
//
// A row holds HEAD_DIM / 8 chunks of 16 bytes. ldmatrix reads one chunk of 8 neighbouring rows at a time; the 128
// bytes of all banks are 8 chunks, so those 8 must differ modulo 8. Chunk c of row r lies at place c ^ turn(r):
//
//     HEAD_DIM 16 (2 chunks)      HEAD_DIM 32, 96 (4, 12 chunks)    HEAD_DIM 64, 128 (8, 16 chunks)
//     r 0  | 0 1 |                r 0  | 0 1 2 3 |                  r 0  | 0 1 2 3 4 5 6 7 |
//     r 1  | 0 1 |  turn =        r 1  | 0 1 2 3 |  turn =          r 1  | 1 0 3 2 5 4 7 6 |  turn = r % 8
//     r 4  | 1 0 |  (r / 4) % 2   r 2  | 1 0 3 2 |  (r / 2) % 4     r 2  | 2 3 0 1 6 7 4 5 |
#pragma once
#include "mma.cuh"

#define THREADS (WARPS * 32)
#define ROW_BYTES (HEAD_DIM * 2)
// Hopper kernels: a block's warps may be several teams, each with a piece of work of its own.
#ifndef TEAMS
#define TEAMS 1
#endif
#define TEAM_THREADS (THREADS / TEAMS)
#define CHUNKS (HEAD_DIM / 8)
#define K_STEPS (HEAD_DIM / 16)

__device__ __forceinline__ u32 team_thread() { return TEAMS == 1 ? threadIdx.x : threadIdx.x % TEAM_THREADS; }

__device__ __forceinline__ int turn(int row) {
#if HEAD_DIM == 16
    return (row >> 2) & 1;
#elif HEAD_DIM == 32 || HEAD_DIM == 96
    return (row >> 1) & 3;
#else
    return row & 7;
#endif
}

// Copies a matrix to shared memory tile by tile. Rows from `num_rows` on and columns from `head_dim` on are zeros in the
// tile and are not read: what lies there may be anything, NaN included. A thread owns one chunk in every THREADS; its
// address moves on by constants, so that a tile costs few instructions (they are a tenth of the main loop at width 16).
struct TileCopy {
    const u16* from;
    i64 row_stride;
    int rows_left;  // from this thread's first row on; none where its column is past head_dim
    u32 place;

#if HEAD_DIM == 96
    // Twelve chunks do not divide the threads: 96 of 128 (192 of 256) copy, eight (sixteen) rows a pass.
    static constexpr int COPIERS = THREADS / 4 * 3;
#else
    static constexpr int COPIERS = THREADS;
#endif

    __device__ __forceinline__ TileCopy(const u16* base, i64 row_stride, int first, int num_rows, int head_dim)
        : row_stride(row_stride) {
        const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        from = base + (i64)(first + row) * row_stride + chunk * 8;
        rows_left = chunk * 8 < head_dim ? num_rows - first - row : 0;
        place = row * ROW_BYTES + ((chunk ^ turn(row)) << 4);
    }

    // The next ROWS rows.
    template <int ROWS>
    __device__ __forceinline__ void next(u32 tile) {
        copy<ROWS>(tile, from, rows_left);
        from += ROWS * row_stride;
        rows_left -= ROWS;
    }

    // The ROWS rows that begin `ahead` rows further on; the copy itself stays where it is.
    template <int ROWS>
    __device__ __forceinline__ void jump(u32 tile, int ahead) const {
        copy<ROWS>(tile, from + ahead * row_stride, rows_left - ahead);
    }

   private:
    template <int ROWS>
    __device__ __forceinline__ void copy(u32 tile, const u16* first, int left) const {
        constexpr int ROWS_A_PASS = COPIERS / CHUNKS;
        static_assert(COPIERS % CHUNKS == 0 && ROWS_A_PASS % 8 == 0, "a pass keeps the turn of a row");
        static_assert(ROWS % ROWS_A_PASS == 0 || ROWS < ROWS_A_PASS, "threads share the chunks evenly");
        if (threadIdx.x < min(COPIERS, ROWS * CHUNKS)) {
#pragma unroll
            for (int row = 0; row < ROWS; row += ROWS_A_PASS)
                copy16(tile + place + row * ROW_BYTES, first + row * row_stride, row < left);
        }
    }
};

// Where this lane points ldmatrix: `plain` for B = tile^T (rows are the n of the product), `transposed` for B = tile
// (rows are the k). Both cover 16 rows x 16 columns: step over columns by XOR of 2 chunks, over rows by ROW_BYTES.
struct LanePlace {
    int row_bytes, chunk;
    __device__ __forceinline__ u32 at(u32 tile, int row, int k_step) const {
        return tile + row * ROW_BYTES + row_bytes + ((chunk ^ (2 * k_step)) << 4);
    }
};

__device__ __forceinline__ LanePlace plain_place() {
    const int lane = threadIdx.x & 31, row = (lane & 7) + ((lane >> 4) << 3);
    return {row * ROW_BYTES, ((lane >> 3) & 1) ^ turn(row)};
}

__device__ __forceinline__ LanePlace transposed_place() {
    const int lane = threadIdx.x & 31, row = lane & 15;
    return {row * ROW_BYTES, (lane >> 4) ^ turn(row)};
}

// The A fragment of rows [row, row + 16), columns [column, column + 16), straight from global memory; zeros outside.
__device__ __forceinline__ void load_fragment(u32 (&a)[4], const u16* base, i64 row_stride, int row, int num_rows, int column,
                                              int head_dim) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int r = row + (lane >> 2) + (i & 1) * 8, c = column + (i >> 1) * 8;
        a[i] = 0;
        if (r < num_rows && c < head_dim) a[i] = *(const u32*)(base + (i64)r * row_stride + c + 2 * (lane & 3));
    }
}

// Writes a 16 x HEAD_DIM block of accumulators times `factor` (one a row half); rows and columns outside stay as they are.
__device__ __forceinline__ void store_rows(u16* base, i64 row_stride, int row, int num_rows, int head_dim,
                                           const float (&c)[HEAD_DIM / 8][4], float factor0, float factor1) {
    const int lane = threadIdx.x & 31, r = row + (lane >> 2);
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
        if (n * 8 >= head_dim) break;
        u16* to = base + (i64)r * row_stride + n * 8 + 2 * (lane & 3);
        if (r < num_rows) *(u32*)to = pack(c[n][0] * factor0, c[n][1] * factor0);
        if (r + 8 < num_rows) *(u32*)(to + 8 * row_stride) = pack(c[n][2] * factor1, c[n][3] * factor1);
    }
}

// Zeros rows of one head that belong to no sequence; the tail's teams share them by `tile` out of `tiles`.
__device__ __forceinline__ void zero_rows(u16* base, i64 row_stride, int num_rows, int head_dim, int tile, int tiles) {
    const int words = head_dim / 2;
    for (int row = tile * TEAM_THREADS / 32 + team_thread() / 32; row < num_rows; row += tiles * TEAM_THREADS / 32)
        for (int i = threadIdx.x & 31; i < words; i += 32) ((u32*)(base + (i64)row * row_stride))[i] = 0;
}
