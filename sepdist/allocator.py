"""What the C library does with memory that is freed. In: nothing; out: a process that faults less."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """From now on keep freed memory in this process for its next blocks. Without glibc's mallopt nothing happens.

    For whole mixtures a model on a CPU frees large blocks all the time and asks for as large ones at once. glibc gives
    every block above 32 MB back to the system, and each of its pages costs a fault when it is touched again: a fifth of
    the time of a DPRNN (docs/results.md). The process then stays as large as it was at most. Training does not do so:
    the copies of an optimizer step, hundreds of megabytes each, leave gaps, and a worker may grow to twice its size.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # no block of its own for a large request
        mallopt(M_TRIM_THRESHOLD, -1)  # never shrinks
