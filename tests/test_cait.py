"""What CaiT has that ViT has not: heads that talk, and a class token that only the last blocks know."""

import keras
import numpy as np
from conftest import GOLDENS, randomise

import keras_vit
from keras_vit import zoo

FILE = GOLDENS / "cait/p8_32/checkpoint.pth"
SMALL = dict(patch_size=8, width=48, depth=3, heads=4, mlp=192, layer_scale=1e-5)


def images(side=32):
    return np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)).astype("float32")


def test_scores_are_distributions_and_mixed_ones_are_not():
    model = keras_vit.CaiT(weights=FILE, **SMALL)
    taps = {tap: zoo.tap(model, f"block_1/{tap}") for tap in ("scores", "mixed_scores", "mixed_logits")}
    taps["class"] = zoo.tap(model, "class_block_1/scores")
    got = keras.Model(model.input, taps).predict_on_batch(images())
    for name, shape in (("scores", (2, 4, 16, 16)), ("class", (2, 4, 1, 17))):
        assert got[name].shape == shape
        np.testing.assert_allclose(got[name].sum(axis=-1), 1, atol=1e-5)
    assert np.abs(got["mixed_scores"].sum(axis=-1) - 1).max() > 0.01
    softmax = keras.ops.convert_to_numpy(keras.ops.softmax(got["mixed_logits"]))
    np.testing.assert_allclose(softmax, got["scores"], atol=1e-6)


def test_patch_tokens_know_nothing_of_the_class_token():
    model = randomise(keras_vit.CaiT_mu(weights=None, classes=5))
    trunk = keras.Model(model.input, [zoo.tap(model, "block_1"), zoo.tap(model, "class_block_1")])
    before = trunk.predict_on_batch(images())
    model.get_layer("cls").token.assign(model.get_layer("cls").token + 1.0)
    after = trunk.predict_on_batch(images())
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1e-3


def test_a_file_tells_heads_and_depths_and_which_row_it_is():
    with keras.StatelessScope(initialize_variables=False):
        shapes = {name: tuple(weight.shape) for name, weight in zoo._weights(keras_vit.CaiT_XXS24(weights=None)).items()}
    keras.utils.clear_session()
    found = zoo.FAMILIES["CaiT"].sizes(shapes)
    assert (found["heads"], found["depth"], found["class_depth"]) == (4, 24, 2)
    assert [row.name for row in zoo.VARIANTS.values() if row.family.name == "CaiT" and row.fits(found)] == ["CaiT_XXS24"]


def test_a_graph_resamples_positions_as_loading_does():
    loaded = keras_vit.CaiT(weights=FILE, input_shape=(56, 24, 3), **SMALL)
    assert "grid 4 x 4 resampled to 7 x 3" in loaded.weights_info["adapted"][0]
    own = keras_vit.CaiT(weights=FILE, **SMALL).get_layer("tokens")
    got = keras.ops.convert_to_numpy(own.positions_at((7, 3)))
    np.testing.assert_allclose(got, np.array(loaded.get_layer("tokens").positions), atol=1e-6)


def test_stochastic_depth_is_the_same_everywhere_and_no_rate_reaches_the_class_blocks():
    model = keras_vit.CaiT(False, stochastic_depth_rate=0.2, dropout_rate=0.1, input_shape=(16, 16, 3), **SMALL)
    assert [model.get_layer(f"block_{i}").drop_path.rate for i in range(3)] == [0.2] * 3
    assert model.get_layer("class_block_0").mlp.dropout.rate == 0
