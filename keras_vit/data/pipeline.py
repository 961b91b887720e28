"""Images and labels on tf.data: the built-in digits, a folder of images, or a TFDS data set -> (images, one-hot labels).

The arithmetic is that of google-research/vision_transformer (`vit_jax/input_pipeline.py`). The order is not: there it depends
on what ran before, here the stream of examples and every random draw in it are a function of the seed alone: whoever reads a part
of it, from wherever, on however many workers, gets the same bits.

    train = open_source("digits", "train")
    model.fit(train_batches(train, size=8, batch=128, augment=False), steps_per_epoch=100)

Images are used as they are stored: EXIF orientation is ignored, as TensorFlow and the original do; an alpha channel is dropped;
gray is repeated to three channels; 16-bit PNG becomes 8-bit; CMYK becomes RGB as libjpeg does it. An animated WebP cannot be
decoded and counts as unreadable, as does a GIF.
"""

import difflib
import hashlib
import itertools
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_vit.data import augment as augmentation
from keras_vit.data.pixels import Pixels
from keras_vit.errors import ArgumentError, DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 64_000_000  # an image that declares more is refused before anything of it is inflated
GOOGLE = Pixels()
ORDER, AUGMENT, MIX = 0, 1, 2  # separate streams of random numbers under one seed
RANDAUGMENT, ERASING = 2, 3  # and under one example's; 0 and 1 are the crop and the flip
KERNELS = {"bilinear": "triangle", "bicubic": "keyscubic"}  # names of the operation that samples
LABELS = "labels must lie in"  # how `one_hot` begins to complain
JPEG = b"\xff\xd8\xff"
# Errors of tf.data that may come from the data; a lost worker or full memory does not, and is no reason to read all of it again
READING = (
    tf.errors.InvalidArgumentError, tf.errors.DataLossError, tf.errors.FailedPreconditionError, tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError, tf.errors.UnknownError,
)  # fmt: skip
_fold_in = tf.random.experimental.stateless_fold_in


@dataclass(frozen=True, eq=False)
class Source:
    """One split of a data set, as `open_source` found it; pass it to `train_batches` and `eval_batches`.

    Beneath these, `ordered()` and `shuffled(key, shuffle_buffer)` are datasets of (number in the source, example), once through
    and undecoded; `read(example)` gives (content of an image file or uint8 image, label).

    Attributes:
        dataset: the name or folder it was opened with.
        split: the split it was opened with.
        class_names: the names in label order.
        num_examples: how many examples; None where TFDS does not know.
        paths: the image files in label order, then by name; empty unless the source is a folder.
        skipped: with `on_error="skip"`, (file or example, reason) of what cannot be read and is left out.
    """

    dataset: str
    split: str
    class_names: tuple = field(repr=False)
    num_examples: int | None
    paths: tuple = field(default=(), repr=False)
    skipped: tuple = field(default=(), repr=False)
    origin: str = field(default="", repr=False)  # what `fingerprint` says of it besides the examples
    read: callable = field(default=None, repr=False)
    all_jpeg: bool = field(default=False, repr=False)  # known before any is read

    @property
    def num_classes(self):
        """How many classes there are: the width of the one-hot labels."""
        return len(self.class_names)

    def fingerprint(self):
        """What must be the same for a stream of these examples to be the same: a dict that JSON keeps.

        A folder may have moved: its files count by their names below it.
        """
        names = ["/".join(Path(path).parts[-2:]) for path in self.paths] or [name for name, _ in self.skipped]
        return {
            "origin": self.origin,
            "split": self.split,
            "class_names": list(self.class_names),
            "num_examples": self.num_examples,
            "examples": hashlib.sha256(b"\0".join(map(os.fsencode, names))).hexdigest(),
        }

    def check(self, fingerprint):
        """Refuses to go on with other examples than those that had this `fingerprint`.

        Raises:
            DataError: lists what differs, classes by name.
        """
        now = self.fingerprint()
        changes = [
            f"{key} was {fingerprint.get(key)!r}, is {now[key]!r}"
            for key in ("origin", "split", "num_examples")
            if fingerprint.get(key) != now[key]
        ]
        before, after = list(fingerprint.get("class_names", [])), now["class_names"]
        if before != after:
            gone, new = (_listed(map(repr, sorted(set(a) - set(b)))) for a, b in ((before, after), (after, before)))
            different = f"classes only before: {gone or 'none'}; only now: {new or 'none'}"
            changes.insert(0, different if gone or new else "its classes are in another order")
        if not changes and fingerprint.get("examples") != now["examples"]:
            changes = ["its files have other names, or others of it are left out as unreadable"]
        if changes:
            raise DataError(f"{self.dataset} ({self.split}) is not the data of before: {'; '.join(changes)}. Restore that.")


@dataclass(frozen=True, eq=False)
class _Indexed(Source):
    """Examples that can be had by number: `read(index)`. A whole epoch is shuffled."""

    def ordered(self):
        return tf.data.Dataset.range(self.num_examples).map(lambda index: (index, index))

    def shuffled(self, key, shuffle_buffer):
        order = tf.random.experimental.stateless_shuffle(tf.range(self.num_examples, dtype=tf.int64), key)
        return tf.data.Dataset.from_tensor_slices((order, order))


