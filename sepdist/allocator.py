"""Settings of glibc's allocator that save page faults."""

import ctypes

MIB = 2**20
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def keep_freed_memory(limit_bytes: int = 512 * MIB) -> None:
    """Let this process keep up to `limit_bytes` of freed memory at the end of its heap.

    By default glibc returns every freed block above 32 MiB to the system, and each of its pages
    costs a fault when the next block of that size is used: a third of the CPU time of a training
    step of the small DPRNN and Sandglasset (docs/results-2026-11.md). Here they come from the heap,
    and what is free at its end beyond the limit goes back. Blocks above the limit still go back at
    once.

    Gaps between blocks in use are kept in addition. The copies that an optimizer step makes of a
    large model cause many: training SSQP-Net (94 M parameters) then takes 4.3 GB instead of 3.4 GB
    and saves 4 % of the CPU time. So this is for inference and for training smaller models.

    Does nothing where the C library has no mallopt. Older versions of glibc refuse blocks above
    32 MiB in the heap; then only smaller ones are kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if not mallopt(M_MMAP_THRESHOLD, limit_bytes):
        mallopt(M_MMAP_THRESHOLD, 32 * MIB)
    mallopt(M_TRIM_THRESHOLD, limit_bytes)
    mallopt(M_TOP_PAD, limit_bytes)
