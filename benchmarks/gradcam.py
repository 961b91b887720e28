"""Grad-CAM on photographs: trains toys to say which of two photographs are in a picture, and shows where they see each.

python -m benchmarks.gradcam PoolFormer_mu DeiT_mu --out=docs

The photographs are scikit-learn's china.jpg (a palace under the sky) and flower.jpg. A picture is made of eight squares; in each
is a piece of one photograph, cut out at random and perhaps mirrored, or one plain colour. A model starts from random weights and
learns two classes, whether there are pieces of china.jpg and whether there are some of flower.jpg; never where. Then it is shown
the middle of one photograph beside that of the other, and its map of each class is drawn over that. Prints how many new pictures
of squares a model gets right in both classes, and of the places where a map is above a half, the share that lies in the
photograph of its class; writes gradcam_<model>.png. Exits with 1 if a model gets fewer than 80% right, or less than 75% lies
there.
"""

import argparse
import io
import itertools
import json
import pathlib
import sys
import time

import keras
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_images

import keras_vit
from keras_vit.checkpoints.files import replacing
from keras_vit.explain import gradcam

CLASSES = ("china", "flower")
SIZE = (96, 192)  # pixels of a picture
SHOWN = (160, 320)  # the same in the figure
SQUARE = 48  # of its pieces in training
BATCH = 16
LEAST_RIGHT, LEAST_SHARE = 0.8, 0.75


def pictures(photographs, count, rng):
    """((count, H, W, 3) uint8, (count, classes) float32 of what is in them)."""
    made, labels = np.empty((count, *SIZE, 3), np.uint8), np.zeros((count, len(photographs)), np.float32)
    for i in range(count):
        allowed = [-1, *np.flatnonzero(rng.integers(2, size=len(photographs)))]  # of each class half the pictures have none
        for top, left in itertools.product(range(0, SIZE[0], SQUARE), range(0, SIZE[1], SQUARE)):
            square, what = made[i, top : top + SQUARE, left : left + SQUARE], rng.choice(allowed)
            if what < 0:
                square[:] = rng.integers(256, size=3)
                continue
            photograph, labels[i, what] = photographs[what], 1
            side = rng.uniform(0.3, 1) * photograph.height
            x, y = (rng.uniform(0, whole - side) for whole in photograph.size)
            piece = photograph.resize((SQUARE, SQUARE), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
            square[:] = np.asarray(piece)[:, :: rng.choice((1, -1))]
    return made, labels


def both(photographs, size):
    """(H, W, 3) uint8: the middle of the first photograph on the left and that of the second on the right."""
    half = (size[1] // 2, size[0])
    made = []
    for photograph in photographs:
        width = photograph.height * half[0] / half[1]
        left = (photograph.width - width) / 2
        made.append(photograph.resize(half, Image.Resampling.BILINEAR, box=(left, 0, left + width, photograph.height)))
    return np.concatenate(made, 1)


def train(name, photographs, examples, epochs, seed):
    """(a model of a registered name, the share of new pictures that it gets right)."""
    keras.utils.set_random_seed(seed)
    options = dict(input_shape=(*SIZE, 3), classes=len(CLASSES), classifier_activation=None)
    model = keras_vit.create_model(name, weights=None, **options)
    rng = np.random.default_rng(seed)
    (images, labels), (others, answers) = (pictures(photographs, count, rng) for count in (examples, 200))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, epochs * examples // BATCH)
    model.compile(keras.optimizers.Adam(rate, global_clipnorm=1.0), loss, jit_compile=False)
    model.fit(keras_vit.preprocess_input(images, model), labels, batch_size=BATCH, epochs=epochs, verbose=0)
    scores = model.predict(keras_vit.preprocess_input(others, model), verbose=0)
    return model, float(np.mean(((scores > 0) == answers).all(1)))


def explain(model, photographs):
    """((2, H, W) maps of the classes on both photographs at once, the share of where each is strong in its own, the layer)."""
    image = keras_vit.preprocess_input(both(photographs, SIZE)[None], model)
    maps, _, layer = gradcam.gradcam(model, np.repeat(image, 2, 0), [0, 1])
    strong = maps > 0.5
    own = strong[0, :, : SIZE[1] // 2].sum(), strong[1, :, SIZE[1] // 2 :].sum()
    return maps, [float(found / max(whole, 1)) for found, whole in zip(own, strong.sum((1, 2)))], layer


def draw(photographs, maps, path):
    """Writes the picture of both and each class's map over it, in few colours, which keeps the file small."""
    shown = both(photographs, SHOWN)
    panels = {"image": shown}
    panels |= {f"Grad-CAM of class {name!r}": gradcam.overlay(shown, heat) for name, heat in zip(CLASSES, maps)}
    figure = Figure(figsize=(len(panels) * SHOWN[1] / 100, SHOWN[0] / 100 + 0.3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items()):
        axes.imshow(panel)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with replacing(path) as temporary:
        Image.open(drawn).convert("RGB").quantize(256).save(temporary, format="png", optimize=True)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    toys = [name for name in ("PoolFormer_mu", "DeiT_mu") if name in keras_vit.list_models()] or ["ViT_mu", "Hybrid_mu"]
    parser.add_argument("name", nargs="*", default=toys, help=f"registered models, by default {' '.join(toys)}")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs"), help="folder of the pictures, by default docs")
    parser.add_argument("--examples", type=int, default=512, help="pictures to train on, by default 512")
    parser.add_argument("--epochs", type=int, default=16, help="by default 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args(words)
    photographs, rows = [Image.fromarray(photograph) for photograph in load_sample_images().images], []
    for name in options.name:
        began = time.perf_counter()
        model, right = train(name, photographs, options.examples, options.epochs, options.seed)
        maps, shares, layer = explain(model, photographs)
        path = options.out / f"gradcam_{name.lower()}.png"
        draw(photographs, maps, path)
        seconds = time.perf_counter() - began
        rows.append(dict(model=name, right=right, shares=dict(zip(CLASSES, shares)), layer=layer, seconds=round(seconds, 1)))
        shown = ", ".join(f"{share:.0%} of {label!r}" for label, share in zip(CLASSES, shares))
        print(f"{name}: {right:.1%} right; in its photograph {shown}, at {layer}; {seconds:.0f} s; {path}")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1))
    good = all(row["right"] >= LEAST_RIGHT and min(row["shares"].values()) >= LEAST_SHARE for row in rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
