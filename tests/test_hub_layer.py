"""`HubLayer`: modules inside Keras 3, ours and those that others exported; and what is refused."""

import json
import os
import shutil
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="modules run on TensorFlow")

tf = pytest.importorskip("tensorflow")
tf_keras = pytest.importorskip("tf_keras")

import keras_vit  # noqa: E402
from keras_vit.errors import ArgumentError, IntegrityError, UntrustedArtifactError  # noqa: E402
from keras_vit.hub import HubLayer, digest, module, verify  # noqa: E402

SHAPE, CLASSES = (16, 16, 3), 5


def exported(path):
    """The module of a small ViT with dropout and a penalty, one layer frozen; and the model."""
    keras.utils.set_random_seed(0)
    small = dict(input_shape=SHAPE, patch_size=8, width=16, depth=2, heads=2, mlp=32, classes=CLASSES, dropout_rate=0.3)
    model = keras_vit.ViT(weights=None, **small)
    model.get_layer("block_0").mlp.fc1.kernel.regularizer = keras.regularizers.L2(0.1)
    model.get_layer("patches").trainable = False
    for weight in model.get_layer("head").weights:
        weight.assign(keras.random.normal(weight.shape, seed=1))
    module.export(model, path)
    return model


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """(folder of a module, the model that it was exported from)."""
    path = tmp_path_factory.mktemp("modules") / "ours"
    return path, exported(path)


def images(batch=8):
    return np.random.default_rng(0).random((batch, *SHAPE), np.float32)


def logits(model, x):
    return keras.Model(model.input, model.get_layer("head").output).predict(keras_vit.preprocess_input(x * 255, model), verbose=0)


def wrapped(path, optimizer="sgd", **options):
    layer = HubLayer(path, **options)
    model = keras.Sequential([keras.Input(SHAPE), layer])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, layer


def values(layer):
    return {name: variable.numpy() for name, variable in layer.names.items() if "seed" not in name}


