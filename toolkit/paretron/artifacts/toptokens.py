"""The k likeliest tokens of a position in about 3 bytes each, whatever the vocabulary.

A set of tokens has no order, which is worth log2(k!) bits: ids are written ascending, as Elias
(1974) and Fano (1971) do. The low l bits of each stand beside its probability; of the rest, which
never falls, only the steps are written, in unary: bit (id >> l) + i of a bitmap is set for the i-th
id. With l = ceil(log2(V / k)) the bitmap has at most 2k bits.

A record, little-endian, of k entries, then the bitmap, then the tail:
    entry   3 bytes (4 where 3 would leave a probability under 10 bits): low << q | level
    bitmap  ceil((k + ceil(V / 2^l)) / 8) bytes, its first bit the lowest of its first byte
    tail    2 bytes: log(rest / mass of the k), from -RANGE to RANGE
A level is log(p / p of the likeliest), from 0 down to -RANGE in 2^q - 1 steps. The likeliest's own
probability is not written: the masses must sum to 1. So at k = 64 a token takes at most
192 + 16 + 2 = 210 bytes for every vocabulary of up to 2^20 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

# exp(-20) is 2e-9: what is less likely counts as much.
RANGE = 20.0
TAIL_BYTES = 2
_LEAST_LEVEL_BITS, _MOST_LEVEL_BITS = 10, 16


@dataclass(frozen=True)
class TopTokensLayout:
    """Records of `k` of `vocab_size` tokens; k is less than vocab_size."""

    vocab_size: int
    k: int

    @property
    def low_bits(self) -> int:
        """How many bits of an id stand in its entry."""
        return (-(-self.vocab_size // self.k) - 1).bit_length()

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry."""
        return 3 if 24 - self.low_bits >= _LEAST_LEVEL_BITS else 4

    @property
    def level_bits(self) -> int:
        """How many bits of an entry say its probability."""
        return min(_MOST_LEVEL_BITS, 8 * self.entry_bytes - self.low_bits)

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of the bitmap."""
        steps = ((self.vocab_size - 1) >> self.low_bits) + 1
        return -(-(self.k + steps) // 8)

    @property
    def record_bytes(self) -> int:
        """Bytes of one position."""
        return self.k * self.entry_bytes + self.bitmap_bytes + TAIL_BYTES
