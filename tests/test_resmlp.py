"""What ResMLP has that no other family has: one matrix over the tokens, for one grid of them."""

import keras
import numpy as np
import pytest
from conftest import GOLDENS, randomise

import keras_vit
from keras_vit import errors
from keras_vit.models.resmlp import ResMLPBlock

FILE = GOLDENS / "deit/resmlp_p8_32/state_dict.npz"
SMALL = dict(patch_size=8, width=48, depth=3, mlp=192, layer_scale=0.1)


def test_a_file_builds_the_model_of_its_own_size_and_no_other():
    assert keras_vit.ResMLP(weights=FILE, **SMALL).input_shape == (None, 32, 32, 3)
    with pytest.raises(errors.ArgumentError, match=r"16 \(4 x 4, input_shape=\(32, 32, 3\)\), but the model has 6 x 5"):
        keras_vit.ResMLP(weights=FILE, input_shape=(48, 40, 3), **SMALL)
    model = keras_vit.ResMLP(input_shape=(48, 40, 3), classes=10, **SMALL)
    with pytest.raises(errors.CheckpointMismatchError, match=r"input_shape=\(32, 32, 3\)"):
        keras_vit.load_weights(model, FILE)
    with pytest.raises(errors.ArgumentError, match="nearest size is input_shape=.32, 32, 3"):
        keras_vit.ResMLP(input_shape=(30, 32, 3), **SMALL)


def test_a_grid_that_is_not_square_survives_a_file(tmp_path):
    model = randomise(keras_vit.ResMLP(input_shape=(64, 16, 3), classes=10, **SMALL))
    keras_vit.save_npz(model, tmp_path / "a.npz")
    assert keras_vit.ResMLP(weights=tmp_path / "a.npz", **SMALL).input_shape == (None, 64, 16, 3)
    with pytest.raises(errors.ArgumentError, match="8 x 2"):
        keras_vit.ResMLP(weights=tmp_path / "a.npz", input_shape=(32, 32, 3), **SMALL)


def test_a_block_starts_near_the_identity_and_drops_its_branches_alike():
    x = np.random.default_rng(0).standard_normal((4, 9, 8)).astype("float32")
    block = ResMLPBlock(16, 1e-6)
    np.testing.assert_allclose(block(x), x, atol=1e-4)
    model = keras_vit.ResMLP(False, stochastic_depth_rate=0.2, input_shape=(16, 16, 3), **SMALL)
    assert [model.get_layer(f"block_{i}").drop_path.rate for i in range(3)] == [0.2] * 3
    assert keras.ops.shape(block(x, tap="token_mixing")) == (4, 8, 9)
