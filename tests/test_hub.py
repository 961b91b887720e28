import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="the module is written by TensorFlow")

tf = pytest.importorskip("tensorflow")
tensorflow_hub = pytest.importorskip("tensorflow_hub")
tf_keras = pytest.importorskip("tf_keras")

from keras_vit.data.pixels import Pixels  # noqa: E402
from keras_vit.errors import ExportError  # noqa: E402
from keras_vit.hub import module as hub  # noqa: E402

PIXELS = Pixels(mean=(120.0, 110.0, 100.0), std=(60.0, 55.0, 50.0))


def small(classes=5, **info):
    """A classifier of 16x24 images with all that a module has to carry: dropout, a penalty, a frozen layer, an activation."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((16, 24, 3))
    x = keras.layers.Conv2D(8, 4, 4, activation="gelu", name="patches")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Flatten(name="flat")(x)
    x = keras.layers.Dense(16, kernel_regularizer=keras.regularizers.L2(0.1), name="dense")(x)
    x = keras.layers.Dropout(0.5, name="dropout")(x)
    if classes:
        x = keras.layers.Dense(classes, name="head")(x)
        x = keras.layers.Softmax(name="predictions")(x)
    model = keras.Model(inputs, x, name="small")
    model.get_layer("patches").trainable = False
    model.weights_info = {"preprocessing": PIXELS.asdict(), **info}
    return model


def logits(model, images, scale=255.0):
    """What the Keras model says of images in [0, 1], by a way of its own: preprocessing in numpy, then plain `predict`."""
    tapped = keras.Model(model.input, model.get_layer("head").output)
    return tapped.predict(PIXELS.normalize(images * np.float32(scale)), verbose=0)


def images(batch, seed=0):
    return np.random.default_rng(seed).random((batch, 16, 24, 3), np.float32)


def content(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("modules") / "new" / "small"
    assert hub.export(model, path) == path
    assert os.listdir(path.parent) == ["small"]  # nothing temporary beside it
    return path


@pytest.fixture(scope="module")
def module(path):
    return tensorflow_hub.load(str(path))


@pytest.fixture
def unverified(monkeypatch):
    """Spares the two other processes where a test compares by itself."""
    monkeypatch.setattr(hub, "_verify", lambda *_, **__: None)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_images_in_unit_range_give_the_logits_of_the_model_on_normalised_pixels(model, module, batch):
    x = images(batch)
    assert np.abs(module(x).numpy() - logits(model, x)).max() <= 1e-5
    assert np.abs(module.signatures["serving_default"](images=tf.constant(x))["logits"].numpy() - logits(model, x)).max() <= 1e-5


def test_root_is_callable_in_both_modes_and_dropout_lives_in_training_only(module):
    x = tf.constant(images(4))
    assert np.array_equal(module(x), module(x, training=False))
    assert np.array_equal(module(x, False), module(x))
    assert not np.array_equal(module(x, training=True), module(x, training=True))


def test_variables_are_those_of_the_model_and_frozen_ones_are_not_trainable(model, module):
    assert len(module.variables) == len(model.variables)  # weights and the seed of dropout
    assert len(module.trainable_variables) == len(model.trainable_variables) == 6
    assert all(np.array_equal(kept, ours) for kept, ours in zip(module.trainable_variables, model.trainable_variables))


def test_regularization_losses_are_the_penalties_of_the_model(model, module):
    assert [float(loss()) for loss in module.regularization_losses] == pytest.approx([float(loss) for loss in model.losses])


def test_signature_names_images_and_logits_and_leaves_only_the_batch_open(module):
    serve = module.signatures["serving_default"]
    (spec,) = serve.structured_input_signature[1].values()
    assert list(serve.structured_input_signature[1]) == ["images"] and list(serve.structured_outputs) == ["logits"]
    assert spec.shape.as_list() == [None, 16, 24, 3] and spec.dtype == tf.float32


def test_another_process_gets_the_same_by_load_and_by_keras_layer(model, path):
    x = images(40)  # more than one call's worth
    outputs = hub.check(path, x)
    assert set(outputs) == {"load", "keras_layer"}
    assert "keras_vit" not in inspect.getsource(hub._as_a_stranger)  # all that the other process runs
    assert all(np.abs(y - logits(model, x)).max() <= 1e-5 for y in outputs.values())


def test_keras_layer_fine_tunes_every_trainable_weight_and_no_other(module, path):
    layer = tensorflow_hub.KerasLayer(str(path), trainable=True)
    tuned = tf_keras.Sequential([tf_keras.Input((16, 24, 3)), layer])
    before = [v.numpy() for v in layer.trainable_weights]
    frozen = [v.numpy() for v in module.variables if v.shape == (4, 4, 3, 8)]
    tuned.compile("sgd", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    tuned.fit(images(8), np.arange(8) % 5, batch_size=8, verbose=0)
    assert len(before) == len(module.trainable_variables) and len(layer.losses) == 1
    assert not any(np.array_equal(old, new) for old, new in zip(before, layer.trainable_weights))
    assert np.array_equal(frozen, [v for v in layer.non_trainable_weights if v.shape == (4, 4, 3, 8)])


def test_export_over_a_module_replaces_it(tmp_path):
    first, second = small(), small(classes=3)
    hub.export(first, tmp_path / "m")
    old = content(tmp_path / "m")
    hub.export(second, str(tmp_path / "m"))
    assert content(tmp_path / "m") != old and os.listdir(tmp_path) == ["m"]
    assert np.abs(tensorflow_hub.load(str(tmp_path / "m"))(images(2)).numpy() - logits(second, images(2))).max() <= 1e-5


@pytest.mark.parametrize("broken", ["outputs differ", "outputs are nan", "module cannot be loaded", "move fails", "disk is full"])
def test_failing_export_leaves_the_old_module_byte_identical_and_nothing_beside_it(broken, tmp_path, path, monkeypatch):
    target = tmp_path / "m"
    target.mkdir()
    for name, data in content(path).items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(data)
    real = os.rename

    def rename(source, destination):
        if Path(source).name == "module":
            raise PermissionError(13, "not permitted", str(destination))
        real(source, destination)

    def full(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    if broken in ("outputs differ", "outputs are nan"):
        wrong = np.full((2, 5), 1e3 if broken == "outputs differ" else np.nan, np.float32)
        monkeypatch.setattr(hub, "_outputs", lambda *_: [{"load": wrong}])
    elif broken == "module cannot be loaded":
        monkeypatch.setattr(hub.sys, "executable", "/bin/false")
    elif broken == "move fails":
        monkeypatch.setattr(hub, "_verify", lambda *_, **__: None)
        monkeypatch.setattr(hub, "_exchange", lambda *_: False)  # a file system that cannot swap
        monkeypatch.setattr(hub.os, "rename", rename)
    else:
        monkeypatch.setattr(tf.saved_model, "save", full)
    with pytest.raises(ExportError, match=str(target)):
        hub.export(small(), target)
    assert content(target) == content(path) and os.listdir(tmp_path) == ["m"]


def test_a_folder_that_is_no_module_is_never_replaced(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("two years of work")
    with pytest.raises(ExportError, match="thesis.tex"):
        hub.export(model, tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(ExportError, match="thesis.tex"):
        hub.export(model, tmp_path)
    with pytest.raises(ExportError, match="a file"):
        hub.export(model, tmp_path / "thesis.tex")
    with pytest.raises(ExportError, match="local folder"):
        hub.export(model, "gs://bucket/module")


def test_an_all_zero_head_is_refused_and_its_features_are_not(tmp_path, unverified):
    cleared = small(zero_head=True)
    cleared.get_layer("head").kernel.assign(np.zeros((16, 5)))
    with pytest.raises(ExportError, match=r"classes=N.*augreg.*task='feature_vector'"):
        hub.export(cleared, tmp_path / "m")
    assert os.listdir(tmp_path) == []
    features = small(classes=None, zero_head=True)
    hub.export(features, tmp_path / "m", task="feature_vector")
    served = tensorflow_hub.load(str(tmp_path / "m")).signatures["serving_default"](images=tf.constant(images(2)))
    expected = features.predict(PIXELS.normalize(images(2) * np.float32(255)), verbose=0)
    assert list(served) == ["feature_vector"] and np.abs(served["feature_vector"].numpy() - expected).max() <= 1e-5


def test_a_model_that_rescales_itself_is_given_0_to_255_and_minus1_1_shifts_the_input(tmp_path, unverified):
    model = small(include_preprocessing=True)
    hub.export(model, tmp_path / "m", input_range="minus1_1")
    expected = keras.Model(model.input, model.get_layer("head").output).predict(images(2) * np.float32(255), verbose=0)
    got = tensorflow_hub.load(str(tmp_path / "m"))(images(2) * 2 - 1).numpy()
    assert np.abs(got - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


def test_what_cannot_be_served_is_refused_before_anything_is_written(tmp_path):
    unbuilt, open_size = keras.Sequential([keras.layers.Dense(2)]), keras.Sequential([keras.Input((None, None, 3))])
    two = keras.Model(i := keras.Input((4, 4, 3)), [i * 1, i * 2])
    for model, word in ((unbuilt, "inputs"), (open_size, "fixed size"), (two, "a layer 'head'")):
        with pytest.raises(ExportError, match=word):
            hub.export(model, tmp_path / "m")
    with pytest.raises(ExportError, match=r"input_range in \('unit', 'minus1_1'\), got '0..1'"):
        hub.export(small(), tmp_path / "m", input_range="0..1")
    assert os.listdir(tmp_path) == []


def test_check_says_what_the_other_process_said(path, tmp_path):
    with pytest.raises(ExportError, match="saved_model.pb"):
        hub.check(tmp_path, images(1))
    with pytest.raises(ExportError, match=rf"(?s){path}.*\(3, 9, 9, 3\)"):
        hub.check(path, np.zeros((3, 9, 9, 3)))


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_export_from_another_backend_gives_the_logits_that_it_gives(backend, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    code = """
import sys, keras, keras_vit, numpy as np
from keras_vit import hub
from keras_vit.zoo import tap
model = keras_vit.ViT_mu(classes=10, weights=None)
for v in model.trainable_variables: v.assign(keras.random.normal(v.shape, stddev=0.1, seed=1))
hub.export(model, sys.argv[1])
x = np.random.default_rng(0).random((3, *model.input_shape[1:]), np.float32)
y = keras.Model(model.input, tap(model, "head")).predict(keras_vit.preprocess_input(x * 255, model), verbose=0)
np.savez(sys.argv[2], x=x, y=y)
"""
    target, arrays = tmp_path / "m", tmp_path / "arrays.npz"
    environment = os.environ | {"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code, str(target), str(arrays)], check=True, env=environment)
    given = np.load(arrays, allow_pickle=False)
    module = tensorflow_hub.load(str(target))
    assert np.abs(module(given["x"]).numpy() - given["y"]).max() <= 1e-5 * max(1, np.abs(given["y"]).max())
    assert sorted(os.listdir(tmp_path)) == ["arrays.npz", "m"]
