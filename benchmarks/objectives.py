"""Whether the training ideas hold on scikit-learn's digits, over some seeds: mean and spread of test accuracy, with and without.

python -m benchmarks.objectives --seeds=0,1,2 --json=objectives.json

(a) distillation: a small student that has 10 labelled images of each class and a teacher that learned from all of them, against
    the same student, images and augmentation without the teacher (with all labels for the student too, a teacher brought no
    reliable gain over seeds in runs of this size);
(b) masked pre-training on the training images without labels, then fine-tuning on 10 labelled images of each class, against the
    same training from random weights.

All are runs of `keras_vit.main`. Exits with 1 unless the mean is better with the idea than without in both.
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

from keras_vit.configs import digits
from keras_vit.data import pipeline
from keras_vit.main import train

SHOTS = 10
TEACHER_STEPS, STUDENT_STEPS = 1_000, 600
PRETRAINING_STEPS, TUNING_STEPS = 4_000, 300


def configured(seed, steps, **changes):
    """configs/digits.py for so many steps, with other values."""
    config = digits.get_config()
    few = dict(eval_every=0, progress_every=500, checkpoint_every=0, export=False, optim_dtype="float32")
    config.update(dict(seed=seed, total_steps=steps, warmup_steps=steps // 10, **few, **changes))
    return config


def trained(config, workdir):
    """A run of the main job in its folder."""
    keras.utils.clear_session()
    return train(config, workdir)


def few_labelled(root, seed):
    """A folder {train,test}/<class>/*.png: `SHOTS` images of each class of the training digits, and all test images."""
    for split in ("train", "test"):
        images, labels = (np.concatenate(parts) for parts in zip(*_raw(split)))
        order = np.random.default_rng(seed).permutation(len(labels)) if split == "train" else np.arange(len(labels))
        for label in range(10):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            chosen = [index for index in order if labels[index] == label]
            for index in chosen[: SHOTS if split == "train" else None]:
                (folder / f"{index}.png").write_bytes(tf.io.encode_png(images[index]).numpy())
    return root


def _raw(split):
    source = pipeline.open_source("digits", split)
    for _, example in source.ordered():
        image, label = source.read(example)
        yield image.numpy()[None], np.array([label])


def distillation(seeds, folder):
    """[(without, with)] accuracies of a student, one for each seed; the teacher's is printed."""
    teacher = trained(configured(100, TEACHER_STEPS), folder / "teacher")
    print(f"teacher: test accuracy {teacher.accuracy:.4f}", flush=True)
    path, found = str(folder / "teacher" / "model.keras"), []
    for seed in seeds:
        data, pair = few_labelled(folder / f"few{seed}", seed), []
        for given in ({}, dict(type="soft", tau=3.0, alpha=1.0, teacher=path)):
            config = configured(
                seed, STUDENT_STEPS, dataset=str(data), batch=50, optimizer="adamw", base_lr=3e-3, mixup=0.8, cutmix=1.0
            )
            config.model.hidden_size = 32
            config.model.transformer.update(dict(num_layers=2, num_heads=2, mlp_dim=64))
            config.distillation.update(given)
            pair.append(trained(config, folder / f"student{seed}{given.get('type', '')}").accuracy)
        found.append(tuple(pair))
    return found


def masked_pretraining(seeds, folder):
    """[(without, with)] accuracies with 10 labelled images of each class, one for each seed."""

    def small(steps, rate, **changes):
        config = configured(seed, steps, optimizer="adamw", base_lr=rate, **changes)
        config.model.hidden_size, config.model.classifier = 64, "gap"
        config.model.transformer.update(dict(num_layers=4, num_heads=4, mlp_dim=128))
        return config

    found = []
    for seed in seeds:
        data = few_labelled(folder / f"few{seed}", seed)
        config = small(PRETRAINING_STEPS, 2e-3, weight_decay=1e-4, grad_norm_clip=3.0)
        with config.unlocked():
            config.trainer, config.masked = "masked", dict(ratio=0.5, least=1, tokenizer="pixels")
        trained(config, folder / f"masked{seed}")
        pair = []
        for start in ("", str(folder / f"masked{seed}" / "model.npz")):
            config = small(TUNING_STEPS, 1e-3, dataset=str(data), batch=50, pretrained_dir=start)
            pair.append(trained(config, folder / f"tuned{seed}{bool(start)}").accuracy)
        found.append(tuple(pair))
    return found


IDEAS = {"distillation": distillation, "masked pre-training": masked_pretraining}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas between")
    parser.add_argument("--only", choices=list(IDEAS), help="one of the two")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args(argv)
    seeds, results, began = list(map(int, options.seeds.split(","))), {}, time.perf_counter()
    for name in [options.only] if options.only else IDEAS:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = IDEAS[name](seeds, pathlib.Path(folder))
    for name, pairs in results.items():
        for how, values in zip(("without", "with"), zip(*pairs)):
            spread = f"{np.mean(values):.4f} +- {np.std(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"
            print(f"{name}, {how}: test accuracy {spread}")
        gain = float(np.mean([after - before for before, after in pairs]))
        print(f"{name}: {gain:+.4f} in the mean of {len(pairs)} seeds")
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s, backend {keras.config.backend()}")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(dict(seeds=seeds, results=results, seconds=seconds), indent=1) + "\n")
    return 0 if all(np.mean(pairs, 0)[1] > np.mean(pairs, 0)[0] for pairs in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
