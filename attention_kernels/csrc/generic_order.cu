// The order of a packed forward's pieces of work (order.cuh), by one block. The backward's is made beside its preprocess.
//
// Build: -DDTYPE_BF16={0,1} -DWARPS=32 -DHEAD_DIM=128 (of which nothing depends on the first and the last).
#include "common/order.cuh"
#include "common/overlap.cuh"
#include "common/tiles.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) attention_order(const __grid_constant__ Params p) {
    let_successor_start();
    make_order<false, THREADS>(p);
}
