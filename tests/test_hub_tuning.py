"""Fine-tuning a module on digits, in tf_keras and in Keras 3, on one device and two: as good as fine-tuning the model itself."""

import json
import os
import subprocess
import sys

import keras
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="modules run on TensorFlow"),
]

CHILD = """
import sys
import numpy as np, tensorflow as tf
from sklearn.datasets import load_digits
way, folder = sys.argv[1:]
if way == "mirrored":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, keras_vit
from keras_vit.hub import HubLayer

digits = load_digits()
x = (digits.images / 16).astype("float32")[..., None].repeat(3, -1)
order = np.random.default_rng(0).permutation(len(x))
x, y = x[order], digits.target[order]
train, test = (x[:1437], y[:1437]), (x[1437:], y[1437:])

def batches(part, batch=64):
    return tf.data.Dataset.from_tensor_slices(part).batch(batch, drop_remainder=len(part[0]) > 1000)

def fit(model, api, epochs=20):
    loss = api.losses.SparseCategoricalCrossentropy(from_logits=True)
    rate = api.optimizers.schedules.CosineDecay(2e-3, epochs * (len(train[0]) // 64))
    model.compile(api.optimizers.Adam(rate), loss, metrics=["accuracy"])
    model.fit(batches(train), epochs=epochs, verbose=0)
    return model.evaluate(batches(test), verbose=0)[1]

def own():
    small = dict(input_shape=(8, 8, 3), patch_size=2, width=32, depth=2, heads=4, mlp=64)
    model = keras_vit.ViT(weights=None, classes=10, classifier_activation=None, include_preprocessing=True, **small)
    positions = model.get_layer("tokens").positions
    positions.assign(keras.random.normal(positions.shape, stddev=0.5, seed=0))  # as keras_vit/configs/digits.py
    return model

keras.utils.set_random_seed(0)
if way == "prepare":  # a little knowledge of digits upside down
    model = own()
    wrapped = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Rescaling(255.0), model])
    train = (train[0][:, ::-1], train[1])
    fit(wrapped, keras, epochs=5)
    keras_vit.hub.export(model, folder + "/module")
    model.save(folder + "/model.keras")
elif way == "model":
    model = keras.saving.load_model(folder + "/model.keras")
    print(fit(keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Rescaling(255.0), model]), keras))
elif way == "keras_layer":
    import tf_keras, tensorflow_hub as hub
    layer = hub.KerasLayer(folder + "/module", trainable=True)
    print(fit(tf_keras.Sequential([tf_keras.Input((8, 8, 3)), layer]), tf_keras))
else:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) if way == "mirrored" else tf.distribute.get_strategy()
    with strategy.scope():
        layer = HubLayer(folder + "/module", trainable="^(block_1|encoder_norm|head)/" if way == "regex" else True)
        before = {name: variable.numpy() for name, variable in layer.names.items()}
        model = keras.Sequential([keras.Input((8, 8, 3)), layer])
        accuracy = fit(model, keras)
    moved = {name.split("/")[0] for name, variable in layer.names.items() if not np.array_equal(before[name], variable.numpy())}
    print(accuracy) if way != "regex" else print(sorted(moved))
"""


def run(way, folder):
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, way, str(folder)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1] if done.stdout else None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a module and the model that it was written from, a little trained."""
    folder = tmp_path_factory.mktemp("prepared")
    run("prepare", folder)
    return folder


@pytest.fixture(scope="module")
def reference(prepared):
    """The test accuracy of fine-tuning the Keras model itself."""
    return float(run("model", prepared))


@pytest.mark.parametrize("way", ["keras_layer", "hub_layer", "mirrored"])
def test_a_module_is_tuned_as_well_as_the_model_itself(way, prepared, reference):
    accuracy = float(run(way, prepared))
    print(f"{way}: {accuracy:.4f}, the model itself {reference:.4f}")
    assert reference > 0.95
    assert abs(accuracy - reference) <= 0.01


def test_only_what_a_pattern_names_is_changed_by_tuning(prepared):
    assert json.loads(run("regex", prepared).replace("'", '"')) == ["block_1", "encoder_norm", "head"]
