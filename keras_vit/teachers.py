"""Opens the models that others learn from: a registered variant, a `.keras` file, or the folder of a TF-Hub module."""

import difflib
import os
import warnings

import keras

from keras_vit import errors, hub, zoo
from keras_vit.data.pixels import Pixels
from keras_vit.training.objectives import Teacher

RANGES = {"unit": Pixels(mean=(0.0,) * 3, std=(255.0,) * 3), "minus1_1": Pixels()}  # of a module's input


def find(word):
    """What `word` names, before anything is opened: "module", "keras" or "variant".

    Raises:
        errors.ArgumentError: nothing of these.
    """
    path, name = os.path.expanduser(word), word.partition(":")[0]
    if name in _names():
        return "variant"
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "saved_model.pb")):
            return "module"
        raise errors.ArgumentError(f"teacher {word}: expected the folder of a TF-Hub module, found no saved_model.pb in it.")
    if os.path.isfile(path) and path.endswith(".keras"):
        return "keras"
    if path.endswith(".keras") or os.sep in name:
        raise errors.ArgumentError(f"teacher {word}: there is no such file or folder; check the path.")
    near = ", ".join(difflib.get_close_matches(name, _names(), 3)) or "see keras_vit.list_models()"
    raise errors.ArgumentError(
        f"teacher {word!r}: expected VARIANT:WEIGHTS, a .keras file or the folder of a TF-Hub module; nearest: {near}."
    )


def _names():
    return [name for row in zoo.VARIANTS.values() for name in (row.name, *row.upstream)]


def open_teacher(word):
    """A `Teacher`.

    Args:
        word: VARIANT, which means VARIANT:imagenet, VARIANT:WEIGHTS (a tag, path or URL), a `.keras` file, or, on TensorFlow, the
            folder of a classification module that this package exported.

    Raises:
        errors.KerasViTError: there is no such model, or it cannot be loaded.
    """
    kind = find(word)
    if kind == "variant":
        name, _, weights = word.partition(":")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is all zeros")  # `Teacher.check` refuses it
            model = zoo.create_model(name, weights=weights or "imagenet")
    elif kind == "module":
        path = os.path.expanduser(word)
        layer, record = hub.HubLayer(path, name="module"), hub.verify(path)
        if record["task"] != "classification":
            raise errors.ArgumentError(f"teacher {word}: expected a module of task 'classification', got {record['task']!r}.")
        images = keras.Input((*record["size"], 3), name="images")
        return Teacher(keras.Model(images, layer(images), name="module_teacher"), word, RANGES[record["input_range"]])
    else:
        try:
            model = keras.saving.load_model(os.path.expanduser(word), compile=False)
        except Exception as error:  # Keras says in many ways that a file is damaged or of unknown classes
            raise errors.ArgumentError(f"teacher {word}: Keras cannot load this file: {error}") from error
    return Teacher(model, word, zoo.pixels_of(model))
