"""What a module computes: the graph behind each of its functions, made from a Keras model and saved by TensorFlow."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_vit import zoo
from keras_vit.data import pipeline
from keras_vit.errors import ArgumentError, ExportError
from keras_vit.explain.cost import cost

TASKS = {  # and what each calls its output
    "classification": "logits", "feature_vector": "feature_vector", "tokens": "tokens", "image_embedding": "image_embeddings",
    "text_embedding": "text_embeddings", "image_text": "logits",
}  # fmt: skip
INPUT_RANGES = {"unit": (255.0, 0.0), "minus1_1": (127.5, 127.5)}  # a module's input to 0..255: x * scale + offset
DTYPES = (None, "float32", "mixed_bfloat16", "mixed_float16")
IMAGE_SIZES = ("fixed", "any")
LARGEST = 4  # of any size: sides up to so many times the model's own, since attention grows with their fourth power
# Layers that compute in float32 whatever the rest does
_FLOAT32 = ("preprocessing", *zoo.HEADS, "logits", "predictions", "projection", "unit_length", "similarity")
_PROBES = 2  # images


@dataclasses.dataclass(frozen=True)
class Form:
    """How `export` was asked to write a module; see there."""

    task: str = "classification"
    input_range: str = "unit"
    dtype: str | None = None
    image_size: str = "fixed"

    def check(self, where):
        """Raises ExportError for a value that is not known."""
        known = dict(task=tuple(TASKS), input_range=tuple(INPUT_RANGES), dtype=DTYPES, image_size=IMAGE_SIZES)
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ExportError(
                    f"{where}: expected {name} in {allowed}, got {getattr(self, name)!r}; by default it is "
                    f"{getattr(Form, name)!r}."
                )


def check(model, form, where):
    """Raises ExportError, naming `where`, for a model that cannot become a module of that form."""
    form.check(where)
    shapes = [tuple(tensor.shape) for tensor in getattr(model, "inputs", None) or []]
    if len(shapes) != 1 or len(shapes[0]) != 4 or None in shapes[0][1:] or shapes[0][3] != 3:
        raise ExportError(
            f"{where}: expected a functional keras.Model with one input (None, H, W, 3) of fixed size, got "
            f"{type(model).__name__} with inputs {shapes}. Build it with input_shape=(H, W, 3)."
        )
    if form.task == "classification" and zoo.zero_head(model):
        raise ExportError(
            f"{where}: expected a classifier, got {model.name!r}, whose checkpoint has an all-zero head: its logits mean "
            "nothing. Build it with classes=N and train it, take the augreg weights, or export with task='feature_vector'."
        )
    if form.image_size == "any" and _any_size(model) is None:
        able = [family.name for family in zoo.FAMILIES.values() if family.any_size is not zoo.Family.any_size]
        raise ExportError(
            f"{where}: image_size='any' needs a model of this package whose weights fit images of any size (of "
            f"{', '.join(able)}), got {model.name!r} of family {getattr(model, 'family', None)}. Where weights fix the number of "
            "tokens, export one module for each size with image_size='fixed'."
        )
    output(model, form.task, where)


def write(model, folder, form):
    """Writes `folder/module`, without a manifest; `folder/about.json`, what is to be said of it; and `folder/probe.npz`.

    The probe holds, for each of a few sizes i, "images_i" and "outputs_i", what the Keras model itself makes of them.
    """
    if form.dtype is not None:
        model = with_dtype(model, form.dtype)
    key = TASKS[form.task]
    whole = _whole(model, form.task)
    own = tuple(whole.input_shape[1:3])
    bounds, macs = None, multiply_adds(keras.Model(whole.inputs, whole.output[key]))
    if form.image_size == "any":
        whole, bounds = _open(whole), _bounds(model, own)
    main = keras.Model(whole.inputs, whole.output[key])
    pixels = zoo.pixels_of(model)

    def prepare(images):
        return ready(_sized(images, *bounds) if bounds else images, pixels, form.input_range)

    @tf.function(autograph=False)
    def run(x, training=False):
        return tf.cast(main(x, training=training), tf.float32)

    @tf.function(autograph=False)
    def call(images, training=False):
        return run(prepare(images), training=training)

    spec = tf.TensorSpec((None, *main.input_shape[1:]), tf.float32, name="images")

    def function(body, given=spec):
        return tf.function(body, input_signature=[given], autograph=False)

    def features(images):
        found = whole(prepare(checked(images, spec.shape)), training=False)
        return {name: tf.cast(value, tf.float32) for name, value in found.items()}

    def of_bytes(image_bytes):
        def image(data):
            return pipeline.eval_image(pipeline.decode(data), own, pixels)

        return {key: run(tf.map_fn(image, image_bytes, fn_output_signature=tf.TensorSpec((*own, 3), tf.float32)))}

    # Not tf.Module: its `variables` are read-only properties, and the saved module would have no trainable variables.
    root = tf.__internal__.tracking.AutoTrackable()
    for training in (False, True):
        call.get_concrete_function(spec, training=training)
    root.__call__ = call
    root.call_infer, root.call_train = function(call), function(lambda images: call(images, training=True))  # for TFSMLayer
    root.features = function(features)
    root.variables = [v.value for v in main.variables]  # with the seeds of dropout
    root.trainable_variables = [v.value for v in main.trainable_variables]
    root.regularization_losses = penalties(main)
    signatures = {
        "serving_default": function(lambda images: {key: call(checked(images, spec.shape))}),
        "features": root.features,
        "serving_bytes": function(of_bytes, tf.TensorSpec((None,), tf.string, name="image_bytes")),
    }
    tf.saved_model.save(root, str(folder / "module"), signatures=signatures)

    sizes = [own] + ([_probed(own, *bounds)] if bounds else [])
    images = [probe(size, form.input_range) for size in sizes]
    with tf.device("CPU:0"):  # where the other process computes too: a GPU's matrix products may be rounded to TF32
        outputs = [tf.function(main, autograph=False)(tf.constant(prepare(x)), training=False) for x in images]
    outputs = {f"outputs_{i}": tf.cast(y, tf.float32).numpy() for i, y in enumerate(outputs)}
    np.savez(folder / "probe.npz", **outputs, **{f"images_{i}": x for i, x in enumerate(images)})
    record = {**about(model, main, form, own, bounds), "macs": macs}
    Path(folder, "about.json").write_text(json.dumps(record))


def ready(images, pixels, input_range):
    """Images as a module takes them -> as its model does."""
    scale, offset = INPUT_RANGES[input_range]
    return pixels.normalize(images * np.float32(scale) + np.float32(offset))


def probe(size, input_range):
    """A few images of noise, (n, h, w, 3) float32, as a module takes them."""
    scale, offset = INPUT_RANGES[input_range]
    images = np.random.default_rng(0).random((_PROBES, *size, 3), np.float32)
    return (images * np.float32(255.0) - np.float32(offset)) / np.float32(scale)


def penalties(model):
    """The functions of no argument that a module keeps for each regularised weight."""

    def penalty(variable):
        loss = tf.function(lambda: variable.regularizer(variable.value), input_signature=[], autograph=False)
        loss.get_concrete_function()
        return loss

    return [penalty(v) for v in model.trainable_variables if v.regularizer is not None]


def about(model, main, form, own, bounds=None):
    """What a manifest and a card say of a module beside its files; a dict of what JSON holds."""
    info, facts = getattr(model, "weights_info", None) or {}, getattr(model, "_facts", {})
    trainable = {id(v) for v in main.trainable_variables}
    return dict(
        model=facts.get("of", model.name), variant=getattr(model, "variant", None), family=getattr(model, "family", None),
        **dataclasses.asdict(form), output=TASKS[form.task], size=own,
        sizes=bounds and dict(zip(("smallest", "step", "largest"), bounds)),
        shape=list(main.outputs[0].shape[1:]), parameters=main.count_params(),
        weights={k: v for k, v in info.items() if k != "stored"},
        variables=[dict(name=v.path, trainable=id(v) in trainable) for v in main.variables],
    )  # fmt: skip


def multiply_adds(model):
    """Of one image; None where a layer of another package does not say."""
    try:
        return cost(model).macs
    except ArgumentError:
        return None


def output(model, task, where):
    """The KerasTensor that a task's module gives."""
    names = [layer.name for layer in model.layers]
    if task == "classification":
        logits = zoo.logits(model)
        if logits is None:
            raise ExportError(
                f"{where}: task='classification' needs a layer 'head', whose output are the logits; {model.name!r} has none. "
                "Export it with task='feature_vector' or 'tokens'."
            )
        return logits
    rank, found = (3 if task == "tokens" else 2), None
    if rank == 2 and "head" in names:
        found = zoo.tap_input(model, "head")
    elif rank == 3 and (last := _last_tokens(model)):
        found = zoo.tap(model, last)
        if len(found.shape) == 4:  # of a family that keeps the grid
            found = keras.layers.Reshape((-1, found.shape[-1]), name="tokens_in_a_row")(found)
    elif len(model.outputs) == 1:
        found = model.outputs[0]
    if found is None or len(found.shape) != rank:
        got = [tuple(tensor.shape) for tensor in ([found] if found is not None else model.outputs)]
        raise ExportError(
            f"{where}: task={task!r} gives one {'vector' if rank == 2 else 'sequence of vectors'} for each image, got {got} from "
            f"{model.name!r}. Build it with pooling=, or choose another task."
        )
    return found


