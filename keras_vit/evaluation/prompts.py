"""Class names and prompts for zero-shot classification, as published by CLIP's authors, and how LiT's write them.

The lists are in `prompts.json`, which names the file and commit of openai/CLIP that each is from, and its licence (MIT).
"""

import functools
import json
import pathlib
import re
import string

from keras_vit.errors import ArgumentError

# What LiT's authors evaluate with (google-research/big_vision, prompt_engineering_constants.py): CLIP's, and the bare name
_AND_BARE = {"lit": "clip", "lit_best": "clip_best"}


def list_prompts():
    """The names that `prompts` takes, a tuple of str."""
    return (*_lists()["prompts"], *_AND_BARE, "class_name_only")


def prompts(name="clip", *, canonical=False):
    """The prompt templates of a published list; each holds "{}" once, in the place of the class name.

    Args:
        name: "clip" (80, for ImageNet), "clip_best" (the 7 of them that forward selection took), "lit" and "lit_best" (these and
            "{}", as LiT is evaluated), "cifar100" (18), "oxford_iiit_pet" (1), "resisc45" (18), or "class_name_only" ("{}").
        canonical: True for what `canonicalize` makes of them, as LiT's evaluation does.

    Returns:
        A tuple of str.

    Raises:
        ArgumentError: there is no such list.
    """
    if name == "class_name_only":
        found = ["{}"]
    elif name in tuple(_AND_BARE):  # a tuple takes also what cannot be hashed
        found = [*prompts(_AND_BARE[name]), "{}"]
    else:
        found = _lookup("prompts", name, list_prompts())["templates"]
    return tuple(canonicalize(each, keep="{}") for each in found) if canonical else tuple(found)


def list_class_names():
    """The data sets that `class_names` knows, a tuple of str: their names in TFDS."""
    return tuple(_lists()["class_names"])


def class_names(dataset, labels=None, *, canonical=False):
    """The class names that CLIP's authors use for a data set.

    Args:
        dataset: "imagenet2012" (1,000 in the order of its labels; "missile" and "sunglasses" are there twice), "cifar100" (100),
            "oxford_iiit_pet" (37, cats first) or "resisc45" (45).
        labels: the data set's own label names in the order of its labels, such as TFDS's `info.features["label"].names`, to which
            the names are put in order; for the last three, whose published order need not be that of the labels.
        canonical: True for what `canonicalize` makes of them, as LiT's evaluation does.

    Returns:
        A tuple of str.

    Raises:
        ArgumentError: there is no such list, or `labels` are not of those classes.
    """
    found = tuple(_lookup("class_names", dataset, list_class_names())["names"])
    if labels is not None:
        of = {canonicalize(name): name for name in found}
        keys = [canonicalize(str(label)) for label in labels]
        if len(of) != len(found) or sorted(of) != sorted(keys):
            others = sorted(set(of) ^ set(keys))[:6]
            raise ArgumentError(
                f"labels: expected the {len(found)} classes of {dataset}, got {len(keys)} that differ in {others}. Give the data "
                "set's own label names, or none where its labels are in the published order."
            )
        found = tuple(of[key] for key in keys)
    return tuple(canonicalize(name, keep=",") for name in found) if canonical else found


def canonicalize(text, *, keep=None):
    """A class name or prompt as LiT's evaluation writes it: lower case, no ASCII punctuation, single spaces, "_" a space.

    That of google-research/big_vision, `evaluators/proj/image_text/prompt_engineering.py`.

    Args:
        text: str.
        keep: punctuation that stays where it stands as a whole: "{}" of prompts, "," of class names (there several names of one
            class are apart by it).

    Returns:
        str.
    """
    drop = str.maketrans("", "", string.punctuation)
    parts = text.replace("_", " ").split(keep) if keep else [text.replace("_", " ")]
    return re.sub(r"\s+", " ", (keep or "").join(part.translate(drop) for part in parts).lower()).strip()


@functools.cache
def _lists():
    return json.loads(pathlib.Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))


def _lookup(kind, name, known):
    found = _lists()[kind].get(name) if isinstance(name, str) else None
    if found is None:
        raise ArgumentError(f"{kind}: expected one of {', '.join(known)}, got {name!r}. Give your own as a list of str.")
    return found
