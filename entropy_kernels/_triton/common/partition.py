"""How programs share values: consecutive blocks for each."""

import triton

# Programs that a launch has at most.
MAX_PROGRAMS = 1024


def programs(n: int, block: int) -> tuple[int, int]:
    """How many programs share n values, and the consecutive blocks of each.

    The blocks are a power of two: kernels are compiled for a number of them.
    """
    blocks = triton.cdiv(n, block)
    each = triton.next_power_of_2(max(triton.cdiv(blocks, MAX_PROGRAMS), 1))
    return triton.cdiv(blocks, each), each
