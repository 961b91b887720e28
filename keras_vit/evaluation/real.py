"""ImageNet-ReaL: the reassessed labels of the ImageNet validation set (arXiv 2006.07159), several or none for an image.

    labels = real_labels("real.json")  # of github.com/google-research/reassessed-imagenet
    source = pipeline.open_source("imagenet2012", "validation")
    found = evaluate(model, pipeline.eval_batches(source, size=224, batch=64), sets=sets(labels, file_names(source)))
    found.real.accuracy

The i-th list of the file, from 0, is that of ILSVRC2012_val_{i + 1:08}. Nothing but an image's file name says which one it is, so
the lists are brought into the order of the data set by name.
"""

import json
import os
import pathlib
import re

from keras_vit import errors

IMAGES = 50_000
CLASSES = 1000
_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")


def real_labels(path):
    """Reads `real.json`: for each image of the validation set in the order of its number, a tuple of classes, empty for 3,163.

    Raises:
        errors.DataError: the file is no JSON, or is not 50,000 lists of whole numbers from 0 to 999.
    """
    try:
        lists = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise errors.DataError(
            f"{path}: cannot be read as JSON ({error}); take real.json of github.com/google-research/reassessed-imagenet."
        ) from error
    if not isinstance(lists, list) or len(lists) != IMAGES:
        got = f"{len(lists):,} entries" if isinstance(lists, list) else f"a {type(lists).__name__}"
        raise errors.DataError(f"{path}: expected a list of {IMAGES:,} lists, got {got}; take real.json of its publisher.")
    for number, labels in enumerate(lists):
        if not isinstance(labels, list) or not all(type(each) is int and 0 <= each < CLASSES for each in labels):
            raise errors.DataError(
                f"{path}: entry {number} must be a list of whole numbers from 0 to {CLASSES - 1}, got {str(labels)[:80]}; "
                "take real.json of its publisher."
            )
    return [tuple(labels) for labels in lists]


def sets(labels, names):
    """The sets of labels in the order of file names.

    Args:
        labels: of `real_labels`.
        names: such as "ILSVRC2012_val_00000001.JPEG", folders before them allowed; of `file_names`.

    Raises:
        errors.DataError: a name is none of the validation set.
    """
    chosen = []
    for name in names:
        found = _NAME.match(os.path.basename(name))
        if not found or not 1 <= int(found[1]) <= len(labels):
            raise errors.DataError(
                f"{name}: expected a file of the ImageNet validation set, ILSVRC2012_val_00000001 to {len(labels):08}; evaluate "
                "on that split."
            )
        chosen.append(labels[int(found[1]) - 1])
    return chosen


def file_names(source, data_dir=None):
    """The file names of a data set in the order of `pipeline.eval_batches`: a folder's, or TFDS's feature `file_name`.

    Args:
        source: of `pipeline.open_source`, with on_error="raise" if it is of TFDS.
        data_dir: as it was opened with.

    Raises:
        errors.DataError: the data set does not name its files, so that nothing says which image is which.
    """
    if source.paths:
        return [os.path.basename(path) for path in source.paths]
    if source.dataset != "digits" and not getattr(source, "skipped", ()):
        import tensorflow_datasets as tfds  # imports TensorFlow

        builder = tfds.builder(source.dataset, data_dir=data_dir)
        if isinstance(dict(builder.info.features.items()).get("file_name"), tfds.features.Text):
            data = builder.as_dataset(  # read as the images are, so that the order is the same
                split=source.split,
                decoders=tfds.decode.PartialDecoding({"file_name": True}),
                read_config=tfds.ReadConfig(try_autocache=False),
                shuffle_files=False,
            )
            return [name.decode() for name in data.map(lambda example: example["file_name"]).as_numpy_iterator()]
    raise errors.DataError(
        f"{source.dataset!r} does not name its files, so nothing says which image is which; use a folder of the original files "
        "or imagenet2012 of TFDS, none left out."
    )
