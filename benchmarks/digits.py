"""Trains `configs/digits.py` once for each seed: test accuracy and seconds of training, and their means.

python -m benchmarks.digits --seeds=0,1,2 --strategy=mirrored --devices=2 --json=digits.json

Exits with 1 if the mean accuracy is below 97%.
"""

import argparse
import json
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf

from keras_vit.configs import digits
from keras_vit.main import train

LEAST = 0.97


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas between")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--strategy", default="auto", help="as --config.strategy of keras_vit.main")
    parser.add_argument("--devices", type=int, help="logical CPU devices of TensorFlow to train on")
    options = parser.parse_args()
    if options.devices:
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * options.devices)
    runs = []
    for seed in map(int, options.seeds.split(",")):
        keras.utils.clear_session()
        config = digits.get_config()
        config.seed, config.eval_every, config.progress_every, config.strategy = seed, 0, 200, options.strategy
        with tempfile.TemporaryDirectory() as workdir:
            trained = train(config, workdir)
        runs.append(dict(seed=seed, accuracy=trained.accuracy, seconds=round(trained.seconds, 1)))
    for run in runs:
        print(f"seed {run['seed']}: test accuracy {run['accuracy']:.4f} after {run['seconds']:.1f} s of training")
    mean, seconds = (float(np.mean([run[key] for run in runs])) for key in ("accuracy", "seconds"))
    print(
        f"mean of {len(runs)}: test accuracy {mean:.4f} (least {LEAST}) after {seconds:.1f} s, backend {keras.config.backend()}"
    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(backend=keras.config.backend(), runs=runs, accuracy=mean, seconds=seconds), file, indent=1)
    return 0 if mean >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
