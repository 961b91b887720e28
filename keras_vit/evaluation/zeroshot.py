"""Zero-shot classification: class names become the classifier of a model of images and texts (arXiv 2103.00020, section 3.1).

    model = keras_vit.LiT_B16B_2()
    classifier = keras_vit.zero_shot(model, ["cat", "dog", "fire truck"])
    keras_vit.decode_predictions(classifier.predict(images), labels=classifier.weights_info["class_names"])

LiT's model card has the figures of google-research/big_vision (`evaluators/proj/image_text/discriminative_classifier.py`): with
`prompts="lit"`, names and prompts in their canonical form, and the mean of each class's embeddings brought to unit length again.
"""

import collections
import hashlib
import itertools
import warnings

import keras
import numpy as np

from keras_vit import errors, zoo
from keras_vit.evaluation import prompts as published

TEXTS = 4096  # held at once
SHORT = {"imagenet": "imagenet2012", "pets": "oxford_iiit_pet"}  # names of published lists
_ACTIVATIONS = ("softmax", "sigmoid", None)


def zero_shot(
    model, class_names, prompts="clip", *, canonicalize=True, classifier_activation="softmax", batch_size=64, name=None
):
    """Makes a classifier of images from class names, without training.

    The classifier is the image tower with one Dense layer more, `head`, whose kernel is the temperature times the embeddings of
    the classes: of each the mean over its names and all prompts, of unit length. It is trained, saved, exported and evaluated as
    any other, and needs no text tower. It shares the tower's weights with `model`: training one trains the other.

    Args:
        model: of images and texts, with both towers and a tokenizer, such as `keras_vit.LiT_B16B_2()`.
        class_names: a list of str; or {label: name or list of names}, whose names are averaged, while the label is only shown; or
            a published list in its own order: "imagenet", "cifar100", "pets" or "resisc45" (`evaluation.prompts.class_names`,
            which also puts it into the order of a data set's labels).
        prompts: a published list of `evaluation.prompts.list_prompts`, such as "clip", "lit" or "class_name_only"; or a list of
            str; or one such str. Each has "{}" once, in the place of the name.
        canonicalize: whether names and prompts go to lower case and without ASCII punctuation, as LiT is evaluated.
        classifier_activation: "softmax", "sigmoid" (for models with a bias, trained so), or None for logits.
        batch_size: texts in a step. There are classes x prompts of them; memory does not grow with their number.
        name: of the classifier; by default that of the model with "_zero_shot".

    Returns:
        A `zoo.Model`, (b, H, W, 3) -> (b, classes). `weights_info` has "class_names", those to show, and "prompts".

    Raises:
        errors.ArgumentError: no towers or tokenizer; a name is empty, no str, or there twice; a prompt has no place for the name,
            or several; an unknown list.
        errors.NonFiniteError: the temperature or an embedding is not finite.

    Warns:
        UserWarning: classes are the same text to the tokenizer, as names it has no words for, or that a long prompt pushes out of
            its length; they get the same scores.
    """
    asked = f"zero_shot of {getattr(model, 'name', model)!r}"
    if classifier_activation not in _ACTIVATIONS:
        raise errors.ArgumentError(
            f"{asked}: expected classifier_activation in {_ACTIVATIONS}, got {classifier_activation!r}; leave it out for softmax."
        )
    tower = getattr(model, "image_tower", None)
    if not isinstance(tower, keras.Model):
        raise errors.ArgumentError(
            f"{asked}: expected a model of images and texts, such as keras_vit.LiT_B16B_2(), got a {type(model).__name__} "
            "without an image tower; build it with towers='both'."
        )
    labels, names = _classes(class_names, canonicalize, asked)
    templates = _prompts(prompts, canonicalize, asked)
    temperature = np.float32(model.temperature)
    kernel = temperature * class_embeddings(model, names, templates, batch_size=batch_size, labels=labels).T
    bias = getattr(model, "bias", None) if classifier_activation == "sigmoid" else None
    head = keras.layers.Dense(len(labels), use_bias=bias is not None, dtype="float32", name="head")
    x = head(tower.output)
    head.set_weights([kernel] if bias is None else [kernel, np.full(len(labels), bias, "float32")])
    if classifier_activation is not None:
        x = keras.layers.Activation(classifier_activation, dtype="float32", name="predictions")(x)
    classifier = zoo.Model(tower.inputs, x, name=name or f"{model.name}_zero_shot")
    info = model.weights_info | dict(classes=len(labels), class_names=labels, prompts=list(templates))
    classifier.remember(**{**tower._facts, "weights_info": info, "tokenizer": None})
    return classifier


