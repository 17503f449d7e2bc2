// Warpgroup products of compute capability 9.0a and the shared-memory tiles that feed them.
//
// A tile of R rows x HEAD_DIM columns lies as HEAD_DIM / PANEL panels side by side, each R rows of PANEL columns; in a
// panel the 16-byte chunk c of row r stands at place c ^ turn(r), which is the swizzle that wgmma knows:
//
//     HEAD_DIM 16: rows of 32 bytes       32, 96: rows of 64 bytes       64, 128: rows of 128 bytes
//     turn = (r / 4) % 2, layout 3        turn = (r / 2) % 4, layout 2   turn = r % 8, layout 1
//
// One tile serves both ways a product reads it: rows as its m or n with columns as its k (`rows_outside`: K in K Q^T), or
// rows as its k with columns as its m or n (`rows_inside`: V in P V). Eight rows of a panel repeat the swizzle.
//
// Accumulators of 64 x N: warp w of the four holds rows 16 w to 16 w + 15, as [N / 8][4] in mma.cuh's order of C; the
// A fragment in registers is mma.cuh's too. So weights go from one product to the next without leaving registers.
#pragma once
#include "mma.cuh"

#if HEAD_DIM == 16
#define PANEL 16
#define SWIZZLE 3
#elif HEAD_DIM == 32 || HEAD_DIM == 96
#define PANEL 32
#define SWIZZLE 2
#else
#define PANEL 64
#define SWIZZLE 1
#endif
#define SWIZZLE_128 1
#define PANEL_ROW (PANEL * 2)
#define PANEL_STEPS (PANEL / 16)

// A tile's place as descriptors count it, in 16-byte units, the same for all lanes: descriptors lie in uniform registers.
__device__ __forceinline__ u32 place_of(u32 address) { return __shfl_sync(ALL_LANES, address >> 4, 0); }

// `across`: bytes from one panel to the next along m or n; `down`: bytes from eight rows to the next eight. Why sums: with
// constants for all but the place, a descriptor is one addition.
__device__ __forceinline__ u64 descriptor(u32 place, u32 across, u32 down, u32 swizzle) {
    return (u64)(down >> 4 | swizzle << 30) << 32 | (place + (across >> 4 << 16));
}

// Rows from `row` (a multiple of 8) on are m or n; columns 16 k_step to 16 k_step + 15 are k.
template <int ROWS_OF_TILE>
__device__ __forceinline__ u64 rows_outside(u32 place, int row, int k_step) {
    const u32 panel = k_step / PANEL_STEPS * (ROWS_OF_TILE * PANEL_ROW) + k_step % PANEL_STEPS * 32;
    return descriptor(place + (panel + row * PANEL_ROW) / 16, 16, 8 * PANEL_ROW, SWIZZLE);
}

// Rows from `row` (a multiple of 8) on are k; all columns are m or n.
template <int ROWS_OF_TILE>
__device__ __forceinline__ u64 rows_inside(u32 place, int row) {
    return descriptor(place + row * PANEL_ROW / 16, ROWS_OF_TILE * PANEL_ROW, 8 * PANEL_ROW, SWIZZLE);
}

// Before the first product after registers it uses were written by other instructions.
__device__ __forceinline__ void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most LEFT groups, the newest, are still at work.
template <int LEFT>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#if DTYPE_BF16
#define PRODUCT_TYPES ".f32.bf16.bf16"
#else
#define PRODUCT_TYPES ".f32.f16.f16"
#endif

// d (64 x N) = or += A B: `registers` takes A from registers, `shared` from a descriptor. TURNED: the rows of that tile are k.
// A's registers are read while the product runs. Write them only behind a wait: the compiler takes them for free once the
// product is queued, and may compute their next values right there (seen on an H200: NaN in the output).
template <int N>
struct Product;

#define D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define D8(n) D4(n), D4(n + 1)
#define D16(n) D8(n), D8(n + 2)
#define D32(n) D16(n), D16(n + 4)
#define L8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define L16 L8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define L32 L16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define L48 L32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define L64 L48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// I0 to I6: the numbers of the operands after the accumulators.
#define DEFINE_PRODUCT(N, LIST, ACCUMULATORS, I0, I1, I2, I3, I4, I5, I6)                                                   \
    template <>                                                                                                            \
    struct Product<N> {                                                                                                    \
        template <bool TURNED_B>                                                                                           \
        static __device__ __forceinline__ void registers(float (&d)[N / 8][4], const u32 (&a)[4], u64 b, bool add) {       \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " I5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N                   \
                         "k16" PRODUCT_TYPES " {" LIST "}, {" I0 "," I1 "," I2 "," I3 "}, " I4 ", p, 1, 1, " I6 ";}"       \
                         : ACCUMULATORS                                                                                    \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)TURNED_B));         \
        }                                                                                                                  \
        template <bool TURNED_A, bool TURNED_B>                                                                            \
        static __device__ __forceinline__ void shared(float (&d)[N / 8][4], u64 a, u64 b, bool add) {                      \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " I2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N                   \
                         "k16" PRODUCT_TYPES " {" LIST "}, " I0 ", " I1 ", p, 1, 1, " I3 ", " I4 ";}"                      \
                         : ACCUMULATORS                                                                                    \
                         : "l"(a), "l"(b), "r"((int)add), "n"((int)TURNED_A), "n"((int)TURNED_B));                         \
        }                                                                                                                  \
    };

DEFINE_PRODUCT(16, L8, D8(0), "%8", "%9", "%10", "%11", "%12", "%13", "%14")
DEFINE_PRODUCT(32, L16, D16(0), "%16", "%17", "%18", "%19", "%20", "%21", "%22")
DEFINE_PRODUCT(64, L32, D32(0), "%32", "%33", "%34", "%35", "%36", "%37", "%38")
#define D48 D32(0), D16(8)
#define D64 D32(0), D32(8)
DEFINE_PRODUCT(96, L48, D48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
DEFINE_PRODUCT(128, L64, D64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
