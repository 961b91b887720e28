"""Every variant, by being registered. Under another backend: KERAS_BACKEND=jax pytest tests/test_registry.py."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import zoo
from keras_vit.checkpoints.load import named_weights

# models_test.py of google-research/vision_transformer: parameters at 224 x 224 with 1,000 classes
ORIGINAL_SIZES = {
    "ViT-B_8": 86_576_872, "ViT-B_16": 86_567_656, "ViT-B_16-gap-norep": 86_566_120, "ViT-B_32": 88_224_232,
    "ViT-B_32-gap-norep": 88_222_696, "ViT-H_14": 632_045_800, "ViT-L_16": 304_326_632, "ViT-L_32": 306_535_400,
    "ViT-S_16": 22_050_664, "ViT-S_16-gap-norep": 22_049_896, "ViT-S_32": 22_878_952, "ViT-S_32-gap-norep": 22_878_184,
    "ViT-Ti_16": 5_717_416,
}  # fmt: skip

VARIANTS = list(zoo.VARIANTS.values())
each_variant = pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)


def shrunk(row, **kwargs):
    """A model of the row's own options at toy size, on a rectangular image, with random weights everywhere."""
    small = {**row.arguments, "width": 16, "depth": 2, "heads": 2, "mlp": 24, "patch_size": (4, 8)}
    options = {"weights": None, "input_shape": (8, 24, 3), "classes": 5, "name": row.name, **small, **kwargs}
    return randomise(row.builder(**options))


def images(count=2):
    return np.random.default_rng(1).uniform(-1, 1, (count, 8, 24, 3)).astype("float32")


def at_full_size(row, **kwargs):
    """The model without its memory: shapes alone."""
    with keras.StatelessScope(initialize_variables=False):
        model = row.build(weights=None, **kwargs)
    keras.utils.clear_session()  # else the next step that traces a graph allocates all these variables
    return model


@each_variant
def test_parameter_count_is_exact(row):
    assert at_full_size(row).count_params() == row.params
    for name in set(row.upstream) & set(ORIGINAL_SIZES):
        assert row.params == ORIGINAL_SIZES[name]


def test_every_model_of_the_original_table_is_registered():
    assert {name for row in VARIANTS for name in row.upstream} >= set(ORIGINAL_SIZES)


@each_variant
def test_every_weight_has_one_name_in_every_layout_and_every_name_leads_back(row):
    weights = named_weights(at_full_size(row, representation_size=8))
    for layout, names in zoo.FAMILIES[row.builder.__name__].layouts.items():
        seen = set()
        for ours, weight in weights.items():
            written = names.to_original(ours)
            assert {transform.index for _, transform in written} == set(range(written[0][1].of)), (layout, ours)
            for original, transform in written:
                assert names.to_ours(original) == [(ours, transform)]
                assert original not in seen
                seen.add(original)
                assert np.prod(transform.file_shape(weight.shape)) * transform.of == np.prod(weight.shape)


@each_variant
def test_output_is_a_distribution_over_classes(row):
    model = shrunk(row)
    scores = model.predict_on_batch(images(3))
    assert scores.shape == (3, 5)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert scores.std(axis=0).min() > 0


@each_variant
def test_a_training_step_reaches_every_weight(row):
    model = shrunk(row, classifier_activation=None, dropout_rate=0.0)
    before = {name: np.array(weight) for name, weight in named_weights(model).items()}
    model.compile(keras.optimizers.SGD(1.0), keras.losses.CategoricalCrossentropy(from_logits=True), jit_compile=False)
    model.train_on_batch(images(), np.eye(5, dtype="float32")[[1, 3]])
    for name, weight in named_weights(model).items():
        moved = np.abs(np.array(weight) - before[name])
        if name.endswith("qkv_bias"):  # a key bias shifts all scores of a query alike: the softmax does not see it
            assert moved[1].max() < 1e-6
            moved = moved[[0, 2]]
        assert moved.max() > 1e-7, name


