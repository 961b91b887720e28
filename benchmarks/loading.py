"""Seconds and memory from a checkpoint file to a ready model: `python -m benchmarks.loading [ViT_B16] [--rounds=5]`.

Writes the variant's weights once as an original .npz (ViT-B/16: 330 MiB) and, where timm is installed, as its safetensors file.
Each contender then runs in processes of its own, in turn, round after round; the median counts.

    keras_vit   keras_vit.create_model(name, weights=path): verified, checked and loaded
    np.load     all arrays by np.load, and the model built with random weights, as the least that a loader without checks does
    timm        timm.create_model(...) and load_state_dict of its safetensors file

Time is from imported packages to the ready model, with the file in the page cache. Memory is the process's peak beyond what it
had with the packages imported and a toy model built, as a multiple of the model's float32 weights.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

TIMM = {"ViT_B16": "vit_base_patch16_224", "ViT_S16": "vit_small_patch16_224", "ViT_L16": "vit_large_patch16_224"}

PREPARE = """
import sys
import keras, numpy as np, keras_vit
name, folder = sys.argv[1:]
model = keras_vit.create_model(name, weights=None)
model.get_layer("head").kernel.assign(np.full(model.get_layer("head").kernel.shape, 0.01))
keras_vit.save_npz(model, f"{folder}/weights.npz")
print(model.count_params())
"""
PREPARE_TIMM = """
import sys
import timm, safetensors.torch
safetensors.torch.save_file(timm.create_model(sys.argv[1]).state_dict(), sys.argv[2] + "/weights.safetensors")
print("written")
"""
RUN = """
import json, resource, sys, time
name, folder = sys.argv[1:]
{imports}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
{body}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(dict(seconds=seconds, mib=(peak - before) / 1024)))
"""
KERAS = "import keras_vit, numpy as np\nkeras_vit.ViT_mu(weights=None)"
CONTENDERS = {
    "keras_vit": RUN.format(imports=KERAS, body='model = keras_vit.create_model(name, weights=f"{folder}/weights.npz")'),
    "np.load": RUN.format(
        imports=KERAS,
        body='arrays = dict(np.load(f"{folder}/weights.npz"))\nmodel = keras_vit.create_model(name, weights=None)',
    ),
    "timm": RUN.format(
        imports='import timm, safetensors.torch\ntimm.create_model("vit_tiny_patch16_224")',
        body='model = timm.create_model(name)\n'
        'model.load_state_dict(safetensors.torch.load_file(f"{folder}/weights.safetensors"))',
    ),
}  # fmt: skip


def _run(source, *words):
    done = subprocess.run([sys.executable, "-c", source, *words], capture_output=True, text=True, env=os.environ, check=False)
    return done.stdout.splitlines()[-1] if done.returncode == 0 else None


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="ViT_B16", help="a registered variant")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        params = int(_run(PREPARE, options.name, folder))
        names = {"keras_vit": options.name, "np.load": options.name}
        if options.name in TIMM and importlib.util.find_spec("timm"):
            if _run(PREPARE_TIMM, TIMM[options.name], folder) is None:  # it needs a torch and a torchvision that fit each other
                print("timm is installed but cannot be used here; left out")
            elif pathlib.Path(folder, "weights.safetensors").is_file():
                names["timm"] = TIMM[options.name]
        results = {label: [] for label in names}
        for _ in range(options.rounds):
            for label, name in names.items():
                results[label].append(json.loads(_run(CONTENDERS[label], name, folder)))
    model = 4 * params / 2**20
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {os.environ.get('KERAS_BACKEND', 'tensorflow')}"
    print(f"{options.name}: {model:.1f} MiB of weights; {machine}")
    medians = {label: statistics.median(run["seconds"] for run in runs) for label, runs in results.items()}
    for label, runs in results.items():
        peak = max(run["mib"] for run in runs)
        ratio = medians["keras_vit"] / medians[label]
        print(
            f"{label:<10} {medians[label]:6.2f} s (keras_vit: {ratio:.2f}x)  peak {peak:5.0f} MiB, {peak / model:.2f}x the model"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
