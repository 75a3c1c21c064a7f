#!/usr/bin/env python3
"""Writes normal_vectors.txt: wide draws and normal numbers from the text of the mask law, independently of the crate.

    python3 tests/normal_vectors.py > tests/normal_vectors.txt

A line is `seed counter key row col draws normals`: seed, counter, key and the draws in hexadecimal; the 32-bit draws
and the normal numbers, computed in f64, separated by commas, one a column, beginning at (row, col).
"""

import math

M32 = 0xFFFFFFFF
M64 = 0xFFFFFFFFFFFFFFFF


def mix64(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def key_of(seed, counter):
    return mix64((mix64(seed) + (counter + 1) * 0x9E3779B97F4A7C15) & M64)


def philox4x32_7(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key & M32, key >> 32
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & M32, (p0 >> 32) ^ c3 ^ k1, p0 & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c0, c1, c2, c3


def draw(key, row, col):
    return philox4x32_7((col // 4, row >> 32, row & M32, 1), key)[col % 4]


def sin_turns(word):
    """The sine of word 2^-32 turns, from the nearest quarter of a turn."""
    quarter = (word + 2**29) // 2**30
    angle = 2 * math.pi * (word - quarter * 2**30) / 2**32
    return [math.sin, math.cos, lambda t: -math.sin(t), lambda t: -math.cos(t)][quarter % 4](angle)


def normal(key, row, col):
    even, odd = draw(key, row, col // 2 * 2), draw(key, row, col // 2 * 2 + 1)
    radius = math.sqrt(-2 * math.log((even + 0.5) / 2**32))
    return radius * sin_turns(odd if col % 2 else odd + 2**30)


CASES = [
    # seed, counter, row, col, columns
    (0, 0, 0, 0, 16),
    (42, 0, 0, 0, 32),
    (42, 7, 3, 5, 21),
    (1, 123456789, 65536, 1000, 24),
    # The last key of a generator, rows beyond 2^32 and their carry, the largest column.
    (M64, M64 - 1, 2**32 + 5, 8191, 17),
    (9, 9, 2**32 - 1, 0, 16),
    (9, 9, 2**32, 0, 16),
    (7, 0, 2**40 + 1, 2**32 + 3, 13),
    (5, 0, 2**61 - 1, 3, 9),
    (5, M64, 0, 2**34 - 11, 11),
    # Runs that begin in every lane of a call, and one element.
    *[(13, lane, lane, 64 + lane, 67) for lane in range(4)],
    (13, 4, 2, 3, 1),
    # Longer than the runs in which a CPU draws.
    (17, 2, 12345, 1, 1100),
]

for seed, counter, row, col, columns in CASES:
    key = key_of(seed, counter)
    print(
        f"{seed:016x} {counter:016x} {key:016x} {row} {col}",
        ",".join(f"{draw(key, row, col + i):08x}" for i in range(columns)),
        ",".join(repr(normal(key, row, col + i)) for i in range(columns)),
    )
