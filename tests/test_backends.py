"""The registry's and the training tests on the backends that the suite itself does not run on."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import randomise

import keras_vit

HERE = pathlib.Path(__file__).parent
LOADED = """
import hashlib, sys
import keras_vit
from keras_vit.checkpoints.load import named_weights, to_numpy
model = keras_vit.ViT_mu(weights=sys.argv[1], input_shape=(64, 48, 3))
digest = hashlib.sha256()
for name, weight in sorted(named_weights(model).items()):
    digest.update(name.encode() + to_numpy(weight).tobytes())
print(digest.hexdigest())
"""


def test_a_file_loads_to_the_same_bits_on_every_backend(tmp_path):
    keras_vit.save_npz(randomise(keras_vit.ViT_mu(weights=None)), tmp_path / "x.npz")
    digests = set()
    for backend in ("tensorflow", "jax", "torch"):
        if importlib.util.find_spec(backend):
            command = [sys.executable, "-c", LOADED, str(tmp_path / "x.npz")]
            environment = {**os.environ, "KERAS_BACKEND": backend}
            digests.add(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip())
    assert len(digests) == 1


@pytest.mark.slow  # 90 s; each backend's outputs and training are compared in test_parity and test_step too
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_models_train_tap_and_save_as_on_tensorflow(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        HERE / "test_fit.py",
        HERE / "test_registry.py",
        "-k",
        "test_fit or training_step and (_mu or 14_bv)",
    ]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
