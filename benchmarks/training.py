"""Images per second of the train step, beside the same machine's matrix products, Keras's own step and keras_hub's.

    python -m benchmarks.training ViT_B16 [--image=224 --batch=8 --rounds=6 --save-every=100 --json=FILE]

Float32, random weights, SGD with momentum, on the current Keras backend; each contender is one `train_on_batch`, all in turn,
round after round, in one run. The ceiling is that of `benchmarks.throughput` for three times the forward pass. Ratios are medians
over the rounds, of wall time and, steadier where others use the machine, of the process's CPU time.

    keras_vit            a `Learner` that clips and checks its numbers: what `keras_vit.main` runs
    keras_vit parts=2    the same over two batches in two parts, one update
    keras                the same model and optimizer by the train step of Keras, without clipping, checks or parts
    keras_hub            its classifier of that size by the train step of Keras with Keras's SGD, where it is installed

A background save is measured as what it adds to the steps it overlaps, started once in every round.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

import keras_vit
from benchmarks import throughput
from keras_vit.training import state
from keras_vit.training.optimizers import MomentumSGD
from keras_vit.training.step import Learner

STEPS_BESIDE_A_SAVE = 3


def contenders(name, image, batch):
    """({label: function that makes one update}, {label: images of one update}, the learner, the keras_vit model)."""
    size = {"input_shape": (image, image, 3)} if image else {}
    random = np.random.default_rng(0)

    def model():
        return keras_vit.create_model(name, weights=None, classifier_activation=None, **size)

    def updates(learner, count):
        images = random.uniform(-1, 1, (count, *learner.input_shape[1:])).astype(np.float32)
        labels = np.eye(learner.output_shape[-1], dtype=np.float32)[random.integers(0, learner.output_shape[-1], count)]
        return lambda: learner.train_on_batch(images, labels)

    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    ours, accumulating, plain = model(), model(), model()
    learners = {
        "keras_vit": Learner(ours.inputs, ours.outputs, clip_norm=1.0),
        "keras_vit parts=2": Learner(accumulating.inputs, accumulating.outputs, parts=2, clip_norm=1.0),
        "keras": keras.Model(plain.inputs, plain.outputs),
    }
    for learner in learners.values():
        learner.compile(MomentumSGD(1e-3), loss)
    counts = {"keras_vit": batch, "keras_vit parts=2": 2 * batch, "keras": batch}
    if ours.family == "ViT" and throughput.installed("keras_hub"):
        learners["keras_hub"] = _keras_hub(ours)
        learners["keras_hub"].compile(keras.optimizers.SGD(1e-3, momentum=0.9), loss)
        counts["keras_hub"] = batch
    runs = {label: updates(learner, counts[label]) for label, learner in learners.items()}
    return runs, counts, learners["keras_vit"], ours


def _keras_hub(ours):
    from keras_hub.models import ViTBackbone

    tokens, patches, block = (ours.get_layer(part).get_config() for part in ("tokens", "patches", "block_0"))
    depth = sum(layer.name.startswith("block_") for layer in ours.layers)
    sizes = patches["patch_size"], depth, block["heads"], patches["width"], block["mlp"]
    backbone = ViTBackbone(ours.input_shape[1:], *sizes, use_class_token=tokens["class_token"])
    logits = keras.layers.Dense(ours.output_shape[-1])(backbone.output[:, 0])
    return keras.Model(backbone.input, logits)


def saving(learner, update, rounds):
    """What a background save costs.

    Returns:
        (seconds that it adds to the steps beside it, one number for each round; CPU seconds of one with no step beside it,
        likewise; megabytes of state).
    """
    added, alone = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = state.Checkpoints(folder)
        for number in range(rounds):
            begun = time.process_time()
            checkpoints.save(2 * number + 1, state.capture(learner), {}, background=False)
            alone.append(time.process_time() - begun)
            seconds = []
            for save in (False, True):
                begun = time.perf_counter()
                if save:
                    arrays = state.capture(learner)
                    checkpoints.save(2 * number + 2, arrays, {})
                for _ in range(STEPS_BESIDE_A_SAVE):
                    update()
                seconds.append(time.perf_counter() - begun)
                checkpoints.wait()
            added.append(seconds[1] - seconds[0])
        size = sum(array.nbytes for array in arrays.values()) / 1e6
    return added, alone, size


def _ratio(times, counts, one, peer):
    """Of the images of `one` in a time to those of `peer`: the median over their calls side by side."""
    return counts[one] / counts[peer] * statistics.median(p / o for p, o in zip(times[peer], times[one]))


def report(name, image, batch, rounds, save_every):
    """Measures and returns the record that `main` prints and writes."""
    runs, counts, learner, model = contenders(name, image, batch)
    gflop = throughput.gflop_per_image(model)
    ceiling = {"ceiling": throughput.matrix_products()} if gflop else {}
    if gflop:
        counts |= {"ceiling": 2e-9 * throughput.PRODUCTS * throughput.SIDE**3 / (3 * gflop)}
    seconds, cpu = throughput.measure(runs | ceiling, rounds)
    rates = {label: counts[label] / statistics.median(times) for label, times in seconds.items()}
    added, alone, size = saving(learner, runs["keras_vit"], rounds)
    pairs = [("keras_vit", peer) for peer in ("ceiling", "keras_hub", "keras")] + [("keras_vit parts=2", "keras")]
    ratios = {
        f"{one} / {peer}": [_ratio(times, counts, one, peer) for times in (seconds, cpu)]
        for one, peer in pairs
        if peer in seconds
    }
    step = batch / rates["keras_vit"]
    save = {"seconds": statistics.median(added), "cpu_seconds": statistics.median(alone), "megabytes": size, "every": save_every}
    save |= {"share_of_steps": save["seconds"] / (save_every * step), "all_seconds": added}
    return {
        "model": name, "input_shape": model.input_shape[1:], "batch": batch, "rounds": rounds, "backend": keras.config.backend(),
        "images_per_second": rates, "seconds": seconds, "cpu_seconds": cpu, "ratios": ratios, "save": save,
        "machine": throughput.machine(), "versions": throughput.versions(),
    }  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="a registered model: keras_vit.list_models()")
    parser.add_argument("--image", type=int, help="side in pixels; the model's own default if left out")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=100, help="steps between two saves, for the share of their cost")
    parser.add_argument("--json", type=Path, help="file for the record, with every call's seconds")
    given = parser.parse_args(arguments)
    if min(given.batch, given.rounds, given.save_every, given.image or 1) < 1:
        parser.error("--image, --batch, --rounds and --save-every must be at least 1")
    record = report(given.name, given.image, given.batch, given.rounds, given.save_every)
    print(f"{record['model']} {record['input_shape']}, batch {record['batch']}, float32, {record['backend']}")
    print(f"{record['machine']['cpu']}, {record['machine']['cores']} cores; {record['rounds']} rounds")
    for label, rate in record["images_per_second"].items():
        print(f"{label:28} {rate:8.3f} images/s")
    for label, (wall, cpu) in record["ratios"].items():
        print(f"{label:28} {wall:8.3f}, of CPU time {cpu:.3f}")
    save = record["save"]
    print(
        f"a background save of {save['megabytes']:.0f} MB adds {save['seconds']:.2f} s to the steps beside it: "
        f"{save['share_of_steps']:.2%} of the time of {save['every']} steps; alone it takes {save['cpu_seconds']:.2f} CPU seconds"
    )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
