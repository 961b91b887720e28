"""Images and labels on tf.data: the built-in digits, a folder of images, or a TFDS data set -> (images, one-hot labels).

The arithmetic is that of google-research/vision_transformer (`vit_jax/input_pipeline.py`). The order is not: there it depends
on what ran before, here the order of an epoch and every random draw in it are a function of (seed, epoch) alone.

    train = open_source("digits", "train")
    model.fit(train_batches(train, size=8, batch=128, augment=False), steps_per_epoch=100)

Images are used as they are stored: EXIF orientation is ignored, as TensorFlow and the original do; an alpha channel is dropped;
gray is repeated to three channels; 16-bit PNG becomes 8-bit. An animated WebP cannot be
decoded and counts as unreadable.
"""

import difflib
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Integral

import numpy as np
import tensorflow as tf

from keras_vit.data.pixels import Pixels
from keras_vit.errors import ArgumentError, DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 64_000_000  # an image that declares more is refused before anything of it is inflated
GOOGLE = Pixels()
ORDER, AUGMENT = 0, 1  # separate streams of random numbers under one seed


@dataclass(frozen=True, eq=False)
class Source:
    """One split of a data set, as `open_source` found it; pass it to `train_batches` and `eval_batches`.

    Attributes:
        dataset: the name or folder it was opened with.
        split: the split it was opened with.
        class_names: the names in label order.
        num_examples: how many examples; None where TFDS does not know.
        paths: the image files in label order, then by name; empty unless the source is a folder.
    """

    dataset: str
    split: str
    class_names: tuple = field(repr=False)
    num_examples: int | None
    paths: tuple = field(default=(), repr=False)

    @property
    def num_classes(self):
        """How many classes there are: the width of the one-hot labels."""
        return len(self.class_names)


@dataclass(frozen=True, eq=False)
class _Indexed(Source):
    """Examples that can be had by number: `load(index) -> (uint8 image, label)`. A whole epoch is shuffled."""

    load: callable = field(default=None, repr=False)

    def ordered(self):
        return tf.data.Dataset.range(self.num_examples).map(lambda index: (index, index))

    def shuffled(self, key, shuffle_buffer):
        order = tf.random.experimental.stateless_shuffle(tf.range(self.num_examples, dtype=tf.int64), key)
        return tf.data.Dataset.from_tensor_slices((order, order))


@dataclass(frozen=True, eq=False)
class _Stream(Source):
    """Examples that come one after the other in a fixed order: `load(example) -> (uint8 image, label)`."""

    load: callable = field(default=None, repr=False)
    examples: tf.data.Dataset = field(default=None, repr=False)

    def ordered(self):
        return self.examples.enumerate()

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


def open_source(dataset, split, *, data_dir=None, manual_dir=None):
    """Finds one split of a data set and checks what can be checked without decoding an image.

    Args:
        dataset: one of
            - "digits": scikit-learn's 1,797 real images of 8x8 pixels, no network. Split "test" is the 360 images, stratified,
              of `train_test_split(test_size=360, random_state=0, stratify=labels)`, "train" the other 1,437. The values 0..16
              become uint8 by `round(value * 255 / 16)`, on three equal channels. (A folder of that name is "./digits".)
            - a folder with `{train,test}/<class>/<image>`: JPEG, PNG or WebP by content, ending in .jpg, .jpeg, .png or .webp
              (any case). Labels follow the sorted class names. Hidden entries and `__MACOSX` are ignored; anything else that is
              not read is listed in one warning.
            - a TFDS name such as "cifar10" or "imagenet2012:5.1.0", with features "image" and "label".
        split: "train" or "test" for digits; the sub folder's name; or a TFDS split such as "train[:98%]".
        data_dir: where TFDS keeps its data sets; None is its own default.
        manual_dir: where TFDS finds files that a user must download by hand.

    Returns:
        A `Source`.

    Raises:
        DataError: no such data set or split; a folder or class without images; a file that is empty or not an image by its first
            bytes (named); train and test with different classes (the difference is listed); TFDS cannot prepare the data.
    """
    dataset, split = os.fspath(dataset), str(split)
    if dataset == "digits":
        return _open_digits(split)
    if os.path.isdir(os.path.expanduser(dataset)):
        return _open_folder(os.path.expanduser(dataset), split)
    return _open_tfds(dataset, split, data_dir, manual_dir)


