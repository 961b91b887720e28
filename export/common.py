"""What the commands of this folder share: models by name, real images, a file's difference, rate and accuracy, and the flags.

Every file that is written here takes float32 RGB images in [0, 1], (b, H, W, 3), with the checkpoint's preprocessing inside, and
gives logits, or a vector where the model has no head. A `predict` below is a function of that kind on numpy arrays.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
import zipfile

import keras
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints import files
from keras_vit.evaluation import classify
from keras_vit.evaluation.sample import training_sample

BATCH = 8  # images in a call that is timed
TOLERANCE = 1e-5  # of a file in float32; absolute for outputs up to 1, relative above
ROUNDS = 7  # of which the median counts
RANDOM = "none"  # the value of --weights that asks for no checkpoint
LARGEST = 2**31 - 2**24  # bytes of weights that fit into a file of protocol or flat buffers, beside its graph
UNIT = dict(mean=(0.0,) * 3, std=(255.0,) * 3)  # of `Pixels` that bring 0..255 into [0, 1]
FLAGS = {
    "model": dict(metavar="MODEL", help="a registered name, such as ViT_B16, or a .keras file"),
    "--weights": dict(help="a tag, AugReg file name, path or URL; 'none' for random ones; needed where MODEL is a name"),
    "--out": dict(required=True, help="what to write; replaced in one step"),
    "--size": dict(type=int, help="height and width of the images in pixels; default: the checkpoint's own"),
    "--classes": dict(type=int, help="classes of a new head; default: the checkpoint's own"),
    "--dataset": dict(help="'digits', a folder or a TFDS name on which to compare the accuracy with the Keras model's"),
    "--split": dict(default="test", help="the split of --dataset (default: %(default)s)"),
    "--json": dict(action="store_true", help="print one JSON document in place of lines"),
}


def parser(description, *names):
    """An `argparse` parser with those of `FLAGS` that are named, in that order; all of them where none is."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names or FLAGS:
        made.add_argument(name, **FLAGS[name])
    return made


