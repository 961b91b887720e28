"""Pixels and pipelines: the original's numbers, a stream that the seed alone decides, and faults that name their file."""

import base64
import io
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_sample_image

from keras_vit.data import augment, pipeline
from keras_vit.data.pipeline import (
    decode,
    decode_box,
    eval_batches,
    eval_image,
    find_corrupt_shards,
    find_unreadable,
    one_hot,
    open_source,
    positions,
    probe,
    raise_unreadable,
    random_box,
    train_batches,
    train_image,
)
from keras_vit.data.pixels import IMAGENET, IMAGENET_MEAN, IMAGENET_STD, Pixels
from keras_vit.errors import ArgumentError, DataError

GOLDENS = Path(__file__).parent / "goldens" / "preprocess"
RGB = Pixels(mean=IMAGENET_MEAN, std=IMAGENET_STD)
WEBP = {  # 6 x 9 pixels of (10, 20, 30), one in each of the format's three headers
    "lossless": base64.b64decode("UklGRh4AAABXRUJQVlA4TBEAAAAvCEABAAdQiirUo/+BiOh/AAA="),
    "lossy": base64.b64decode("UklGRi4AAABXRUJQVlA4ICIAAABwAQCdASoJAAYAAUAmJZQCdAFAAAD+/DeBV/fU6D4r4AAA"),
    "extended": base64.b64decode(
        "UklGRlYAAABXRUJQVlA4WAoAAAAIAAAACAAABQAAVlA4ICIAAABwAQCdASoJAAYAAUAmJZQCdAFAAAD+/DeBV/fU6D4r4AAA"
        "RVhJRg4AAABNTQAqAAAACAAAAAAAAA=="
    ),
}


# Two frames of 4 x 4 pixels
ANIMATED = base64.b64decode(
    "UklGRoQAAABXRUJQVlA4WAoAAAACAAAAAwAAAwAAQU5JTQYAAAAAAAAAAABBTk1GKAAAAAAAAAAAAAMAAAMAAAAAAAJWUDhMDwAAAC8DwAAABxD9j/4HIqL/AQBB"
    "Tk1GKAAAAAAAAAAAAAMAAAMAAAAAAABWUDhMDwAAAC8DwAAAB9D/iP4HIqL/AQA="
)
EVERYTHING = {"randaugment": (1, 15), "mixup": 0.4, "cutmix": 1.0, "erasing": 0.5}


def picture(seed=0, height=12, width=10):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(width, height, rows=0):
    """A gray PNG that declares width x height and holds `rows` rows of zeros."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes((width + 1) * rows), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def write_folder(root, classes=("ant", "bee"), splits=("train", "test"), count=3):
    """{split}/{class}/{i}.png, every picture with a first pixel of its own: (label, i, split)."""
    for (s, split), (label, name) in itertools.product(enumerate(splits), enumerate(classes)):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            image = picture(i)
            image[0, 0] = label, i, s
            (folder / f"{i}.png").write_bytes(tf.io.encode_png(image).numpy())
    return root


def raw(dataset, examples):
    """The first `examples` images of batched data, back on the 0..255 scale."""
    images = np.concatenate([images for images, _ in dataset.take(-(-examples // 4)).as_numpy_iterator()])
    return np.rint(images[:examples] * 127.5 + 127.5).astype(int)


def ids(dataset, examples):
    """Which examples of `write_folder`'s kind came, in order."""
    return [tuple(pixel[:2]) for pixel in raw(dataset, examples)[:, 0, 0].tolist()]


def write_jpegs(root, count=10, splits=("train",)):
    """{split}/{ant,bee}/{i}.jpg, noise of 30 x 40 pixels."""
    for split, i in itertools.product(splits, range(count)):
        path = root / split / ("ant", "bee")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_jpeg(picture(i, 30, 40)).numpy())
    return root


