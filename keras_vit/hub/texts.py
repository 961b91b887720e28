"""Modules of a LiT: its text tower, which takes strings, and the pair of towers. `graph` makes that of images alone."""

import json
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_vit import zoo
from keras_vit.errors import ExportError
from keras_vit.hub import graph

TASKS = ("text_embedding", "image_text")
TOWERS = {"image_embedding": "image_tower", "text_embedding": "text_tower"}
PROBES = ("a photo of a dog", "", "Two red circles, \u00e9t\u00e9 \U0001f600!")  # texts that are given to module and model


def part(model, task):
    """What of a LiT a task's module is made of: one tower, or all; any other model as it is."""
    return getattr(model, TOWERS.get(task, ""), None) or model


def check(model, form, where):
    """Raises ExportError, naming `where`, for a model that cannot become such a module."""
    form.check(where)
    towers = ("image_tower", "text_tower") if form.task == "image_text" else ()
    kinds = [tensor.dtype for tensor in getattr(model, "inputs", None) or []]
    if not all(getattr(model, name, None) for name in towers) or "int32" not in kinds:
        raise ExportError(
            f"{where}: task={form.task!r} needs a LiT with {'both towers' if towers else 'a text tower'}, got "
            f"{type(model).__name__} {getattr(model, 'name', '')!r} with inputs of {kinds}. Build one, such as "
            "keras_vit.LiT_B16B_2."
        )
    if form.image_size == "any":
        raise ExportError(f"{where}: task={form.task!r} takes images of the model's size alone; leave image_size out.")
    if model.tokenizer is None:
        raise ExportError(
            f"{where}: expected a model with a tokenizer, since the module takes strings, got {model.name!r} without one. Build "
            "it with vocabulary=, the file that was published with its weights."
        )


def write(model, folder, form):
    """Writes `folder/module`, `folder/about.json` and `folder/probe.npz`; see `graph.write`.

    The probe holds the inputs by name, "texts" and perhaps "images", and what the Keras model makes of them, "output" or
    "output_NAME".
    """
    if form.dtype is not None:
        model = graph.with_dtype(model, form.dtype)
    both, tokenizer, pixels = form.task == "image_text", model.tokenizer, zoo.pixels_of(model)
    texts = model.text_tower if both else model
    strings = tf.TensorSpec((None,), tf.string, name="texts")

    def cast(x):
        return tf.cast(x, tf.float32)

    def of_texts(given, training=False):
        return cast(texts(tokenizer.in_graph(given), training=training))

    def function(body, *given):
        return tf.function(body, input_signature=given, autograph=False)

    signatures = {"texts": function(lambda texts: {"text_embeddings": of_texts(texts)}, strings)}
    if both:
        own = tuple(model.image_tower.input_shape[1:3])
        pictures = tf.TensorSpec((None, *own, 3), tf.float32, name="images")

        def of_images(images, training=False):
            return cast(model.image_tower(graph.ready(images, pixels, form.input_range), training=training))

        def run(given, training=False):
            found = dict(
                image_embeddings=of_images(given["images"], training), text_embeddings=of_texts(given["texts"], training)
            )
            return {**found, "logits": model.logits(*found.values())}

        def serve(images, texts):
            return run({"images": graph.checked(images, pictures.shape), "texts": texts})

        spec = {"images": pictures, "texts": strings}
        signatures["serving_default"] = function(serve, pictures, strings)
        signatures["images"] = function(
            lambda images: {"image_embeddings": of_images(graph.checked(images, pictures.shape))}, pictures
        )
    else:
        own, run, spec = None, of_texts, strings
        signatures["serving_default"] = signatures["texts"]
        tokens = tf.TensorSpec((None, tokenizer.length), tf.int32, name="tokens")
        signatures["tokens"] = function(lambda tokens: {"text_embeddings": cast(texts(tokens, training=False))}, tokens)

    call = tf.function(run, autograph=False)
    root = tf.__internal__.tracking.AutoTrackable()
    for training in (False, True):
        call.get_concrete_function(spec, training=training)
    root.__call__ = call
    root.variables = [v.value for v in model.variables]
    root.trainable_variables = [v.value for v in model.trainable_variables]
    root.regularization_losses = graph.penalties(model)
    tf.saved_model.save(root, str(folder / "module"), signatures=signatures)

    given = {"texts": np.array(PROBES)}
    tokens = tokenizer(list(PROBES))
    with tf.device("CPU:0"):
        outputs = {"text_embeddings": texts(tf.constant(tokens), training=False)}
        if both:
            given["images"] = graph.probe(own, form.input_range)
            outputs["image_embeddings"] = model.image_tower(
                graph.ready(given["images"], pixels, form.input_range), training=False
            )
            outputs["logits"] = model.logits(outputs["image_embeddings"], outputs["text_embeddings"])
    outputs = {f"output_{name}": cast(value).numpy() for name, value in outputs.items()}
    np.savez(folder / "probe.npz", **given, **outputs)
    record = {**graph.about(model, model, form, own), "macs": graph.multiply_adds(model)}
    record |= dict(text_length=tokenizer.length, vocabulary=dict(kind=tokenizer.kind, sha256=tokenizer.sha256))
    Path(folder, "about.json").write_text(json.dumps(record))


def as_a_stranger(path, given, taken):
    """Runs in another process from its source text alone, so all it has is what it imports."""
    import numpy as np
    import tensorflow as tf
    import tensorflow_hub as hub

    with np.load(given, allow_pickle=False) as arrays:
        inputs = {name: tf.constant(arrays[name]) for name in arrays.files}
    layer = hub.KerasLayer(path, trainable=True)
    asked = inputs if len(inputs) > 1 else inputs["texts"]
    outputs = {}
    for way, found in {"load": layer.resolved_object(asked), "keras_layer": layer(asked)}.items():
        found = found if isinstance(found, dict) else {"text_embeddings": found}
        outputs |= {f"{way}_{name}": value.numpy() for name, value in found.items()}
    np.savez(taken, **outputs)