def changed(before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_outputs_are_those_of_the_model(ours, batch):
    path, source = ours
    model, layer = wrapped(path)
    assert model.output_shape == (None, CLASSES)
    expected = logits(source, images(batch))
    for found in (model.predict(images(batch), verbose=0), layer(images(batch)).numpy()):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_all_that_the_module_declares_trainable_is_trained_and_nothing_else(ours, optimizer):
    path, source = ours
    model, layer = wrapped(path, optimizer, trainable=True)
    before = values(layer)
    assert len(model.trainable_variables) == len(source.trainable_variables) and len(layer.losses) == 0
    first = model.evaluate(images(), np.arange(8) % CLASSES, verbose=0)
    model.fit(images(), np.arange(8) % CLASSES, epochs=5, verbose=0)
    assert changed(before, values(layer)) == {v.path for v in source.trainable_variables}
    assert model.evaluate(images(), np.arange(8) % CLASSES, verbose=0) < first
    frozen = [name for name in before if name.startswith("patches")]
    assert frozen


def test_penalties_and_dropout_live_in_training_and_not_in_a_frozen_layer(ours):
    path, source = ours
    model, layer = wrapped(path, trainable=True)
    model(images())
    (penalty,) = layer.losses
    kernel = source.get_layer("block_0").mlp.fc1.kernel
    assert float(penalty) == pytest.approx(0.1 * float(np.sum(np.square(kernel.numpy()))), rel=1e-5)
    assert not np.array_equal(layer(images(), training=True), layer(images(), training=True))
    assert np.array_equal(layer(images(), training=False), layer(images(), training=False))
    layer.trainable = False
    assert np.array_equal(layer(images(), training=True), layer(images())) and not layer.losses
    assert not model.trainable_variables


def test_a_pattern_trains_what_it_names(ours):
    path, _ = ours
    model, layer = wrapped(path, trainable="block_1/mlp/|^head/")
    before = values(layer)
    model.fit(images(), np.arange(8) % CLASSES, verbose=0)
    moved = changed(before, values(layer))
    assert moved == {name for name in before if name.startswith(("block_1/mlp/", "head/"))} and len(moved) == 6
    with pytest.raises(ArgumentError, match="trainable='blok_1' is found in none .*block_1"):
        HubLayer(path, trainable="blok_1")


def test_a_keras_file_brings_back_what_was_trained(ours, tmp_path):
    path, _ = ours
    model, layer = wrapped(path, "adam", trainable="block_1/|head/")
    model.fit(images(), np.arange(8) % CLASSES, verbose=0)
    model.save(tmp_path / "tuned.keras")
    again = keras.saving.load_model(tmp_path / "tuned.keras")
    np.testing.assert_array_equal(again.predict(images(), verbose=0), model.predict(images(), verbose=0))
    assert again.layers[0].tuned == "block_1/|head/" and len(again.trainable_variables) == len(model.trainable_variables)
    again.fit(images(), np.arange(8) % CLASSES, verbose=0)


def test_a_layer_in_half_precision_around_it_changes_nothing(ours):
    path, source = ours
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model, layer = wrapped(path, trainable=True)
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(layer(images()).numpy(), logits(source, images()), rtol=0, atol=1e-5)
    model.fit(images(), np.arange(8) % CLASSES, verbose=0)


def test_two_devices_train_as_one(ours, tmp_path):
    child = """
import sys, json, numpy as np, tensorflow as tf, keras
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from keras_vit.hub import HubLayer
x, y = np.random.default_rng(0).random((8, 16, 16, 3), np.float32), np.arange(8) % 5
losses = []
for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
    with strategy.scope():
        model = keras.Sequential([keras.Input((16, 16, 3)), HubLayer(sys.argv[1], trainable=True)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses.append(model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0).history["loss"])
print(json.dumps(losses))
"""
    done = subprocess.run(
        [sys.executable, "-c", child, str(deterministic(tmp_path))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert one[2] < one[0]


def deterministic(folder):
    """A module without dropout."""
    keras.utils.set_random_seed(0)
    small = dict(input_shape=SHAPE, patch_size=8, width=16, depth=1, heads=2, mlp=32, classes=CLASSES)
    return module.export(keras_vit.ViT(weights=None, **small), folder / "deterministic")


def plain(folder):
    """A module of TensorFlow alone, as tensorflow/hub's reusable_saved_models.md describes them."""
    root = tf.train.Checkpoint()
    root.w, root.b = tf.Variable(tf.ones((3, 4)), name="scale/w"), tf.Variable(tf.zeros(4), name="shift/b")
    call = tf.function(lambda x: tf.reduce_mean(x, (1, 2)) @ root.w + root.b, input_signature=[tf.TensorSpec((None, *SHAPE))])
    root.__call__ = call
    root.variables, root.trainable_variables, root.regularization_losses = [root.w, root.b], [root.w], []
    tf.saved_model.save(root, folder, signatures={"serving_default": tf.function(lambda x: {"y": call(x)}).get_concrete_function(
        tf.TensorSpec((None, *SHAPE), name="x"))})  # fmt: skip


def of_tf_keras(folder):
    model = tf_keras.Sequential(
        [tf_keras.Input(SHAPE), tf_keras.layers.Flatten(), tf_keras.layers.Dropout(0.5), tf_keras.layers.Dense(4)]
    )
    model.save(folder, save_format="tf")


@pytest.mark.parametrize("make", [plain, of_tf_keras])
def test_modules_of_others_train_once_their_digest_is_named(make, tmp_path):
    make(str(tmp_path / "theirs"))
    with pytest.raises(UntrustedArtifactError, match=r"expected a module with a manifest.json.*digest=keras_vit.hub.digest"):
        HubLayer(tmp_path / "theirs")
    pinned = digest(tmp_path / "theirs")
    model, layer = wrapped(tmp_path / "theirs", trainable=True, digest=pinned)
    reference = tf.saved_model.load(str(tmp_path / "theirs"))
    np.testing.assert_allclose(
        layer(images()), reference(tf.constant(images()), **({} if make is plain else {"training": False}))
    )
    before = values(layer)
    model.fit(images(), np.arange(8) % 4, verbose=0)
    assert len(changed(before, values(layer))) == len(model.trainable_variables) == (1 if make is plain else 2)
    with pytest.raises(IntegrityError, match=f"expected a module of digest {'0' * 64}, got {pinned}"):
        HubLayer(tmp_path / "theirs", digest="0" * 64)


def test_signatures_give_their_outputs_and_cannot_be_trained(ours):
    path, source = ours
    layer = HubLayer(path, signature="serving_default", output_key="logits")
    np.testing.assert_allclose(layer(images()), logits(source, images()), rtol=0, atol=1e-5)
    for options, match in (
        (dict(signature="serving"), r"a signature among \['features', 'serving_bytes', 'serving_default'\], got 'serving'"),
        (dict(signature="serving_default", trainable=True), "'serving_default' cannot be trained"),
    ):
        with pytest.raises(ArgumentError, match=match):
            HubLayer(path, **options)
    with pytest.raises(ArgumentError, match=r"output_key among \['logits'\], got 'probabilities'"):
        HubLayer(path, signature="serving_default", output_key="probabilities")(images())
    with pytest.raises(ArgumentError, match="output_key among one tensor"):
        HubLayer(path, output_key="logits")(images())


@pytest.mark.parametrize("handle", ["https://tfhub.dev/google/module/1", "gs://bucket/module"])
def test_a_module_from_elsewhere_is_not_even_asked_for_without_a_digest(handle, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(UntrustedArtifactError, match="Pass digest="):
        HubLayer(handle)


def test_a_module_that_was_altered_is_refused_by_name(ours, tmp_path):  # [E2]
    path, _ = ours
    other = deterministic(tmp_path)
    assert len(verify(path)["variables"]) == len(tf.saved_model.load(str(path)).variables)

    def copied():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return shutil.copytree(path, tmp_path / "copy")

    for name in ("saved_model.pb", "fingerprint.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"):
        shutil.copyfile(other / name, copied() / name)
        with pytest.raises(IntegrityError, match=f"{name}: expected .* bytes of sha256"):
            verify(tmp_path / "copy")
        with pytest.raises(IntegrityError, match=name):
            HubLayer(tmp_path / "copy")
    (copied() / "saved_model.pbtxt").write_text("")
    with pytest.raises(IntegrityError, match="saved_model.pbtxt is not in the manifest"):
        verify(tmp_path / "copy")
    (copied() / "fingerprint.pb").unlink()
    with pytest.raises(IntegrityError, match="fingerprint.pb is missing"):
        verify(tmp_path / "copy")
    (tmp_path / "copy" / "fingerprint.pb").symlink_to(path / "fingerprint.pb")
    with pytest.raises(IntegrityError, match="got a link"):
        verify(tmp_path / "copy")
    for text in ("", "[]", "{}", '{"format": 2, "files": {}}', '{"format": 1, "files": {"a": {}}}'):
        (copied() / "manifest.json").write_text(text)
        with pytest.raises(UntrustedArtifactError, match="manifest.json cannot be read"):
            verify(tmp_path / "copy")
    with pytest.raises(ArgumentError, match="with saved_model.pb, got none"):
        HubLayer(tmp_path)