@pytest.fixture
def few_operations(monkeypatch):
    """RandAugment of three operations: tracing all takes a second in every pipeline."""
    monkeypatch.setattr(augment, "OPERATIONS", {name: augment.OPERATIONS[name] for name in ("Rotate", "Color", "Cutout")})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "bugs", count=5)


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory):
    """A TFDS data set of 20 digits, built here; gives its name and data_dir."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class KerasVitTiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        broken = None  # a file to put in the place of example 3

        def _info(self):
            label = tfds.features.ClassLabel(names=list("abcdefghij"))
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(8, 8, 3)), "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(20):
                image = picture(i, 8, 8)
                image[0, 0] = i % 10, i, 0
                yield i, {"image": self.broken if self.broken and i == 3 else image, "label": i % 10}

    folder = str(tmp_path_factory.mktemp("tfds"))
    shards = tfds.download.DownloadConfig(num_shards=3)
    KerasVitTiny(data_dir=folder).download_and_prepare(download_config=shards)
    cut = tmp_path_factory.mktemp("cut") / "cut.png"
    cut.write_bytes(tf.io.encode_png(picture()).numpy()[:100])
    KerasVitTiny.broken = str(cut)
    KerasVitTiny(data_dir=f"{folder}/broken").download_and_prepare(download_config=shards)
    return "keras_vit_tiny", folder


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("kind", ["eval_resize", "train_given_crop"])
def test_single_images_equal_the_originals(kind):
    meta = json.loads((GOLDENS / kind / "meta.json").read_text())
    inputs, expected = np.load(GOLDENS / kind / "inputs.npz"), np.load(GOLDENS / kind / "expected.npz")
    for item in meta["items"]:
        image = inputs[item["name"]]
        if kind == "eval_resize":
            got = eval_image(image, item["size"])
        else:
            box = [item[key] for key in ("begin_y", "begin_x", "height", "width")]
            got = train_image(image, item["size"], box=box, flip=item["flip"])
        assert got.dtype == tf.float32
        np.testing.assert_allclose(got, expected[item["name"]], rtol=0, atol=meta["tolerance"], err_msg=item["name"])


def test_one_hot_equals_the_original_and_refuses_labels_out_of_range():
    expected = np.load(GOLDENS / "eval_resize" / "expected.npz")["onehot_label_3_of_10"]
    np.testing.assert_array_equal(one_hot(3, 10), expected)
    assert one_hot([[1, 2]], 4).shape == (1, 2, 4)
    for label in (-1, 10, [0, 10]):
        with pytest.raises(ArgumentError, match=r"0\.\.9"):
            one_hot(label, 10)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"labels must lie in 0\.\.9"):
        list(tf.data.Dataset.from_tensors(-1).map(lambda label: one_hot(label, 10)))


def test_normalize_is_exact_in_numpy_tensorflow_and_tf_data():
    image = picture()
    expected = (image.astype(np.float32) - np.float32(RGB.mean)) / np.float32(RGB.std)
    in_data = next(iter(tf.data.Dataset.from_tensors(image).map(RGB.normalize)))
    for got in (RGB.normalize(image), RGB.normalize(tf.constant(image)), RGB.normalize(image.tolist()), in_data):
        np.testing.assert_array_equal(got, expected)
    assert RGB.normalize(image).dtype == np.float32
    assert RGB.normalize(image.astype(np.float64)[None]).dtype == np.float32


def test_normalize_of_backend_and_symbolic_tensors_agrees_with_numpy():
    image = picture()
    backend = keras.ops.convert_to_numpy(RGB.normalize(keras.ops.convert_to_tensor(image)))
    np.testing.assert_allclose(backend, RGB.normalize(image), rtol=0, atol=5e-7)  # XLA multiplies by the reciprocal
    symbolic = keras.Input((12, 10, 3), dtype="uint8")
    model = keras.Model(symbolic, RGB.normalize(symbolic))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(image[None]))[0], RGB.normalize(image), rtol=0, atol=5e-7)


@pytest.mark.parametrize("bad", [np.zeros((4, 3)), np.zeros((4, 4, 1)), np.zeros((4, 4, 3), bool), "abc", None])
def test_normalize_refuses_what_is_no_rgb_image(bad):
    with pytest.raises(ArgumentError):
        Pixels().normalize(bad)


def test_pixels_survive_json():
    assert Pixels.from_dict(json.loads(json.dumps(RGB.asdict()))) == RGB
    assert Pixels.from_dict(Pixels().asdict()) == Pixels() == Pixels(mean=[127.5] * 3)
    assert Pixels.from_dict(json.loads(json.dumps(IMAGENET.asdict()))) == IMAGENET
    before = dict(mean=[127.5] * 3, std=[127.5] * 3, resize="bilinear", antialias=False, crop="squash")
    assert Pixels.from_dict(before) == Pixels()  # as stored before there was a crop_fraction


@pytest.mark.parametrize(
    "bad",
    [{"mean": (1, 2)}, {"mean": 127.5}, {"std": (1, 0, 1)}, {"std": (1, float("nan"), 1)}, {"mean": ("1", "2", "3")}]
    + [{"resize": "cubic"}, {"antialias": 1}, {"crop": "centre"}, {"gamma": 2.2}]
    + [{"crop_fraction": 0.9}, *({"crop_fraction": each, "crop": "center"} for each in (0, 1.1, True, "1", float("nan")))],
)
def test_pixels_refuse_values_they_cannot_honour(bad):
    with pytest.raises(ArgumentError, match=next(iter(bad))):
        Pixels.from_dict(bad)


def test_what_a_record_does_to_an_image_is_said_in_words():
    assert Pixels().describe((224, 192)) == "bilinear without antialiasing, to 224 x 192 whatever the aspect ratio"
    assert IMAGENET.describe((224, 224)) == "bicubic with antialiasing, the shorter side to 256, then the central 224 x 224"
    assert IMAGENET.describe((224, 112)).endswith("to cover 256 x 128, then the central 224 x 112")


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("resize, fraction, side", [("bicubic", 0.875, 224), ("bicubic", 0.9, 224), ("bilinear", 1.0, 96)])
def test_evaluation_sees_of_a_photograph_what_torchvision_cuts_with_pillow(upright, resize, fraction, side):
    """torchvision's `Resize` and `CenterCrop`, written out with the numbers of their code; Pillow does the sampling."""
    image = load_sample_image("china.jpg")
    image = np.ascontiguousarray(image.swapaxes(0, 1) if upright else image)
    (h, w), short = image.shape[:2], int(np.floor(side / fraction))
    high, wide = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
    top, left = round((high - side) / 2.0), round((wide - side) / 2.0)
    resized = Image.fromarray(image).resize((wide, high), Image.Resampling[resize.upper()])
    expected = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32)
    as_it_is = dict(mean=(0,) * 3, std=(1,) * 3)
    found = eval_image(image, side, replace(IMAGENET, resize=resize, crop_fraction=fraction, **as_it_is)).numpy()
    assert np.abs(found - expected).max() <= 1 and np.mean(found != expected) < (0.001 if resize == "bicubic" else 0.01)
    found = eval_image(image, side, replace(IMAGENET, resize=resize, crop_fraction=fraction)).numpy()
    np.testing.assert_allclose(found, (expected - IMAGENET_MEAN) / IMAGENET_STD, atol=0.0176, rtol=0)  # a level of 255


def test_a_central_crop_is_that_of_the_whole_resized_image_and_a_rectangle_may_be_one():
    image = picture(height=30, width=50)
    pixels = Pixels(crop="center", crop_fraction=0.5)
    whole = pixels.normalize(tf.image.resize(image, (16, 26)))  # covers 16 x 24
    np.testing.assert_allclose(eval_image(image, (8, 12), pixels), whole[4:12, 7:19], atol=2e-5)
    np.testing.assert_array_equal(eval_image(image[None], (8, 12), pixels)[0], eval_image(image, (8, 12), pixels))


def test_the_squash_of_before_keeps_its_bits_and_with_antialias_is_pillows():
    image = load_sample_image("flower.jpg")
    before = Pixels().normalize(tf.image.resize(image, (60, 80), "bilinear", antialias=False))
    np.testing.assert_array_equal(eval_image(image, (60, 80)), before)
    found = eval_image(image, (60, 80), Pixels((0,) * 3, (1,) * 3, "bicubic", antialias=True)).numpy()
    assert np.abs(found - np.asarray(Image.fromarray(image).resize((80, 60), Image.Resampling.BICUBIC))).max() <= 1


def test_training_cuts_its_own_box_and_takes_only_the_interpolation_of_a_record():
    image, box = picture(height=30, width=50), (3, 4, 20, 30)
    for pixels in (IMAGENET, replace(IMAGENET, crop="squash", crop_fraction=1.0)):
        found = train_image(image, 12, pixels, box=box, flip=False)
        np.testing.assert_array_equal(found, eval_image(image[3:23, 4:34], 12, replace(pixels, crop="squash", crop_fraction=1.0)))


def test_the_crop_of_an_image_whose_long_side_would_fill_memory_is_made():
    assert eval_image(np.full((2, 3_000_000, 3), 7, np.uint8), 32, IMAGENET).shape == (32, 32, 3)  # 36 x 54,000,000 resized


