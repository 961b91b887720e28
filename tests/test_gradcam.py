"""Grad-CAM against finite differences and a model built by hand; every wiring is mapped in test_registry."""

import functools
import importlib.util
import os
import pathlib
import re
import runpy
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import console, errors, zoo
from keras_vit.explain import gradcam as explain

SIZE = (16, 24, 3)
SMALL = dict(weights=None, input_shape=SIZE, classes=3, patch_size=8, width=8, depth=2)
VIT = dict(SMALL, heads=2, mlp=12)


def images(count=2):
    return np.random.default_rng(5).uniform(-1, 1, (count, *SIZE)).astype("float32")


@pytest.fixture(scope="module")
def vit():
    return randomise(keras_vit.ViT(**VIT), seed=3)


@pytest.fixture(scope="module")
def mixer():
    return randomise(keras_vit.Mixer(**SMALL, tokens_mlp=5, channels_mlp=12), seed=4)


def bilinear(maps, size):
    """(b, h, w) -> (b, H, W): linear between the middles of cells, along one side after the other."""
    for axis, side in enumerate(size, 1):
        old = maps.shape[axis]
        middles, at = (np.arange(old) + 0.5) / old, (np.arange(side) + 0.5) / side
        maps = np.apply_along_axis(functools.partial(np.interp, at, middles), axis, maps)
    return maps


def by_definition(outputs, weights, size):
    """Equations 1 and 2 of the paper for grids (b, h, w, c) and weights (b, c), stretched; the largest value of each is 1."""
    maps = bilinear(np.maximum((outputs * weights[:, None, None]).sum(-1), 0), size)
    return maps / maps.max((1, 2), keepdims=True)


def test_maps_are_those_of_gradients_by_finite_differences(vit):
    tokens = zoo.tap(vit, "block_0")
    values, step = keras.Model(vit.input, tokens).predict_on_batch(images()), 0.03
    rest = keras.Model(tokens, zoo.tap(vit, "head"))
    weights, classes = [], [2, 0]
    for value, number in zip(values, classes):
        shifts = step * np.eye(value.size, dtype="float32").reshape(-1, *value.shape)
        up, down = (rest.predict_on_batch(value + sign * shifts)[:, number] for sign in (1, -1))
        weights.append(((up - down) / (2 * step)).reshape(value.shape)[1:].mean(0))
    found = explain.gradcam(vit, images(), classes, layer="block_0")
    expected = by_definition(values[:, 1:].reshape(2, 2, 3, 8), np.array(weights), SIZE[:2])
    assert found.layer == "block_0" and found.classes.tolist() == classes and found.maps.dtype == "float32"
    np.testing.assert_allclose(found.maps, expected, atol=5e-3)


def test_a_norm_inside_a_block_is_a_place_too(mixer):
    """A norm's `beta` is added to all tokens, so that the logit's slope along it is the sum of the gradients at them."""
    place, step = "block_1/token_norm", 0.02
    beta, logits = mixer.get_layer("block_1").token_norm.beta, keras.Model(mixer.input, zoo.tap(mixer, "head"))
    values, before = keras.Model(mixer.input, zoo.tap(mixer, place)).predict_on_batch(images(1)), np.array(beta)
    slopes = []
    for shift in step * np.eye(8, dtype="float32"):
        found = []
        for sign in (1, -1):
            beta.assign(before + sign * shift)
            found.append(logits.predict_on_batch(images(1))[0, 1])
        slopes.append((found[0] - found[1]) / (2 * step))
    beta.assign(before)
    expected = by_definition(values.reshape(1, 2, 3, 8), np.array([slopes]), SIZE[:2])
    np.testing.assert_allclose(explain.gradcam(mixer, images(1), 1, layer=place).maps, expected, atol=5e-3)


@pytest.fixture(scope="module")
def colours():
    """A classifier whose class 0 is the amount of red and class 1 that of green, as blocks that add nothing leave them."""
    model = keras_vit.ViT(**{**VIT, "classes": 2}, classifier="gap")
    for weight in model.weights:
        weight.assign(np.ones(weight.shape) if weight.path.endswith("gamma") else np.zeros(weight.shape))
    kernel = np.zeros((8, 8, 3, 8), "float32")
    kernel[:, :, 0, 0] = kernel[:, :, 1, 1] = 1 / 64
    model.get_layer("patches").kernel.assign(kernel)
    model.get_layer("head").kernel.assign(np.eye(8, 2))
    return model


def test_a_map_is_where_what_drives_the_class_lies(colours):
    picture = np.zeros((3, *SIZE), "float32")
    picture[:, :8, 16:, 0] = 1  # red in the upper right, green in the lower left
    picture[:, 8:, :8, 1] = 1
    maps, classes, layer = explain.gradcam(colours, picture, [0, 1, 0])
    red, green = np.s_[2:6, 18:], np.s_[10:14, :6]
    for heat, own, other in zip(maps, (red, green, red), (green, red, green)):
        assert heat[own].min() > 0.6 and heat.max() == 1 and heat.min() == 0
        assert heat[other].max() == 0 and heat[:4, :4].max() == 0
    assert classes.tolist() == [0, 1, 0] and layer == "block_1"
    np.testing.assert_allclose(maps[0], maps[2], atol=1e-6)


def test_a_map_of_a_batch_is_that_of_each_image_and_the_best_class_is_the_default(vit):
    maps, classes, layer = explain.gradcam(vit, images())
    assert classes.tolist() == vit.predict_on_batch(images()).argmax(1).tolist()
    assert layer == "block_1/attention_norm"  # patches of the last block's output have no influence
    for number in range(2):
        alone = explain.gradcam(vit, images()[number : number + 1], int(classes[number]))
        np.testing.assert_allclose(maps[number], alone.maps[0], atol=1e-5)