def _last_tokens(model):
    """The name of the layer behind the last block: the norm after it, where there is one; None without either."""
    if any(layer.name == "encoder_norm" for layer in model.layers):
        return "encoder_norm"
    return next((layer.name for layer in reversed(model.layers) if "block_" in layer.name and hasattr(layer, "TAPS")), None)


def _whole(model, task):
    """The model of all that the signature "features" gives: {name: tensor}, blocks and attention scores among them."""
    main = output(model, task, model.name)
    part = keras.Model(model.inputs[0], main)
    found = {}
    for layer in part.layers:
        if hasattr(layer, "TAPS"):
            found[layer.name] = zoo.tap(part, layer.name)
            if "scores" in layer.TAPS:
                found[f"{layer.name}_scores"] = zoo.tap(part, f"{layer.name}/scores")
    return keras.Model(model.inputs[0], {**found, TASKS[task]: main})


def _open(model):
    """The same layers on images of open height and width."""
    images = keras.Input((None, None, 3), name="images")
    return keras.models.clone_model(model, input_tensors=images, clone_function=lambda layer: layer)


def _any_size(model):
    family = zoo.FAMILIES.get(getattr(model, "family", None))
    return family.any_size(model) if family else None


def _bounds(model, own):
    """(smallest, step, largest), each (h, w), of the images that a module of any size takes."""
    smallest, step = _any_size(model)
    return smallest, step, tuple(LARGEST * side for side in own)