@dataclass(frozen=True, eq=False)
class _Stream(Source):
    """Examples that come one after the other in a fixed order: `read(example)`.

    Attributes:
        examples: `tf.data.Dataset` of them.
        dropped: the numbers of those that are left out.
        shards: (file, records in it) of every TFRecord file that they lie in.
    """

    examples: tf.data.Dataset = field(default=None, repr=False)
    dropped: tuple = field(default=(), repr=False)
    shards: tuple = field(default=(), repr=False)

    def ordered(self):
        data = self.examples.enumerate()
        if not self.dropped:
            return data
        dropped = tf.constant(self.dropped, tf.int64)
        return data.filter(lambda index, example: tf.reduce_all(index != dropped))

    def shuffled(self, key, shuffle_buffer):
        # Dataset.shuffle mixes the process-wide seed into the order and takes no tensor for its own; the operation beneath does.
        data = self.ordered()
        specs = tf.nest.flatten(data.element_spec)
        seeds = tf.random.stateless_uniform([2], key, minval=1, maxval=2**31 - 1, dtype=tf.int64)
        variant = tf.raw_ops.ShuffleDataset(
            input_dataset=tf.data.experimental.to_variant(data),
            buffer_size=min(shuffle_buffer, self.num_examples or shuffle_buffer),
            seed=seeds[0],
            seed2=seeds[1],
            reshuffle_each_iteration=False,
            output_types=[spec.dtype for spec in specs],
            output_shapes=[spec.shape for spec in specs],
        )
        return tf.data.experimental.from_variant(variant, data.element_spec)


@dataclass(frozen=True)
class Example:
    """A place in the stream of `train_batches`: the epoch, the example's number in the source, its file if that is a folder."""

    position: int
    epoch: int
    index: int
    path: str | None


def open_source(dataset, split, *, data_dir=None, manual_dir=None, on_error="raise", limit=0.01):
    """Finds one split of a data set and checks what can be checked without decoding an image.

    Args:
        dataset: one of
            - "digits": scikit-learn's 1,797 real images of 8x8 pixels, no network. Split "test" is the 360 images, stratified,
              of `train_test_split(test_size=360, random_state=0, stratify=labels)`, "train" the other 1,437. The values 0..16
              become uint8 by `round(value * 255 / 16)`, on three equal channels. (A folder of that name is "./digits".)
            - a folder with `{train,test}/<class>/<image>`: JPEG, PNG or WebP by content, ending in .jpg, .jpeg, .png or .webp
              (any case). With split None it is a folder of `<class>/<image>` itself. Labels follow the sorted class names. Hidden
              entries and `__MACOSX` are ignored; anything else that is not read is listed in one warning.
            - a TFDS name such as "cifar10" or "imagenet2012:5.1.0", with features "image" and "label".
        split: "train" or "test" for digits; the sub folder's name, or None; or a TFDS split such as "train[:98%]".
        data_dir: where TFDS keeps its data sets; None is its own default.
        manual_dir: where TFDS finds files that a user must download by hand.
        on_error: "raise", or "skip": every image is decoded once now, on all cores, and what cannot be read is left out of the
            source, counted and listed in one warning and in `skipped`. So all who open it, for training or evaluation, leave out
            the same. Or "keep", for a folder: what is no image by its first bytes stays among its `paths` and is found by who
            reads it, as `numbered_batches` does; other data sets are opened as by "raise".
        limit: the largest share of the examples that "skip" may leave out.

    Returns:
        A `Source`.

    Raises:
        DataError: no such data set or split; a folder or class without images; a file that is empty or not an image by its first
            bytes (named); train and test with different classes (the difference is listed); TFDS cannot prepare the data;
            more than `limit` of it cannot be read.
        ArgumentError: `on_error` or `limit` is none of those.
    """
    if on_error not in ("raise", "skip", "keep") or isinstance(limit, bool) or not isinstance(limit, Real) or not 0 <= limit <= 1:
        raise ArgumentError(
            f"on_error must be 'raise', 'skip' or 'keep' and limit a share from 0 to 1, got on_error={on_error!r}, "
            f"limit={limit!r}."
        )
    dataset, split = os.fspath(dataset), None if split is None else str(split)
    limit = limit if on_error == "skip" else None
    if dataset == "digits":
        return _open_digits(split)
    if os.path.isdir(os.path.expanduser(dataset)):
        return _open_folder(os.path.expanduser(dataset), split, limit, on_error == "keep")
    return _open_tfds(dataset, split, data_dir, manual_dir, limit)


