"""Images per second of models' inference, beside the same machine's matrix products and the peers that are installed.

    python -m benchmarks.throughput ViT_B16 poolformer_s12 [--image=224 --batch=8 --rounds=6 --json=FILE]

Any registered models, by either name; float32, random weights, the current Keras backend. All contenders are measured in one run,
a few calls each in turn, round after round, so that noise hits all alike. Keras models run as their users run them, by
`predict_on_batch`, with and without `jit_compile` on TensorFlow, and the better median of the two counts on either side; timm's,
that of the same upstream name or a ViT of the same size, runs eagerly in `torch.inference_mode`.

The ceiling is the rate at which this machine, by the same backend in the same rounds, multiplies two float32 2048 x 2048
matrices, divided by the model's multiplications (see `gflop_per_image`): its median, and that of the best one ("best ceiling").
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from pathlib import Path

import keras
import numpy as np

import keras_vit
from keras_vit import errors, zoo
from keras_vit.explain.cost import cost

SIDE = 2048
PRODUCTS = 8  # in one call, so that it lasts long enough to meet the same noise as a batch of images
CALLS = 2  # of each contender in a round
JIT = {"tensorflow": {"graph": False, "jit": True}, "jax": {"jit": True}, "torch": {"eager": False}}


def gflop_per_image(model):
    """Billions of floating-point operations (two for each multiply-add) of all matrix products and convolutions for one image.

    ViT-B/16 at 224: 35.1. None for a model whose layers do not all say what they cost.
    """
    try:
        return 2e-9 * cost(model).macs
    except errors.ArgumentError:
        return None


def contenders(name, image, batch):
    """({label: function of no arguments that classifies one batch}, the keras_vit model)."""
    model = keras_vit.create_model(name, weights=None, **({"input_shape": (image, image, 3)} if image else {}))
    shape = model.input_shape[1:]
    images = np.random.default_rng(0).uniform(-1, 1, (batch, *shape)).astype(np.float32)
    modes = JIT[keras.config.backend()].items()
    runs = {f"keras_vit {mode}": _keras(model, images, jit) for mode, jit in modes}
    if model.family == "ViT" and installed("keras_hub"):
        from keras_hub.models import ViTBackbone

        tokens, patches, depth, block = _parts(model)
        sizes = patches["patch_size"], depth, block["heads"], patches["width"], block["mlp"]
        peer = ViTBackbone(shape, *sizes, use_class_token=tokens["class_token"])
        runs |= {f"keras_hub {mode}": _keras(peer, images, jit) for mode, jit in modes}
    if installed("timm"):
        try:
            peer = _timm(model, name)
            runs |= {"timm eager": _torch(peer, images)} if peer else {}
        except (ImportError, RuntimeError) as error:  # it needs a torch and a torchvision that fit each other
            print(f"timm is installed but cannot be used here ({error}); left out")
    return runs, model


def _parts(model):
    """What a ViT is made of: the settings of its tokens and patches, its depth, and a block's settings."""
    tokens, patches, block = (model.get_layer(part).get_config() for part in ("tokens", "patches", "block_0"))
    return tokens, patches, sum(layer.name.startswith("block_") for layer in model.layers), block


def _keras(model, images, jit):
    model = keras.Model(model.inputs[0], model.outputs[0])  # the same layers and weights, compiled apart
    model.compile(jit_compile=jit)
    return lambda: model.predict_on_batch(images)