def test_the_model_is_left_as_it_was(vit):
    before = vit.predict_on_batch(images())
    explain.gradcam(vit, images())
    assert "call" not in vars(vit.get_layer("block_1")) and "call" not in vars(vit.get_layer("block_1").attention_norm)
    np.testing.assert_array_equal(vit.predict_on_batch(images()), before)


def test_a_rewired_model_is_explained_on_its_own_graph(vit):
    wired = keras.Input(SIZE, name="wired")
    x = wired
    for layer in vit.layers[1:]:
        x = layer(x)
    again = explain.gradcam(keras.Model(wired, x), images())
    np.testing.assert_allclose(again.maps, explain.gradcam(vit, images()).maps, atol=1e-6)


CHILD = """
import sys
import keras, numpy as np
import keras_vit
from keras_vit.explain.gradcam import gradcam
for path in sys.argv[2:]:
    maps, classes, _ = gradcam(keras.saving.load_model(path), np.load(sys.argv[1]), [0, 2])
    np.save(path.replace("keras", "npy"), maps)
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_every_backend_gives_the_same_maps(backend, vit, mixer, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    np.save(tmp_path / "images.npy", images())
    for model in (vit, mixer):
        model.save(tmp_path / f"{model.name}.keras")
    paths = [tmp_path / "images.npy", *(tmp_path / f"{model.name}.keras" for model in (vit, mixer))]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, "-c", CHILD, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for model in (vit, mixer):
        np.testing.assert_allclose(
            np.load(tmp_path / f"{model.name}.npy"), explain.gradcam(model, images(), [0, 2]).maps, atol=1e-5
        )


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(layer="blok_1"), "nearest: block_1"),
        (dict(layer="block_1/scores"), r"inside 'block_1' \(attention_norm, attention, mlp_norm, mlp\), got 'scores'"),
        (dict(layer="class_token"), r"gives \(None, 8\), expected .* for example block_0, block_1, encoder_norm"),
        (dict(layer="encoder_norm"), "no patch of 'encoder_norm' has any influence"),
        (dict(classes=3), r"whole number of 0\.\.2"),
        (dict(classes=[0, 1, 2]), "a list of 2"),
        (dict(images=np.zeros((2, 24, 16, 3))), r"expected images of shape \('b', 16, 24, 3\), got \(2, 24, 16, 3\)"),
    ],
)
def test_what_cannot_be_explained_is_refused_with_what_can(vit, options, match):
    with pytest.raises(errors.ArgumentError, match=match):
        explain.gradcam(vit, **{"images": images(), **options})


@pytest.mark.parametrize(
    "options, match",
    [
        ({}, "head is all zeros"),
        (dict(include_top=False), "include_top=True"),
        (dict(classifier="unpooled"), "one vector an image"),
    ],
)
def test_a_model_without_scores_to_explain_is_refused(options, match):
    with pytest.raises(errors.ArgumentError, match=match):
        explain.gradcam(keras_vit.ViT(**{**VIT, **options}), images())


def test_what_is_not_finite_is_an_error_and_no_map(vit):
    with pytest.raises(errors.NonFiniteError, match="not finite"):
        explain.gradcam(vit, np.full((1, *SIZE), np.nan))


def test_an_overlay_keeps_the_image_where_the_map_is_0_and_is_stored_as_it_is(tmp_path):
    image = np.full((6, 8, 3), 100, "uint8")
    heat = np.zeros((6, 8))
    heat[:, 6:] = 1
    mixed = explain.overlay(image, heat)
    assert mixed.dtype == "uint8" and (mixed[:, :6] == 100).all() and (mixed[:, 6:] != 100).all()
    explain.save_png(tmp_path / "x.png", mixed)
    np.testing.assert_array_equal(keras.utils.img_to_array(keras.utils.load_img(tmp_path / "x.png")), mixed)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    for path, match in (("x.jpg", "ends in .png"), ("no/x.png", "folder that exists")):
        with pytest.raises(errors.ArgumentError, match=match):
            explain.save_png(tmp_path / path, mixed)
    with pytest.raises(errors.ArgumentError, match="one map"):
        explain.overlay(image, heat[None])


def test_the_page_on_explaining_works_as_it_says(vit, tmp_path, monkeypatch, capsys):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "explain.md").read_text()
    command, snippet = re.findall(r"<!-- snippet: .*? -->\n```\w+\n(.*?)```\n", page, re.DOTALL)
    assert page.count("\n```") == 6  # both, and the command that makes the pictures
    for picture in re.findall(r"\]\((.*?\.png)\)", page):
        assert (pathlib.Path(__file__).parents[1] / "docs" / picture).stat().st_size < 150_000
    monkeypatch.chdir(tmp_path)
    vit.save("vit.keras")
    keras.utils.save_img("flower.jpg", np.random.default_rng(0).integers(0, 256, (40, 60, 3)), scale=False)
    for said, done in (('keras_vit.ViT_B16(weights="imagenet")', 'keras.saving.load_model("vit.keras")'), ("[985]", "[2]")):
        assert said in snippet
        snippet = snippet.replace(said, done)
    pathlib.Path("snippet.py").write_text(f"import keras\n{snippet}")
    left = runpy.run_path("snippet.py")
    assert left["maps"].shape == (1, *SIZE[:2]) and left["layer"] == "block_1/attention_norm"
    assert keras.utils.load_img("flower-985.png").size == (60, 40)
    name, *words = command.replace("ViT_B16", "vit.keras").replace("985", "2").split()
    assert name == "keras-vit" and console.main(words) == 0
    assert keras.utils.load_img("flower-gradcam.png").size == SIZE[1::-1] and "block_1" in capsys.readouterr().out