def test_every_stream_of_evaluation_cuts_as_the_single_image_does(tmp_path):
    for name, image in (("a", picture(1, 20, 31)), ("b", picture(2, 33, 20))):
        (tmp_path / "d" / "test" / name).mkdir(parents=True)
        (tmp_path / "d" / "test" / name / "1.png").write_bytes(tf.io.encode_png(image).numpy())
    source = open_source(tmp_path / "d", "test")
    expected = np.stack([eval_image(picture(1, 20, 31), 14, IMAGENET), eval_image(picture(2, 33, 20), 14, IMAGENET)])
    (found,) = [images.numpy() for images, _ in eval_batches(source, size=14, batch=2, pixels=IMAGENET)]
    np.testing.assert_array_equal(found, expected)
    images, labels = next(iter(train_batches(source, size=14, batch=2, pixels=IMAGENET, augment=False)))
    np.testing.assert_array_equal(images.numpy()[np.argsort(labels.numpy().argmax(1))], expected)


def test_sizes_boxes_and_shapes_that_make_no_sense_are_refused():
    image = picture()
    for size in (0, -1, 2.5, (8,), (8, 8, 3), "8", True):
        with pytest.raises(ArgumentError, match="size"):
            eval_image(image, size)
    for box in ([0, 0, 13, 5], [-1, 0, 5, 5], [0, 8, 5, 5], [0, 0, 0, 5]):
        with pytest.raises(ArgumentError, match="box"):
            train_image(image, 8, box=box, flip=False)
    for wrong in (image[..., :1], image[..., 0], np.zeros((1, 1, 4, 4, 3))):
        with pytest.raises(ArgumentError, match="height, width, 3"):
            eval_image(wrong, 8)
    assert eval_image(image, (7, 5)).shape == (7, 5, 3) and eval_image(image[None], (7, 5)).shape == (1, 7, 5, 3)


def test_random_boxes_lie_in_the_image_and_keep_area_and_aspect():
    boxes = np.array([random_box([120, 160, 3], [seed, 7]) for seed in range(300)])
    y, x, height, width = boxes.T
    assert boxes.dtype == np.int32 and min(y.min(), x.min()) >= 0 and (y + height).max() <= 120 and (x + width).max() <= 160
    area = height * width / (120 * 160)
    assert area.min() > 0.045 and area.max() > 0.8 and 0.28 < area.mean() < 0.4
    assert (width / height).min() > 0.72 and (width / height).max() < 1.37  # whole pixels blur the limits
    np.testing.assert_array_equal(boxes[3], random_box([120, 160, 3], [3, 7]))


# ---------------------------------------------------------------- digits


def test_digits_are_split_as_scikit_learn_splits_them():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    expected = train_test_split(data.images, data.target, test_size=360, random_state=0, stratify=data.target)
    for split, values, labels, count in (("train", *expected[0::2], 1437), ("test", *expected[1::2], 360)):
        source = open_source("digits", split)
        assert source.num_examples == count and source.num_classes == 10 and source.class_names[3] == "3"
        images, hot = map(np.concatenate, zip(*eval_batches(source, size=8, batch=100).as_numpy_iterator()))
        np.testing.assert_array_equal(hot.argmax(-1), labels)
        np.testing.assert_array_equal(np.rint((images * 127.5 + 127.5) * 16 / 255), np.repeat(values[..., None], 3, -1))
        assert images.min() == -1 and images.max() == 1
    with pytest.raises(DataError, match="validation"):
        open_source("digits", "validation")


def test_digits_train_without_crop_or_flip_and_with_full_static_batches():
    source = open_source("digits", "train")
    data = train_batches(source, size=8, batch=32, augment=False)
    assert [tuple(spec.shape) for spec in data.element_spec] == [(32, 8, 8, 3), (32, 10)]
    assert data.cardinality() == tf.data.INFINITE_CARDINALITY
    plain = {image.tobytes() for images, _ in eval_batches(source, size=8, batch=500).as_numpy_iterator() for image in images}
    assert all(image.tobytes() in plain for images, _ in data.take(3).as_numpy_iterator() for image in images)


# ---------------------------------------------------------------- order and draws


def sources(folder, tiny_tfds):
    name, data_dir = tiny_tfds
    return {"folder": (open_source(folder, "train"), 10), "tfds": (open_source(name, "train", data_dir=data_dir), 20)}


