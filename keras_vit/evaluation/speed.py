"""How fast a model classifies."""

import time

import keras
import numpy as np


def images_per_second(model, batch, steps=30, warm_up=10):
    """The rate of each of so many calls of `predict_on_batch` with images of ones, (steps,) float64.

    The images lie on the device before; each call ends when its scores are with the host.

    Args:
        model: of images of one size.
        batch: images in a call.
        steps: calls that are measured, at least 1.
        warm_up: calls before that are not; the very first, which compiles, comes on top.
    """
    images = keras.ops.ones((batch, *model.input_shape[1:]))

    def seconds():
        began = time.perf_counter()
        model.predict_on_batch(images)
        return time.perf_counter() - began

    for _ in range(1 + warm_up):
        seconds()
    return np.array([batch / seconds() for _ in range(steps)])
