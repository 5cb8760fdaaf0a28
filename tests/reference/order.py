"""Orders of stream hko1, one place at a time in Python integers, straight from the definition in DESIGN.md."""

from __future__ import annotations

from .philox import MASK, philox4x32

TAG = 0x686B6F31
SHUFFLED = 1024
ROUNDS = 8
M64 = (1 << 64) - 1


def block(seed: int, epoch: int, which: int, index: int) -> tuple[int, int, int, int]:
    """Four random words of order ``which`` of an epoch: 0 is that of the samples, w + 1 that of window w's batches."""
    key = philox4x32((epoch, which & MASK, which >> 32, TAG), (seed & MASK, seed >> 32))[:2]
    return philox4x32((index, 0, 0, TAG), key)


def shuffled(seed: int, epoch: int, which: int, size: int) -> list[int]:
    """Fisher and Yates: from the last place down, swap with one of the places up to it."""
    order = list(range(size))
    for drawn, last in enumerate(range(size - 1, 0, -1)):
        word = block(seed, epoch, which, drawn // 4)[drawn % 4]
        choice = word * (last + 1) >> 32
        order[last], order[choice] = order[choice], order[last]
    return order


def network(seed: int, epoch: int, which: int, bits: int, x: int) -> int:
    """Eight rounds that change the high ceil(bits / 2) bits by a hash of the others, and the others by one of those."""
    low_bits = bits // 2
    high, low = x >> low_bits, x & ((1 << low_bits) - 1)
    for r in range(ROUNDS):
        a, b, c, d = block(seed, epoch, which, r)
        source, width = (low, bits - low_bits) if r % 2 == 0 else (high, low_bits)
        mixed = (source + (a | b << 32)) * (c | d << 32 | 1) & M64
        hashed = ((mixed ^ mixed >> 32) * 0x9E3779B97F4A7C15 & M64) >> (64 - width)
        high, low = (high ^ hashed, low) if r % 2 == 0 else (high, low ^ hashed)
    return high << low_bits | low


def order(seed: int, epoch: int, size: int, position: int, which: int = 0) -> int:
    """The sample at a position: the network is applied again to what falls outside range(size)."""
    if size <= SHUFFLED:
        return shuffled(seed, epoch, which, size)[position]
    bits = (size - 1).bit_length()
    x = network(seed, epoch, which, bits, position)
    while x >= size:
        x = network(seed, epoch, which, bits, x)
    return x
