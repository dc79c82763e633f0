"""One random seed from several whole numbers."""

from __future__ import annotations


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits, any change of whose numbers or of their order changes half of its bits.

    SplitMix64's finalizer (Steele, Lea & Flood 2014), applied after each number.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
