// The dropout mask in the Hopper forward: drawn for a tile, laid over its weights.
#pragma once
#include "philox.cuh"
#include "softmax.cuh"

typedef u32 Mask[BLOCKS / 4][4];  // of a tile, as keep_bits leaves it

__device__ __forceinline__ void draw(Mask& keep, const Params& p, const Philox& philox, int row, int column) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n += 4) keep_bits(keep[n / 4], p, philox, row >> 4, (column >> 5) + n / 4);
}

__device__ __forceinline__ void drop(Weights& weights, const Mask& keep) {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
        weights[0][n][0] &= pair_mask<0>(keep[n / 4][n % 4]);
        weights[0][n][1] &= pair_mask<1>(keep[n / 4][n % 4]);
    }
}
