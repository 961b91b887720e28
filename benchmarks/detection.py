"""What detectors and segmenters on PoolFormer's pyramid learn of coloured squares on noise, beside chance.

    python -m benchmarks.detection [retinanet] [semantic_fpn] [--model=PoolFormer_mu --side=64 --steps=400 --json=FILE]

From random weights, on new images in every step; measured on 64 other images. `retinanet` needs keras-hub (`pip install -e
'.[detect]'`) and gives the average precision at an intersection over union of 0.5, mean over the colours; chance is that of the
same boxes laid over other images. `semantic_fpn` gives the mean intersection over union of the colours; chance is that of the
same maps of labels laid over other images.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import keras
import numpy as np

import keras_vit
from keras_vit.dense import semantic_fpn

COLOURS = np.float32([[2, -1, -1], [-1, 2, -1], [-1, -1, 2]])
BATCH, SHOWN = 16, 64
NONE = -1  # label of a box that is not there


def squares(count, side, seed):
    """(images (n, side, side, 3), boxes (n, 2, 4) as x0, y0, x1, y1, labels (n, 2), maps (n, side, side)): one or two squares.

    They lie in different halves of the image; a map has 0 for the ground and 1 + the label for a square.
    """
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 0.7, (count, side, side, 3)).astype("float32")
    boxes, labels = np.zeros((count, 2, 4), "float32"), np.full((count, 2), NONE, "int32")
    maps = np.zeros((count, side, side), "int32")
    for n in range(count):
        for at in range(2 if rng.random() < 0.5 else 1):
            size = rng.integers(side // 5, side // 2 - 1)
            x, y = at * side // 2 + rng.integers(0, side // 2 - size + 1), rng.integers(0, side - size + 1)
            label = rng.integers(len(COLOURS))
            images[n, y : y + size, x : x + size] += COLOURS[label]
            maps[n, y : y + size, x : x + size] = 1 + label
            boxes[n, at], labels[n, at] = (x, y, x + size, y + size), label
    return images, boxes, labels, maps


def overlap(box, others):
    """Intersection over union of a box (4,) with others (n, 4)."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inner = np.prod(np.maximum(high - low, 0), axis=1)
    return inner / (np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1) - inner)


def average_precision(found, boxes, labels, least=0.5):
    """Area under the curve of precision over recall, mean over the classes.

    Args:
        found: {"boxes": (n, m, 4), "labels": (n, m), "confidence": (n, m)}; label -1 is none.
    """
    areas = []
    for kind in range(len(COLOURS)):
        shown = [(score, n, box) for n in range(len(boxes)) for box, label, score in zip(
            found["boxes"][n], found["labels"][n], found["confidence"][n]) if label == kind]  # fmt: skip
        taken, hits = set(), []
        for _, n, box in sorted(shown, key=lambda each: -each[0]):
            fits = np.where(labels[n] == kind, overlap(box, boxes[n]), 0)
            best = int(fits.argmax())
            hits.append(fits[best] >= least and (n, best) not in taken)
            if hits[-1]:
                taken.add((n, best))
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        best_later = np.maximum.accumulate(precision[::-1])[::-1]
        areas.append(float(np.sum(best_later * hits) / max((labels == kind).sum(), 1)))
    return float(np.mean(areas))


def mean_overlap(found, maps):
    """Intersection over union of the labels above 0, mean over them."""
    kinds = range(1, 1 + len(COLOURS))
    return float(np.mean([np.sum((found == k) & (maps == k)) / np.sum((found == k) | (maps == k)) for k in kinds]))


def trained(model, targets, side, steps):
    """Fits on new images in every step."""
    images, boxes, labels, maps = squares(steps * BATCH, side, 0)
    model.fit(images, targets(boxes, labels, maps), batch_size=BATCH, epochs=1, verbose=0)


def run_retinanet(name, side, steps):
    import keras_hub

    from keras_vit.dense.detection import retinanet

    model = keras_vit.create_model(name, weights=None, input_shape=(side, side, 3))
    anchors = keras_hub.layers.AnchorGenerator("xyxy", 3, 5, 3, [1.0], 2.0)
    decoder = keras_hub.layers.NonMaxSuppression("xyxy", from_logits=True, confidence_threshold=0.05, max_detections=10)
    options = dict(anchor_generator=anchors, prediction_decoder=decoder, pre_logits_num_conv_layers=1)
    detector = retinanet(model, len(COLOURS), (3, 5), **options)
    detector.compile(keras.optimizers.Adam(1e-3))
    trained(detector, lambda boxes, labels, maps: {"boxes": boxes, "labels": labels}, side, steps)
    images, boxes, labels, _ = squares(SHOWN, side, 1)
    found = detector.predict(images, verbose=0)
    other = {key: np.roll(value, 1, axis=0) for key, value in found.items()}
    return average_precision(found, boxes, labels), average_precision(other, boxes, labels)


def run_semantic_fpn(name, side, steps):
    model = keras_vit.create_model(name, weights=None, input_shape=(side, side, 3))
    segmenter = semantic_fpn(model, 1 + len(COLOURS), channels=64, width=32)
    segmenter.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    trained(segmenter, lambda boxes, labels, maps: maps, side, steps)
    images, _, _, maps = squares(SHOWN, side, 1)
    found = segmenter.predict(images, verbose=0).argmax(axis=-1)
    return mean_overlap(found, maps), mean_overlap(np.roll(found, 1, axis=0), maps)


RUNS = {"retinanet": (run_retinanet, "AP50"), "semantic_fpn": (run_semantic_fpn, "mIoU")}


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", choices=[*RUNS, []], default=list(RUNS))
    parser.add_argument("--model", default="PoolFormer_mu")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    results = {}
    for name in options.runs:
        run, metric = RUNS[name]
        keras.utils.set_random_seed(0)
        start = time.perf_counter()
        score, chance = run(options.model, options.side, options.steps)
        seconds = time.perf_counter() - start
        results[name] = dict(metric=metric, score=score, chance=chance, steps=options.steps, seconds=seconds)
        print(f"{name:<14} {metric} {score:.3f}, chance {chance:.3f}; {options.steps} steps of {BATCH}, {seconds:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(result["score"] > 2 * result["chance"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