def class_embeddings(model, classes, templates, *, batch_size=64, labels=None):
    """(classes, d) float32 of unit length: what `zero_shot` puts into the classifier, before the temperature.

    Args:
        model: with `tokenizer` and `encode_text`.
        classes: for each class a list of its names.
        templates: prompts with "{}" in the place of the name.
        batch_size: texts in a step.
        labels: how the classes are called in messages; by default by their first name.
    """
    labels = labels or [names[0] for names in classes]
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise errors.ArgumentError(
            f"zero_shot of {getattr(model, 'name', model)!r}: it has no tokenizer for texts; build it with towers='both' and "
            "vocabulary=, the path or URL of the vocabulary it was trained with."
        )
    texts = (
        (number, template.replace("{}", name)) for number, names in enumerate(classes) for name in names for template in templates
    )
    sums, digests = None, [hashlib.sha256() for _ in classes]
    while part := list(itertools.islice(texts, TEXTS)):
        numbers, words = zip(*part)
        tokens = np.asarray(tokenizer(list(words)))
        rows = np.asarray(model.encode_text(tokens, batch_size=batch_size), np.float64)
        if sums is None:
            sums = np.zeros((len(classes), rows.shape[1]))
        np.add.at(sums, list(numbers), rows)
        for number, row in zip(numbers, tokens):
            digests[number].update(row.tobytes())
    counts = np.array([len(names) * len(templates) for names in classes])[:, None]
    means = sums / counts
    means /= np.linalg.norm(means, axis=1, keepdims=True) + 1e-8
    broken = np.flatnonzero(~np.isfinite(means).all(1))
    if len(broken):
        raise errors.NonFiniteError(
            f"zero_shot: the embeddings of {len(broken)} classes are not finite, such as {labels[broken[0]]!r}; check the "
            "model's weights."
        )
    _warn_of_same(labels, [digest.digest() for digest in digests])
    return means.astype(np.float32)


def _warn_of_same(labels, digests):
    groups = collections.defaultdict(list)
    for label, digest in zip(labels, digests):
        groups[digest].append(label)
    same = [group for group in groups.values() if len(group) > 1]
    if same:
        shown = "; ".join(" = ".join(map(repr, group[:4])) + (" = ..." if len(group) > 4 else "") for group in same[:4])
        warnings.warn(
            f"zero_shot: {sum(map(len, same))} classes are the same text to the tokenizer as others and cannot be told apart: "
            f"{shown}{' and more' if len(same) > 4 else ''}. Give them other names, or shorter prompts.",
            stacklevel=4,
        )


def _classes(class_names, canonicalize, asked):
    """[label of each class], [its names]."""
    if isinstance(class_names, str):
        return _published(class_names, canonicalize)
    if isinstance(class_names, dict):
        given = {label: [names] if isinstance(names, str) else names for label, names in class_names.items()}
    elif isinstance(class_names, (list, tuple)):
        given = {label: [label] for label in class_names if isinstance(label, str)}
        odd = [each for each in class_names if not isinstance(each, str)]
        if odd or len(given) != len(class_names):
            twice = [label for label, count in collections.Counter(map(str, class_names)).items() if count > 1]
            what = f"no str: {odd[0]!r}" if odd else f"{twice[0]!r} twice"
            raise errors.ArgumentError(f"{asked}: expected class names that are str, each another one, got {what}.")
    else:
        given = None
    if not given:
        raise errors.ArgumentError(
            f"{asked}: expected class_names as a list of str, a dict of label to names, or the name of a published list "
            f"({', '.join(lists())}), got {class_names!r}."
        )
    classes, known = [], {}
    for label, names in given.items():
        if not isinstance(label, str) or not isinstance(names, (list, tuple)) or not names:
            raise errors.ArgumentError(f"{asked}: expected {{label: name or list of names}}, got {label!r}: {names!r}.")
        classes.append([_written(each, canonicalize, f"{asked}, class {label!r}") for each in names])
        before = known.setdefault(frozenset(classes[-1]), label)
        if before != label:
            raise errors.ArgumentError(
                f"{asked}: classes {before!r} and {label!r} have the same names, {', '.join(classes[-1])}"
                f"{', in lower case without punctuation' if canonicalize else ''}; give each another one."
            )
    return list(given), classes


def _written(name, canonicalize, where):
    if not isinstance(name, str):
        raise errors.ArgumentError(f"{where}: expected a name that is a str, got {name!r}.")
    written = published.canonicalize(name) if canonicalize else name.strip()
    if not written:
        rest = ", of which lower case without punctuation leaves nothing; pass canonicalize=False" if name.strip() else ""
        raise errors.ArgumentError(f"{where}: expected a name that is not empty, got {name!r}{rest}.")
    return written


def lists():
    """The names of the published lists of class names, the short ones first."""
    return (*SHORT, *published.list_class_names())


def _published(name, canonicalize):
    """As `_classes`, of a published list, in which a few names are there twice."""
    dataset = SHORT.get(name, name)
    names = published.class_names(dataset, canonical=canonicalize)
    # Of several names with commas between the first, as the original evaluates
    return list(published.class_names(dataset)), [[each.split(",")[0].strip()] for each in names]


def _prompts(prompts, canonicalize, asked):
    if isinstance(prompts, str) and "{}" not in prompts:
        return published.prompts(SHORT.get(prompts, prompts), canonical=canonicalize)
    given = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(given, (list, tuple)) or not given:
        raise errors.ArgumentError(
            f"{asked}: expected prompts as a list of str such as 'a photo of a {{}}', or the name of a published one "
            f"({', '.join(published.list_prompts())}), got {prompts!r}."
        )
    for each in given:
        if not isinstance(each, str) or each.count("{}") != 1:
            raise errors.ArgumentError(
                f"{asked}: expected prompts with {{}} once, in the place of the class name, such as 'a photo of a {{}}', got "
                f"{each!r}."
            )
    return tuple(published.canonicalize(each, keep="{}") if canonicalize else each for each in given)
