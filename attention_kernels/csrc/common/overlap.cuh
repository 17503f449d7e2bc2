// Programmatic dependent launch: a kernel that is launched so (launcher.py) begins while the one before it in the stream still
// runs. In a launch that did not ask for it there is nothing to wait for, and nobody to let start.
#pragma once

// Until here nothing may be read that the kernel before wrote, and nothing written that it still uses.
__device__ __forceinline__ void await_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
