"""Plain Keras training; also run on JAX by test_backends.py."""

import keras
import numpy as np
import pytest

import keras_vit
from keras_vit.data import pipeline


@pytest.fixture(scope="module")
def trained():
    """A small ViT after a short plain fit on the digits, and its history."""
    train = pipeline.open_source("digits", "train")
    keras.utils.set_random_seed(0)
    model = keras_vit.ViT(
        weights=None, input_shape=(8, 8, 3), patch_size=2, width=48, depth=2, heads=4, mlp=96, classes=10, dropout_rate=0.1
    )
    model.compile(keras.optimizers.AdamW(2e-3), keras.losses.CategoricalCrossentropy(), metrics=["accuracy"])
    batches = pipeline.train_batches(train, size=8, batch=64, augment=False)
    history = model.fit(batches, epochs=8, steps_per_epoch=40, verbose=0)
    return model, history.history


def test_fit_learns(trained):
    _, history = trained
    assert history["loss"][-1] < 0.6 * history["loss"][0]


def test_evaluate_and_predict_agree(trained):
    model, _ = trained
    test = pipeline.open_source("digits", "test")
    batches = pipeline.eval_batches(test, size=8, batch=128)
    loss, accuracy = model.evaluate(batches, verbose=0)
    scores = model.predict(batches, verbose=0)
    labels = np.concatenate([np.asarray(labels) for _, labels in batches])
    assert scores.shape == (360, 10)
    assert accuracy == pytest.approx(np.mean(scores.argmax(axis=1) == labels.argmax(axis=1)), abs=1e-6)
    assert accuracy > 0.7
    assert np.isfinite(loss)


def test_a_frozen_backbone_trains_its_head_alone():
    model = keras_vit.ViT_mu(weights=None, classes=3)
    for layer in model.layers:
        layer.trainable = layer.name == "head"
    before = [np.array(weight) for weight in model.weights]
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    images = np.random.default_rng(0).uniform(-1, 1, (6, 32, 32, 3)).astype("float32")
    model.fit(images, np.arange(6) % 3, verbose=0)
    changed = {w.path.split("/")[0] for w, old in zip(model.weights, before) if np.abs(np.array(w) - old).max() > 0}
    assert changed == {"head"}
