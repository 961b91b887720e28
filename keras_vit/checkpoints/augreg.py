"""The file names of "How to train your ViT?" (arXiv 2106.10270), `gs://vit_models/augreg/`: parsed into facts."""

import re

from keras_vit import errors
from keras_vit.checkpoints.weights import IMAGENET21K, google

_PRETRAIN = (
    r"(?P<model>[A-Za-z0-9_]+)-(?P<ds>i1k|i21k|i21k_30)-(?P<epochs>\d+)ep-lr_(?P<lr>[\d.]+)-aug_(?P<aug>[a-z]+\d?)"
    r"-wd_(?P<wd>[\d.]+)-do_(?P<do>[\d.]+)-sd_(?P<sd>[\d.]+)"
)
_ADAPT = r"--(?P<adapt_ds>[a-z0-9_]+)-steps_(?P<adapt_steps>\d+)k-lr_(?P<adapt_lr>[\d.]+)-res_(?P<adapt_resolution>\d+)"
_NAME = re.compile(f"{_PRETRAIN}(?:{_ADAPT})?(?:\\.npz)?")

_CLASSES = {"i1k": 1000, "i21k": IMAGENET21K, "i21k_30": IMAGENET21K}
_ADAPT_CLASSES = {"imagenet2012": 1000, "cifar100": 100, "resisc45": 45, "oxford_iiit_pet": 37, "kitti": 4}


def parse(name):
    """The fields of an AugReg file name as a dict of text, or None if it is no such name."""
    found = _NAME.fullmatch(name)
    return found and {key: value for key, value in found.groupdict().items() if value is not None}


def weights(name, mib=None):
    """The `Weights` record of an AugReg file name, with or without ".npz".

    Raises:
        errors.ArgumentError: not a name of this grammar.
    """
    fields = parse(name)
    if fields is None or fields.get("adapt_ds", "kitti") not in _ADAPT_CLASSES:
        raise errors.ArgumentError(
            f"{name!r}: expected an AugReg file name such as "
            "'B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0', optionally with a fine-tuning part."
        )
    adapted = fields.get("adapt_ds")
    return google(
        f"augreg/{name.removesuffix('.npz')}",
        mib,
        resolution=int(fields.get("adapt_resolution", 224)),
        classes=_ADAPT_CLASSES[adapted] if adapted else _CLASSES[fields["ds"]],
        tuned=adapted is not None,
    )