def train_batches(
    source,
    *,
    size,
    batch,
    pixels=GOOGLE,
    seed=0,
    shuffle_buffer=50_000,
    augment=True,
    randaugment=None,
    increasing=None,
    repeats=1,
    erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
    targets=None,
    prefetch=2,
    start=0,
    shard=(0, 1),
):
    """Endless shuffled batches; they run across the borders of epochs, so every batch is full.

    Digits and folders shuffle the whole epoch. TFDS reads in its stored order (shuffled when it was written) through a buffer.
    Images are decoded after shuffling.

    Args:
        source: what `open_source` returned.
        size: height and width in pixels: one number, or (height, width).
        batch: examples in a batch, of all workers together.
        pixels: the checkpoint's preprocessing.
        seed: all that order and draws depend on, with the epoch's number and an example's in the source; Mixup's and CutMix's,
            with the place of the batch in the stream.
        shuffle_buffer: how many encoded examples of a TFDS data set are held for shuffling.
        augment: True for the inception crop (area 5% to 100%, aspect ratio 3/4 to 1.33; Szegedy et al., arXiv 1409.4842), resize
            and horizontal flip with probability 1/2; False for the images of `eval_batches`.
        randaugment: (layers, magnitude) of `augment.randaugment`, after the flip; the resized image becomes uint8 for it, as in
            big_vision's "inception_crop|flip_lr|randaug|value_range". None, or 0 layers, for none.
        increasing: (operations, magnitude, deviation) of `augment.increasing_randaugment`, likewise, or None.
        repeats: how many times each image of an epoch is taken, augmented anew each time; an epoch, of as many examples as ever,
            then has so many times fewer images ("repeated augmentation", Hoffer et al., arXiv 1901.09335, as DeiT has it). The
            copies are a `repeats`-th of the batch apart, so that a batch has all of most images, none beside another.
        erasing: probability of `augment.random_erasing` with normal noise, after the normalisation.
        mixup: alpha of `augment.mix`; each example is mixed with the one before it in the global batch. 0 for none.
        cutmix: alpha of CutMix, likewise; where both are above 0, each has half of the batches.
        targets: float32 (n, c), a row for each example by its number in the source, put behind its one-hot label; not mixed.
        prefetch: batches prepared ahead.
        start: how many examples were already consumed, by all workers: the stream goes on exactly there.
        shard: (worker, workers): this worker's equal part of every batch, in order; the workers' parts together are the batch of
            one. Each decodes its own part only (and one example more for mixing), but a TFDS data set is read by all.

    Returns:
        A `tf.data.Dataset` of infinite cardinality with float32 (n, height, width, 3) and float32 (n, classes), one-hot unless
        mixed, n = batch / workers; (n, classes + c) with `targets`.

    Raises:
        ArgumentError: a size, count, probability or seed out of range.
        tf.errors.OpError: while iterating, on an image or shard that cannot be read; see `raise_unreadable`.
    """
    size = _height_width(size)
    _whole_numbers(1, batch=batch, shuffle_buffer=shuffle_buffer)
    _whole_numbers(0, prefetch=prefetch, start=start)
    _whole_numbers(-(2**63), seed=seed)
    _numbers(1, erasing=erasing)
    _numbers(float("inf"), mixup=mixup, cutmix=cutmix)
    if targets is not None and (mixup or cutmix):
        raise ArgumentError("targets of single images cannot be mixed: set mixup and cutmix to 0, or leave targets out.")
    worker, share = _share(shard, batch)
    rows_of = [] if targets is None else [tf.constant(targets, tf.float32)]
    _whole_numbers(1, repeats=repeats)
    if increasing:
        augmentation.check_randaugment(*increasing)
    if randaugment and increasing:
        raise ArgumentError("randaugment and increasing are two kinds of RandAugment; leave one of them out.")
    layers, magnitude = randaugment or (0, 0)
    augmentation.check_randaugment(layers, magnitude)

    def prepare(epoch, numbered):
        (index, example), (_, draws) = numbered, epoch
        content, label = source.read(example)
        key = tf.stack([draws, index])
        if augment:
            seeds = tf.unstack(tf.random.split(key, 2))
            image, flip = random_crop(content, seeds[0], source.all_jpeg), tf.random.stateless_uniform([], seeds[1]) > 0.5
        else:
            image, flip = _decoded(content), None
        image = _resize(image, size, pixels) if augment else _fit(image, size, pixels)
        if layers or increasing:
            image = tf.saturate_cast(image, tf.uint8)
        if flip is not None:
            image = _flipped(image, flip)
        if layers:
            image = augmentation.randaugment(image, layers, magnitude, _fold_in(key, RANDAUGMENT))
        if increasing:
            image = augmentation.increasing_randaugment(image, *increasing, _fold_in(key, RANDAUGMENT))
        image = pixels.normalize(image)
        if erasing:
            image = augmentation.random_erasing(image, _fold_in(key, ERASING), erasing)
        return image, label, *(tf.gather(rows, index) for rows in rows_of)

    mixing = mixup > 0 or cutmix > 0
    places = list(range(worker * share, (worker + 1) * share))
    before = [(places[0] - 1) % batch] if mixing and share < batch else []  # whom the first of them is mixed with
    data = _stream(source, seed, shuffle_buffer, start, repeats, batch)
    if share < batch:
        rows = tf.constant(before + places)
        whole = data.batch(batch, drop_remainder=True)
        data = whole.map(lambda *parts: tf.nest.map_structure(lambda part: tf.gather(part, rows), parts)).unbatch()
    data = data.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    data = data.batch(len(before + places), drop_remainder=True)

    def finish(number, batched):
        pair = batched[0], tf.concat([one_hot(batched[1], source.num_classes), *batched[2:]], -1)
        if not mixing:
            return pair
        partners = [part[:-1] if before else tf.roll(part, 1, 0) for part in pair]
        pair = [part[len(before) :] for part in pair]
        key = _fold_in(tf.constant([seed, MIX], tf.int64), start + number * batch)
        return augmentation.mix(pair, partners, key, mixup_alpha=mixup, cutmix_alpha=cutmix)

    parallel = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True} if mixing else {}
    data = data.enumerate().map(finish, **parallel)
    return data.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)).prefetch(prefetch)


def positions(source, *, seed, start, count, shuffle_buffer=50_000, repeats=1, batch=None):
    """What stands at places `start` to `start + count - 1` of the stream of `train_batches`: a list of `Example`.

    Nothing is decoded. A batch of `batch` examples after `step` steps is `start=step * batch, count=batch`.

    Args and errors are those of `train_batches`, with the same `seed` and `shuffle_buffer` as there; `batch` is needed with
    `repeats` only.
    """
    _whole_numbers(1, count=count, shuffle_buffer=shuffle_buffer)
    _whole_numbers(0, start=start)
    _whole_numbers(-(2**63), seed=seed)
    data = _stream(source, seed, shuffle_buffer, start, repeats, batch).take(count)
    data = data.map(lambda epoch, numbered: (epoch[0], numbered[0]))
    places = [(int(epoch), int(index)) for epoch, index in data.as_numpy_iterator()]
    return [
        Example(start + offset, epoch, index, source.paths[index] if source.paths else None)
        for offset, (epoch, index) in enumerate(places)
    ]


