"""Classification: names for predictions, and accuracy on a data set."""

import json

import keras
import numpy as np

from keras_vit import errors, zoo
from keras_vit.checkpoints.fetch import STORAGE, fetch
from keras_vit.checkpoints.weights import IMAGENET21K

_IMAGENET1K = f"{STORAGE}/download.tensorflow.org/data/imagenet_class_index.json"  # of keras.applications
_IMAGENET21K = f"{STORAGE}/bit_models/imagenet21k_wordnet_ids.txt", f"{STORAGE}/bit_models/imagenet21k_wordnet_lemmas.txt"


def class_names(classes):
    """[(WordNet id, name)] of ImageNet-1k (1,000 classes) or of ImageNet-21k (21,843, in Google's own order); fetched and cached.

    Raises:
        errors.ArgumentError: another number of classes, whose names only the caller knows.
    """
    if classes == 1000:
        index = json.loads(fetch(_IMAGENET1K).path.read_text())
        names = [tuple(index[str(i)]) for i in range(1000)]
    elif classes == IMAGENET21K:
        ids, lemmas = (fetch(url).path.read_text().splitlines() for url in _IMAGENET21K)
        names = list(zip(ids, lemmas))
    else:
        raise errors.ArgumentError(
            f"class names are known for 1000 and {IMAGENET21K} classes, not for {classes}; pass labels=[...] of that length."
        )
    if len(names) != classes:
        raise errors.DataError(
            f"the list of class names has {len(names)} entries, expected {classes}; fetch it anew: delete it from the cache "
            "and its record from the lock file."
        )
    return names


def decode_predictions(predictions, top=5, labels=None):
    """The best classes of each row of scores.

    Args:
        predictions: (b, classes) scores, as a model's `predict` returns them.
        top: how many classes for each row.
        labels: names of the classes; by default those of ImageNet-1k or 21k, by the number of columns.

    Returns:
        A list for each row: [(WordNet id, or the label again, name, score)], best first.

    Raises:
        errors.ArgumentError: not (b, classes); labels of another length; or all classes score the same, as under the zeroed
            heads of the original `imagenet21k` files.
    """
    scores = np.asarray(keras.ops.convert_to_numpy(predictions))
    if scores.ndim != 2:
        raise errors.ArgumentError(f"decode_predictions: expected scores of shape (batch, classes), got {scores.shape}.")
    if scores.size and scores.shape[1] > 1 and np.all(scores == scores[:, :1]):
        raise errors.ArgumentError(
            "decode_predictions: every class has the same score, so there is no best one: the head is zeroed (weights "
            "'imagenet21k') or not trained. Use weights='augreg' or 'imagenet', or fine-tune with classes=N."
        )
    names = class_names(scores.shape[1]) if labels is None else [(label, label) for label in labels]
    if len(names) != scores.shape[1]:
        raise errors.ArgumentError(f"decode_predictions: expected {scores.shape[1]} labels, got {len(names)}.")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return [[(*names[i], float(row[i])) for i in order] for row, order in zip(scores, best)]


def accuracy(model, batches):
    """Share of examples whose best class is the labelled one.

    Args:
        model: (b, H, W, 3) -> (b, classes) scores.
        batches: finite iterable of (images, one-hot labels).

    Raises:
        errors.ArgumentError: the model's head is zeroed. errors.DataError: there are no examples.
    """
    if zoo.zero_head(model):
        raise errors.ArgumentError(
            f"accuracy: the head of {model.name!r} is all zeros and prefers no class; fine-tune it or load weights with a head."
        )
    right = count = 0
    for images, labels in batches:
        best = np.argmax(model.predict_on_batch(np.asarray(images)), axis=-1)  # JAX takes no TensorFlow tensors
        right += int(np.sum(best == np.argmax(np.asarray(labels), axis=-1)))
        count += len(best)
    if not count:
        raise errors.DataError("accuracy: the data set has no examples; check its split.")
    return right / count
