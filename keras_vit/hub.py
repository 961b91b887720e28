"""TF-Hub modules: a reusable TF2 SavedModel that `hub.load` and `hub.KerasLayer` take, run and fine-tune.

The form is that of tensorflow/hub `docs/reusable_saved_models.md` and `docs/common_saved_model_apis/images.md`.
"""

import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_vit.data.pixels import Pixels
from keras_vit.errors import ExportError
from keras_vit.zoo import tap, zero_head

INPUT_RANGES = {"unit": (255.0, 0.0), "minus1_1": (127.5, 127.5)}  # a module's input to 0..255: x * scale + offset
BATCH = 32  # images that `check` gives the module at once
PARTS = {"saved_model.pb", "variables", "assets", "fingerprint.pb"}  # what TensorFlow writes into a module's folder


def export(model, path, *, input_range="unit"):
    """Writes `model` as a TF-Hub module into the folder `path` and returns its absolute path.

    The module takes RGB images, float32 (batch, H, W, 3) in [0, 1], of any batch size and the model's own height and width;
    the checkpoint's preprocessing is inside. It returns float32: the logits (batch, classes), which are the output of layer
    "head", or the model's own output where it has no such layer. It is callable as `module(images, training=False)`, with
    dropout alive under `training=True`, and has `variables`, `trainable_variables` (without what the caller froze),
    `regularization_losses` and the signature `serving_default(images)` -> {"logits"} or {"features"}.

    It is written beside `path`, loaded by another process through `hub.load` and `hub.KerasLayer`, compared with the model on
    the CPU (1e-5 in float32, 2e-2 in lower precision, absolute below an output of 1 and relative above), and only then moved
    to `path`. A module that was there is replaced; on any error it stays as it was, and nothing else is left behind. On JAX
    and PyTorch it is carried as a `.keras` file into a TensorFlow process that has only the layers of Keras and keras_vit.

    Args:
        model: a functional `keras.Model` with one image input of fixed size. `model.weights_info` says how it wants its pixels
            ("preprocessing", a `Pixels.asdict()`; [-1, 1] without a record; 0..255 where "include_preprocessing" is true).
        path: a local folder: new, empty, or an earlier module.
        input_range: "unit" for [0, 1], the convention of TF-Hub; "minus1_1" for modules that replace one taking [-1, 1].

    Raises:
        ExportError: the model or `path` cannot be used, or the module could not be written or does not reproduce the model.
    """
    if input_range not in INPUT_RANGES:
        raise ExportError(f"hub.export to {path}: expected input_range 'unit' or 'minus1_1', got {input_range!r}; take 'unit'.")
    _check_model(model, path)
    target = _target(path)
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        if keras.config.backend() == "tensorflow":
            _write(model, staging, input_range)
        else:
            model.save(staging / "model.keras")
            command = ["-m", "keras_vit.hub", staging / "model.keras", staging, input_range]
            _run(command, f"carrying the model from {keras.config.backend()} to TensorFlow", path, KERAS_BACKEND="tensorflow")
        _verify(staging, path, low_precision=any(layer.compute_dtype != "float32" for layer in model.layers))
        _place(staging / "module", target)
    except (OSError, tf.errors.OpError) as error:
        raise ExportError(
            f"hub.export to {path}: expected a local folder that can be written, got {error}. "
            "Free space, change permissions, or choose another path."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def check(path, images):
    """What the module in folder `path` makes of `images` in another process that has TensorFlow but not keras_vit.

    Args:
        path: folder of a module.
        images: (batch, H, W, 3), any kind of number, in the range that the module takes.

    Returns:
        Two float arrays of the module's outputs, (batch, ...): "load" by `hub.load(path)(images)`, "keras_layer" by
        `hub.KerasLayer(path, trainable=True)` in a tf_keras model, through `predict`. The CPU computes, `BATCH` images at a time.

    Raises:
        ExportError: the module cannot be loaded or called on these images; the other process's last lines are in the message.
    """
    if not Path(path, "saved_model.pb").is_file():
        raise ExportError(f"hub.check of {path}: expected a folder with saved_model.pb, got none. Pass what hub.export wrote.")
    return _outputs(path, images, path)


def _outputs(folder, images, named):
    with tempfile.TemporaryDirectory() as between:
        given, taken = Path(between, "images.npz"), Path(between, "outputs.npz")
        np.savez(given, images=np.asarray(images, np.float32))
        source = f"{inspect.getsource(_as_a_stranger)}\nimport sys\n_as_a_stranger(*sys.argv[1:])"
        _run(["-c", source, folder, given, taken, BATCH], "loading and calling it in another process", named)
        return _arrays(taken)


def _as_a_stranger(path, given, taken, batch):
    """Runs in another process from its source text alone, so all it has is what it imports."""
    import numpy as np
    import tensorflow as tf
    import tensorflow_hub as hub
    import tf_keras

    with np.load(given, allow_pickle=False) as arrays:
        images = arrays["images"]
    batch = int(batch)
    module = hub.load(path)
    loaded = [module(tf.constant(images[i : i + batch])).numpy() for i in range(0, len(images), batch)]
    model = tf_keras.Sequential([tf_keras.Input(images.shape[1:]), hub.KerasLayer(path, trainable=True)])
    np.savez(taken, load=np.concatenate(loaded), keras_layer=model.predict(images, batch_size=batch, verbose=0))


def _check_model(model, path):
    shapes = [tuple(tensor.shape) for tensor in getattr(model, "inputs", None) or []]
    if len(shapes) != 1 or len(shapes[0]) != 4 or None in shapes[0][1:] or shapes[0][3] != 3:
        raise ExportError(
            f"hub.export to {path}: expected a functional keras.Model with one input (None, H, W, 3) of fixed size, got "
            f"{type(model).__name__} with inputs {shapes}. Build it with input_shape=(H, W, 3)."
        )
    head = _has_head(model)
    if zero_head(model):
        raise ExportError(
            f"hub.export to {path}: expected a classifier, got {model.name!r}, whose checkpoint has an all-zero head: its logits "
            "mean nothing. Build it with classes=N and train, with include_top=False for features, or take the augreg weights."
        )
    if not head and len(model.outputs) != 1:
        raise ExportError(
            f"hub.export to {path}: expected a model with a layer 'head' or one output, got {model.name!r} with "
            f"{len(model.outputs)} outputs. Pass keras.Model(model.input, one_output)."
        )


def _target(path):
    """The folder to write, all links followed, so that a replaced link's folder is replaced and not the link."""
    target = Path(path).expanduser().resolve()
    if "://" in str(path):
        raise ExportError(f"hub.export: expected a local folder, got {path}. Export to a local folder, then upload it.")
    if target.exists():
        found = {entry.name for entry in target.iterdir()} if target.is_dir() else {"(a file)"}
        if found and ("saved_model.pb" not in found or found - PARTS):
            raise ExportError(
                f"hub.export to {path}: expected a new or empty folder, or an earlier module and nothing else, since it is "
                f"replaced; got {sorted(found - PARTS)[:5] or sorted(found)}. Choose another path, or move these away."
            )
    return target


def _info(model):
    return getattr(model, "weights_info", None) or {}


def _has_head(model):
    return any(layer.name == "head" for layer in model.layers)


def _write(model, folder, input_range):
    """Writes `folder/module`, and `folder/probe.npz` with two images and what the Keras model itself makes of them."""
    key = "logits" if _has_head(model) else "features"
    served = keras.Model(model.inputs[0], tap(model, "head") if key == "logits" else model.outputs[0])
    pixels = Pixels.from_dict(_info(model).get("preprocessing", {}))
    rescales_itself = _info(model).get("include_preprocessing", False)
    scale, offset = INPUT_RANGES[input_range]

    def prepare(images):
        images = images * np.float32(scale) + np.float32(offset)
        return images if rescales_itself else pixels.normalize(images)

    @tf.function(autograph=False)
    def call(images, training=False):
        return tf.cast(served(prepare(images), training=training), tf.float32)

    def penalty(variable):
        return tf.function(lambda: variable.regularizer(variable.value), input_signature=[], autograph=False)

    spec = tf.TensorSpec((None, *served.input_shape[1:]), tf.float32, name="images")
    # Not tf.Module: its `variables` are read-only properties, and the saved module would have no trainable variables.
    root = tf.__internal__.tracking.AutoTrackable()
    for training in (False, True):
        call.get_concrete_function(spec, training=training)
    root.__call__ = call
    root.variables = [v.value for v in served.variables]  # with the seeds of dropout
    root.trainable_variables = [v.value for v in served.trainable_variables]
    root.regularization_losses = [penalty(v) for v in served.trainable_variables if v.regularizer is not None]
    for loss in root.regularization_losses:
        loss.get_concrete_function()
    serve = tf.function(lambda images: {key: call(images)}, input_signature=[spec], autograph=False)
    tf.saved_model.save(root, str(folder / "module"), signatures={"serving_default": serve})

    images = np.random.default_rng(0).random((2, *served.input_shape[1:]), np.float32)
    images = (images * np.float32(255.0) - np.float32(offset)) / np.float32(scale)
    with tf.device("CPU:0"):  # where the other process computes too: a GPU's matrix products may be rounded to TF32
        outputs = tf.function(served, autograph=False)(tf.constant(prepare(images)), training=False)
    np.savez(folder / "probe.npz", images=images, outputs=tf.cast(outputs, tf.float32).numpy())


def _verify(folder, path, low_precision):
    probe = _arrays(folder / "probe.npz")
    tolerance = (2e-2 if low_precision else 1e-5) * max(1.0, float(np.max(np.abs(probe["outputs"]))))
    for way, outputs in _outputs(folder / "module", probe["images"], path).items():
        difference = float(np.max(np.abs(outputs - probe["outputs"])))
        if not difference <= tolerance:  # so that nan fails too
            raise ExportError(
                f"hub.export to {path}: expected the module to give the model's outputs within {tolerance:.1e}, got a difference "
                f"of {difference:.1e} by {way}. Look for nan weights and layers that act differently when traced; an earlier "
                "module is unchanged."
            )


def _place(new, target):
    """Moves the folder `new` to `target`; an earlier one steps aside and comes back if that fails."""
    if not target.exists():
        os.rename(new, target)
        return
    aside = target.with_name(f".{target.name}.old-{uuid.uuid4().hex}")
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside)


def _run(arguments, doing, path, **environment):
    """Runs a Python process on the CPU that finds this keras_vit; ExportError with its last lines if it fails."""
    places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        last = done.stderr.rpartition("Traceback (most recent call last):\n")[2][-2000:].strip()
        raise ExportError(
            f"TF-Hub module {path}: expected {doing} to succeed, got exit code {done.returncode} and\n{last}\n"
            "Mend what its last line names; on 'pkg_resources', install 'setuptools<81', which tensorflow_hub needs."
        )


def _arrays(file):
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


if __name__ == "__main__":
    source, folder, input_range = sys.argv[1:]
    _write(keras.saving.load_model(source, compile=False), Path(folder), input_range)