@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_every_epoch_holds_each_example_once_in_an_order_of_its_own(kind, folder, tiny_tfds):
    source, count = sources(folder, tiny_tfds)[kind]
    options = {"size": (12, 10) if kind == "folder" else 8, "batch": 2}
    assert sum(len(labels) for _, labels in eval_batches(source, **options)) == count
    data = train_batches(source, augment=False, shuffle_buffer=7, **options).take(3 * count // 2)
    order = [image.tobytes() for images, _ in data.as_numpy_iterator() for image in images]
    epochs = [order[i * count : (i + 1) * count] for i in range(3)]
    assert all(len(set(epoch)) == count for epoch in epochs)
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def take(data, batches):
    return [np.concatenate(arrays) for arrays in zip(*data.take(batches).as_numpy_iterator())]


@pytest.mark.parametrize("kind", ["folder", "tfds"])
@pytest.mark.parametrize("augment", [False, True])
def test_order_and_draws_depend_on_seed_and_epoch_alone(kind, augment, folder, tiny_tfds):
    source, count = sources(folder, tiny_tfds)[kind]
    options = {"size": 8, "batch": 2, "augment": augment, "shuffle_buffer": 7}
    tf.random.set_seed(1)
    images, labels = take(train_batches(source, seed=5, **options), count)
    tf.random.set_seed(2)
    tf.random.uniform([3])
    again = train_batches(sources(folder, tiny_tfds)[kind][0], seed=5, **options)
    for _ in range(2):
        for got, expected in zip(take(again, count), (images, labels)):
            np.testing.assert_array_equal(got, expected)
    for start in (2, count, count + 4):  # the second epoch is the same without the first
        rest = take(train_batches(source, seed=5, start=start, **options), (2 * count - start) // 2)
        np.testing.assert_array_equal(rest[0], images[start:])
        np.testing.assert_array_equal(rest[1], labels[start:])
    other = take(train_batches(source, seed=6, **options), count)
    assert not np.array_equal(other[1], labels)


@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_workers_slices_together_are_the_batches_of_one_bit_for_bit(kind, folder, tiny_tfds, few_operations):
    source, count = sources(folder, tiny_tfds)[kind]
    options = {"size": 8, "batch": 4, "seed": 3, "shuffle_buffer": 7, **EVERYTHING}
    batches = list(train_batches(source, **options).take(count).as_numpy_iterator())
    for workers, start in ((2, 0), (4, 8)):
        parts = [train_batches(source, shard=(worker, workers), start=start, **options) for worker in range(workers)]
        assert [tuple(spec.shape) for spec in parts[0].element_spec] == [
            (4 // workers, 8, 8, 3),
            (4 // workers, source.num_classes),
        ]
        expected = batches[start // 4 :]
        slices = [list(part.take(len(expected)).as_numpy_iterator()) for part in parts]
        for number, (images, labels) in enumerate(expected):
            np.testing.assert_array_equal(np.concatenate([part[number][0] for part in slices]), images)
            np.testing.assert_array_equal(np.concatenate([part[number][1] for part in slices]), labels)
    assert all(np.count_nonzero(labels) > 4 for _, labels in batches[:2]) and len({x.tobytes() for x, _ in batches}) == count


def test_a_worker_reads_its_own_examples_and_one_more_for_mixing(folder, monkeypatch):
    source = open_source(folder, "train")
    read = []

    def spy(index):
        tf.numpy_function(lambda i: read.append(int(i)) or i, [index], tf.int64, stateful=True)
        return source.read(index)

    spied = pipeline.replace(source, read=spy)
    for options, more in (({}, 0), ({"mixup": 0.2}, 1)):
        read.clear()
        data = train_batches(spied, size=8, batch=10, augment=False, shard=(0, 2), prefetch=0, **options)
        in_turn = tf.data.Options()
        in_turn.threading.private_threadpool_size = 1
        next(iter(data.with_options(in_turn)))
        first = [example.index for example in positions(source, seed=0, start=0, count=10)]
        expected = {*first[:5], *first[9:][:more]}
        assert expected <= set(read[: 5 + more]) and set(read[: 5 + more]) == expected


@pytest.mark.parametrize("kind", ["folder", "tfds", "unknown length", "digits"])
def test_a_stream_goes_on_anywhere_with_everything_on(kind, folder, tiny_tfds, few_operations):
    if kind == "digits":
        source, count, start = open_source("digits", "test"), 360, 356
    else:
        source, count = sources(folder, tiny_tfds)[kind if kind == "folder" else "tfds"]
        start = 12 if kind == "folder" else 24
    if kind == "unknown length":
        source = pipeline.replace(source, num_examples=None)
    options = {"size": 8, "batch": 4, "seed": 5, "shuffle_buffer": 7, **EVERYTHING}
    images, labels = take(train_batches(source, **options).skip(start // 4), 3)
    rest = take(train_batches(source, start=start, **options), 3)
    np.testing.assert_array_equal(rest[0], images)
    np.testing.assert_array_equal(rest[1], labels)


def test_draws_do_not_depend_on_how_many_threads_there_are(folder, few_operations):
    data = train_batches(open_source(folder, "train"), size=8, batch=4, **EVERYTHING)
    single = tf.data.Options()
    single.threading.private_threadpool_size = 1
    single.autotune.enabled = False
    for one, many in zip(take(data.with_options(single), 4), take(data, 4)):
        np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("kind", ["folder", "tfds", "digits"])
def test_positions_name_the_examples_of_a_batch(kind, folder, tiny_tfds):
    if kind == "digits":
        source, count = open_source("digits", "test"), 360
    else:
        source, count = sources(folder, tiny_tfds)[kind]
    options = {"seed": 9, "start": count - 4, "shuffle_buffer": 7}
    places = positions(source, count=8, **options)
    assert [place.position for place in places] == list(range(count - 4, count + 4))
    assert [place.epoch for place in places] == [0] * 4 + [1] * 4
    size = (12, 10) if kind == "folder" else 8
    whole = raw(eval_batches(source, size=size, batch=4), count)
    stream = raw(train_batches(source, size=size, batch=4, augment=False, **options), 8)
    np.testing.assert_array_equal(stream, whole[[place.index for place in places]])
    assert [place.path for place in places] == [source.paths[p.index] if source.paths else None for p in places]


def test_randaugment_comes_between_a_crop_to_bytes_and_the_normalisation(folder):
    source = open_source(folder, "train")
    plain, erased, mixed = (
        take(train_batches(source, size=8, batch=10, **options), 1)[0]
        for options in ({}, {"randaugment": (0, 0), "erasing": 1.0}, {"randaugment": (1, 10)})
    )
    kept = (plain == erased).all(-1).mean((1, 2))
    assert (kept < 1).all() and (kept > 0.5).all()  # the crops are the same, a box of each is gone
    np.testing.assert_allclose(mixed * 127.5 + 127.5, np.rint(mixed * 127.5 + 127.5), atol=1e-4)
    assert not np.allclose(plain * 127.5 + 127.5, np.rint(plain * 127.5 + 127.5), atol=1e-4)


def test_another_process_draws_the_same_numbers():
    code = (
        "import zlib; from keras_vit.data.pipeline import open_source, train_batches\n"
        "data = train_batches(open_source('digits', 'train'), size=8, batch=64, seed=3, start=1400)\n"
        "print(zlib.crc32(b''.join(a.tobytes() for pair in data.take(2).as_numpy_iterator() for a in pair)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    data = train_batches(open_source("digits", "train"), size=8, batch=64, seed=3, start=1400)
    images, labels = zip(*data.take(2).as_numpy_iterator())
    mine = b"".join(array.tobytes() for pair in zip(images, labels) for array in pair)
    assert int(other.split()[-1]) == zlib.crc32(mine)


def test_augmented_images_are_crops_half_of_them_flipped(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (120, 120, 3))  # brighter to the right
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "ramp.png").write_bytes(tf.io.encode_png(ramp).numpy())
    images, _ = take(train_batches(open_source(tmp_path, "train"), size=8, batch=20), 10)
    rising = images[:, 0, -1, 0] > images[:, 0, 0, 0]
    assert 70 <= rising.sum() <= 130
    assert len({image.tobytes() for image in images}) > 190


def test_batches_refuse_numbers_out_of_range():
    source = open_source("digits", "test")
    for bad in ({"batch": 0}, {"batch": 2.0}, {"seed": 0.5}, {"start": -1}, {"shuffle_buffer": 0}, {"prefetch": -1}, {"size": 0}):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            train_batches(source, **{"size": 8, "batch": 4, **bad})
    for bad in ({"erasing": 1.5}, {"mixup": -1}, {"cutmix": True}, {"randaugment": (2, -1)}, {"shard": 2}, {"shard": (2, 2)}):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            train_batches(source, **{"size": 8, "batch": 4, **bad})
    with pytest.raises(ArgumentError, match="multiple of the number of workers, got 4"):
        train_batches(source, size=8, batch=4, shard=(0, 3))
    with pytest.raises(ArgumentError, match="batch"):
        eval_batches(source, size=8, batch=0)
    for bad in ({"start": -1}, {"count": 0}, {"seed": "0"}, {"shuffle_buffer": 0}):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            positions(source, **{"seed": 0, "start": 0, "count": 1, **bad})


# ---------------------------------------------------------------- folders


def test_a_folder_is_read_in_the_order_of_its_names(folder):
    source = open_source(folder, "test")
    assert source.class_names == ("ant", "bee") and source.num_examples == 10
    assert [Path(path).parts[-3:] for path in source.paths[4:6]] == [("test", "ant", "4.png"), ("test", "bee", "0.png")]
    batches = list(eval_batches(source, size=(12, 10), batch=4).as_numpy_iterator())
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    labels = np.concatenate([labels for _, labels in batches])
    np.testing.assert_array_equal(labels.argmax(-1), [0] * 5 + [1] * 5)
    assert ids(eval_batches(source, size=(12, 10), batch=4), 10) == [(label, i) for label in range(2) for i in range(5)]


def test_jpeg_png_and_webp_mix_by_content_whatever_their_ending(tmp_path):
    image = picture()
    files = {
        "0.JPG": tf.io.encode_jpeg(image).numpy(),
        "1.png": tf.io.encode_png(image).numpy(),
        "2.webp": WEBP["lossless"],
        "3.jpeg": tf.io.encode_png(image).numpy(),
        "4 ünï.png": tf.io.encode_png(image[..., :1]).numpy(),
        "5.png": tf.io.encode_png(np.concatenate([image, image[..., :1]], -1)).numpy(),
        "6.png": tf.io.encode_png(image.astype(np.uint16) * 257).numpy(),
    }
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "train" / "a" / name).write_bytes(content)
    gray = np.repeat(image[..., :1], 3, -1)
    got = raw(eval_batches(open_source(tmp_path, "train"), size=(12, 10), batch=4), 7)
    jpeg = tf.image.decode_jpeg(files["0.JPG"], 3).numpy()
    flat = np.broadcast_to([10, 20, 30], (12, 10, 3))
    for one, expected in zip(got, [jpeg, image, flat, image, gray, image, image]):
        np.testing.assert_array_equal(one, expected)


def test_exif_orientation_is_ignored_in_training_and_evaluation_alike(tmp_path):
    plain = tf.io.encode_jpeg(picture(height=40, width=56), quality=80).numpy()
    expected = tf.image.decode_jpeg(plain, 3)
    np.testing.assert_array_equal(decode(plain), expected)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for orientation in range(9):  # 0 is not defined, 1 means upright
        tiff = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
        exif = b"Exif\0\0" + tiff
        turned = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
        np.testing.assert_array_equal(decode(turned), expected)
        (tmp_path / "train" / "a" / f"{orientation}.jpg").write_bytes(turned if orientation else plain)
    source = open_source(tmp_path, "train")
    ((images, _),) = eval_batches(source, size=16, batch=9)
    assert (images.numpy() == images.numpy()[0]).all()
    images, _ = take(train_batches(source, size=16, batch=9), 2)
    draws = [example.index for example in positions(source, seed=0, start=0, count=18)]
    for place in (0, 5, 11):
        epoch = tf.random.experimental.stateless_fold_in(
            tf.constant([0, pipeline.AUGMENT], tf.int64), tf.constant(place // 9, tf.int64)
        )
        seeds = tf.random.split(tf.random.experimental.stateless_fold_in(epoch, tf.constant(draws[place], tf.int64)), 2)
        flip = tf.random.stateless_uniform([], seeds[1]) > 0.5
        wanted = train_image(expected, 16, box=random_box(expected.shape, seeds[0]), flip=flip)
        np.testing.assert_array_equal(images[place], wanted)


def jpegs(image):
    """One picture as JPEGs of many kinds."""
    pillow = pytest.importorskip("PIL.Image")
    for mode, options in [
        ("RGB", {"subsampling": 0}), ("RGB", {"subsampling": 1}), ("RGB", {"subsampling": 2}), ("L", {}), ("CMYK", {}),
        ("RGB", {"progressive": True}), ("RGB", {"restart_marker_blocks": 3}),
    ]:  # fmt: skip
        file = io.BytesIO()
        pillow.fromarray(image).convert(mode).save(file, "JPEG", quality=80, **options)
        yield f"{mode} {options}", file.getvalue()


def test_the_box_of_a_jpeg_has_the_values_of_the_whole_image_there():
    random = np.random.default_rng(0)
    for height, width in ((50, 66), (33, 17)):
        for kind, content in jpegs(picture(1, height, width)):
            whole = decode(content).numpy()
            corner = [0, 0, height, width], [0, 0, 1, 1], [height - 1, width - 1, 1, 1]
            drawn = [random_box([height, width, 3], random.integers(0, 99, 2)).numpy() for _ in range(20)]
            for y, x, tall, wide in [*corner, *drawn]:
                got = decode_box(content, tf.constant([y, x, tall, wide], tf.int32), width)
                np.testing.assert_array_equal(got, whole[y : y + tall, x : x + wide], err_msg=kind)


def test_training_on_jpegs_alone_or_among_others_gives_what_decoding_them_whole_gives(tmp_path, monkeypatch):
    root = write_jpegs(tmp_path / "data", 6)
    source = open_source(root, "train")
    fast = take(train_batches(source, size=12, batch=6), 2)
    assert source.all_jpeg
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_crop_jpeg", pipeline._crop_any)
        slow = take(train_batches(source, size=12, batch=6), 2)
    np.testing.assert_array_equal(fast[0], slow[0])
    (root / "train" / "bee" / "9.png").write_bytes(tf.io.encode_png(picture(1, 30, 40)).numpy())
    source = open_source(root, "train")
    mixed = take(train_batches(source, size=12, batch=7), 2)
    assert not source.all_jpeg
    monkeypatch.setattr(pipeline, "_crop_jpeg", pipeline._crop_any)
    np.testing.assert_array_equal(mixed[0], take(train_batches(source, size=12, batch=7), 2)[0])


def test_cmyk_palette_and_transparency_become_plain_rgb():
    pillow = pytest.importorskip("PIL.Image")
    image = pillow.fromarray(np.uint8([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [200, 200, 200]]])).resize((16, 16), 0)

    def saved(image, kind, **options):
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    cmyk = saved(image.convert("CMYK"), "JPEG", quality=95, subsampling=0)
    np.testing.assert_array_equal(decode(cmyk), tf.image.decode_jpeg(cmyk, 3))
    np.testing.assert_allclose(decode(cmyk), np.asarray(image), atol=12)
    np.testing.assert_array_equal(
        decode(saved(image.convert("P", palette=1), "PNG")), np.asarray(image.convert("P", palette=1).convert("RGB"))
    )
    gray = image.convert("L")
    half = pillow.merge("LA", (gray, pillow.new("L", gray.size, 128)))
    np.testing.assert_array_equal(decode(saved(half, "PNG")), np.repeat(np.asarray(gray)[..., None], 3, -1))
    clear = pillow.merge("RGBA", (*image.split(), pillow.new("L", image.size, 0)))
    np.testing.assert_array_equal(decode(saved(clear, "PNG")), np.asarray(image))


def test_animated_webp_and_gif_are_unreadable_under_any_name(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "moving.webp").write_bytes(ANIMATED)
    (tmp_path / "train" / "a" / "still.png").write_bytes(tf.io.encode_png(picture()).numpy())
    ((path, _),) = find_unreadable(open_source(tmp_path, "train"))
    assert path.endswith("moving.webp")
    (tmp_path / "train" / "a" / "named.jpg").write_bytes(base64.b64decode("R0lGODlhAQABAIAAAAUEBAAAACwAAAAAAQABAAACAkQBADs="))
    with pytest.raises(DataError, match=r"named\.jpg \(not a JPEG.*GIF89a"):
        open_source(tmp_path, "train")


@pytest.mark.parametrize("kind", WEBP)
def test_webp_headers_are_read_and_decoded(kind):
    content = WEBP[kind]
    image = decode(content)
    assert image.shape == (6, 9, 3) and np.abs(image.numpy().astype(int) - [10, 20, 30]).max() <= 2
    first = {"lossless": 21, "lossy": 26, "extended": 24}[kind]
    huge = content[:first] + b"\xff" * (6 if kind == "extended" else 4) + content[first + (6 if kind == "extended" else 4) :]
    with pytest.raises(tf.errors.InvalidArgumentError, match="64,000,000"):
        decode(huge)


def test_a_decompression_bomb_is_refused_from_its_header():
    jpeg = tf.io.encode_jpeg(picture(), format="rgb").numpy()
    frame = jpeg.index(b"\xff\xc0") + 5  # start of frame: marker, length, precision, height, width
    bombs = [png(16000, 16000, rows=16000), png(2**32 - 1, 2**32 - 1), jpeg[:frame] + b"\xff\0" * 2 + jpeg[frame + 4 :]]
    assert len(bombs[0]) < 300_000
    for bomb in bombs:
        with pytest.raises(tf.errors.InvalidArgumentError, match="64,000,000"):
            decode(bomb)
    assert decode(png(30, 20, rows=20)).shape == (20, 30, 3)


def test_hidden_entries_are_ignored_and_other_files_listed_in_one_warning(tmp_path):
    root = write_folder(tmp_path / "data")
    for extra in (".hidden", "__MACOSX"):
        (root / "train" / extra).mkdir()
        (root / "train" / "ant" / extra).mkdir()
    (root / "train" / "ant" / "._0.png").write_bytes(b"")
    (root / "train" / "ant" / "notes.txt").write_text("x")
    (root / "train" / "bee" / "scan.tiff").write_bytes(b"II*\0")
    (root / "train" / "bee" / "deeper").mkdir()
    (root / "train" / "readme.md").write_text("x")
    with pytest.warns(UserWarning, match="^4 entries are not read") as caught:
        source = open_source(root, "train")
    assert source.class_names == ("ant", "bee") and source.num_examples == 6
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in ("notes.txt", "scan.tiff", "deeper", "readme.md"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(root, "test")


def test_symlink_loops_end_in_an_error_that_names_them(tmp_path):
    root = write_folder(tmp_path / "data")
    (root / "train" / "ant" / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=r"loop\.png"):
        open_source(root, "train")
    (root / "train" / "ant" / "loop.png").unlink()
    for split in ("train", "test"):
        (root / split / "up").symlink_to("..")
    with pytest.raises(DataError, match=r"up holds no image"):
        open_source(root, "train")


def test_folders_without_images_are_named(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing has no split 'train'"):
        open_source(tmp_path / "nothing", "train")
    (tmp_path / "nothing" / "train").mkdir()
    with pytest.raises(DataError, match="has no class folder"):
        open_source(tmp_path / "nothing", "train")
    (tmp_path / "nothing" / "train" / "ant").mkdir()
    (tmp_path / "nothing" / "train" / "ant" / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match="ant holds no image"):
        open_source(tmp_path / "nothing", "train")
    with pytest.raises(DataError, match=r"train\[:50%\]"):
        open_source(tmp_path / "nothing", "train[:50%]")


def test_files_that_are_no_images_by_their_first_bytes_are_all_named(tmp_path):
    root = write_folder(tmp_path / "data", count=8)
    (root / "train" / "ant" / "0.png").write_bytes(b"")
    (root / "train" / "bee" / "1.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError) as caught:
        open_source(root, "train")
    message = str(caught.value)
    assert "2 image file(s)" in message and "0.png (zero bytes)" in message and "1.png" in message and "<html>" in message
    for i in range(8):
        (root / "train" / "ant" / f"{i}.png").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"9 image file\(s\).*; and 4 more"):
        open_source(root, "train")


def test_different_classes_in_train_and_test_are_listed(tmp_path):
    root = write_folder(tmp_path / "data", ("ant", "bee", "cat"))
    (root / "test" / "bee").rename(root / "test" / "dog")
    for split, mine, theirs in (("train", "bee", "dog"), ("test", "dog", "bee")):
        other = "test" if split == "train" else "train"
        with pytest.raises(DataError, match=rf"Only in {split}: \['{mine}'\]; only in {other}: \['{theirs}'\]"):
            open_source(root, split)


def test_a_truncated_image_is_named_after_the_pipeline_failed(tmp_path):
    root = write_folder(tmp_path / "data")
    content = tf.io.encode_jpeg(picture(height=60, width=60)).numpy()
    (root / "train" / "ant" / "cut.jpg").write_bytes(content[: len(content) // 2])
    (root / "train" / "bee" / "bomb.png").write_bytes(png(16000, 16000))
    (root / "train" / "bee" / "0.png").write_bytes((root / "train" / "bee" / "1.png").read_bytes()[:60])
    train, test = open_source(root, "train"), open_source(root, "test")
    assert [Path(path).name for path, _ in find_unreadable(train)] == ["cut.jpg", "0.png", "bomb.png"]
    assert find_unreadable(test) == [] == find_unreadable(open_source("digits", "test"))
    with pytest.raises(tf.errors.InvalidArgumentError) as failed:
        list(train_batches(train, size=8, batch=4).take(4))
    with pytest.raises(DataError) as caught:
        raise_unreadable(failed.value, test, train)
    message = str(caught.value)
    assert message.startswith("3 image file(s)") and "cut.jpg (" in message and "64,000,000" in message
    assert "{{" not in message and "[Op:" not in message and caught.value.__cause__ is failed.value
    with pytest.raises(tf.errors.InvalidArgumentError) as same:
        raise_unreadable(failed.value, test)
    assert same.value is failed.value


def test_a_file_that_vanishes_is_named(tmp_path):
    root = write_folder(tmp_path / "data")
    source = open_source(root, "train")
    (root / "train" / "ant" / "1.png").unlink()
    with pytest.raises(tf.errors.NotFoundError) as failed:
        list(eval_batches(source, size=8, batch=4))
    with pytest.raises(DataError, match=r"1\.png \(No such file"):
        raise_unreadable(failed.value, source)


# ---------------------------------------------------------------- leaving out, first looks, the same data again


def test_what_is_left_out_is_counted_and_listed_and_might_as_well_not_be_there(tmp_path):
    root = write_folder(tmp_path / "data", count=8)
    for path, content in (("ant/2.png", b""), ("bee/5.png", b"<html>"), ("bee/7.png", png(16000, 16000))):
        (root / "train" / path).write_bytes(content)
    with pytest.warns(UserWarning, match=r"^3 of 16 examples .* are left out: .*2\.png \(.*<html>|5\.png") as caught:
        source = open_source(root, "train", on_error="skip", limit=0.2)
    assert [warning.filename for warning in caught] == [__file__]
    assert [Path(path).name for path, _ in source.skipped] == ["2.png", "5.png", "7.png"]
    assert "64,000,000" in dict(source.skipped)[str(root / "train" / "bee" / "7.png")]
    for path, _ in source.skipped:
        os.unlink(path)
    without = open_source(root, "train")
    assert source.num_examples == without.num_examples == 13 and source.paths == without.paths
    for make in (lambda s: train_batches(s, size=8, batch=4), lambda s: eval_batches(s, size=8, batch=4).take(3)):
        for got, expected in zip(take(make(source), 3), take(make(without), 3)):
            np.testing.assert_array_equal(got, expected)


def test_too_much_to_leave_out_is_an_error(tmp_path):
    root = write_folder(tmp_path / "data", count=5)
    (root / "train" / "ant" / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 10 examples .* limit=0\.01: .*2\.png"):
        open_source(root, "train", on_error="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_source(root, "test", on_error="skip").skipped == ()
    for i in range(5):
        (root / "train" / "ant" / f"{i}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="5 of 10"), pytest.raises(DataError, match="ant holds no image that can be read"):
        open_source(root, "train", on_error="skip", limit=0.5)
    for bad in ({"on_error": "ignore"}, {"limit": 2}, {"limit": "1%"}, {"limit": True}):
        with pytest.raises(ArgumentError, match="on_error must be"):
            open_source(root, "train", **bad)


def test_a_lost_worker_is_no_reason_to_read_all_data_again(tmp_path):
    root = write_folder(tmp_path / "data")
    source = open_source(root, "train")
    (root / "train" / "ant" / "1.png").unlink()
    lost = tf.errors.UnavailableError(None, None, "worker 1 is gone")
    with pytest.raises(tf.errors.UnavailableError) as same:
        raise_unreadable(lost, source)
    assert same.value is lost


def test_other_classes_or_files_than_before_are_refused_and_named(tmp_path):
    root = write_folder(tmp_path / "data")
    source = open_source(root, "train")
    record = json.loads(json.dumps(source.fingerprint()))
    source.check(record)
    root.rename(tmp_path / "moved")
    root = tmp_path / "moved"
    open_source(root, "train").check(record)
    open_source("digits", "test").check(open_source("digits", "test").fingerprint())
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "00.png")
    with pytest.raises(DataError, match="other names"):
        open_source(root, "train").check(record)
    (root / "train" / "ant" / "1.png").unlink()
    with pytest.raises(DataError, match="num_examples was 6, is 5"):
        open_source(root, "train").check(record)
    for split in ("train", "test"):
        (root / split / "bee").rename(root / split / "wasp")
    with pytest.raises(DataError, match=r"classes only before: 'bee'; only now: 'wasp'; .*num_examples"):
        open_source(root, "train").check(record)
    with pytest.raises(DataError, match="'folder', is 'digits'"):
        open_source("digits", "train").check(record)


def flawed(kind):
    images, labels = np.random.default_rng(0).random((4, 6, 6, 3), np.float32), np.eye(4, dtype=np.float32)
    whole = np.arange(4)
    if kind == "NaN or infinity, such as number 2":
        images[2, 1, 1, 1] = np.nan
    elif kind == "all images are equal":
        images[:] = images[0]
    elif kind == "of one colour":
        images[:] = np.arange(4)[:, None, None, None]
    elif kind == "number 1 names no class":
        labels[1] = 0
    elif kind == "shares from 0 to 1":
        labels[3, 0] = np.nan
    elif kind == r"0\.\.3, got -1 to 3":
        labels = np.where(whole == 0, -1, whole)
    elif kind == r"0\.\.3, got 1 to 4":
        labels = whole + 1
    return images, labels


@pytest.mark.parametrize(
    "kind",
    [
        "NaN or infinity, such as number 2", "all images are equal", "of one colour", "number 1 names no class",
        "shares from 0 to 1", r"0\.\.3, got -1 to 3", r"0\.\.3, got 1 to 4",
    ],
)  # fmt: skip
def test_a_first_batch_that_would_spoil_the_weights_is_refused(kind):
    images, labels = flawed(kind)
    for batches in ([(images, labels)], tf.data.Dataset.from_tensors((images, labels))):
        with pytest.raises(DataError, match=kind):
            probe(batches, classes=4)


def test_a_good_first_batch_is_given_back_and_an_unreadable_one_explained(tmp_path):
    images, labels = flawed(None)
    got = probe([(images, labels)])
    np.testing.assert_array_equal(got[0], images)
    np.testing.assert_array_equal(got[1], labels)
    probe([(images, np.arange(4), np.ones(4))], classes=4)
    with pytest.raises(DataError, match="no batch"):
        probe([])
    root = write_folder(tmp_path / "data")
    source = open_source(root, "train")
    probe(train_batches(source, size=8, batch=4), source)
    (root / "train" / "ant" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"1 image file\(s\) cannot be read: .*1\.png"):
        probe(train_batches(source, size=8, batch=6), source)
    unlabelled = pipeline.replace(
        open_source("digits", "test"), read=lambda index: (tf.zeros([8, 8, 3], tf.uint8), index * 0 - 1)
    )
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.9; .* whether the split has labels at all; got.*-1"):
        probe(train_batches(unlabelled, size=8, batch=4), unlabelled)


# ---------------------------------------------------------------- TFDS


def test_an_unreadable_image_of_tfds_is_named_or_left_out(tiny_tfds):
    name, data_dir = tiny_tfds
    source = open_source(name, "train", data_dir=f"{data_dir}/broken")
    ((found, reason),) = find_unreadable(source)
    assert found.startswith("example ") and reason
    with pytest.raises(tf.errors.InvalidArgumentError) as failed:
        list(eval_batches(source, size=8, batch=4))
    with pytest.raises(DataError, match=found):
        raise_unreadable(failed.value, source)
    with pytest.raises(DataError, match=f"1 of 20 examples .*limit=0.01: {found}"):
        open_source(name, "train", data_dir=f"{data_dir}/broken", on_error="skip")
    with pytest.warns(UserWarning, match=f"1 of 20 examples .* left out: {found}"):
        rest = open_source(name, "train", data_dir=f"{data_dir}/broken", on_error="skip", limit=0.05)
    assert rest.num_examples == 19 and rest.fingerprint() != source.fingerprint()
    labels = np.concatenate([labels.numpy() for _, labels in eval_batches(rest, size=8, batch=4)])
    assert sorted(labels.argmax(-1)) == sorted(i % 10 for i in range(20) if i != 3)
    indices = [example.index for example in positions(rest, seed=0, start=0, count=19)]
    assert sorted(indices) == sorted({*range(20)} - {int(found.split()[1])})


@pytest.mark.parametrize(
    "fault", ["flipped bit", "flipped length", "cut", "cut in a length", "cut between records", "empty", "missing"]
)
def test_a_broken_shard_is_named_with_the_place(fault, tiny_tfds, tmp_path):
    name, data_dir = tiny_tfds
    shutil.copytree(Path(data_dir) / name, tmp_path / name)
    (shard,) = (tmp_path / name).rglob("*-00001-of-00003")
    content = shard.read_bytes()
    first = int.from_bytes(content[:8], "little") + 16  # length, its checksum, data, their checksum
    broken, place = {
        "flipped bit": (
            content[: first + 20] + bytes([content[first + 20] ^ 1]) + content[first + 21 :],
            f"record at {first + 12}",
        ),
        "flipped length": (bytes([content[0] ^ 1]) + content[1:], "record at 0"),
        "cut": (content[: first + 20], f"record at {first}"),
        "cut in a length": (content[: first + 4], "of 6"),
        "cut between records": (content[:first], f"ends after 1 of 6 records, at byte {first}"),
        "empty": (b"", "ends after 0 of 6 records, at byte 0"),
        "missing": (None, "No such file"),
    }[fault]
    source = open_source(name, "train", data_dir=tmp_path)
    assert find_corrupt_shards(source) == []
    shard.write_bytes(broken) if broken is not None else shard.unlink()
    ((path, why),) = find_corrupt_shards(source)
    assert path == str(shard) and place in why
    with pytest.raises(tf.errors.OpError) as failed:
        list(train_batches(source, size=8, batch=5, augment=False, shuffle_buffer=3).take(8))
    with pytest.raises(DataError, match=r"1 TFRecord file\(s\) are broken: .*00001-of-00003 \(.*" + place) as caught:
        raise_unreadable(failed.value, source)
    assert "{{" not in str(caught.value) and caught.value.__cause__ is failed.value
    with pytest.raises(DataError, match="00001-of-00003"):
        open_source(name, "train", data_dir=tmp_path, on_error="skip")


def test_a_tfds_data_set_is_prepared_and_sliced(tiny_tfds):
    name, data_dir = tiny_tfds
    source = open_source(name, "train", data_dir=data_dir)
    assert source.num_examples == 20 and source.class_names == tuple("abcdefghij") and source.paths == ()
    whole = ids(eval_batches(source, size=8, batch=4), 20)
    assert sorted(whole) == sorted((i % 10, i) for i in range(20))
    head, tail = (open_source(name, split, data_dir=data_dir) for split in ("train[:75%]", "train[75%:]"))
    assert (head.num_examples, tail.num_examples) == (15, 5)
    assert ids(eval_batches(head, size=8, batch=4), 15) + ids(eval_batches(tail, size=8, batch=4), 5) == whole
    labels = np.concatenate([labels for _, labels in eval_batches(source, size=8, batch=7).as_numpy_iterator()])
    np.testing.assert_array_equal(labels.argmax(-1), [label for label, _ in whole])
    for split, text in (("valid", "valid"), ("train[:1%]", "no data")):
        with pytest.raises(DataError, match=text) as caught:
            open_source(name, split, data_dir=data_dir)
        assert "['train']" in str(caught.value)


def test_a_tfds_data_set_of_unknown_length_works():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=6):
        source = open_source("cifar10", "train")
        assert source.num_classes == 10 and source.num_examples is None
        assert [len(labels) for _, labels in eval_batches(source, size=32, batch=4)] == [4, 2]
        images, labels = next(iter(train_batches(source, size=16, batch=8)))
        assert images.shape == (8, 16, 16, 3) and labels.shape == (8, 10)
        gray = open_source("mnist", "test")
        assert next(iter(eval_batches(gray, size=28, batch=2)))[0].shape == (2, 28, 28, 3)


def test_an_unknown_data_set_is_answered_with_close_names(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    for name, near in (("cifr10", "cifar10"), ("digit", "digits")):
        with pytest.raises(DataError, match=rf"not 'digits', not an existing folder.*{near}"):
            open_source(name, "train", data_dir=tmp_path)
    with pytest.raises(DataError, match="no/such/folder"):
        open_source(str(tmp_path / "no/such/folder"), "train")


def test_a_tfds_data_set_that_cannot_be_prepared_says_where(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class KerasVitOffline(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"x": np.int64}))

        def _split_generators(self, dl_manager):
            raise ConnectionError("no route")

        def _generate_examples(self):
            return iter(())

    with pytest.raises(DataError, match=r"could not download or prepare .*no route") as caught:
        open_source("keras_vit_offline", "train", data_dir=str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_repeated_augmentation_takes_each_image_so_many_times_each_time_anew():
    source = open_source("digits", "test")
    options = dict(seed=3, repeats=3, batch=12)
    places = pipeline.positions(source, start=0, count=360, **options)
    assert {place.epoch for place in places} == {0} and pipeline.positions(source, start=360, count=1, **options)[0].epoch == 1
    indices = [place.index for place in places]
    assert len(set(indices)) == 120 and all(indices.count(index) == 3 for index in set(indices))
    assert indices[:4] == indices[4:8] == indices[8:12] and len(set(indices[:4])) == 4
    ((images, labels),) = train_batches(source, size=8, **options).take(1)
    images = images.numpy().reshape(3, 4, -1)
    assert np.all(np.any(images[0] != images[1], -1)) and np.all(np.any(images[1] != images[2], -1))
    np.testing.assert_array_equal(labels[:4], labels[8:])
    ((later, _),) = train_batches(source, size=8, start=12, **options).take(1)
    (*_, (second, _)) = train_batches(source, size=8, **options).take(2)
    np.testing.assert_array_equal(later, second)
    halves = [next(iter(train_batches(source, size=8, shard=(worker, 2), **options)))[0] for worker in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), images.reshape(12, 8, 8, 3))
    once, (first, _) = next(iter(train_batches(source, size=8, seed=3, batch=4)))[0], (images[0], None)
    np.testing.assert_array_equal(once, first.reshape(4, 8, 8, 3))
