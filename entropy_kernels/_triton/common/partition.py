"""How programs share values: each takes consecutive blocks."""

import triton

# Programs that a launch has at most.
MAX_PROGRAMS = 1024


def programs(n: int, block: int) -> tuple[int, int]:
    """How many programs share n values, and how many consecutive blocks each takes.

    The blocks are a power of two, because kernels are compiled for their number.
    """
    blocks = triton.cdiv(n, block)
    each = triton.next_power_of_2(max(triton.cdiv(blocks, MAX_PROGRAMS), 1))
    return triton.cdiv(blocks, each), each