def command(main):
    """Decorates a file's `main(argv=None)`: an error that the user can mend is one message and exit status 1, no traceback."""

    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except (errors.KerasViTError, OSError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1

    return run


def need_tensorflow(asked):
    """Raises ExportError, naming `asked`, where Keras runs on another backend: the converters read TensorFlow's graphs."""
    if keras.config.backend() != "tensorflow":
        raise errors.ExportError(
            f"{asked}: expected the TensorFlow backend, got {keras.config.backend()!r}. Set KERAS_BACKEND=tensorflow; a .keras "
            "or .npz file that another backend wrote brings the weights along."
        )


def build(name, weights=None, **options):
    """A model to export.

    Args:
        name: registered, of here or upstream; or the path of a `.keras` file, which has its own weights and takes no options. One
            that computes in lower precision is brought to float32.
        weights: a tag, an AugReg file name, a path or URL of a checkpoint; `"none"` for random weights, the head's too, the same
            ones every time, which is said on stderr.
        **options: of the constructor; those that are None are left out.

    Raises:
        errors.ArgumentError: no weights are named, or there is no such model, weight, file or option.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if str(name).endswith(".keras"):
        return _stored(name, weights, options)
    if weights is None:
        tags = ", ".join(keras_vit.list_weights(name)) or "none published"
        raise errors.ArgumentError(
            f"{name}: expected --weights, got none; it has {tags}; or give a checkpoint's path or URL, or --weights={RANDOM} for "
            "random ones."
        )
    try:
        if weights != RANDOM:
            return keras_vit.create_model(name, weights=weights, **options)
        keras.utils.set_random_seed(0)
        model = keras_vit.create_model(name, weights=None, **options)
    except TypeError as error:  # the registry names the constructor's arguments
        raise errors.ArgumentError(str(error)) from error
    say(f"{name}: weights={RANDOM}, so all weights are random, the head's too: good for sizes and speeds, not for predictions.")
    for layer in model.layers:
        if layer.name in zoo.HEADS:  # zeros by default, under which any two models agree
            layer.kernel.assign(0.1 * np.random.default_rng(0).standard_normal(layer.kernel.shape))
    return model


def _stored(path, weights, options):
    given = [*(["weights"] if weights else []), *options]
    if given:
        raise errors.ArgumentError(f"{path}: a .keras file is used as it is, got {', '.join(given)} as well; leave that out.")
    if not pathlib.Path(path).is_file():
        raise errors.ArgumentError(f"{path}: expected a .keras file, found nothing; check the path.")
    try:
        model = keras.saving.load_model(path, compile=False)
    except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise errors.ArgumentError(f"{path}: expected a .keras file of keras_vit, it cannot be read: {error}") from error
    if not isinstance(model, zoo.Model):
        raise errors.ArgumentError(
            f"{path}: expected a model of keras_vit, which knows its preprocessing, got {type(model).__name__} {model.name!r}; "
            "save the keras_vit model itself."
        )
    low = {layer.compute_dtype for layer in model._flatten_layers()} & {"bfloat16", "float16"}
    if low:
        say(f"{path}: it computes in {low.pop()}; exported in float32.")
        for layer in model._flatten_layers():
            layer.dtype_policy = "float32"
    return model


def say(text):
    """A line for the reader that is no figure: to stderr, so that --json stays one document."""
    print(text, file=sys.stderr)


def shape_of(size):
    """`--size` as `input_shape`."""
    return None if size is None else (size, size, 3)


def real_images(count, size):
    """(count, h, w, 3) uint8: squares cut from scikit-learn's photographs china.jpg and flower.jpg, the same ones every time.

    Args:
        count: images, of both photographs in turn.
        size: h and w in pixels: one number, or (h, w); resized with antialiasing.
    """
    height, width = (size, size) if isinstance(size, int) else size
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    rng, made = np.random.default_rng(0), np.empty((count, height, width, 3), np.uint8)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        side = int(rng.integers(64, min(photograph.size) + 1))
        x, y = (int(rng.integers(0, whole - side + 1)) for whole in photograph.size)
        made[i] = photograph.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return made


def unit(images):
    """uint8 images -> float32 in [0, 1], what exported files take."""
    return np.asarray(images, np.float32) / np.float32(255.0)


def image_model(model):
    """The part of a model that takes images alone: the image tower of a LiT, any other model as it is."""
    return getattr(model, "image_tower", None) or model


def logits_model(model):
    """The model up to its logits, before their activation; the model itself where it has no head."""
    logits = zoo.logits(model)
    return model if logits is None else keras.Model(model.inputs, logits)


def output_name(model):
    """What an exported file calls its output: "logits", or "feature_vector" of a model without a head.

    Raises:
        errors.ExportError: it has no head and gives no vector; or its checkpoint's head is all zeros.
    """
    if zoo.zero_head(model):
        raise errors.ExportError(
            f"{model.name!r}: expected a classifier, got one whose checkpoint has an all-zero head; its logits mean nothing. "
            "Give --classes=N and train it, take the augreg weights, or export features of it by export.hub."
        )
    if zoo.logits(model) is not None:
        return "logits"
    if len(model.outputs) != 1 or len(model.outputs[0].shape) != 2:
        shapes = [tuple(output.shape) for output in model.outputs]
        raise errors.ExportError(
            f"{model.name!r}: expected a head, or one vector for each image, got {shapes}. Build it with pooling=, or export it "
            "as tokens by export.hub."
        )
    return "feature_vector"


def served(model, batch=None):
    """The `tf.function` behind an exported file: images, float32 (batch, H, W, 3) in [0, 1] -> {`output_name`: float32}."""
    import tensorflow as tf  # not at the top: on another backend the commands first say that they need it

    name, main = output_name(model), logits_model(model)
    check_size(main)

    def call(images):
        return {name: tf.cast(main(keras_vit.preprocess_input(images * 255.0, model), training=False), tf.float32)}

    spec = tf.TensorSpec((batch, *main.input_shape[1:]), tf.float32, name="images")
    return tf.function(call, input_signature=[spec], autograph=False)


def check_size(model):
    """Raises ExportError where a model's weights in float32 are more than fits into one file."""
    size = sum(4 * int(np.prod(v.shape)) for v in model.variables)
    if size > LARGEST:
        raise errors.ExportError(
            f"{model.name!r}: expected at most {LARGEST:,} bytes of weights, which is what this file format holds, got {size:,}. "
            "Export it as a module by export.hub."
        )


def keras_predict(model):
    """The `predict` of a Keras model, by ways of its own: preprocessing in numpy and Keras's `predict_on_batch`."""
    main = logits_model(model)

    def predict(images):
        ready = keras_vit.preprocess_input(np.asarray(images, np.float32) * np.float32(255.0), model)
        return keras.ops.convert_to_numpy(main.predict_on_batch(ready))

    return predict


def difference(predict, model, count=8):
    """(largest absolute difference from the Keras model on real images, its largest output), both floats."""
    images = unit(real_images(count, tuple(model.input_shape[1:3])))
    expected, got = keras_predict(model)(images), np.asarray(predict(images))
    if got.shape != expected.shape:
        raise errors.ExportError(f"{model.name!r}: expected outputs of shape {expected.shape} from its file, got {got.shape}.")
    return float(np.max(np.abs(got - expected))), float(np.max(np.abs(expected)))


def checked(predict, model, where, tolerance=TOLERANCE):
    """`difference`, or ExportError, naming `where`, if it is above the tolerance or no number."""
    found, largest = difference(predict, model)
    allowed = tolerance * max(1.0, largest)
    if not found <= allowed or not np.isfinite(found):
        raise errors.ExportError(
            f"{where}: expected the model's outputs within {allowed:.1e}, got a difference of {found:.1e}. Look for nan weights; "
            "nothing was written."
        )
    return found, largest


def rate(predict, images, rounds=ROUNDS):
    """Images per second, the median of so many calls with this batch; a call before them does not count."""
    predict(images)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        predict(images)
        seconds.append(time.perf_counter() - began)
    return len(images) / statistics.median(seconds)


def speed(predict, model, batch=BATCH):
    """The figures of `report` that say how fast a `predict` of a model's images is."""
    images = unit(real_images(batch, tuple(model.input_shape[1:3])))
    return dict(images_per_second=rate(predict, images), batch=batch)


def batches(model, dataset, split, batch=32, count=None):
    """(images in [0, 1], one-hot labels), numpy, of a data set at a model's size, resized as its checkpoint wants it.

    Args:
        model: says the size and the resizing.
        dataset, split: of `keras_vit.data.pipeline.open_source`.
        batch: images in each.
        count: a fixed choice of so many examples; None for all, in order.
    """
    from keras_vit.data import pipeline  # imports TensorFlow

    source = pipeline.open_source(dataset, split)
    if count is not None:
        source = training_sample(source, count)
    pixels = dataclasses.replace(pipeline.Pixels.from_dict(model.weights_info.get("preprocessing", {})), **UNIT)
    return pipeline.eval_batches(source, size=tuple(model.input_shape[1:3]), batch=batch, pixels=pixels).as_numpy_iterator()


def top1(predict, model, dataset, split="test"):
    """Share of a split's examples whose label has the highest score; a tie counts against it.

    Args:
        predict: images in [0, 1] -> (b, classes).
        model: the Keras model behind it, for the size and resizing of the images.
        dataset, split: of `keras_vit.data.pipeline.open_source`.
    """
    scores = ((predict(images), labels) for images, labels in batches(model, dataset, split))
    return classify.evaluate_scores(scores, from_logits=True).accuracy


def accuracies(predict, model, dataset, split):
    """What a file changes: dict(dataset, split, keras, file, change), shares and their difference; None without a data set."""
    if dataset is None:
        return None
    ours, theirs = (top1(each, model, dataset, split) for each in (keras_predict(model), predict))
    return dict(dataset=dataset, split=split, keras=ours, file=theirs, change=theirs - ours)


def report(path, model, *, as_json=False, **figures):
    """Prints what was written: one line for each figure, or one JSON document.

    Args:
        path: the file or folder.
        model: that it was made of.
        as_json: whether to print JSON.
        **figures: in the order to print, None left out. Known ones get their unit: bytes (default: measured of `path`),
            difference and largest (as `difference` returns them), images_per_second and batch, top1 (as `accuracies` returns it).

    Returns:
        The document, a dict.
    """
    document = {"path": str(path), "model": model.name, "bytes": size_of(path), **figures}
    document = {key: value for key, value in document.items() if value is not None}
    if as_json:
        print(json.dumps(document, indent=1))
        return document
    for key, value in document.items():
        if key in _LINES:
            print(_LINES[key](value, document))
        elif key not in ("largest", "batch"):  # said with another figure
            print(f"{key.replace('_', ' ')}: {value}")
    return document


_LINES = {
    "bytes": lambda value, _: f"bytes on disk: {value:,}",
    "difference": lambda value, all_: (
        f"largest difference from the Keras model on real images: {value:.2e}"
        + (f" (its largest output: {all_['largest']:.2f})" if "largest" in all_ else "")
    ),
    "rounding": lambda value, _: f"largest change by rounding weights (in the line above both are rounded): {value:.2e}",
    "images_per_second": lambda value, all_: (
        f"images per second: {value:.1f}" + (f" (batch {all_['batch']}, median)" if "batch" in all_ else "")
    ),
    "top1": lambda value, _: (
        f"top-1 on {value['dataset']} ({value['split']}): Keras {value['keras']:.4f}, this file {value['file']:.4f}, "
        f"change {100 * value['change']:+.2f} points"
    ),
}


def size_of(path):
    """Bytes of a file, or of all files below a folder."""
    path = pathlib.Path(path)
    return path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


@contextlib.contextmanager
def writing(path, ending):
    """Yields a temporary path to write and verify, which takes the place of `path` if the body succeeds; folders are made.

    Raises:
        errors.ArgumentError: `path` has another ending, or is a folder.
    """
    path = pathlib.Path(path)
    if not path.name.endswith(ending) or path.is_dir():
        raise errors.ArgumentError(f"--out={path}: expected the name of a {ending} file; call it {path.with_suffix(ending)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        yield temporary
