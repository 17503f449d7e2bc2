"""A CUDA graph's capture that CUDA calls invalid: what torch leaves of it, undone. For whoever records graphs."""

from contextlib import suppress

import torch


def forget_capture(pool: tuple[int, int], device: torch.device) -> int:
    """Undo what `capture_end` leaves where it raises: allocator and generator still believe in the capture.

    `pool` is what the capture allocated from. Returns the device's index.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    # AttributeError: the name is torch's own and has changed before.
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(index, pool)
    generator = torch.cuda.default_generators[index]
    # A copy has seed and offset, and no capture under way.
    generator.graphsafe_set_state(generator.clone_state())
    return index
