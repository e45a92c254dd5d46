"""The counter-based random generator: every random number is a pure function of (seed, stream, step, position).

So a draw depends neither on the number of ranks, threads or micro-batches, nor on what was drawn before it.
"""

from __future__ import annotations

import hashlib

import numpy as np

_WORD = 2**64


def generator(seed: int, stream: str | int, step: int, position: int = 0) -> np.random.Generator:
    """Return the generator of (seed, stream, step, position), independent of every other.

    Philox 4x64 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): seed and stream are the
    key; step and position are the upper half of the counter, and 2^128 draws fit below them.
    """
    words = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
    key = np.frombuffer(words, "<u8")
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position % _WORD, step % _WORD]))
