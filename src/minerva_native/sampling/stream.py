"""The random stream: a hashed counter. Its state is two integers, and it is the same on every platform."""

from __future__ import annotations

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """Apply SplitMix64's finaliser (Steele, Lea and Flood 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Stream:
    """Uniform numbers in [0, 1) with 53 bits: SplitMix64, from a seed.

    Attributes:
        seed: 0 to 2**64 - 1.
        drawn: how many numbers were drawn so far.
    """

    __slots__ = ("drawn", "seed")

    def __init__(self, seed: int, drawn: int = 0) -> None:
        self.seed = seed
        self.drawn = drawn

    def uniform(self) -> float:
        """Return the next number."""
        self.drawn += 1
        return (_mix((self.seed + self.drawn * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def fresh_seed() -> int:
    """Return 64 random bits from the operating system."""
    from os import urandom

    return int.from_bytes(urandom(8), "little")