def train_batches(
    source,
    *,
    size,
    batch,
    pixels=GOOGLE,
    seed=0,
    shuffle_buffer=50_000,
    augment=True,
    prefetch=2,
    start=0,
):
    """Endless shuffled batches; they run across the borders of epochs, so every batch is full.

    Digits and folders shuffle the whole epoch. TFDS reads in its stored order (shuffled when it was written) through a buffer.
    Images are decoded after shuffling.

    Args:
        source: what `open_source` returned.
        size: height and width in pixels: one number, or (height, width).
        batch: examples in a batch.
        pixels: the checkpoint's preprocessing.
        seed: with the epoch's number, all that order, crops and flips depend on.
        shuffle_buffer: how many encoded examples of a TFDS data set are held for shuffling.
        augment: True for the inception crop (area 5% to 100%, aspect ratio 3/4 to 1.33; Szegedy et al., arXiv 1409.4842), resize
            and horizontal flip with probability 1/2; False for the plain resize of `eval_batches`.
        prefetch: batches prepared ahead.
        start: how many examples were already consumed: the stream goes on exactly there.

    Returns:
        A `tf.data.Dataset` of infinite cardinality with float32 (batch, height, width, 3) and float32 (batch, classes) one-hot.

    Raises:
        ArgumentError: a size, count or seed that is not a whole number in range.
        tf.errors.InvalidArgumentError: while iterating, on an image that cannot be decoded; see `raise_unreadable`.
    """
    size = _height_width(size)
    _whole_numbers(1, batch=batch, shuffle_buffer=shuffle_buffer)
    _whole_numbers(0, prefetch=prefetch, start=start)
    _whole_numbers(-(2**63), seed=seed)

    def draws(stream, epoch):
        return tf.random.experimental.stateless_fold_in(tf.constant([seed, stream], tf.int64), epoch)

    def one_epoch(epoch):
        examples = source.shuffled(draws(ORDER, epoch), shuffle_buffer)
        return examples.map(lambda index, example: (epoch, index, example))

    def prepare(epoch, index, example):
        image, label = source.load(example)
        if augment:
            seeds = tf.random.split(tf.random.experimental.stateless_fold_in(draws(AUGMENT, epoch), index), 2)
            flip = tf.random.stateless_uniform([], seeds[1]) > 0.5
            image = train_image(image, size, pixels, box=random_box(tf.shape(image), seeds[0]), flip=flip)
        else:
            image = eval_image(image, size, pixels)
        return image, one_hot(label, source.num_classes)

    epochs, examples = divmod(start, source.num_examples) if source.num_examples else (0, start)
    data = tf.data.Dataset.counter(epochs).flat_map(one_epoch).skip(examples)
    data = data.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(batch, drop_remainder=True)
    return data.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)).prefetch(prefetch)


def eval_batches(source, *, size, batch, pixels=GOOGLE, prefetch=2):
    """Every example once, in a fixed order, resized and normalised only; the last batch may be smaller.

    Args and errors are those of `train_batches`.

    Returns:
        A `tf.data.Dataset` with float32 (n, height, width, 3) and float32 (n, classes) one-hot, n = batch except at the end.
    """
    size = _height_width(size)
    _whole_numbers(1, batch=batch)
    _whole_numbers(0, prefetch=prefetch)

    def prepare(_, example):
        image, label = source.load(example)
        return eval_image(image, size, pixels), one_hot(label, source.num_classes)

    data = source.ordered().map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return data.batch(batch).prefetch(prefetch)


def eval_image(image, size, pixels=GOOGLE):
    """([b,] h, w, 3) on the 0..255 scale -> ([b,] height, width, 3) float32: resize, then `pixels.normalize`.

    Args:
        image: integers or floats; anything `tf.convert_to_tensor` takes.
        size: one number or (height, width), in pixels.
        pixels: the checkpoint's preprocessing.

    Raises:
        ArgumentError: `size` is not made of whole numbers above 0, or `image` is no RGB image.
    """
    return pixels.normalize(_resize(_rgb(image, (3, 4)), size, pixels))


