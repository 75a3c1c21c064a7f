#!/usr/bin/env python3
"""Writes mask_vectors.txt: masks computed from the text of the mask law, independently of the crate.

    python3 tests/mask_vectors.py > tests/mask_vectors.txt

A line is `seed counter key drop_p threshold row col draws keep`: seed, counter, key and the draws
in hexadecimal, the draws separated by commas, and one 0 or 1 a column, beginning at (row, col).
"""

import math
import struct

M32 = 0xFFFFFFFF
M64 = 0xFFFFFFFFFFFFFFFF


def mix64(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def key_of(seed, counter):
    return mix64((mix64(seed) + (counter + 1) * 0x9E3779B97F4A7C15) & M64)


def philox4x32(counter, key, rounds):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & M32, (p0 >> 32) ^ c3 ^ k1, p0 & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c0, c1, c2, c3


def draw(key, row, col):
    words = philox4x32((col // 8, row >> 32, row & M32, 0), (key & M32, key >> 32), 7)
    lane = col % 8
    return (words[lane // 2] >> (16 * (lane % 2))) & 0xFFFF


def threshold_of(drop_p):
    widened = struct.unpack("f", struct.pack("f", drop_p))[0]
    return min(max(math.floor((1 - widened) * 65536 + 0.5), 1), 65535)


CASES = [
    # seed, counter, drop_p, row, col, columns
    (0, 0, 0.1, 0, 0, 16),
    (42, 0, 0.1, 0, 0, 32),
    (42, 1, 0.1, 0, 0, 32),
    (42, 7, 0.5, 3, 5, 21),
    (1, 123456789, 0.25, 65536, 1000, 24),
    (M64, M64 - 1, 0.9, 2**32 + 5, 8191, 17),
    (2024, 3, 0.05, 17, 4096, 16),
    (7, 0, 0.001, 2**40 + 1, 2**32 + 3, 13),
    (7, 0, 0.999, 2, 0, 40),
    # The largest column, the largest row of a 62-bit grid, the last key of a generator.
    (5, M64, 0.5, 0, 2**35 - 11, 11),
    (5, 0, 0.5, 2**61 - 1, 3, 9),
    (0x8000000000000000, 1, 0.3, 2**32 - 1, 7, 2),
    # The row's carry into its high word, one line on each side.
    (9, 9, 0.5, 2**32 - 1, 0, 16),
    (9, 9, 0.5, 2**32, 0, 16),
    # Rates at the ends of the grid, and one that lies between two of its points.
    (11, 0, 1e-9, 1, 1, 64),
    (11, 0, 0.99999994, 1, 1, 64),
    (11, 0, 1.5 / 65536, 1, 1, 64),
    # Runs that start in every lane of a call and cross several registers of calls.
    *[(13, lane, 0.5, lane, 64 + lane, 131) for lane in range(8)],
    # Longer than the runs in which a CPU draws.
    (17, 2, 0.2, 12345, 1, 1100),
]

for seed, counter, drop_p, row, col, columns in CASES:
    key, threshold = key_of(seed, counter), threshold_of(drop_p)
    draws = [draw(key, row, col + i) for i in range(columns)]
    print(
        f"{seed:016x} {counter:016x} {key:016x} {drop_p} {threshold} {row} {col}",
        ",".join(f"{d:04x}" for d in draws),
        "".join("1" if d < threshold else "0" for d in draws),
    )
