"""Memory for weights and KV caches, in huge pages."""
import contextlib
import ctypes
import functools
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3      # of malloc.h


class HugePages:
    """Memory in pages of 2 MB instead of 4 KB where the system allows, in chunks that are freed with their last piece.

    A core that streams weights through 4 KB pages waits for address translation: half the bandwidth, if virtualized.
    """
    CHUNK = 64 << 20

    def __init__(self) -> None:
        self.chunk, self.used = None, 0

    def take(self, size: int) -> Tensor:
        """uint8 [size] of zeros with a storage of its own. It occupies no memory before it is written to."""
        if self.chunk is None or self.used + size > len(self.chunk):
            rest = len(self.chunk) - self.used if self.chunk is not None else 0
            capacity = max(self.CHUNK, size + HUGE_PAGE)
            chunk = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            start = -torch.frombuffer(chunk, dtype=torch.uint8).data_ptr() % HUGE_PAGE
            with contextlib.suppress(OSError):    # a Linux without huge pages: slower, no more
                chunk.madvise(mmap.MADV_HUGEPAGE, start, (capacity - start) // HUGE_PAGE * HUGE_PAGE)
            if capacity - start - size < rest:    # the old chunk has more left to give
                return torch.frombuffer(chunk, dtype=torch.uint8, offset=start, count=size)
            self.chunk, self.used = chunk, start
        piece = torch.frombuffer(self.chunk, dtype=torch.uint8, offset=self.used, count=size)
        self.used += -(-size // 64) * 64          # whole cache lines
        return piece


arena = functools.cache(HugePages)    # the one of this process
libc = functools.cache(lambda: ctypes.CDLL(None))


def huge_zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """torch.zeros, on the CPU in huge pages."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if torch.device(device).type != "cpu" or not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    return arena().take(size).view(dtype).view(shape)


def copy_to(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A copy of a weight where it will be used: matrices on the CPU in huge pages, away from the file they come from.

    Vectors stay out of those: they outlive matrices that are packed later, and would keep chunks from being freed.
    """
    if torch.device(device).type != "cpu" or tensor.dim() < 2:
        return tensor.to(device, dtype, copy=True)
    return huge_zeros(tensor.shape, dtype).copy_(tensor)


def release_mapped(tensor: Tensor) -> None:
    """Lets go of the pages of a tensor that is mapped from a file: they count as memory of this process no longer, and
    come back from the file when they are used again."""
    begin, end = (address // mmap.PAGESIZE * mmap.PAGESIZE for address in (
        tensor.data_ptr() + mmap.PAGESIZE - 1, tensor.data_ptr() + tensor.nbytes))         # of whole pages
    if end > begin and tensor.is_cpu and hasattr(mmap, "MADV_DONTNEED"):
        libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def keep_freed_memory() -> None:
    """Lets this process use freed memory again, instead of returning it to the system and asking for it anew with every
    layer of a prompt: a page comes back cleared, and on a virtual machine at times from the host. glibc alone."""
    with contextlib.suppress(OSError, AttributeError):
        libc().mallopt(M_MMAP_THRESHOLD, 32 << 20)        # the most that it takes
        libc().mallopt(M_TRIM_THRESHOLD, 1 << 30)


def trim_memory() -> None:
    """Returns freed memory to the system; glibc would keep what packing the weights has used."""
    with contextlib.suppress(OSError, AttributeError):
        libc().malloc_trim(0)