@each_variant
def test_features_and_attention_are_tapped_from_the_same_graph(row):
    model = shrunk(row)
    block = model.get_layer("block_1")
    graph = keras.Model(
        model.input,
        [
            model.get_layer("block_0").output,
            block(block.input, tap="scores"),
            zoo.tap(model, "block_1/mlp"),
            zoo.tap(model, "head"),
        ],
    )
    features, scores, mlp, logits = graph.predict_on_batch(images())
    tokens = 6 + model.get_layer("tokens").class_token
    assert features.shape == mlp.shape == (2, tokens, 16)
    assert scores.shape == (2, 2, tokens, tokens)
    np.testing.assert_allclose(scores.sum(axis=-1), 1, atol=1e-5)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(exp / exp.sum(axis=1, keepdims=True), model.predict_on_batch(images()), atol=1e-6)


@each_variant
def test_mixed_bfloat16_is_finite_and_close_with_softmax_and_logits_in_float32(row):
    model = shrunk(row, classifier_activation=None)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = shrunk(row, classifier_activation=None)
    finally:
        keras.config.set_dtype_policy(before)
    assert mixed.output.dtype == "float32"
    assert zoo.tap(mixed, "block_0/scores").dtype == "float32"
    assert zoo.tap(mixed, "block_0").dtype == "bfloat16"
    got, expected = mixed.predict_on_batch(images()), model.predict_on_batch(images())
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected, atol=0.03 * np.abs(expected).max())


@each_variant
def test_flash_attention_gives_the_numbers_of_the_matrix_products(row):
    flash, plain = (shrunk(row, flash_attention=flash).predict_on_batch(images()) for flash in (True, False))
    np.testing.assert_allclose(flash, plain, atol=1e-6)


def test_saved_models_reload_in_a_process_that_only_imports_keras_vit(tmp_path):
    for row in VARIANTS:
        model = shrunk(row, dropout_rate=0.1, stochastic_depth_rate=0.1)
        model.save(tmp_path / f"{row.name}.keras")
        np.save(tmp_path / f"{row.name}.npy", model.predict_on_batch(images()))
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        shrunk(VARIANTS[0], name="mixed").save(tmp_path / "mixed.keras")
    finally:
        keras.config.set_dtype_policy(before)
    np.save(tmp_path / "images.npy", images())
    child = """
import pathlib, sys
import numpy as np
import keras_vit
from keras.saving import load_model
folder = pathlib.Path(sys.argv[1])
for path in sorted(folder.glob("*.keras")):
    model = load_model(path)
    scores = model.predict_on_batch(np.load(folder / "images.npy"))
    assert model.family and model.weights_info["preprocessing"]["std"] == [127.5] * 3
    if path.stem == "mixed":
        assert model.get_layer("block_0").compute_dtype == "bfloat16" and np.isfinite(scores).all()
    else:
        np.testing.assert_allclose(scores, np.load(path.with_suffix(".npy")), atol=1e-6)
    print(path.stem)
"""
    done = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path)], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) >= {"mixed", *(row.name for row in VARIANTS)}


def test_names_of_the_original_work_in_create_model():
    for row in VARIANTS:
        for name in row.upstream:
            assert zoo._row(name) is row
    with pytest.raises(keras_vit.errors.ArgumentError, match="ViT_B16"):
        keras_vit.create_model("ViT_B61", weights=None)


def test_list_models_takes_patterns():
    assert keras_vit.list_models("ViT_B*") == ["ViT_B16", "ViT_B16_gap", "ViT_B32", "ViT_B32_gap", "ViT_B8"]


def test_list_weights_names_the_published_files():
    tags = {"imagenet", "imagenet21k", "imagenet21k+imagenet2012", "sam", "gsam", "augreg", "augreg+imagenet2012"}
    assert tags <= set(keras_vit.list_weights("ViT_B16"))
    assert keras_vit.list_weights("ViT-H_14") == ["imagenet21k"]
    assert keras_vit.list_weights("ViT_mu") == []
