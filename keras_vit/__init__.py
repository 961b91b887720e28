"""Vision transformers in Keras 3, in the style of `keras.applications`, with the authors' original checkpoints."""

import importlib

from keras_vit import errors, zoo
from keras_vit import models as _families  # noqa: F401 - registers every family
from keras_vit.checkpoints import augreg
from keras_vit.evaluation.classify import decode_predictions
from keras_vit.evaluation.zeroshot import zero_shot
from keras_vit.version import __version__
from keras_vit.zoo import create_model, list_models, list_weights, load_weights, preprocess_input, save_npz

_CONSTRUCTORS = {row.name: row.build for row in zoo.VARIANTS.values()}
_CONSTRUCTORS |= {row.builder.__name__: row.builder for row in zoo.VARIANTS.values()}
globals().update(_CONSTRUCTORS)

__all__ = [
    "augreg", "create_model", "decode_predictions", "errors", "hub", "list_models", "list_weights", "load_weights",
    "preprocess_input", "save_npz", "zero_shot", "__version__", *_CONSTRUCTORS,
]  # fmt: skip


def __getattr__(name):
    if name == "hub":  # needs TensorFlow, which `import keras_vit` does not
        return importlib.import_module("keras_vit.hub")
    raise AttributeError(f"module 'keras_vit' has no attribute {name!r}; see keras_vit.list_models()")


def __dir__():
    return sorted(__all__)
