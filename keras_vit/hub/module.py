"""Writes TF-Hub modules: a reusable TF2 SavedModel that `hub.load`, `hub.KerasLayer` and `HubLayer` take, run and fine-tune.

The form is that of tensorflow/hub `docs/reusable_saved_models.md` and `docs/common_saved_model_apis/images.md`.
"""

import ctypes
import dataclasses
import errno
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_vit.errors import ExportError
from keras_vit.hub import card as cards
from keras_vit.hub import graph, manifest, texts
from keras_vit.hub.graph import Form
from keras_vit.version import __version__

BATCH = 32  # images that `check` gives the module at once
PARTS = {"saved_model.pb", "variables", "assets", "fingerprint.pb", manifest.MANIFEST, *cards.FILES}  # of a module's folder


def export(model, path, *, task="classification", input_range="unit", dtype=None, image_size="fixed", card=True):
    """Writes `model` as a TF-Hub module into the folder `path` and returns its absolute path.

    The module takes RGB images, float32 (batch, H, W, 3) in [0, 1], of any batch size; the checkpoint's preprocessing is inside.
    It returns float32 and is callable as `module(images, training=False)`, with dropout and stochastic depth alive under
    `training=True`. It has `variables`, `trainable_variables` (without what the caller froze), `regularization_losses`, and

    - the signature "serving_default": images -> {"logits"}, {"feature_vector"} or {"tokens"};
    - the signature "features", also the attribute `features`: images -> the same and every block's output (block_0, ...) and
      attention scores (block_0_scores, (batch, heads, tokens, tokens));
    - the signature "serving_bytes": image_bytes, (batch,) strings, each a JPEG, PNG, WebP, GIF or BMP file -> as serving_default,
      decoded and resized in the graph as `keras_vit.data.pipeline.eval_batches` does;
    - the attributes `call_infer` and `call_train` for `keras.layers.TFSMLayer`.

    Signatures refuse NaN (InvalidArgumentError).

    It is written beside `path`, loaded by another process through `hub.load` and `hub.KerasLayer`, compared with the model on
    the CPU (1e-5 in float32, 2e-2 in lower precision, absolute below an output of 1 and relative above), and only then moved
    to `path`. A module that was there is replaced in one operation of the kernel (Linux; elsewhere in two renames), so that a
    kill at any instant leaves the old one or the new one; on any error it stays as it was, and nothing else is left behind. A
    manifest inside has the sha256 of every file, see `verify`. On JAX and PyTorch the model is carried as a `.keras` file into a
    TensorFlow process that has only the layers of Keras and keras_vit.

    Args:
        model: a functional `keras.Model` with one image input of fixed size. `model.weights_info` says how it wants its pixels
            ("preprocessing", a `Pixels.asdict()`; [-1, 1] without a record; 0..255 where "include_preprocessing" is true).
        path: a local folder: new, empty, or an earlier module.
        task: "classification" gives the logits (batch, classes) before their activation, the output of layer "head", or of
            "logits" where that is the mean of two heads; "feature_vector" what "head" reads, or the output of a model without
            it, (batch, width); "tokens" the sequence after the last norm or, without one, the last block, (batch, n, width), a
            class token first where there is one. Of a LiT, "image_embedding" gives its image tower; "text_embedding" its text
            tower, a module that takes strings (batch,), UTF-8, in the place of images, and has the signature "tokens" for who
            tokenizes by himself; "image_text" both, a module that takes {"images", "texts"} and gives {"image_embeddings",
            "text_embeddings", "logits"}, the last (images, texts), with the signatures "images" and "texts" for each alone.
        input_range: "unit" for [0, 1], the convention of TF-Hub; "minus1_1" for modules that replace one taking [-1, 1].
        dtype: the policy it computes in, "float32", "mixed_bfloat16" or "mixed_float16"; None for the model's own. Weights and
            head are float32 in each.
        image_size: "fixed" is the model's own; "any" takes any height and width, where the weights do (not Mixer's and ResMLP's;
            FlexiViT's at its patch size), positions being resampled in the graph as loading a checkpoint does; sides up to 4
            times the model's own.
        card: whether to write a model card into the module, in the formats of TF-Hub (tfhub.md) and Hugging Face (README.md); or
            a dict of what the model does not know of itself: see `keras_vit.hub.card.write`.

    Raises:
        ExportError: the model or `path` cannot be used, or the module could not be written or does not reproduce the model.
    """
    form, where = Form(task, input_range, dtype, image_size), f"hub.export to {path}"
    extra = card if isinstance(card, dict) else {}
    cards.check(extra, where)
    model = texts.part(model, task)
    _writer(form).check(model, form, where)
    target = _target(path)
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = staging_folder(target)
        if keras.config.backend() == "tensorflow":
            _writer(form).write(model, staging, form)
        else:
            model.save(staging / "model.keras")
            command = ["-m", "keras_vit.hub.module", staging / "model.keras", staging, json.dumps(dataclasses.asdict(form))]
            _run(command, f"carrying the model from {keras.config.backend()} to TensorFlow", path, KERAS_BACKEND="tensorflow")
        about = {"keras_vit": __version__, **json.loads((staging / "about.json").read_text())}
        if card:
            cards.write(staging / "module", about, extra)
        manifest.write(staging / "module", about)
        _verify(staging, path, form, low_precision=_low_precision(model, dtype))
        place(staging / "module", target)
    except (OSError, tf.errors.OpError) as error:
        raise ExportError(
            f"{where}: expected a local folder that can be written, got {error}. "
            "Free space, change permissions, or choose another path."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _writer(form):
    """The file that checks and writes modules of a form."""
    return texts if form.task in texts.TASKS else graph


def _low_precision(model, dtype):
    return dtype != "float32" if dtype else any(layer.compute_dtype != "float32" for layer in model._flatten_layers())


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
    return _outputs(path, [images], path)[0]


def _outputs(folder, images, named):
    """[{"load": outputs, "keras_layer": outputs}] for a list of batches of images."""
    given = {f"arr_{i}": np.asarray(x, np.float32) for i, x in enumerate(images)}
    arrays = _elsewhere(_as_a_stranger, folder, given, named, BATCH)
    return [{way: arrays[f"{way}_{i}"] for way in ("load", "keras_layer")} for i in range(len(images))]


def _outputs_of_texts(folder, probe, named):
    """[{"load": output, "keras_layer": output}] for each output of a module that takes texts, in the order of the probe."""
    given = {name: value for name, value in probe.items() if not name.startswith("output_")}
    arrays = _elsewhere(texts.as_a_stranger, folder, given, named)
    names = [name.removeprefix("output_") for name in probe if name not in given]
    return [{way: arrays[f"{way}_{name}"] for way in ("load", "keras_layer")} for name in names]


def _elsewhere(function, folder, given, named, *more):
    """{name: array}: what a function leaves of the arrays `given`, run by another process from its source text alone."""
    with tempfile.TemporaryDirectory() as between:
        before, after = Path(between, "inputs.npz"), Path(between, "outputs.npz")
        np.savez(before, **given)
        source = f"{inspect.getsource(function)}\nimport sys\n{function.__name__}(*sys.argv[1:])"
        _run(["-c", source, folder, before, after, *more], "loading and calling it in another process", named)
        return _arrays(after)


def _as_a_stranger(path, given, taken, batch):
    """Runs in another process from its source text alone, so all it has is what it imports."""
    import numpy as np
    import tensorflow as tf
    import tensorflow_hub as hub
    import tf_keras

    with np.load(given, allow_pickle=False) as arrays:
        sizes = [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
    batch, outputs = int(batch), {}
    layer = hub.KerasLayer(path, trainable=True)
    module = layer.resolved_object  # what hub.load gives
    for i, images in enumerate(sizes):
        loaded = [module(tf.constant(images[at : at + batch])).numpy() for at in range(0, len(images), batch)]
        model = tf_keras.Sequential([tf_keras.Input(images.shape[1:]), layer])
        outputs[f"load_{i}"] = np.concatenate(loaded)
        outputs[f"keras_layer_{i}"] = model.predict(images, batch_size=batch, verbose=0)
    np.savez(taken, **outputs)


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


def _verify(folder, path, form, low_precision):
    probe = _arrays(folder / "probe.npz")
    if form.task in texts.TASKS:
        wanted = [value for name, value in probe.items() if name.startswith("output_")]
        found = _outputs_of_texts(folder / "module", probe, path)
    else:
        sizes = range(len(probe) // 2)
        wanted = [probe[f"outputs_{i}"] for i in sizes]
        found = _outputs(folder / "module", [probe[f"images_{i}"] for i in sizes], path)
    for expected, outputs in zip(wanted, found):
        tolerance = (2e-2 if low_precision else 1e-5) * max(1.0, float(np.max(np.abs(expected))))
        for way, got in outputs.items():
            difference = float(np.max(np.abs(got - expected)))
            if not difference <= tolerance:  # so that nan fails too
                raise ExportError(
                    f"hub.export to {path}: expected the module to give the model's outputs within {tolerance:.1e}, got a "
                    f"difference of {difference:.1e} by {way}. Look for nan weights and layers that act differently when traced; "
                    "an earlier module is unchanged."
                )


def staging_folder(target):
    """A new folder beside `target`; those of exports on this machine that were killed are removed."""
    mine = f".{target.name}.new-{socket.gethostname()}-"
    for left in target.parent.glob(f"{mine}*"):
        pid = left.name.removeprefix(mine).partition("-")[0]
        if pid.isdecimal() and not _runs(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=target.parent))


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _exchange(one, other):
    """Swaps two folders in one operation; False where the system or the file system has none (renameat2 of Linux)."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def place(new, target):
    """Moves the folder `new` to `target`, where an earlier one is replaced by it; on an error that one is as it was."""
    if not target.exists():
        os.rename(new, target)
        return
    if _exchange(new, target):
        return  # the earlier one is in the staging folder now
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
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
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
    source, folder, form = sys.argv[1:]
    form = Form(**json.loads(form))
    _writer(form).write(keras.saving.load_model(source, compile=False), Path(folder), form)
