"""The order of rows in an epoch: a permutation that is computed, not stored.

An array of a shuffled million rows takes 8 MB and has to be saved with every checkpoint. Here the row that is drawn at
an index is a function of the index, the number of rows and the seed, so a resumed run needs the index alone, and the
first draw costs as much as any other.

    index ── divmod rows ──▶ epoch, place ── Feistel network keyed by (seed, epoch) ──▶ row

The network is the generalized Feistel cipher of Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA
2002), section 4: a place is written as two digits (left, right) of the bases a and b with a · b ≥ rows, and each round
adds a keyed hash of one digit to the other, which can be undone, so the network is a permutation of a · b places.
Section 3 of the paper, cycle walking, restricts it to the rows: a result that is no row goes through the network again.
"""

from __future__ import annotations

import math
import struct
from hashlib import blake2b

ROUNDS = 16
"""Rounds of the network. The paper's bound needs three, for digits of many values. The digits of a data set of six rows
have two or three values, and only from 16 rounds on do all its 720 orders come up equally often (12,000 seeds). They
cost 25 µs."""


def shuffled(index: int, count: int, seed: int) -> int:
    """The row, 0 to `count` - 1, that is drawn at `index` (0 and up, without an end) of a shuffled stream.

    Each epoch, that is `count` indices from a multiple of `count` on, has every row exactly once. Epochs and seeds
    have different orders.

    >>> [shuffled(index, 5, seed=0) for index in range(5)]
    [3, 1, 0, 2, 4]
    >>> [shuffled(index, 5, seed=0) for index in range(5, 10)]
    [3, 1, 0, 4, 2]
    >>> shuffled(2**40, 10**6, seed=7)
    498515
    """
    epoch, place = divmod(index, count)
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    key = b"%d %d" % (seed, epoch)
    while True:
        place = _network(place, a, b, key)
        if place < count:
            return place


def _network(place: int, a: int, b: int, key: bytes) -> int:
    """A permutation of the places 0 to a · b - 1."""
    left, right = place % a, place // a
    for turn in range(0, ROUNDS, 2):
        left = (left + _hash(key, turn, right)) % a
        right = (right + _hash(key, turn + 1, left)) % b
    return right * a + left


def _hash(key: bytes, turn: int, digit: int) -> int:
    """64 bits that depend on all three."""
    data = key + struct.pack("<BQ", turn, digit)
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
