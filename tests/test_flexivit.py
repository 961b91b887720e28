"""FlexiViT: one set of weights for all patch sizes, and training at many, which some tests also try on the other backends."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints import adapt, files
from keras_vit.checkpoints.load import named_weights
from keras_vit.models import flexivit
from keras_vit.training import flexible

TOY = dict(
    weights=None, input_shape=(24, 24, 3), classes=3, classifier="token", width=16, depth=1, heads=2, mlp=24, patch_size=8,
    stored_patch_size=8, stored_grid=(3, 3),
)  # fmt: skip


def toy(**options):
    return randomise(keras_vit.FlexiViT(**{**TOY, **options}))


def images(count=4):
    return np.random.default_rng(0).uniform(-1, 1, (count, 24, 24, 3)).astype("float32")


def values(model):
    return {name: keras.ops.convert_to_numpy(weight) for name, weight in named_weights(model).items()}


def assert_same_weights(model, other, atol=0.0):
    ours, theirs = values(model), values(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=name)


def test_one_file_and_one_keras_file_fit_every_patch_size(tmp_path):
    model = toy()
    keras_vit.save_npz(model, tmp_path / "x.npz")
    model.save_weights(tmp_path / "x.weights.h5")
    assert {"params/pos_embedding", "params/cls"} < set(files.Npz(tmp_path / "x.npz").entries)
    for patch_size in (3, 8, (5, 12)):
        file = keras_vit.FlexiViT(**{**TOY, "patch_size": patch_size, "weights": tmp_path / "x.npz"})
        other = toy(patch_size=patch_size, name="other")
        other.load_weights(tmp_path / "x.weights.h5")
        assert_same_weights(model, file)
        assert_same_weights(model, other)
        assert file.weights_info["adapted"] == []
        assert file.get_layer("block_0").output.shape[1] == 1 + np.prod(24 // (np.array(patch_size) * [1, 1]))


@pytest.mark.parametrize("options", [{}, dict(include_top=False), dict(classifier="map"), dict(include_preprocessing=True)])
def test_at_patch_size_is_the_model_built_so_with_the_same_variables(options):
    model = toy(**options)
    model.compile("sgd", loss=lambda y, scores: keras.ops.mean(scores))  # which cannot be cloned, and is not asked to be
    for patch_size in (4, 8, (6, 9)):
        other = flexivit.at_patch_size(model, patch_size)
        built = toy(patch_size=patch_size, **options)
        np.testing.assert_allclose(other.predict_on_batch(images()), built.predict_on_batch(images()), atol=1e-6)
        assert all(mine is theirs for mine, theirs in zip(model.weights, other.weights, strict=True))
        assert (other.family, other.name, other.input_shape) == ("FlexiViT", model.name, model.input_shape)


def test_at_patch_size_always_starts_from_the_stored_weights(tmp_path):
    model = toy()
    chained = flexivit.at_patch_size(flexivit.at_patch_size(model, 4), 6)
    direct = flexivit.at_patch_size(model, 6)
    np.testing.assert_array_equal(chained.predict_on_batch(images()), direct.predict_on_batch(images()))
    chained.save(tmp_path / "x.keras")
    again = keras.saving.load_model(tmp_path / "x.keras")
    np.testing.assert_allclose(again.predict_on_batch(images()), direct.predict_on_batch(images()), atol=1e-6)
    own = flexivit.at_patch_size(again, 8)
    np.testing.assert_allclose(own.predict_on_batch(images()), model.predict_on_batch(images()), atol=1e-6)


def test_a_plain_vit_of_its_resampled_file_gives_the_same_patches(tmp_path):
    keras_vit.save_npz(toy(), tmp_path / "x.npz")
    model = toy(patch_size=6)
    plain = keras_vit.ViT(
        weights=None, input_shape=(24, 24, 3), classes=3, style="big_vision", width=16, depth=1, heads=2, mlp=24, patch_size=6
    )
    keras_vit.load_weights(plain, tmp_path / "x.npz", resize_patches=True)
    got = [keras.Model(m.input, zoo.tap(m, "patches")).predict_on_batch(images()) for m in (model, plain)]
    np.testing.assert_allclose(*got, atol=1e-5)


def test_half_precision_resizes_in_float32():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layer = toy().get_layer("patches")
    finally:
        keras.config.set_dtype_policy(before)
    expected = adapt.resample_patches(keras.ops.convert_to_numpy(layer.kernel), (5, 6))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(layer.kernel_at((5, 6))), expected, atol=1e-5)


def test_antialiased_keeps_constants_and_is_bilinear_when_it_enlarges():
    for old, new in ((7, 15), (7, 8), (7, 7), (1, 4)):
        np.testing.assert_allclose(adapt.antialiased(old, new), adapt.bilinear(old, new), atol=1e-12)
    shrinks = adapt.antialiased(7, 3)
    np.testing.assert_allclose(shrinks.sum(axis=1), 1)
    assert ((shrinks > 0).sum(axis=1) > 2).all()  # looks at all it covers, not at two neighbours


def test_another_stored_size_is_refused_by_name_and_resampled_only_when_asked(tmp_path):
    keras_vit.save_npz(toy(), tmp_path / "x.npz")
    model = toy(stored_patch_size=6, stored_grid=(4, 4))
    before = values(model)
    with pytest.raises(errors.CheckpointMismatchError, match="patches/kernel and tokens/positions: .*resize_patches=True"):
        keras_vit.load_weights(model, tmp_path / "x.npz")
    assert all((before[name] == value).all() for name, value in values(model).items())
    keras_vit.load_weights(model, tmp_path / "x.npz", resize_patches=True)
    assert len(model.weights_info["adapted"]) == 2
    kernel = adapt.resample_patches(values(toy())["patches/kernel"], (6, 6))
    np.testing.assert_allclose(values(model)["patches/kernel"], kernel, atol=1e-6)


def test_a_grid_of_the_same_length_and_another_shape_is_told_apart(tmp_path):
    first = toy(stored_grid=(2, 8))
    keras_vit.save_npz(first, tmp_path / "x.npz")
    keras_vit.load_weights(toy(stored_grid=(2, 8)), tmp_path / "x.npz")
    with pytest.raises(errors.CheckpointMismatchError, match=r"a grid of \(2, 8\)"):
        keras_vit.load_weights(toy(stored_grid=(4, 4)), tmp_path / "x.npz")


@pytest.mark.parametrize(
    "options", [{}, dict(classifier="gap", positions="sincos2d"), dict(classifier="map", stored_patch_size=(4, 6))]
)
def test_a_files_shapes_tell_what_to_build(tmp_path, options):
    options = {**TOY, **options}
    keras_vit.save_npz(toy(**options), tmp_path / "x.npz")
    _, shapes, unknown = zoo._read_as(files.Npz(tmp_path / "x.npz"), flexivit.FAMILY)
    told = flexivit.FAMILY.sizes(shapes)
    assert unknown == []
    assert told == {"positions": "learned", **{key: value for key, value in options.items() if key in told}}


def test_released_files_have_their_classes_and_the_baselines_their_tags():
    rows = {size: zoo.VARIANTS[f"FlexiViT_{size}"] for size in "SBL"}
    for row in rows.values():
        assert {"imagenet", "i1k", "i1k-90ep", "i1k-300ep", "i1k-600ep"} <= set(row.tags())
        assert row.weights["i1k"] == row.weights[row.imagenet(224)]
    base = rows["B"].weights
    assert base["i1k"].source == "gs://big_vision/flexivit/flexivit_b_i1k.npz"
    assert (base["i1k"].classes, base["i1k"].activation, base["i1k"].resolution) == (1000, "softmax", 240)
    assert base["i21k-vit-b30"].source == "gs://big_vision/flexivit/vit_b30_i21k_300ep.npz"
    assert (base["i21k-1000ep"].classes, base["i21k-1000ep"].activation) == (21_843, "sigmoid")


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(patch_size=25), "no patch of 25 x 25"),
        (dict(patch_size=0), "patch_size must be a whole number above 0"),
        (dict(stored_patch_size=(8, 8, 3)), "stored_patch_size must be"),
        (dict(stored_grid=2.5), "stored_grid must be"),
        (dict(classifier="unpooled"), "classifier in"),
        (dict(include_top=False, classifier="gap", pooling="token"), "use 'avg'"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_by_name(options, match):
    with pytest.raises(errors.ArgumentError, match=match):
        toy(**options)


def test_at_patch_size_refuses_other_models_and_patches_larger_than_the_image():
    with pytest.raises(errors.ArgumentError, match="expected a model built by FlexiViT"):
        flexivit.at_patch_size(keras_vit.ViT_mu(weights=None), 8)
    with pytest.raises(errors.ArgumentError, match="no patch of 8 x 30"):
        flexivit.at_patch_size(toy(), (8, 30))


def compiled(model, optimizer, **options):
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(), **options)
    return model


def losses(trained, count):
    """The loss of each of so many steps on one batch."""
    found = []
    for _ in range(count):
        trained.reset_metrics()
        found.append(float(np.ravel(trained.train_on_batch(images(), np.arange(4) % 3))[0]))
    return np.array(found)


def test_learner_draws_every_patch_size_with_its_probability():
    model = toy()
    trained = compiled(flexible.learner(model, (4, 8, 12), probabilities=(1, 3, 0)), keras.optimizers.SGD(0.0))
    of_size = []
    for patch_size in (4, 8, 12):
        other = compiled(flexivit.at_patch_size(model, patch_size), "sgd")
        of_size.append(float(np.ravel(other.test_on_batch(images(), np.arange(4) % 3))[0]))
    apart = np.abs(losses(trained, 120)[:, None] - of_size)
    assert apart.min(axis=1).max() < 1e-4 < 1e-3 < np.diff(np.sort(of_size)).min()
    share = np.bincount(apart.argmin(axis=1), minlength=3) / 120
    assert share[2] == 0
    np.testing.assert_allclose(share, np.array([1, 3, 0]) / 4, atol=0.12)


def test_learner_draws_the_same_for_the_same_seed():
    def draws(seed):
        trained = flexible.learner(toy(), (4, 8, 12), seed=seed)
        return [int(trained.draw()) for _ in range(30)]

    assert draws(1) == draws(1) != draws(2)


def test_learner_steps_as_the_model_at_that_patch_size_does():
    """So gradients reach the stored kernel and positions through the resizing."""
    start, direct, drawn = toy(), toy(), toy()
    losses(compiled(flexivit.at_patch_size(direct, (6, 5)), keras.optimizers.Adam(0.01)), 2)
    losses(compiled(flexible.learner(drawn, [(6, 5)]), keras.optimizers.Adam(0.01)), 2)
    for name in ("patches/kernel", "tokens/positions"):
        assert np.abs(values(start)[name] - values(drawn)[name]).min() > 0
    keys = np.s_[1, :]  # of which the softmax sees no bias, so that Adam makes noise large
    for model in (direct, drawn):
        bias = values(model)["block_0/attention/qkv_bias"].copy()
        bias[keys] = 0
        named_weights(model)["block_0/attention/qkv_bias"].assign(bias)
    assert_same_weights(direct, drawn, atol=1e-5)


def test_learner_fits_every_patch_size_and_evaluates_at_the_models_own():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 96)
    colours = (np.eye(3)[labels][:, None, None] + 0.3 * rng.standard_normal((96, 24, 24, 3))).astype("float32")
    model = keras_vit.FlexiViT(**TOY, dropout_rate=0.1, stochastic_depth_rate=0.1)
    trained = compiled(flexible.learner(model, (4, 12)), keras.optimizers.Adam(0.01), metrics=["accuracy"])
    history = trained.fit(colours, labels, batch_size=16, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["accuracy"][-1] > 0.8
    own = compiled(model, "sgd").evaluate(colours, labels, verbose=0)
    assert trained.evaluate(colours, labels, verbose=0, return_dict=True)["loss"] == pytest.approx(own, abs=1e-5)
    for patch_size in (4, 8, 12):
        assert compiled(flexivit.at_patch_size(model, patch_size), "sgd").evaluate(colours, labels, verbose=0) < 0.3


def test_learner_draws_dropout_anew_in_every_step_and_leaves_frozen_layers():
    model = toy(dropout_rate=0.5)
    model.get_layer("patches").trainable = False
    before = values(model)
    still = losses(compiled(flexible.learner(model, [8]), keras.optimizers.SGD(0.0)), 4)
    assert len(set(still.round(5))) == 4
    losses(compiled(flexible.learner(model, [8, 4]), keras.optimizers.SGD(0.1)), 2)
    after = values(model)
    np.testing.assert_array_equal(after["patches/kernel"], before["patches/kernel"])
    assert np.abs(after["tokens/positions"] - before["tokens/positions"]).max() > 0


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="JAX compiles by XLA anyway")
def test_learner_compiles_by_xla_to_the_same_numbers():
    found = []
    for jit_compile in (False, True):
        trained = flexible.learner(toy(), (8, 12), probabilities=(0, 1))  # since XLA draws other numbers
        found.append(losses(compiled(trained, keras.optimizers.SGD(0.1), jit_compile=jit_compile), 4))
    np.testing.assert_allclose(*found, atol=1e-4)


@pytest.mark.parametrize("probabilities", [(1,), (1, -1), (0, 0), (1, np.nan), [[1, 1]]])
def test_learner_refuses_what_are_no_probabilities(probabilities):
    with pytest.raises(errors.ArgumentError, match="as many probabilities"):
        flexible.learner(toy(), (4, 8), probabilities)


def test_learner_refuses_other_models_and_impossible_patches():
    with pytest.raises(errors.ArgumentError, match="expected a model built by FlexiViT"):
        flexible.learner(keras_vit.ViT_mu(weights=None), (4, 8))
    with pytest.raises(errors.ArgumentError, match="no patch of 32 x 32"):
        flexible.learner(toy(), (8, 32))
    with pytest.raises(errors.ArgumentError, match="expected patch sizes"):
        flexible.learner(toy(), ())


@pytest.mark.slow  # 60 s
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_training_mode_works_on_other_backends(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    if keras.config.backend() != "tensorflow":
        pytest.skip("is what runs")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(pathlib.Path(__file__)),
        "-k",
        "learner_draws_every or learner_fits or learner_steps",
    ]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


def test_what_is_stored_is_the_checkpoints_own_unless_asked_for(tmp_path):
    options = {**TOY, "stored_patch_size": None, "stored_grid": None, "weights": tmp_path / "x.npz"}
    keras_vit.save_npz(toy(stored_patch_size=6, stored_grid=(2, 2)), tmp_path / "x.npz")
    model = keras_vit.FlexiViT(**options)
    assert model.get_layer("patches").kernel.shape[:2] == (6, 6)
    assert model.get_layer("tokens").grid == (2, 2)
    assert model.weights_info["adapted"] == []
    with pytest.raises(errors.CheckpointMismatchError, match="stored_patch_size"):
        keras_vit.FlexiViT(**{**options, "stored_patch_size": 8})