def _probed(own, smallest, step, largest):
    """An (h, w) within bounds that is not the model's own, and not square."""
    return tuple(max(least, side - i * unit) for i, side, least, unit in zip((1, 2), own, smallest, step))


def _sized(images, smallest, step, largest):
    """Images whose sides fit, or InvalidArgumentError."""
    size = tf.shape(images)[1:3]
    fits = tf.reduce_all((size >= smallest) & (size <= largest) & (size % step == 0))
    message = f"images: expected height and width from {smallest} to {largest} in steps of {step}, got"
    return _asserted(images, fits, message, size)


def checked(images, shape):
    """Finite images of the shape, or InvalidArgumentError; a signature itself takes what it is given."""
    images = tf.ensure_shape(images, shape)
    finite = tf.reduce_all(tf.math.is_finite(images))
    return _asserted(images, finite, "images: expected finite numbers, got NaN or infinity in a batch of shape", tf.shape(images))


def _asserted(value, condition, *message):
    with tf.control_dependencies([tf.raw_ops.Assert(condition=condition, data=message, summarize=8)]):
        return tf.identity(value)


def with_dtype(model, policy):
    """A copy of a model, with its values, that computes in another type; preprocessing and classifier stay in float32."""

    def clone(layer):
        if isinstance(layer, keras.Model):
            return with_dtype(layer, policy)
        config = layer.get_config()
        return type(layer).from_config(config if layer.name in _FLOAT32 else {**config, "dtype": policy})

    other = keras.models.clone_model(model, clone_function=clone)
    for new, old in zip(other.variables, model.variables):
        new.assign(old)
        new.trainable, new.regularizer = old.trainable, old.regularizer
    if isinstance(model, zoo.Model):
        other.remember(**model._facts)
    else:
        other.weights_info = getattr(model, "weights_info", None)
    return other
