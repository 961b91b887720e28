import pathlib

import numpy as np
import pytest

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def randomise(model, seed=0):
    """Gives every weight of a model non-degenerate values, zero-initialised heads included."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        name = weight.path.rpartition("/")[2]
        center = 1.0 if name == "gamma" else 0.0
        weight.assign(center + 0.1 * rng.standard_normal(weight.shape))
    return model


@pytest.fixture(autouse=True)
def _same_random_numbers():
    import keras

    keras.utils.set_random_seed(0)
