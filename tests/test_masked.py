"""Masked-image pre-training: how masks are drawn, what a model guesses, what is refused. On TensorFlow, JAX and PyTorch."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import randomise

import keras_vit
from keras_vit import errors, main, zoo
from keras_vit.checkpoints.load import named_weights, to_numpy
from keras_vit.configs import digits, dvae, mim
from keras_vit.data import pipeline
from keras_vit.training import masked
from keras_vit.training.dvae import Gumbel, encoder
from keras_vit.training.masked import CodeTargets, Mask, PixelTargets
from keras_vit.training.objectives import Outputs
from keras_vit.training.optimizers import MomentumSGD
from keras_vit.training.step import Learner


def toy(**changes):
    given = dict(patch_size=4, width=16, depth=2, heads=2, mlp=16, input_shape=(12, 8, 3), weights=None, classes=3)
    return randomise(keras_vit.ViT_mu(**given | changes))


def hidden_images(mask, images):
    """(b, h, w) masks and (b, H, W, 3) images -> (b, H, W, 4)."""
    p, q = (side // patches for side, patches in zip(images.shape[1:3], mask.shape[1:]))
    return np.concatenate([images, mask.repeat(p, 1).repeat(q, 2)[..., None]], -1).astype("float32")


def images(count=2, shape=(12, 8, 3)):
    return np.random.default_rng(0).standard_normal((count, *shape), np.float32)


MASK = np.array([[[1, 0], [0, 1], [0, 0]], [[0, 0], [0, 0], [1, 0]]], np.float32)


def test_beits_masks_hide_75_of_196_patches_in_blocks():
    # 4,000 masks of microsoft/unilm beit/masking_generator.py: 74.5 +- 1.0 patches, at most 75; 0.1112 of neighbours differ
    generator = np.random.default_rng(0)
    drawn = np.stack([Mask(75 / 196, 16).draw((14, 14), generator) for _ in range(400)])
    counts = drawn.sum((1, 2))
    assert counts.max() == 75 and counts.mean() == pytest.approx(74.5, abs=0.2)
    assert (drawn[:, 1:] != drawn[:, :-1]).mean() == pytest.approx(0.111, abs=0.005)
    assert drawn[:, 0, 0].mean() < 0.1 < 0.6 < drawn[:, 7, 7].mean()  # blocks lie inside, so corners are hidden seldom


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(ratio=0.0), r"ratio, the share of patches that are hidden, must lie in \(0, 1\), got 0.0"),
        (dict(ratio=1.0), r"must lie in \(0, 1\), got 1.0"),
        (dict(ratio=-0.1), r"must lie in \(0, 1\), got -0.1"),
        (dict(least=0), "least must be a whole number above 0"),
        (dict(aspect=2.0), r"aspect lie in \(0, 1\]"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(options, expected):
    with pytest.raises(errors.ArgumentError, match=expected):
        Mask(**options)


def test_a_block_larger_than_what_is_to_be_hidden_is_refused():
    with pytest.raises(errors.ArgumentError, match="of the 4 x 4 patches, ratio=0.4 hides 6, fewer than the 16 of the smallest"):
        Mask(0.4, 16).count((4, 4))


def test_masks_depend_on_the_place_in_the_stream_alone():
    data = tf.data.Dataset.from_tensor_slices((images(16), np.zeros(16, "float32")))
    grid, mask = (3, 2), Mask(0.5, 1)
    whole = np.concatenate([x for x, _ in masked.masked(data.batch(8), 8, grid, mask, seed=1)])
    assert whole.shape == (16, 12, 8, 4) and np.all((whole[..., 3] == 0) | (whole[..., 3] == 1))
    assert np.all(whole[:, ::4, ::4, 3].sum((1, 2)) == 3)
    np.testing.assert_array_equal(whole[:, 3::4, 3::4, 3], whole[:, ::4, ::4, 3])
    later = np.concatenate([x for x, _ in masked.masked(data.skip(8).batch(8), 8, grid, mask, seed=1, start=8)])
    np.testing.assert_array_equal(later, whole[8:])
    second = data.enumerate().filter(lambda i, _: i % 8 >= 4).map(lambda _, pair: pair)
    half = np.concatenate([x for x, _ in masked.masked(second.batch(4), 8, grid, mask, seed=1, shard=(1, 2))])
    np.testing.assert_array_equal(half, np.concatenate([whole[4:8], whole[12:]]))
    other = np.concatenate([x for x, _ in masked.masked(data.batch(8), 8, grid, mask, seed=2)])
    assert np.any(other != whole)


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_a_rewired_model_sees_nothing_of_hidden_patches_and_guesses_them_alone(classifier):
    graph, x = masked.rewired(toy(classifier=classifier), PixelTargets()), images()
    guesses = keras.Model(graph.input, zoo.tap(graph, "mask_head"))
    given = hidden_images(MASK, x)
    changed = given.copy()
    changed[0, :4, :4, :3] += 1  # a hidden patch of the first image
    np.testing.assert_array_equal(to_numpy(guesses(given)), to_numpy(guesses(changed)))
    losses = to_numpy(graph(given))
    assert losses.shape == (2, 1)
    cut = x.reshape(2, 3, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 48)
    expected = [np.mean(np.abs(to_numpy(guesses(given))[i] - cut[i])[MASK[i].ravel() == 1]) for i in range(2)]
    np.testing.assert_allclose(losses[:, 0], expected, rtol=1e-5)


def test_without_hidden_patches_a_rewired_models_blocks_are_the_models():
    model = toy()
    graph, x = masked.rewired(model, PixelTargets()), images()
    encoded = keras.Model(graph.input, zoo.tap(graph, "encoder"))
    found = to_numpy(encoded(hidden_images(np.zeros_like(MASK), x)))
    np.testing.assert_allclose(found, to_numpy(keras.Model(model.input, zoo.tap(model, "block_1"))(x)), atol=1e-6)


def tokenizer(vocabulary=5, side=6, grid=(3, 2)):
    given = keras.Input((side * grid[0], side * grid[1], 3))
    return randomise(keras.Model(given, keras.layers.Conv2D(vocabulary, side, side, name="codes")(given), name="tokenizer"))


def test_codes_of_a_frozen_model_are_guessed_by_cross_entropy():
    codes, x = tokenizer(), images()
    before = [to_numpy(variable).copy() for variable in codes.variables]
    graph = masked.rewired(toy(), CodeTargets(codes))
    given = hidden_images(MASK, x)
    scores = to_numpy(keras.Model(graph.input, zoo.tap(graph, "mask_head"))(given)).astype("float64")
    resized = tf.image.resize(x, (18, 12), antialias=False)
    wanted = to_numpy(codes(keras.ops.convert_to_tensor(resized.numpy()))).argmax(-1).reshape(2, 6)
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    expected = [-logs[i][np.arange(6), wanted[i]][MASK[i].ravel() == 1].mean() for i in range(2)]
    np.testing.assert_allclose(to_numpy(graph(given))[:, 0], expected, rtol=1e-4)
    learner = Learner(graph.inputs, graph.outputs, objective=Outputs(graph))
    learner.compile(MomentumSGD(0.1))
    learner.fit(given, np.zeros((2, 1)), batch_size=2, epochs=2, verbose=0)
    for old, variable in zip(before, codes.variables):
        np.testing.assert_array_equal(old, to_numpy(variable))


def test_a_tokenizer_of_another_grid_is_refused_by_name():
    with pytest.raises(errors.ArgumentError, match=r"tokenizer tokenizer: gives a grid of \(2, 2\) codes, ViT_mu has \(3, 2\)"):
        masked.rewired(toy(), CodeTargets(tokenizer(grid=(2, 2))))


def test_a_model_without_patches_or_blocks_is_refused():
    given = keras.Input((8, 8, 3))
    with pytest.raises(errors.ArgumentError, match="a layer 'patches'"):
        masked.rewired(keras.Model(given, keras.layers.Flatten()(given)), PixelTargets())


def test_a_step_trains_the_models_own_layers_but_not_its_head():
    model = toy(classifier_activation=None)
    before = {name: to_numpy(variable).copy() for name, variable in named_weights(model).items()}
    graph = masked.rewired(model, PixelTargets())
    learner = Learner(graph.inputs, graph.outputs, objective=Outputs(graph), parts=2, clip_norm=1.0)
    learner.compile(MomentumSGD(0.1))
    given = hidden_images(np.concatenate([MASK, MASK]), images(4))
    logs = learner.fit(given, np.zeros((4, 1)), batch_size=4, epochs=4, verbose=0, shuffle=False).history
    assert logs["step_loss"][-1] < logs["step_loss"][0] and min(logs["healthy"]) == 1
    moved = {name for name, variable in named_weights(model).items() if np.any(to_numpy(variable) != before[name])}
    still = {"encoder_norm/gamma", "encoder_norm/beta", "head/kernel", "head/bias"}
    assert moved == set(before) - still


def test_pretraining_is_fine_tuned_from_what_it_wrote(tmp_path):
    small = {
        "model.hidden_size": 16, "model.transformer.num_layers": 1, "model.transformer.num_heads": 2,
        "model.transformer.mlp_dim": 16, "total_steps": 4, "warmup_steps": 1, "batch": 8, "accum_steps": 1, "eval_every": 2,
        "checkpoint_every": 2,
    }  # fmt: skip
    config = mim.get_config("vit_mu,digits")
    config.update_from_flattened_dict(small)
    assert main.run(config, tmp_path / "masked") > 0
    first = keras.saving.load_model(tmp_path / "masked" / "model.keras")
    assert zoo.zero_head(first)
    config = digits.get_config()
    with config.unlocked():
        config.model, config.pp = mim.get_config("vit_mu,digits").model, mim.get_config("vit_mu,digits").pp
    config.update_from_flattened_dict(small | {"total_steps": 1, "warmup_steps": 0, "base_lr": 0.0, "eval_every": 0})
    config.pretrained_dir, config.export = str(tmp_path / "masked" / "model.npz"), False
    tuned = main.train(config, tmp_path / "tuned").model
    kept = {name: to_numpy(variable) for name, variable in named_weights(first).items()}
    for name, variable in named_weights(tuned).items():
        np.testing.assert_array_equal(to_numpy(variable), kept[name])
    config.pretrained_dir = str(tmp_path / "nothing.npz")
    with pytest.raises(errors.ConfigError, match="nothing.npz: there is no such checkpoint"):
        main.train(config, tmp_path / "other")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"masked.ratio": 1.5}, r"ratio, the share of patches that are hidden, must lie in \(0, 1\), got 1.5"),
        ({"masked.least": 9}, "hides 6, fewer than the 9 of the smallest"),
        ({"masked.tokenizer": "nowhere.keras"}, "nowhere.keras: there is no such file"),
        ({"cutmix": 1.0}, "knows no labels"),
    ],
)
def test_what_pretraining_cannot_use_is_refused_and_nothing_is_written(changes, expected, tmp_path):
    config = mim.get_config("vit_mu,digits")
    config.update_from_flattened_dict(changes)
    with pytest.raises(errors.KerasViTError, match=expected):
        main.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_values_are_beits():
    config = mim.get_config("b16,imagenet2012")
    assert (config.batch, config.base_lr, config.grad_norm_clip, config.pp.crop) == (2048, 1.5e-3, 3.0, 224)
    assert config.weight_decay == pytest.approx(0.05 * config.base_lr) and config.stochastic_depth_rate == 0.1
    assert Mask(config.masked.ratio, config.masked.least).count((14, 14)) == 75 and config.masked.least == 16
    assert config.total_steps == round(800 * 1_268_355 / 2048)
    with pytest.raises(errors.ConfigError, match="mim.py expects MODEL,DATASET"):
        mim.get_config("b16")


def test_a_discrete_autoencoder_learns_codes_that_pretraining_then_guesses(tmp_path):
    config = dvae.get_config("8,digits")
    small = {"total_steps": 12, "warmup_steps": 1, "batch": 16, "eval_every": 0, "dvae.vocabulary": 8, "dvae.width": 16}
    config.update_from_flattened_dict(small)
    assert main.run(config, tmp_path / "codes") > 0
    lines = [json.loads(line) for line in (tmp_path / "codes" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    codes = keras.saving.load_model(tmp_path / "codes" / "model.keras")
    assert codes.output_shape == (None, 4, 4, 8) and not (tmp_path / "codes" / "model.npz").exists()
    config = mim.get_config("vit_mu,digits")
    config.update_from_flattened_dict({"total_steps": 2, "warmup_steps": 1, "batch": 16, "eval_every": 0})
    config.masked.tokenizer = str(tmp_path / "codes" / "model.keras")
    assert main.run(config, tmp_path / "masked") == pytest.approx(np.log(8), abs=0.5)


def test_codes_are_drawn_in_training_at_a_temperature_that_falls_and_are_the_best_otherwise():
    logits = np.random.default_rng(0).standard_normal((400, 5)).astype("float32")
    layer = Gumbel(steps=10)
    best = to_numpy(layer(logits))
    np.testing.assert_array_equal(best, np.eye(5)[logits.argmax(-1)])
    sharpness = [to_numpy(layer(logits, training=True)).max(-1).mean() for _ in range(12)]
    assert sharpness[0] < 0.8 < 0.95 < sharpness[-1]
    often = np.mean([to_numpy(layer(logits, training=True)).argmax(-1) == logits.argmax(-1) for _ in range(20)])
    expected = np.mean(np.exp(logits.max(-1)) / np.exp(logits).sum(-1))  # Gumbel's maximum draws from the softmax itself
    assert often == pytest.approx(expected, abs=0.02)


def test_an_autoencoder_that_cannot_be_is_refused():
    with pytest.raises(errors.ArgumentError, match="at least 2 codes"):
        encoder((8, 8, 3), 4, vocabulary=1)
    with pytest.raises(errors.ArgumentError, match="images in whole patches"):
        encoder((9, 8, 3), 4)
    with pytest.raises(errors.ConfigError, match="dvae.py expects PATCH,DATASET"):
        dvae.get_config("digits")


def test_judging_takes_the_same_masks_each_time():
    source = pipeline.open_source("digits", "test")
    batches = masked.masked(pipeline.eval_batches(source, size=8, batch=100), 100, (2, 2), Mask(0.5, 1), seed=0)
    graph = masked.rewired(toy(input_shape=(8, 8, 3)), PixelTargets())
    learner = Learner(graph.inputs, graph.outputs, objective=Outputs(graph))
    first, again = (masked.judge(learner, batches) for _ in range(2))
    assert first == again and first.examples == 360
