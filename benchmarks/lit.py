"""A small LiT learns from captions what digits and coloured shapes are called, and is asked for what it has not seen.

python -m benchmarks.lit --out=runs/lit_small --json=lit.json

A folder of images with captions is written: scikit-learn's digits, "a photo of the digit seven", and drawings, "a red circle on a
grey background". `LiT_mu` trains on it from random weights, both towers, by `keras_vit.main`. Then, on test images:

(a) `keras_vit.zero_shot` with names and prompts alone tells digits, and shapes, apart;
(b) retrieval between classes: the nearest of the classes' captions to an image, and the nearest image to a caption.

`OUT/model.keras` is the model, with its tokenizer. Exits with 1 unless (a) is at least 90% for digits and recall@1 of (b) at
least 0.9 both ways, for both kinds.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf

import keras_vit
from keras_vit.configs import lit_digits
from keras_vit.data import pipeline
from keras_vit.data.captions import open_captions
from keras_vit.main import train
from keras_vit.training.contrastive import ranks

SIDE = 32
COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 60, 220), "yellow": (240, 220, 40), "purple": (140, 40, 170),
    "orange": (245, 140, 20),
}  # fmt: skip
GROUNDS = {"white": 250, "grey": 128, "black": 5}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
SAID_OF_DIGITS = ("a photo of the digit {}", "a picture of the number {}", "the digit {}", "{}")
SAID_OF_SHAPES = ("a {}", "a drawing of a {}", "a picture of a {}", "a {} on a {} background")
STEPS, COPIES = 1_200, {"train": 80, "test": 10}  # images of each colour and shape


def inside(shape, x, y):
    """Whether points, in units of the radius, lie in a shape."""
    distance = np.hypot(x, y)
    if shape == "circle":
        return distance < 1
    if shape == "ring":
        return (distance < 1) & (distance > 0.55)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.85
    if shape == "cross":
        return (np.maximum(abs(x), abs(y)) < 1) & (np.minimum(abs(x), abs(y)) < 0.3)
    return (y < 0.8) & (y > 2 * abs(x) - 1)  # a triangle


def drawing(shape, colour, random):
    """(uint8 (32, 32, 3), its captions)."""
    ground, radius, centre = random.choice(list(GROUNDS)), random.uniform(10, 14), SIDE / 2 + random.uniform(-2, 2, 2)
    points = (np.arange(4 * SIDE) + 0.5) / 4  # sixteen samples a pixel
    x, y = ((points - place) / radius for place in centre)
    share = inside(shape, x[None], y[:, None]).reshape(SIDE, 4, SIDE, 4).mean((1, 3))[..., None]
    image = share * COLOURS[colour] + (1 - share) * GROUNDS[ground] + random.normal(0, 4, (SIDE, SIDE, 3))
    captions = [text.format(f"{colour} {shape}", ground) for text in SAID_OF_SHAPES]
    return np.clip(np.rint(image), 0, 255).astype("uint8"), captions


def write(folder):
    """FOLDER/{train,test}/{digits,shapes}/*.png with *.txt beside them; the first word of a name is its class."""
    for split, copies in COPIES.items():
        random = np.random.default_rng(len(split))
        source, digits, shapes = pipeline.open_source("digits", split), folder / split / "digits", folder / split / "shapes"
        digits.mkdir(parents=True)
        shapes.mkdir()
        for number, (_, example) in enumerate(source.ordered()):
            image, label = source.read(example)
            name = lit_digits.NAMES[int(label)]
            save(digits / f"{name}-{number}", image, [text.format(name) for text in SAID_OF_DIGITS])
        for colour in COLOURS:
            for shape in SHAPES:
                for number in range(copies):
                    save(shapes / f"{colour} {shape}-{number}", *drawing(shape, colour, random))
    return folder


def save(path, image, captions):
    path.with_suffix(".png").write_bytes(tf.io.encode_png(image).numpy())
    path.with_suffix(".txt").write_text("\n".join(captions) + "\n")


def configured(folder, seed, steps):
    """configs/lit_digits.py for that folder."""
    config = lit_digits.get_config()
    with config.unlocked():
        config.contrastive.prompts = config.contrastive.class_names = ()
    few = dict(eval_every=0, progress_every=100, checkpoint_every=0, shuffle_buffer=1)
    config.update(dict(dataset=str(folder), seed=seed, total_steps=steps, warmup_steps=steps // 10, batch=96, **few))
    return config


def tests(folder, kind):
    """(float32 (n, 32, 32, 3) in the model's range, the class of each) of the test images of a kind."""
    source = open_captions(folder / "test" / kind, None)
    images = np.concatenate([images for images, _ in pipeline.eval_batches(source, size=SIDE, batch=256)])
    return images, [pathlib.Path(path).stem.partition("-")[0] for path in source.paths]


def judged(model, images, names, prompts, sentence):
    """{figure: share}: zero-shot accuracy with `prompts`; recall@1 both ways between images and one sentence of each class."""
    classes = sorted(set(names))
    scores = keras_vit.zero_shot(model, classes, prompts).predict(images, verbose=0)
    own = np.array([classes.index(name) for name in names])
    texts, embedded = model.encode_text([sentence.format(name) for name in classes]), model.encode_image(images)
    there, back = (
        ranks(embedded, texts, own[:, None]),
        ranks(texts, embedded, [np.flatnonzero(own == i) for i in range(len(classes))]),
    )
    return {
        "classes": len(classes),
        "images": len(images),
        "zero_shot_accuracy": float(np.mean(np.argmax(scores, -1) == own)),
        "image_to_text@1": float(np.mean(there == 0)),
        "text_to_image@1": float(np.mean(back == 0)),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder of the run, with model.keras; without it, one that is removed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args(argv)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write(pathlib.Path(temporary) / "captioned")
        trained = train(configured(folder, options.seed, options.steps), options.out or pathlib.Path(temporary) / "run")
        found = {
            "digits": judged(
                trained.model, *tests(folder, "digits"), ["a photo of the digit {}", "the digit {}"], "the digit {}"
            ),
            "shapes": judged(trained.model, *tests(folder, "shapes"), ["a {}", "a drawing of a {}"], "a {}"),
        }
    found["seconds"], found["backend"] = round(time.perf_counter() - began, 1), keras.config.backend()
    for kind in ("digits", "shapes"):
        print(f"{kind}: {', '.join(f'{name} {value:.4g}' for name, value in found[kind].items())}")
    print(f"{found['seconds']:.0f} s (training {trained.seconds:.0f} s), backend {found['backend']}")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    enough = found["digits"]["zero_shot_accuracy"] >= 0.9
    ways = [found[kind][f"{way}@1"] for kind in ("digits", "shapes") for way in ("image_to_text", "text_to_image")]
    return 0 if enough and min(ways) >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
