"""The counter-based generator."""

import numpy as np

from data_pipeline.rng import generator


def test_generator_depends_on_every_part_of_its_key_and_on_nothing_else():
    first = generator(1, "mask", 2, 3).random(8)
    generator(1, "mask", 2, 3).random(1000)
    assert np.array_equal(first, generator(1, "mask", 2, 3).random(8))
    others = [(2, "mask", 2, 3), (1, "crop", 2, 3), (1, "mask", 3, 3), (1, "mask", 2, 4), (1, "mask", 3, 2)]
    draws = {tuple(generator(*key).random(8)) for key in others}
    assert len(draws | {tuple(first)}) == 6
    assert len({tuple(generator(0, 5, 10**12 + k, 2**40).random(4)) for k in range(50)}) == 50
