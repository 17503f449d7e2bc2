"""Dropout masks from a counter: the same bits for every form of attention, on every device.

Called by every implementation of attention; knows nothing of attention beyond (sample, head, row, column).
Philox-4x32 is the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3" (SC 2011). It is written in int64 tensor arithmetic, where each word stays within [0, 2^32).

What a CUDA kernel must reproduce
---------------------------------
The grid of one (sample, head) is cut into tiles of 16 query rows x 32 key columns, rows and columns counted
within the sequence. A tile has 512 elements and takes 32 calls of 16 bytes, one a lane. Lane 4 g + t (g < 8,
t < 4) owns exactly the elements that it holds after four m16n8 matrix instructions side by side:

    word j (0..3) of the call, byte 2 i + e counted from the low end  ->  row    16 (tile row)    + 8 i + g
                                                                          column 32 (tile column) + 8 j + 2 t + e

so byte c of word j belongs to accumulator register c of the j-th m16n8 block and no lane asks another.

    counter word 0 = 32 (tile row) + lane           key word 0 = low half of dropout_seed[0]
    counter word 1 = tile column                    key word 1 = high half of dropout_seed[0]
    counter word 2 = sample xor low half of dropout_seed[1]
    counter word 3 = head xor high half of dropout_seed[1]

An element is dropped when its byte is below `drop_count(p)`; what is kept is multiplied by 256 / (256 - count),
the inverse of the probability that it really has. Seven rounds: the fewest with which Philox-4x32 passes
BigCrush in the paper (table 2 there), and FlashAttention-2's choice; ten would add 40 % to a cost that
bounds the forward kernel. A lane may hoist the first round, which depends on two counter words alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 7
TILE_ROWS = 16
TILE_COLUMNS = 32
_LANES = 32
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor | int], rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Return the four output words for four counter words and two key words.

    Counter: int64 tensors with values in [0, 2^32) that broadcast against one another; key: the same, or ints.
    Returns int64 tensors in [0, 2^32). A product of two words may pass 2^63: int64 wraps, and the low half and
    the (masked) high half of the wrapped product are still the true ones.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # c1 and c3 may carry bits above 32 between rounds: they only enter an xor that is masked at once.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = ((product0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def drop_count(dropout_p: float) -> int:
    """Return how many of a byte's 256 values are dropped: 256 p rounded, at least 1 and at most 255 where p > 0."""
    if dropout_p == 0.0:
        return 0
    return min(max(round(dropout_p * 256), 1), 255)


def keep_scale(count: int) -> float:
    """Return the factor of a kept element: one over the probability of being kept."""
    return 256.0 / (256 - count)


def draw_seed(device: torch.device) -> Tensor:
    """Return a fresh dropout seed (two int64) from torch's own generator for the device."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def keep_tiles(
    seed: Tensor, count: int, samples_S: Tensor, heads_H: Tensor, row_tiles_XR: Tensor, column_tiles_XC: Tensor
) -> Tensor:
    """Return which elements of whole tiles are kept: uint8 0 or 1, (S, H, X, 16 R, 32 C).

    Why uint8: torch turns it into floats ten times as fast as bool.
    `row_tiles_XR` and `column_tiles_XC` number the tiles (row // 16 and column // 32), X independent sets of them.
    All index tensors are int64 on the seed's device.
    """
    device = seed.device
    num_samples, num_heads = len(samples_S), len(heads_H)
    num_sets, num_rows = row_tiles_XR.shape
    num_columns = column_tiles_XC.shape[1]
    g = torch.arange(8, device=device).view(8, 1, 1)
    t = torch.arange(4, device=device)
    low, high = seed & _WORD, (seed >> 32) & _WORD
    # torch.compile would fold the first product into 32-bit index arithmetic, where the multiplier does not fit and the
    # GPU compiler fails (torch 2.11): a zero that comes from the seed makes the word a value instead of an index.
    nothing = low[0] ^ low[0]
    # Dimensions: (sample, head, set, tile row, g, tile column, t); each word starts with only the ones it needs.
    words = philox4x32(
        (
            (row_tiles_XR.view(num_sets, num_rows, 1, 1, 1) * _LANES + 4 * g + t) ^ nothing,
            column_tiles_XC.view(num_sets, 1, 1, num_columns, 1),
            samples_S.view(-1, 1, 1, 1, 1, 1, 1) ^ low[1],
            heads_H.view(-1, 1, 1, 1, 1, 1) ^ high[1],
        ),
        (low[0], high[0]),
    )
    shape = (num_samples, num_heads, num_sets, num_rows, 8, num_columns, 4)
    # The words go side by side in the order (g, tile column, j, t); then the halves of each word, i = 0 and 1, part.
    packed = _bytes_at_least(torch.cat([word.to(torch.int32).expand(shape) for word in words], dim=-1), count)
    halves = torch.stack([packed.to(torch.int16), (packed >> 16).to(torch.int16)], dim=4)
    return halves.view(torch.uint8).view(num_samples, num_heads, num_sets, num_rows * 16, num_columns * 32)


def _bytes_at_least(words: Tensor, count: int) -> Tensor:
    """Return 1 in each byte of the int32 words that is at least `count` (0 to 255), else 0: four bytes at a time."""
    # The lower 7 bits and 128 - (count mod 128) add up to 128 or more where those bits alone reach the count's; no
    # carry leaves a byte. The top bits then decide: any will do for a count below 128, else both are needed.
    step = (128 - count % 128) * 0x01010101
    reached = (words & 0x7F7F7F7F) + (step - (1 << 32) if step >= 1 << 31 else step)
    reached = reached | words if count < 128 else reached & words
    return (reached >> 7) & 0x01010101


def keep_mask(
    seed: Tensor, count: int, samples_S: Tensor, heads_H: Tensor, rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:
    """Return which elements of a rectangle are kept: uint8 0 or 1, (S, H, rows, columns).

    `rows` and `columns` are (first, past the last) within the sequence; they need not fall on tile borders.
    """
    row_tile, column_tile = rows[0] // TILE_ROWS, columns[0] // TILE_COLUMNS
    row_tiles = torch.arange(row_tile, -(-rows[1] // TILE_ROWS), device=seed.device)
    column_tiles = torch.arange(column_tile, -(-columns[1] // TILE_COLUMNS), device=seed.device)
    keep = keep_tiles(seed, count, samples_S, heads_H, row_tiles[None], column_tiles[None])[:, :, 0]
    top, left = row_tile * TILE_ROWS, column_tile * TILE_COLUMNS
    return keep[:, :, rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
