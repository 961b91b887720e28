"""What the original implementations computed, on every backend installed, each in a process of its own."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDENS

from benchmarks.parity_training import Ties

ROOT = pathlib.Path(__file__).parents[1]


def parity(*folders, backend="tensorflow"):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.parity", *map(str, folders)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "KERAS_BACKEND": backend}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_every_golden_case_passes(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    cases = len(list(GOLDENS.rglob("meta.json")))
    done = parity(GOLDENS, backend=backend)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{backend}: {cases} of {cases} cases ok" in done.stdout


def test_a_miss_an_unknown_option_and_an_unknown_family_fail_each_by_name(tmp_path):
    for name in ("wrong", "option", "family", "shape"):
        shutil.copytree(GOLDENS / "vit" / "token_p16", tmp_path / name)
    with np.load(tmp_path / "wrong" / "expected.npz") as file:
        expected = dict(file)
    np.savez(tmp_path / "wrong" / "expected.npz", **{**expected, "logits": expected["logits"] + 2e-5})
    np.savez(tmp_path / "shape" / "expected.npz", **{k: v for k, v in expected.items() if k != "logits"})
    for name, change in (("option", {"config": {"resnet": {"num_layers": []}}}), ("family", {"family": "perceiver"})):
        meta = json.loads((tmp_path / name / "meta.json").read_text())
        meta["config"] |= change.pop("config", {})
        (tmp_path / name / "meta.json").write_text(json.dumps({**meta, **change}))
    done = parity(tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert "0 of 4 cases ok" in lines[-1]
    for line, match in zip(lines, ("family 'perceiver'", "resnet.num_layers", "logits: a final output", "logits: error")):
        assert "MISS" in line
        assert match in line


def test_only_a_trace_halfway_between_two_bfloat16_numbers_gives_its_weight_slack():
    half, spacing = 1 + 2**-8, 2**-7
    ties = Ties([np.zeros(4)])
    ties.step([np.float32([half, 1, half + 1e-4, -half])], 0.5, 0.9)
    np.testing.assert_array_equal(ties.slack[0], 0)  # the update itself takes the unrounded trace
    for _ in range(2):
        ties.step([np.float32([1, 1, 1, 1])], 0.1, 0.9)
    np.testing.assert_allclose(ties.slack[0], np.array([1, 0, 0, 1]) * 2 * 0.1 * 0.9 * spacing)


def test_no_case_is_no_success(tmp_path):
    done = parity(tmp_path)
    assert done.returncode == 1
    assert "no case found" in done.stdout
