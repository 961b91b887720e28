"""What the input pipeline costs beside the bare decoding: `python -m benchmarks.pipeline [images] [rounds]`.

    bare      `tf.io.decode_and_crop_jpeg` of given boxes, and `tf.image.resize` to 224
    crops     `data.pipeline.random_crop`, which draws and checks the same boxes of the same files, and the same resize
    batches   `data.pipeline.train_batches` on their folder: shuffled, cropped and resized, flipped, normalised, labelled

All read the files in tf.data on all cores. Counted is the process's CPU time, so that the figures are for one core. The files are
cut from a photograph that comes with scikit-learn, 500 x 375 and about 109 kB each, near the average of ImageNet (108 kB). One
line for each, with the median ratio to `bare` of interleaved rounds.
"""

import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_sample_image

from keras_vit.data import pipeline

SIZE, BATCH, FILES, HEIGHT, WIDTH, QUALITY = 224, 32, 512, 375, 500, 96


def write_images(folder, count):
    """`count` JPEGs of HEIGHT x WIDTH in one class folder."""
    (folder / "train" / "china").mkdir(parents=True)
    photo, random = load_sample_image("china.jpg"), np.random.default_rng(0)
    for i in range(count):
        y, x = random.integers(photo.shape[0] - HEIGHT + 1), random.integers(photo.shape[1] - WIDTH + 1)
        content = tf.io.encode_jpeg(photo[y : y + HEIGHT, x : x + WIDTH], quality=QUALITY).numpy()
        (folder / "train" / "china" / f"{i:04}.jpg").write_bytes(content)


def resized(paths, draws, crop):
    """Batches of resized crops: crop(content of a file, element of `draws`)."""

    def prepare(path, draw):
        return tf.image.resize(crop(tf.io.read_file(path), draw), (SIZE, SIZE))

    data = tf.data.Dataset.from_tensor_slices((list(paths), draws)).repeat()
    return data.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(BATCH).prefetch(2)


def images_per_second(data, images):
    """Of CPU time, after the first batches, which start the threads."""
    batches = iter(data.take(images // BATCH + 2))
    next(batches), next(batches)
    start = time.process_time()
    count = sum(len(batch[0] if isinstance(batch, tuple) else batch) for batch in batches)
    return count / (time.process_time() - start)


def main(argv):
    images, rounds = (int(argv[i]) if len(argv) > i else default for i, default in enumerate((640, 11)))
    with tempfile.TemporaryDirectory() as folder:
        write_images(pathlib.Path(folder), FILES)
        source = pipeline.open_source(folder, "train")
        paths = source.paths * 4
        seeds = tf.constant([[7, number] for number in range(len(paths))], tf.int64)
        boxes = tf.stack([pipeline.random_box([HEIGHT, WIDTH, 3], seed) for seed in seeds])
        ways = {
            "bare": resized(paths, boxes, lambda content, box: tf.io.decode_and_crop_jpeg(content, box, channels=3)),
            "crops": resized(paths, seeds, lambda content, seed: pipeline.random_crop(content, seed, is_jpeg=True)),
            "batches": pipeline.train_batches(source, size=SIZE, batch=BATCH),
        }
        rates = {name: [] for name in ways}
        for _ in range(rounds):
            for name, data in ways.items():
                rates[name].append(images_per_second(data, images))
    for name, found in rates.items():
        ratio = statistics.median(each / bare for each, bare in zip(found, rates["bare"]))
        middle, least, most = statistics.median(found), min(found), max(found)
        print(f"{name:<8}{middle:6.0f} images/s per core ({rounds} rounds: {least:.0f} to {most:.0f}){ratio:6.2f} of bare")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
