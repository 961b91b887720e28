"""What a TF-Hub module costs beside its Keras model: bytes, seconds to write, verify and load, and images per second served.

    python -m benchmarks.hub ViT_B16

Writes the module, which ends with a check by another process (timed once more, and taken off for the writing alone), loads it in
processes of their own, and measures its signature "serving_default" beside the model's compiled `predict_on_batch`, in turn.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOAD = """
import sys, time
import tensorflow, tensorflow_hub
start = time.perf_counter()
module = tensorflow_hub.load(sys.argv[1])
print(time.perf_counter() - start)
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a registered model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(argv)

    import keras
    import numpy as np
    import tensorflow as tf

    import keras_vit
    from keras_vit import hub

    model = keras_vit.create_model(options.model, weights=None, classifier_activation=None)
    found = {"weights_bytes": sum(4 * int(np.prod(v.shape)) for v in model.weights)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "module")
        start = time.perf_counter()
        hub.export(model, path)
        found["write_and_verify_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        hub.check(path, np.zeros((2, *model.input_shape[1:])))  # what verification does in the other process
        found["write_seconds"] = found["write_and_verify_seconds"] - (time.perf_counter() - start)
        found["module_bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        command = [sys.executable, "-c", LOAD, str(path)]
        loads = [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3)]
        found["load_seconds"] = statistics.median(loads)

        served = tf.saved_model.load(str(path)).signatures["serving_default"]
        images = np.random.default_rng(0).random((options.batch, *model.input_shape[1:]), np.float32)
        given, prepared = tf.constant(images), keras_vit.preprocess_input(images * 255, model)
        model.compile()
        contenders = {"keras": lambda: model.predict_on_batch(prepared), "module": lambda: served(images=given)["logits"].numpy()}
        difference = np.abs(contenders["keras"]() - contenders["module"]()).max()
        seconds = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    found["difference"] = float(difference)
    for name, times in seconds.items():
        found[f"{name}_images_per_second"] = options.batch / statistics.median(times)
    found["throughput_ratio"] = statistics.median(a / b for a, b in zip(seconds["keras"], seconds["module"]))
    found["size_ratio"] = found["module_bytes"] / found["weights_bytes"]
    if options.json:
        print(json.dumps({"model": options.model, "keras": keras.__version__, "tensorflow": tf.__version__, **found}))
    else:
        for name, value in found.items():
            print(f"{name:28} {value:,}" if isinstance(value, int) else f"{name:28} {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
