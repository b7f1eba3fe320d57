"""A restored process draws the numbers that the saved one would have drawn."""

import json
import random

import numpy as np
import torch

from megalm.checkpoint.random_state import restore_random_state, take_random_state


def draw():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]


def test_the_numbers_go_on_after_a_trip_through_json():
    draw()
    saved = json.dumps(take_random_state())
    expected = draw(), draw()
    restore_random_state(json.loads(saved))
    assert (draw(), draw()) == expected