def train_image(image, size, pixels=GOOGLE, *, box, flip):
    """(h, w, 3) on the 0..255 scale -> (height, width, 3) float32: cut the box, resize, flip left-right if asked, normalise.

    Args:
        image: integers or floats.
        size: one number or (height, width), in pixels.
        pixels: the checkpoint's preprocessing.
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
    image = tf.slice(image, [box[0], box[1], 0], [box[2], box[3], 3])
    image = _resize(image, size, pixels)
    return pixels.normalize(tf.where(flip, tf.reverse(image, [1]), image))


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
    message = f"labels must lie in 0..{classes - 1}; check the number of classes, and whether the split has labels at all; got"
    if tf.executing_eagerly() and not valid:
        raise ArgumentError(f"{message} {labels.numpy()}.")
    return tf.one_hot(_checked(labels, valid, message, labels), classes, dtype=tf.float32)


def decode(data):
    """A file's content, scalar string tensor -> uint8 (h, w, 3), the values of `tf.image.decode_jpeg` for a JPEG.

    Raises:
        tf.errors.InvalidArgumentError: the content cannot be decoded, or a JPEG, PNG or WebP declares more than 64 million pixels
            (seen from its header, before decoding).
    """
    height, width = tf.unstack(_declared_size(data))
    small = tf.logical_and(height <= MAX_PIXELS, height * width <= MAX_PIXELS)
    data = _checked(data, small, f"the image declares more than {MAX_PIXELS:,} pixels (height, width):", height, width)
    return tf.ensure_shape(tf.io.decode_image(data, channels=3, expand_animations=False), [None, None, 3])


def find_unreadable(source):
    """Decodes every file of a folder source: a list of (path, reason) for those that fail; empty for other sources."""

    def reason(path):
        try:
            with open(path, "rb") as file:
                decode(tf.constant(file.read()))
        except (OSError, tf.errors.OpError) as error:
            text = error.strerror if isinstance(error, OSError) else error.message
            return re.sub(r"^\{\{.*?\}\} |assertion failed: | \[Op:\w+\].*$", "", str(text), flags=re.S)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [(path, why) for path, why in zip(source.paths, pool.map(reason, source.paths)) if why]


def raise_unreadable(error, *sources):
    """Names the files behind an error that came out of tf.data, which knows no file names.

    Call it where `fit` or `evaluate` is called: `except tf.errors.OpError as error: raise_unreadable(error, train, test)`.
    It decodes all files of the sources again, so that every broken one is found at once.

    Raises:
        DataError: files of these sources cannot be decoded: the first five with the reason, and how many there are.
        The given error: all files can be decoded, or no source is a folder; the cause is another one.
    """
    bad = [item for source in sources for item in find_unreadable(source)]
    if bad:
        raise _unreadable(bad) from error
    raise error


def _checked(value, condition, *message):
    with tf.control_dependencies([tf.debugging.Assert(condition, message)]):
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


def _rgb(image, ranks):
    image = tf.convert_to_tensor(image)
    if image.shape.rank not in ranks or image.shape[-1] != 3:
        raise ArgumentError(f"An image must have shape (height, width, 3), got {image.shape}. Convert it to RGB, channels last.")
    return image


def _resize(image, size, pixels):
    return tf.image.resize(image, _height_width(size), method=pixels.resize, antialias=pixels.antialias)


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
            (starts(b"\xff\xd8\xff"), lambda: tf.image.extract_jpeg_shape(data, tf.int64)[:2]),
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
    return _Indexed("digits", split, names, len(chosen), load=lambda index: (values[index], labels[index]))


def _open_folder(root, split):
    splits = _folders(root)
    if split not in splits:
        raise DataError(f"{root} has no split {split!r} but {splits}. Expected {root}/{{train,test}}/<class>/<image>.")
    folder = os.path.join(root, split)
    names = _folders(folder)
    if not names:
        raise DataError(f"The folder {folder} has no class folder. Expected {folder}/<class>/<image>.")
    sibling = "train" if split != "train" else "test"
    if sibling in splits:
        others = _folders(os.path.join(root, sibling))
        if others != names:
            raise DataError(
                f"{split} and {sibling} of {root} must have the same classes. "
                f"Only in {split}: {sorted(set(names) - set(others))};"
                f" only in {sibling}: {sorted(set(others) - set(names))}. Rename or add the missing folders."
            )
    paths, labels, bad = [], [], []
    skipped = [os.path.join(folder, name) for name in _visible(folder) if name not in names]
    with ThreadPoolExecutor(16) as pool:  # opening a file waits on the disk or the network
        for label, name in enumerate(names):
            entries = [os.path.join(folder, name, entry) for entry in _visible(os.path.join(folder, name))]
            images = [path for path in entries if path.lower().endswith(ENDINGS) and not os.path.isdir(path)]
            skipped += sorted(set(entries) - set(images))
            if not images:
                raise DataError(f"{os.path.join(folder, name)} holds no image ({', '.join(ENDINGS)}). Add some or remove it.")
            bad += [(path, why) for path, why in zip(images, pool.map(_header_fault, images)) if why]
            paths += images
            labels += [label] * len(images)
    if bad:
        raise _unreadable(bad)
    if skipped:
        warnings.warn(f"{len(skipped)} entries are not read as images ({', '.join(ENDINGS)}): {_listed(skipped)}", stacklevel=3)
    files, labels = tf.constant([os.fsencode(path) for path in paths]), tf.constant(labels, tf.int64)

    def load(index):
        return decode(tf.io.read_file(files[index])), labels[index]

    return _Indexed(root, split, tuple(names), len(paths), tuple(paths), load)


def _visible(folder):
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "__MACOSX")
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be listed: {error.strerror}. Check its permissions.") from error


def _folders(folder):
    return [name for name in _visible(folder) if os.path.isdir(os.path.join(folder, name))]


def _header_fault(path):
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        return error.strerror
    if not head:
        return "zero bytes"
    known = head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
    return None if known else f"not a JPEG, PNG or WebP file, starts with {head[:8]!r}"


def _open_tfds(dataset, split, data_dir, manual_dir):
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
        num_examples = builder.info.splits[split].num_examples if builder.info.splits else None
        examples = builder.as_dataset(
            split=split,
            decoders=tfds.decode.PartialDecoding({"image": True, "label": True}, decoders={"image": tfds.decode.SkipDecoding()}),
            read_config=tfds.ReadConfig(try_autocache=False),
            shuffle_files=False,
        )
    except (KeyError, ValueError, AssertionError) as error:
        splits = sorted(builder.info.splits)
        raise DataError(f"{dataset!r} has nothing under the split {split!r} ({error}). Its splits are {splits}.") from error

    encoded = examples.map(lambda example: (example["image"], example["label"]))

    def load(example):
        return decode(example[0]), example[1]

    return _Stream(dataset, split, tuple(label.names), num_examples, load=load, examples=encoded)
