"""Modules of a LiT: texts as strings, images, and both."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import randomise

import keras_vit
from keras_vit import hub, zoo
from keras_vit.errors import ExportError
from keras_vit.hub import card

TEXTS = ["a photo of the digit seven", "two red dogs", "", "Caf\u00e9 \U0001f600 " * 9]


@pytest.fixture(scope="module")
def model():
    return randomise(keras_vit.LiT_mu(weights=None))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((3, 32, 32, 3), np.float32)


def test_a_module_of_both_towers_gives_embeddings_and_logits_and_each_alone(model, images, tmp_path):
    record = zoo.VARIANTS["LiT_B16B_2"].weights["lit"]
    before = model.weights_info
    model.remember(weights_info={**before, "card": record.card, "licence": record.licence, "source": record.source})
    try:
        path = hub.export(model, tmp_path / "m", task="image_text", card={"publisher": "me"})
    finally:
        model.remember(weights_info=before)
    module = tf.saved_model.load(str(path))
    found = module({"images": tf.constant(images), "texts": tf.constant(TEXTS)})
    z = model.encode_image(keras_vit.preprocess_input(images * 255)), model.encode_text(TEXTS)
    for name, expected in zip(("image_embeddings", "text_embeddings"), z):
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
        (alone,) = (
            module.signatures["images"](images=tf.constant(images))
            if name == "image_embeddings"
            else module.signatures["texts"](texts=tf.constant(TEXTS))
        ).values()
        np.testing.assert_allclose(alone, expected, atol=1e-5)
    np.testing.assert_allclose(found["logits"], model.temperature * z[0] @ z[1].T, atol=1e-3)
    served = module.signatures["serving_default"](images=tf.constant(images), texts=tf.constant(TEXTS))
    np.testing.assert_array_equal(served["logits"], found["logits"])
    with pytest.raises(tf.errors.InvalidArgumentError, match="finite"):
        module.signatures["images"](images=tf.fill((1, 32, 32, 3), np.nan))
    assert len(module.trainable_variables) == len(model.trainable_variables)

    manifest = hub.verify(path)
    assert manifest["vocabulary"] == {"kind": "wordpiece", "sha256": model.tokenizer.sha256}
    assert card.read(path)["module"] == "me/lit_mu_image_text/1"
    text = (path / "README.md").read_text()
    assert 'pipeline_tag: "zero-shot-image-classification"' in text and 'license: "apache-2.0"' in text
    for said in ("No deployment", "English alone", "biases", "ImageNet 73.9 %", "MS-COCO image to text 51.6 %"):
        assert said in text
    assert "logits (images, texts)" in text and "values cut down to whole numbers" in text


@pytest.mark.slow
def test_a_module_of_texts_takes_strings_or_tokens(model, tmp_path):
    path = hub.export(model, tmp_path / "m", task="text_embedding")
    module, expected = tf.saved_model.load(str(path)), model.encode_text(TEXTS)
    np.testing.assert_allclose(module(tf.constant(TEXTS)), expected, atol=1e-5)
    (given,) = module.signatures["tokens"](tokens=tf.constant(model.tokenizer(TEXTS))).values()
    np.testing.assert_allclose(given, expected, atol=1e-5)
    assert hub.verify(path)["parameters"] == model.text_tower.count_params()
    assert card.read(path)["task"] == "text-embedding" and (path / "README.md").read_text().count("image") > 0


@pytest.mark.slow
def test_a_module_of_the_image_tower_is_one_of_images(model, images, tmp_path):
    path = hub.export(model.image_tower, tmp_path / "m", task="image_embedding")
    (got,) = tf.saved_model.load(str(path)).signatures["serving_default"](images=tf.constant(images)).values()
    np.testing.assert_allclose(got, model.encode_image(keras_vit.preprocess_input(images * 255)), atol=1e-5)
    assert card.read(path)["module"] == "keras_vit/lit_mu_image/1"
    np.testing.assert_allclose(hub.check(path, images)["keras_layer"], got, atol=1e-5)


@pytest.mark.slow
def test_a_module_that_computes_in_half_precision_is_close(model, tmp_path):
    path = hub.export(model, tmp_path / "m", task="image_text", dtype="mixed_bfloat16", card=False)
    found = tf.saved_model.load(str(path)).signatures["texts"](texts=tf.constant(TEXTS))["text_embeddings"]
    assert 0 < np.abs(found - model.encode_text(TEXTS)).max() < 0.05


def test_what_cannot_be_such_a_module_is_refused(model, tmp_path):
    def refused(match, made, **form):
        with pytest.raises(ExportError, match=match):
            hub.export(made, tmp_path / "m", **form)
        assert not list(tmp_path.iterdir())

    refused("a text tower", keras_vit.ViT_mu(weights=None), task="text_embedding")
    refused("both towers", keras_vit.LiT_mu(weights=None, towers="text"), task="image_text")
    refused("vocabulary=", keras_vit.LiT_mu(weights=None, vocabulary=None), task="text_embedding")
    refused("leave image_size out", model, task="image_text", image_size="any")
    refused("one input", model)
    refused("one input", keras_vit.LiT_mu(weights=None, towers="text"), task="image_embedding")