def _stream(source, seed, shuffle_buffer, start, repeats=1, batch=None):
    """The examples from place `start` on, endless: (epoch, its number for draws), (number in the source, what `read` takes)."""

    def one_epoch(epoch):
        order, key = (_fold_in(tf.constant([seed, stream], tf.int64), epoch) for stream in (ORDER, AUGMENT))
        draws = tf.random.stateless_uniform([], key, None, None, tf.int64)
        examples = source.shuffled(order, shuffle_buffer)
        if repeats == 1:
            return tf.data.Dataset.zip(tf.data.Dataset.from_tensors((epoch, draws)).repeat(), examples)

        def copies(*chunk):
            def copy(nth):
                again = tf.where(nth == 0, draws, tf.random.stateless_uniform([], _fold_in(key, nth), None, None, tf.int64))
                epochs = tf.data.Dataset.from_tensors((epoch, again)).repeat()
                return tf.data.Dataset.zip(epochs, tf.data.Dataset.from_tensor_slices(chunk))

            return tf.data.Dataset.range(repeats).flat_map(copy)

        examples = examples.batch(max(1, batch // repeats)).flat_map(copies)
        return examples.take(source.num_examples) if source.num_examples else examples

    epochs, examples = divmod(start, source.num_examples) if source.num_examples else (0, start)
    return tf.data.Dataset.counter(epochs).flat_map(one_epoch).skip(examples)


def _share(shard, batch):
    """(worker, examples of each worker)."""
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        raise ArgumentError(f"shard must be (worker, number of workers), got {shard!r}.")
    worker, workers = shard
    _whole_numbers(0, shard=worker)
    _whole_numbers(worker + 1, shard=workers)
    if batch % workers:
        raise ArgumentError(f"batch must be a multiple of the number of workers, got {batch} and shard={tuple(shard)}.")
    return worker, batch // workers


def eval_batches(source, *, size, batch, pixels=GOOGLE, prefetch=2):
    """Every example once, in a fixed order, as `eval_image` makes it; the last batch may be smaller.

    Args and errors are those of `train_batches`.

    Returns:
        A `tf.data.Dataset` with float32 (n, height, width, 3) and float32 (n, classes) one-hot, n = batch except at the end.
    """
    size = _height_width(size)
    _whole_numbers(1, batch=batch)
    _whole_numbers(0, prefetch=prefetch)

    def prepare(_, example):
        content, label = source.read(example)
        return eval_image(_decoded(content), size, pixels), label

    data = source.ordered().map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(batch)
    return data.map(lambda images, labels: (images, one_hot(labels, source.num_classes))).prefetch(prefetch)


def numbered_batches(source, *, size, batch, pixels=GOOGLE, prefetch=2, start=0):
    """As `eval_batches`, from the example `start` on, and past the files of a folder that cannot be read: `why_unreadable`.

    Args and errors are those of `train_batches`; another data set than a folder raises what cannot be read.

    Returns:
        A `tf.data.Dataset` with int64 (n,) numbers of the examples, increasing, float32 (n, height, width, 3) and int64 (n,)
        labels. What could not be read is missing among the numbers.
    """
    size = _height_width(size)
    _whole_numbers(1, batch=batch)
    _whole_numbers(0, prefetch=prefetch, start=start)

    def prepare(index, example):
        content, label = source.read(example)
        return index, eval_image(_decoded(content), size, pixels), label

    data = source.ordered().map(lambda _, example: example).enumerate().skip(start)
    data = data.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return (data.ignore_errors() if source.paths else data).batch(batch).prefetch(prefetch)


def why_unreadable(source, numbers):
    """[(file, label, reason)] of those of a folder's files that `numbered_batches` went past, in their order.

    Raises:
        DataError: one of them can be read now, so that the disk, the network or the memory is at fault and not the file.
    """
    paths = [source.paths[number] for number in numbers]
    faults = {path: why for _, path, why in _undecodable((number, path, None) for number, path in enumerate(paths))[0]}
    for path in paths:
        if path not in faults:
            raise DataError(
                f"{path} could not be read, and a moment later it could: the disk, the network or a lack of memory is at fault. "
                "Run it again."
            )
    return [(path, source.class_names.index(Path(path).parent.name), faults[path]) for path in paths]


def eval_image(image, size, pixels=GOOGLE):
    """([b,] h, w, 3) on the 0..255 scale -> ([b,] height, width, 3) float32: resize, crop, then `pixels.normalize`.

    Args:
        image: integers or floats; anything `tf.convert_to_tensor` takes.
        size: one number or (height, width), in pixels.
        pixels: the checkpoint's preprocessing.

    Raises:
        ArgumentError: `size` is not made of whole numbers above 0, or `image` is no RGB image.
    """
    return pixels.normalize(_fit(_rgb(image, (3, 4)), size, pixels))


def train_image(image, size, pixels=GOOGLE, *, box, flip):
    """(h, w, 3) on the 0..255 scale -> (height, width, 3) float32: cut the box, resize, flip left-right if asked, normalise.

    Args:
        image: integers or floats.
        size: one number or (height, width), in pixels.
        pixels: the checkpoint's preprocessing, whose `crop` is for evaluation only.
        box: (y, x, height, width) in pixels of `image`, numbers or an int32 tensor; `random_box` draws one.
        flip: bool or bool tensor.

    Raises:
        ArgumentError: `size` is not made of whole numbers above 0, `image` is no RGB image, or a box known beforehand does not
            lie in it.
    """
    image, box = _rgb(image, (3,)), tf.convert_to_tensor(box, tf.int32)
    known = tf.get_static_value(box)
    if known is not None and image.shape.is_fully_defined():
        y, x, height, width = known
        if min(y, x) < 0 or min(height, width) < 1 or y + height > image.shape[0] or x + width > image.shape[1]:
            extent, got = tuple(image.shape[:2]), tuple(known.tolist())
            raise ArgumentError(f"box (y, x, height, width) must lie in the image of {extent} pixels, got {got}.")
    return pixels.normalize(_flipped(_resize(_cut(image, box), size, pixels), flip))


def random_box(shape, seed, area=(0.05, 1.0), ratio=(0.75, 1.33)):
    """The inception crop's box for an image of `shape` (h, w, 3): int32 (4,), y, x, height, width in pixels.

    Of `area`, a share of the image, and `ratio`, width / height; the whole image if 100 draws fail
    (`tf.image.stateless_sample_distorted_bounding_box`); a pure function of these and `seed` (two integers).
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros([1, 0, 4]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=ratio,
        area_range=area,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], extent[:2]], 0)


def one_hot(labels, classes):
    """Integers (...,) in 0..classes - 1 -> float32 (..., classes).

    Raises:
        ArgumentError: a label is outside that range (`tf.one_hot` would give a row of zeros).
        tf.errors.InvalidArgumentError: the same, inside tf.data or a `tf.function`.
    """
    labels = tf.convert_to_tensor(labels)
    valid = tf.reduce_all(tf.logical_and(labels >= 0, labels < classes))
    message = f"{LABELS} 0..{classes - 1}; check the number of classes, and whether the split has labels at all; got"
    if tf.executing_eagerly() and not valid:
        raise ArgumentError(f"{message} {labels.numpy()}.")
    return tf.one_hot(_checked(labels, valid, message, labels), classes, dtype=tf.float32)


def decode(data):
    """A file's content, scalar string tensor -> uint8 (h, w, 3), the values of `tf.image.decode_jpeg` for a JPEG.

    Raises:
        tf.errors.InvalidArgumentError: the content cannot be decoded, or a JPEG, PNG or WebP declares more than 64 million pixels
            (seen from its header, before decoding).
    """
    data = _not_huge(data, *tf.unstack(_declared_size(data)))
    return tf.ensure_shape(tf.io.decode_image(data, channels=3, expand_animations=False), [None, None, 3])


def read_image(path):
    """An image file -> uint8 (h, w, 3) numpy; see `decode`.

    Raises:
        DataError: it cannot be read or decoded.
    """
    try:
        with open(path, "rb") as file:
            return decode(tf.constant(file.read())).numpy()
    except OSError as error:
        raise _unreadable([(path, error.strerror)]) from error
    except tf.errors.OpError as error:
        raise _unreadable([(path, _plain(error.message))]) from error


def random_crop(content, seed, is_jpeg=None):
    """What `Source.read` gives -> uint8 (h, w, 3): the box that `random_box` draws of it. Of a JPEG, no more is decoded.

    Args:
        content: of a file, scalar string tensor; or uint8 (h, w, 3).
        seed: two integers.
        is_jpeg: True where that is known of the file; it saves a look.

    Raises:
        tf.errors.InvalidArgumentError: as `decode`; a JPEG that breaks off may do so only when a box needs what is missing.
    """
    if content.dtype != tf.string:
        return _cut(content, random_box(tf.shape(content), seed))
    if is_jpeg:
        return _crop_jpeg(content, seed)
    starts_so = tf.strings.substr(content, 0, 3) == JPEG
    image = tf.cond(starts_so, lambda: _crop_jpeg(content, seed), lambda: _crop_any(content, seed))
    return tf.ensure_shape(image, [None, None, 3])


def decode_box(data, box, width):
    """A JPEG's content -> uint8 (height, width of the box, 3): the values of `decode` there, without decoding all the rest.

    TensorFlow's own `decode_and_crop_jpeg` differs by up to 26 levels in the outermost columns of the box, where libjpeg would
    interpolate the colours of a neighbour outside it; hence one column more is decoded on each side.

    Args:
        data: scalar string tensor.
        box: int32 (4,), y, x, height, width in pixels, inside the image.
        width: int32, of the whole image.

    Raises:
        tf.errors.InvalidArgumentError: the content is no JPEG, or broken as far as the box needs it.
    """
    y, x, height, wide = tf.unstack(box)
    left, right = tf.minimum(x, 1), tf.minimum(width - x - wide, 1)
    image = tf.io.decode_and_crop_jpeg(data, tf.stack([y, x - left, height, left + wide + right]), channels=3)
    return image[:, left : left + wide]


def find_unreadable(source):
    """Reads and decodes every image of a folder or TFDS source: a list of (file or "example N", reason) for those that fail."""
    return [(name, why) for _, name, why in _faults(source)[0]]


def find_corrupt_shards(source):
    """Reads every TFRecord file of a TFDS source: a list of (file, what is wrong and at which byte); empty for other sources."""
    return [(path, why) for path, records in getattr(source, "shards", ()) if (why := _shard_fault(path, records))]


def raise_unreadable(error, *sources):
    """Names the files behind an error that came out of tf.data, which knows no file names.

    Call it where `fit` or `evaluate` is called: `except tf.errors.OpError as error: raise_unreadable(error, train, test)`.
    It decodes all images of the sources again, or reads all shards, so that every broken one is found at once.

    Raises:
        DataError: images or shards of these sources cannot be read: the first five with the reason, and how many there are; or a
            label is out of range.
        The given error: all can be read; the cause is another one.
    """
    explained = _explained(error, sources)
    if explained is None:
        raise error
    raise explained from error


def probe(batches, *sources, classes=None):
    """Reads the first batch and refuses what training would only spoil weights with; gives (images, labels) as numpy arrays.

    Args:
        batches: of (images, labels), such as `train_batches` gives; any iterable.
        sources: those that `batches` read, to name what cannot be read.
        classes: how many there are; needed to check labels that are whole numbers, not one-hot.

    Raises:
        DataError: there is no batch; something cannot be read; images hold NaN or infinity, are all equal or all of one colour;
            a label is out of range, NaN, or names no class.
    """
    try:
        first = next(iter(batches), None)
    except tf.errors.OpError as error:
        raise _explained(error, sources) or DataError(f"The first batch cannot be read: {_plain(error.message)}.") from error
    if first is None:
        raise DataError("There is no batch. Check that the source holds examples, at least a batch of them.")
    images, labels = (np.asarray(part) for part in first[:2])
    faults = [*_image_faults(images), *_label_faults(labels, classes)]
    if faults:
        raise DataError(f"The first batch of {len(images)} examples cannot be trained on: {'; '.join(faults)}. Mend the data.")
    return images, labels


def _image_faults(images):
    axes = tuple(range(1, images.ndim))
    finite = np.isfinite(images).all(axes)
    if not finite.all():
        yield f"{np.sum(~finite)} images hold NaN or infinity, such as number {np.argmin(finite)}"
    elif len(images) > 1 and (images == images[:1]).all():
        yield "all images are equal"
    elif (images.min(axes) == images.max(axes)).all():
        yield "every image is of one colour"


def _label_faults(labels, classes):
    if np.issubdtype(labels.dtype, np.integer) and (labels.ndim == 1 or labels.shape[1:] == (1,)):
        if classes is not None and labels.size and not 0 <= labels.min() <= labels.max() < classes:
            yield f"labels must lie in 0..{classes - 1}, got {labels.min()} to {labels.max()}"
    elif not np.isfinite(labels).all() or labels.min(initial=0) < 0 or labels.max(initial=0) > 1:
        yield f"labels must be shares from 0 to 1, got {labels.min()} to {labels.max()}"
    elif not labels.any(-1).all():
        yield f"label number {np.argmin(labels.any(-1))} names no class, as a one-hot label out of range does"


def _explained(error, sources):
    """A `DataError` that says what is behind an error of tf.data, or None."""
    text = _plain(error.message)
    if LABELS in text:
        return DataError(f"{text}.")
    if not isinstance(error, READING):
        return None
    if isinstance(error, tf.errors.InvalidArgumentError):
        broken = []
    else:
        broken = [item for source in sources for item in find_corrupt_shards(source)]
    if broken:
        shards = _listed(f"{path} ({why})" for path, why in broken)
        return DataError(f"{len(broken)} TFRecord file(s) are broken: {shards}. Download or prepare the data set again.")
    bad = [item for source in sources for item in find_unreadable(source)]
    return _unreadable(bad) if bad else None


def _shard_fault(path, records):
    read = 0
    try:
        for _ in tf.data.TFRecordDataset(path):
            read += 1
        size = tf.io.gfile.stat(path).length
    except tf.errors.DataLossError as error:
        return f"record {read + 1} of {records}: {_plain(error.message)}"
    except tf.errors.OpError as error:
        return _plain(error.message)
    return None if read == records else f"ends after {read} of {records} records, at byte {size}"


def _faults(source):
    """([(number, file or "example N", reason)] of what cannot be decoded, how many examples there are)."""
    if source.paths:
        return _undecodable((index, path, None) for index, path in enumerate(source.paths))
    if isinstance(source, _Stream):
        data = source.ordered().as_numpy_iterator()
        return _undecodable((int(index), f"example {index}", content) for index, (content, _) in data)
    return [], source.num_examples


def _undecodable(items):
    """`_faults` of an iterator of (number, name, content); without a content it is the file of that name."""

    def reason(item):
        try:
            _, name, content = item
            if content is None:
                with open(name, "rb") as file:
                    content = file.read()
            decode(tf.constant(content))
        except (OSError, tf.errors.OpError) as error:
            return error.strerror if isinstance(error, OSError) else _plain(error.message)
        return None

    faults, total = [], 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(itertools.islice(items, 256)):
            faults += [(*item[:2], why) for item, why in zip(chunk, pool.map(reason, chunk)) if why]
            total += len(chunk)
    return faults, total


def _plain(message):
    """An error message of TensorFlow without its frame."""
    text = re.sub(r"^\{\{.*?\}\} | \[Op:\w+\].*$|\n\t .*$", "", str(message), flags=re.S)
    return re.sub(r"assertion failed: \[(.*?)\]", r"\1", text)


def _not_huge(data, height, width):
    small = height <= MAX_PIXELS // tf.maximum(width, 1)  # the product may overflow
    return _checked(data, small, f"the image declares more than {MAX_PIXELS:,} pixels (height, width):", height, width)


def _checked(value, condition, *message):
    # tf.debugging.Assert puts a conditional around it, which costs more in tf.data than making the message
    with tf.control_dependencies([tf.raw_ops.Assert(condition=condition, data=message, summarize=8)]):
        return tf.identity(value)


def _unreadable(bad):
    return DataError(
        f"{len(bad)} image file(s) cannot be read: {_listed(f'{path} ({why})' for path, why in bad)}. Replace or remove them."
    )


def _listed(items, most=5):
    items = list(items)
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def _height_width(size):
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ArgumentError(f"size must be one number or (height, width), got {size!r}.")
    _whole_numbers(1, size=pair[0])
    _whole_numbers(1, size=pair[1])
    return tuple(map(int, pair))


def _whole_numbers(least, **values):
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or not least <= value < 2**63:
            raise ArgumentError(f"{name} must be a whole number, at least {least}, got {value!r}.")


def _numbers(most, **values):
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= most:
            raise ArgumentError(f"{name} must be a number from 0 to {most}, got {value!r}.")


def _rgb(image, ranks):
    image = tf.convert_to_tensor(image)
    if image.shape.rank not in ranks or image.shape[-1] != 3:
        raise ArgumentError(f"An image must have shape (height, width, 3), got {image.shape}. Convert it to RGB, channels last.")
    return image


def _fit(image, size, pixels):
    """The image as evaluation sees it, before `pixels.normalize`."""
    found = _framed(image, _height_width(size), pixels)
    return tf.floor(found) if pixels.whole else found


def _framed(image, size, pixels):
    if pixels.crop == "squash":
        return _resize(image, size, pixels)
    h, w = tf.unstack(tf.shape(image, tf.int64)[-3:-1])
    if pixels.crop == "cover":
        extent = tf.cast(tf.stack([h, w]), tf.float32)
        whole = tf.cast(tf.round(extent * tf.reduce_max(tf.cast(size, tf.float32) / extent)), tf.int64)
        return _scaled(image, size, pixels, whole, tf.cast((whole - size) // 2, tf.float32))
    high, wide = pixels.covered(size)
    # One side just covers, the other one is rounded down
    whole = tf.where(high * w >= wide * h, tf.stack([high, high * w // h]), tf.stack([wide * h // w, wide]))
    corner = tf.round(tf.cast(whole - size, tf.float32) / 2)  # a half to the even number, as Python does
    return _scaled(image, size, pixels, whole, corner)


def _resize(image, size, pixels):
    size = _height_width(size)
    if pixels.antialias:
        return _scaled(image, size, pixels, size, (0.0, 0.0))
    return tf.image.resize(image, size, method=pixels.resize)


def _scaled(image, size, pixels, whole, corner):
    """([b,] h, w, 3) -> ([b,] height, width, 3) float32: what lies at `corner` of the image resized to `whole`.

    Nothing beside that is computed: of 8 x 8,000,000 pixels the resized image would fill any memory.
    """
    image = image if image.dtype == tf.uint8 else tf.cast(image, tf.float32)
    extent = tf.shape(image)[-3:-1]
    scale, shift = tf.cast(whole, tf.float32) / tf.cast(extent, tf.float32), -tf.convert_to_tensor(corner, tf.float32)
    (height, width), (h, w), one = size, tf.unstack(extent), tf.ones([])

    def sampled(values, to, by, moved):
        how = dict(kernel_type=KERNELS[pixels.resize], antialias=pixels.antialias)
        return tf.raw_ops.ScaleAndTranslate(images=values, size=to, scale=by, translation=moved, **how)

    if pixels.antialias:  # an axis at a time, of length 1 along the other: as Pillow rounds, and not a second time by the way
        rows = sampled(tf.reshape(image, [-1, 1, w, 3]), [1, width], [one, scale[1]], [0.0 * one, shift[1]])
        columns = tf.reshape(_levels(rows), [-1, h, 1, 3 * width])
        found = _levels(sampled(columns, [height, 1], [scale[0], one], [shift[0], 0.0 * one]))
    else:
        found = sampled(tf.reshape(image, [-1, h, w, 3]), size, scale, shift)
    return tf.reshape(found, [*([-1] if image.shape.rank == 4 else []), height, width, 3])


def _levels(values):
    return tf.clip_by_value(tf.round(values), 0.0, 255.0)


def _cut(image, box):
    return tf.slice(image, [box[0], box[1], 0], [box[2], box[3], 3])


def _flipped(image, flip):
    return tf.cond(tf.cast(flip, tf.bool), lambda: tf.reverse(image, [1]), lambda: image)


def _decoded(content):
    """What `Source.read` gives -> uint8 (h, w, 3)."""
    return decode(content) if content.dtype == tf.string else content


def _crop_jpeg(content, seed):
    shape = tf.image.extract_jpeg_shape(content)
    height, width, _ = tf.unstack(shape)
    return decode_box(_not_huge(content, height, width), random_box(shape, seed), width)


# Not inlined: as dead nodes of every call on a JPEG, its many small operations would cost more than the checks on that JPEG
@tf.function(autograph=False, experimental_attributes={"_noinline": True})
def _crop_any(content, seed):
    image = decode(content)
    return _cut(image, random_box(tf.shape(image), seed))


def _declared_size(data):
    """The header's (height, width) as int64 (2,); (0, 0) for a kind of file that is not looked into."""
    start = tf.strings.substr(tf.strings.join([tf.strings.substr(data, 0, 30), tf.constant(bytes(30))]), 0, 30)
    byte = tf.cast(tf.io.decode_raw(start, tf.uint8), tf.int64)

    def number(first, count, big_endian=False):
        weights = [256**place for place in range(count)]
        return tf.reduce_sum(byte[first : first + count] * tf.constant(weights[::-1] if big_endian else weights, tf.int64))

    def starts(text, first=0):
        return tf.strings.substr(start, first, len(text)) == text

    def webp():  # container specification: https://developers.google.com/speed/webp/docs/riff_container and RFC 6386, RFC 9649
        extended = tf.stack([number(27, 3) + 1, number(24, 3) + 1])
        lossless = tf.stack([number(21, 4) // 2**14 % 2**14 + 1, number(21, 4) % 2**14 + 1])
        lossy = tf.stack([number(28, 2) % 2**14, number(26, 2) % 2**14])
        return tf.where(starts(b"VP8X", 12), extended, tf.where(starts(b"VP8L", 12), lossless, lossy))

    return tf.case(
        [
            (starts(JPEG), lambda: tf.image.extract_jpeg_shape(data, tf.int64)[:2]),
            (starts(b"\x89PNG\r\n\x1a\n"), lambda: tf.stack([number(20, 4, big_endian=True), number(16, 4, big_endian=True)])),
            (tf.logical_and(starts(b"RIFF"), starts(b"WEBP", 8)), webp),
        ],
        default=lambda: tf.zeros([2], tf.int64),
    )


def _open_digits(split):
    if split not in ("train", "test"):
        raise DataError(f"digits has the splits 'train' and 'test', got {split!r}.")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("The data set digits comes with scikit-learn, which is missing: pip install scikit-learn.") from error
    images, labels = load_digits(return_X_y=True)
    chosen = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)[split == "test"]
    values = np.rint(images[chosen].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8).repeat(3, axis=-1)
    values, labels = tf.constant(values), tf.constant(labels[chosen], tf.int64)
    names = tuple(map(str, range(10)))
    return _Indexed("digits", split, names, len(chosen), origin="digits", read=lambda index: (values[index], labels[index]))


def _open_folder(root, split, limit, keep):
    splits = _folders(root)
    if split is not None and split not in splits:
        raise DataError(f"{root} has no split {split!r} but {splits}. Expected {root}/{{train,test}}/<class>/<image>.")
    folder = root if split is None else os.path.join(root, split)
    names = _folders(folder)
    if not names:
        raise DataError(
            f"The folder {folder} has no class folder. Expected {folder}/<class>/<image>; ImageNet's val, which is published in "
            "one heap, must be sorted into a folder for each WordNet id."
        )
    sibling = "train" if split != "train" else "test"
    if split is not None and sibling in splits:
        others = _folders(os.path.join(root, sibling))
        if others != names:
            raise DataError(
                f"{split} and {sibling} of {root} must have the same classes. "
                f"Only in {split}: {sorted(set(names) - set(others))};"
                f" only in {sibling}: {sorted(set(others) - set(names))}. Rename or add the missing folders."
            )
    paths, labels, heads = [], [], []
    skipped = [os.path.join(folder, name) for name in _visible(folder) if name not in names]
    with ThreadPoolExecutor(16) as pool:  # opening a file waits on the disk or the network
        for label, name in enumerate(names):
            entries = [os.path.join(folder, name, entry) for entry in _visible(os.path.join(folder, name))]
            images = [path for path in entries if path.lower().endswith(ENDINGS) and not os.path.isdir(path)]
            skipped += sorted(set(entries) - set(images))
            if not images:
                raise DataError(f"{os.path.join(folder, name)} holds no image ({', '.join(ENDINGS)}). Add some or remove it.")
            heads += pool.map(_first_bytes, images)
            paths += images
            labels += [label] * len(images)
    bad = [(path, why) for path, (why, _) in zip(paths, heads) if why]
    if bad and limit is None and not keep:
        raise _unreadable(bad)
    if skipped:
        warnings.warn(f"{len(skipped)} entries are not read as images ({', '.join(ENDINGS)}): {_listed(skipped)}", stacklevel=3)

    def opened(kept, skipped=()):
        some = [paths[index] for index in kept]
        files = tf.constant([os.fsencode(path) for path in some])
        targets = tf.constant([labels[index] for index in kept], tf.int64)

        def read(index):
            return tf.io.read_file(tf.gather(files, index)), tf.gather(targets, index)

        all_jpeg = all(heads[index][1] for index in kept)
        return _Indexed(root, split, tuple(names), len(some), tuple(some), skipped, "folder", read, all_jpeg)

    source = opened(range(len(paths)))
    if limit is None:
        return source
    faults, _ = _faults(source)
    skipped = _left_out(source, faults, len(paths), limit)
    gone = {index for index, _, _ in faults}
    kept = [index for index in range(len(paths)) if index not in gone]
    for label in set(range(len(names))) - {labels[index] for index in kept}:
        raise DataError(f"{os.path.join(folder, names[label])} holds no image that can be read. Replace them or remove it.")
    return opened(kept, skipped)


def _left_out(source, faults, total, limit):
    """(name, reason) of each fault, with a warning, or an error where there are too many."""
    items = tuple((name, why) for _, name, why in faults)
    what = f"{len(items)} of {total} examples of {source.dataset} ({source.split})"
    listed = _listed(f"{name} ({why})" for name, why in items)
    if len(items) > limit * total or len(items) == total:
        raise DataError(f"{what} cannot be read, and limit={limit}: {listed}. Replace or remove them, or pass a larger limit.")
    if items:
        warnings.warn(f"{what} cannot be read and are left out: {listed}", stacklevel=4)
    return items


def _visible(folder):
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "__MACOSX")
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be listed: {error.strerror}. Check its permissions.") from error


def _folders(folder):
    return [name for name in _visible(folder) if os.path.isdir(os.path.join(folder, name))]


def _first_bytes(path):
    """(what is wrong with a file by its first bytes, or None; whether it is a JPEG)."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        return error.strerror, False
    if not head:
        return "zero bytes", False
    known = head.startswith((JPEG, b"\x89PNG\r\n\x1a\n")) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
    return None if known else f"not a JPEG, PNG or WebP file, starts with {head[:8]!r}", head.startswith(JPEG)


def _open_tfds(dataset, split, data_dir, manual_dir, limit):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"{dataset!r} is neither 'digits' nor a folder; for TFDS: pip install tensorflow-datasets.") from error
    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
    except Exception as error:
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(re.split("[:/]", dataset)[0], known) or "none"
        raise DataError(
            f"The data set {dataset!r} is not 'digits', not an existing folder, and TFDS does not have it "
            f"({str(error).splitlines()[0]}). Close names: {near}."
        ) from error
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    except Exception as error:
        raise DataError(
            f"TFDS could not download or prepare {dataset!r} in data_dir {builder.data_dir} ({type(error).__name__}: {error}). "
            "Give the data_dir of a prepared copy, or prepare it where there is a network (with manual_dir, if it wants one)."
        ) from error
    features = builder.info.features
    image, label = (dict(features.items()).get(key) for key in ("image", "label"))
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        raise DataError(f"{dataset!r} of TFDS must have an image 'image' and a class 'label', its features are {features}.")
    try:
        chosen = builder.info.splits[split] if builder.info.splits else None
        examples = builder.as_dataset(
            split=split,
            decoders=tfds.decode.PartialDecoding({"image": True, "label": True}, decoders={"image": tfds.decode.SkipDecoding()}),
            read_config=tfds.ReadConfig(try_autocache=False),
            shuffle_files=False,
        )
    except (KeyError, ValueError, AssertionError) as error:
        splits = sorted(builder.info.splits)
        raise DataError(f"{dataset!r} has nothing under the split {split!r} ({error}). Its splits are {splits}.") from error

    shards = ()
    if chosen and builder.info.file_format is tfds.core.FileFormat.TFRECORD:
        shards = tuple((shard.filename, shard.examples_in_shard) for shard in chosen.file_instructions)
    source = _Stream(
        dataset,
        split,
        tuple(label.names),
        chosen.num_examples if chosen else None,
        origin=builder.info.full_name,
        read=lambda example: example,
        examples=examples.map(lambda example: (example["image"], example["label"])),
        shards=shards,
    )
    if limit is None:
        return source
    try:
        faults, total = _faults(source)
    except tf.errors.OpError as error:
        raise_unreadable(error, source)
    return replace(
        source,
        skipped=_left_out(source, faults, total, limit),
        dropped=tuple(index for index, _, _ in faults),
        num_examples=total - len(faults),
    )