def _timm(model, name):
    """timm's model of the same name, as given or upstream, else of a ViT one of its size, else None."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    size, row = model.input_shape[1:3], zoo.VARIANTS.get(model.variant)
    known = [each for each in (name, *(row.upstream if row else ())) if timm.is_model(each)]
    if known:
        try:
            return timm.create_model(known[0], img_size=size)
        except TypeError:  # a model of any size
            return timm.create_model(known[0])
    if model.family != "ViT":
        return None
    tokens, patches, depth, block = _parts(model)
    return VisionTransformer(
        img_size=size, patch_size=patches["patch_size"], embed_dim=patches["width"], depth=depth, num_heads=block["heads"],
        mlp_ratio=block["mlp"] / patches["width"], class_token=tokens["class_token"],
        global_pool="token" if tokens["class_token"] else "avg",
    )  # fmt: skip


def _torch(model, images):
    import torch

    model, images = model.eval(), torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    @torch.inference_mode()
    def run():
        return model(images).numpy()

    return run


def matrix_products():
    """One call of the ceiling; each product is waited for by copying a single number of it."""
    a, b = (keras.ops.convert_to_tensor(np.random.default_rng(i).random((SIDE, SIDE), np.float32)) for i in (0, 1))

    def run():
        for _ in range(PRODUCTS):
            keras.ops.convert_to_numpy(keras.ops.matmul(a, b)[0, 0])

    return run


def measure(runs, rounds):
    """{label: seconds of each call} and {label: CPU seconds of each call}, all labels in turn in every round."""
    seconds, cpu = {label: [] for label in runs}, {label: [] for label in runs}
    for run in runs.values():
        run(), run()  # trace, compile, allocate
    for _ in range(rounds):
        for label, run in runs.items():
            for _ in range(CALLS):
                before, before_cpu = time.perf_counter(), time.process_time()
                run()
                seconds[label].append(time.perf_counter() - before)
                cpu[label].append(time.process_time() - before_cpu)
    return seconds, cpu


def report(names, image=None, batch=8, rounds=6):
    """Measures models, all in the same rounds.

    Returns:
        For each the record that `main` prints and writes: settings, rates in images/s, ratios, machine, versions.
    """
    built = {name: contenders(name, image, batch) for name in names}
    runs = {(name, label): run for name, (labels, _) in built.items() for label, run in labels.items()}
    seconds, cpu = measure(runs | {"ceiling": matrix_products()}, rounds)
    gflops = [2e-9 * PRODUCTS * SIDE**3 / s for s in seconds.pop("ceiling")]
    records = []
    for name, (labels, model) in built.items():
        rates = {}
        for label in labels:
            times = seconds[name, label]
            rates[label] = {
                "median": batch / statistics.median(times), "max": batch / min(times),
                "cpu_seconds_per_image": statistics.median(cpu[name, label]) / batch, "seconds": times,
            }  # fmt: skip
        records.append(_record(name, model, batch, rounds, rates, gflops))
    return records


def _record(name, model, batch, rounds, rates, gflops):
    best, gflop = {}, gflop_per_image(model)
    for label, rate in rates.items():
        side = label.split()[0]
        best[side] = max(best.get(side, 0), rate["median"])
    ours = best.pop("keras_vit")
    ratios = {f"keras_vit / {side}": ours / rate for side, rate in best.items()}
    ceiling = {"gflops_median": statistics.median(gflops), "gflops_max": max(gflops), "gflop_per_image": gflop}
    if gflop:
        ceiling |= {"median": ceiling["gflops_median"] / gflop, "max": ceiling["gflops_max"] / gflop}
        ratios |= {"keras_vit / ceiling": ours / ceiling["median"], "keras_vit / best ceiling": ours / ceiling["max"]}
    return {
        "model": name, "input_shape": model.input_shape[1:], "batch": batch, "rounds": rounds, "calls_per_round": CALLS,
        "dtype": "float32", "backend": keras.config.backend(), "images_per_second": rates, "ceiling": ceiling, "ratios": ratios,
        "machine": machine(), "versions": versions(),
    }  # fmt: skip


def machine():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = None if keras.config.backend() == "torch" else keras.distribution.list_devices()  # Keras lists none on PyTorch
    return {"cpu": names[0] if names else platform.processor(), "cores": cores, "devices": devices}


def installed(module):
    return importlib.util.find_spec(module) is not None


def versions():
    found = {}
    for package in ("keras", "tensorflow", "jax", "torch", "keras-hub", "timm", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {"python": platform.python_version(), "keras_vit": keras_vit.__version__, **found}


def _print(record):
    machine, ceiling = record["machine"], record["ceiling"]
    print(f"{record['model']} {record['input_shape']}, batch {record['batch']}, float32, {record['backend']}")
    print(f"{machine['cpu']}, {machine['cores']} cores; {record['rounds']} rounds of {record['calls_per_round']} calls each")
    print(", ".join(f"{package} {version or 'absent'}" for package, version in record["versions"].items()))
    print(f"{'images/s':20} {'median':>8} {'max':>8} {'cpu-s/image':>12}")
    for label, rate in record["images_per_second"].items():
        print(f"{label:20} {rate['median']:8.2f} {rate['max']:8.2f} {rate['cpu_seconds_per_image']:12.4f}")
    if "median" in ceiling:
        print(f"{'ceiling':20} {ceiling['median']:8.2f} {ceiling['max']:8.2f}")
        rate = f"{ceiling['gflops_median']:.0f} GFLOP/s (best {ceiling['gflops_max']:.0f}) of a float32 {SIDE}^3 product"
        print(f"the ceiling is {rate} / {ceiling['gflop_per_image']:.4g} GFLOP an image")
    print("graph, jit: predict_on_batch without and with jit_compile; in the ratios of medians each side's better one counts")
    for label, ratio in record["ratios"].items():
        print(f"{label:24} {ratio:.3f}")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="a registered model: keras_vit.list_models()")
    parser.add_argument("--image", type=int, help="side in pixels; the model's own default, mostly 224, if left out")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path, help="file for the records, with every call's seconds")
    given = parser.parse_args(arguments)
    if min(given.batch, given.rounds, given.image or 1) < 1:
        parser.error(f"--image, --batch and --rounds must be at least 1, got {given.image}, {given.batch}, {given.rounds}")
    records = report(given.names, given.image, given.batch, given.rounds)
    for record in records:
        _print(record)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
