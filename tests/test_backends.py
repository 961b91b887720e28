"""The registry's and the training tests on the backends that the suite itself does not run on."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


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
        "not ViT_L and not ViT_S",
    ]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
