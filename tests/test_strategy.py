"""The same run wherever it trains: devices, processes, machines; what is lost with a worker; what is refused at entry.

The runs are those of the main job, in processes of their own (child_strategy.py): a process has one set of devices for its life.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_vit

CHILD = pathlib.Path(__file__).with_name("child_strategy.py")
# No accelerator, and on JAX without the optimizations of which each compilation takes long
QUICK = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
STEPS, CLIP = 8, 0.5
RUN = [
    "--config.model.hidden_size=32", "--config.model.transformer.num_layers=1", "--config.model.transformer.num_heads=8",
    "--config.model.transformer.mlp_dim=64", f"--config.total_steps={STEPS}", "--config.warmup_steps=2", "--config.batch=32",
    "--config.base_lr=0.5", f"--config.grad_norm_clip={CLIP}", "--config.optim_dtype=float32", "--config.eval_every=0",
    "--config.progress_every=0", "--config.checkpoint_every=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs are, and the weights that they start from."""
    root = tmp_path_factory.mktemp("strategies")
    keras.utils.set_random_seed(0)
    small = dict(input_shape=(8, 8, 3), patch_size=2, width=32, depth=1, heads=8, mlp=64, classes=10)
    keras_vit.save_npz(keras_vit.ViT(weights=None, name="ViT_digits", **small), root / "ViT_digits.npz")
    return root


def run(folder, name, *options, **more):
    """What child_strategy.py is told of a run in `folder`/`name`."""
    return {"workdir": str(folder / name), "options": [*RUN, f"--config.pretrained_dir={folder}", *options], **more}


def start(folder, out, runs, backend="tensorflow", environment=(), **more):
    """A process of child_strategy.py, and the file that it will write."""
    out = folder / f"{out}.json"
    command = [sys.executable, str(CHILD), json.dumps({"out": str(out), "runs": runs, **more})]
    environment = {**os.environ, "KERAS_BACKEND": backend, **QUICK, **dict(environment)}
    with open(out.with_suffix(".log"), "w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log), out


def finished(*started, exits=(0,), timeout=300):
    """What the processes found; their logs are in the error if one ends otherwise than by `exits`."""
    try:
        for process, out in started:
            assert process.wait(timeout) in exits, out.with_suffix(".log").read_text()[-4000:]
    finally:
        for process, _ in started:
            process.kill()
    return [json.loads(out.read_text()) if out.exists() else None for _, out in started]


def environments(backend):
    """The variables of two workers on this machine."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(2)]
    hosts = [f"localhost:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    if backend == "jax":
        named = {"KERAS_DISTRIBUTION_JOB_ADDRESSES": ",".join(hosts), "KERAS_DISTRIBUTION_NUM_PROCESSES": "2"}
        return [{**named, "KERAS_DISTRIBUTION_PROCESS_ID": str(index)} for index in range(2)]
    cluster = {"worker": hosts}
    return [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}})} for i in range(2)]


def workers(folder, out, runs, backend="tensorflow", **more):
    """Two processes of the same runs; `runs` is a function of the worker's number."""
    return [
        start(folder, f"{out}_{index}", runs(index), backend, environment, **more)
        for index, environment in enumerate(environments(backend))
    ]


def steps(folder, name):
    """{step: its record} of a run's metrics.jsonl; a step that was made twice would have two."""
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "loss" in record]
    found = {record["step"]: record for record in records}
    assert len(found) == len(records)
    return found


@pytest.fixture(scope="module")
def processes(folder):
    """One process of TensorFlow and one of JAX, each with all runs that are possible in one process, at the same time."""
    four, mirrored, data = "--config.accum_steps=4", "--config.strategy=mirrored", "--config.strategy=data_parallel"
    tensorflow = [
        run(folder, "one_device", "--config.strategy=one_device"),
        run(folder, "mirrored", mirrored),
        run(folder, "as_on_tpu", mirrored, four, "--config.steps_on_device=2", stand_in=True),
    ]
    jax = [
        run(folder, "data_2", data, four, places=2),
        run(folder, "data_8", data),
        run(folder, "model", "--config.strategy=model_parallel", "--config.model_axis=4"),
    ]
    refused = [{"name": "model_parallel", "model_axis": 3}, {"name": "model_parallel", "model_axis": 0}, {"name": "mirrored"}]
    started = (
        start(folder, "tensorflow", tensorflow, devices=2, extra="masks"),
        start(folder, "jax", jax, "jax", devices=8, refused=refused, extra="reset"),
    )
    return finished(*started)


@pytest.fixture(scope="module")
def lost(folder):
    """Two workers of TensorFlow, of which the second is killed after step 6; the exit of the first."""
    options = ("--config.strategy=multi_worker",)
    first, second = workers(folder, "lost", lambda i: [run(folder, "workers", *options, stop=(6 if i else -1, signal.SIGKILL))])
    finished(second, exits=(-signal.SIGKILL,))
    finished(first, exits=(1,), timeout=60)  # T10
    return first[1].with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def resumed(folder, lost):
    """Two new workers that go on, the second asked to end after step 6; the same two go on again; a run without a stop."""
    options = ("--config.strategy=multi_worker",)

    def runs(index):
        stopped = run(folder, "workers", *options, stop=(6 if index else -1, signal.SIGTERM))
        return [stopped, run(folder, "workers", *options), run(folder, "workers_whole", *options)]

    return finished(*workers(folder, "resumed", runs, extra="bare"))


@pytest.fixture(scope="module")
def jax_workers(folder):
    """Two processes of JAX with two devices each: a run of which the second is asked to end after step 6, and that goes on."""
    options = ("--config.strategy=data_parallel",)

    def runs(index):
        stopped = run(folder, "jax_workers", *options, stop=(6 if index else -1, signal.SIGTERM))
        return [stopped, run(folder, "jax_workers", *options)]

    return finished(*workers(folder, "jax_workers", runs, "jax", devices=2, refused=[{"name": "one_device"}]))


def assert_same_run(folder, name):
    """Losses within 1e-5 of those on one device at every step, and the same weights at the end."""
    expected, found = steps(folder, "one_device"), steps(folder, name)
    assert list(found) == [step for step in expected if step in found] and max(found) == STEPS
    for key in ("loss", "grad_norm", "lr"):
        np.testing.assert_allclose([s[key] for s in found.values()], [expected[step][key] for step in found], rtol=1e-5)
    with np.load(folder / "one_device" / "model.npz") as one, np.load(folder / name / "model.npz") as other:
        assert sorted(one) == sorted(other)
        for key in one:
            np.testing.assert_allclose(other[key], one[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_the_run_on_one_device_clips_warms_up_and_learns(folder, processes):
    one = steps(folder, "one_device").values()
    assert [record["lr"] for record in one][:3] == [0.0, 0.25, 0.5]
    assert min(record["grad_norm"] for record in one) > CLIP
    assert len({record["loss"] for record in one}) >= STEPS - 1
    assert len(one) == STEPS


PLACES = {
    "one_device": ["one_device", 1, 0, 1], "mirrored": ["mirrored", 2, 0, 1], "as_on_tpu": ["tpu", 2, 0, 1],
    "data_2": ["data_parallel", 2, 0, 1], "data_8": ["data_parallel", 8, 0, 1], "model": ["model_parallel", 2, 0, 1],
}  # fmt: skip


@pytest.mark.parametrize("name", list(PLACES)[1:])
def test_the_numbers_are_those_of_one_device(folder, processes, name):
    tensorflow, jax = processes
    assert dict(zip(PLACES, tensorflow["places"] + jax["places"]))[name] == PLACES[name]
    assert_same_run(folder, name)


def test_replicas_draw_other_dropout_masks_and_go_on_from_the_same_seed(processes):
    (one, two), seeds = processes[0]["extra"]["norms"], processes[0]["extra"]["seeds"]
    for mine, both in zip(one, two):  # the same masks on both replicas would give the same gradient
        assert abs(mine / both - 1) > 1e-3
    assert two[0] != two[1]
    assert seeds and all(len(each) == 2 and each[0] == each[1] for each in seeds)


def test_one_device_after_a_distribution_of_jax_is_one_device(processes):
    assert processes[1]["extra"] == [False, "one_device", True]


def test_jax_refuses_at_entry_what_its_devices_cannot_do(processes, jax_workers):
    assert processes[1]["refused"] == [
        "model_parallel: model_axis=3 does not divide the 8 devices; choose a divisor.",
        "model_parallel: model_axis=0 does not divide the 8 devices; choose a divisor.",
        "strategy 'mirrored': on jax there are auto, one_device, data_parallel, model_parallel; it is one of tensorflow: set "
        "KERAS_BACKEND=tensorflow.",
    ]
    for worker in jax_workers:
        assert worker["refused"] == ["one_device: there are several JAX processes; use data_parallel or model_parallel."]


def test_a_worker_that_loses_another_says_so_and_where_to_go_on(folder, lost):  # T10
    (line,) = [line for line in lost.splitlines() if line.startswith("TrainingError")]
    assert "another worker was lost" in line and "start all workers again" in line and str(folder / "workers") in line


def test_workers_that_were_killed_or_asked_to_end_go_on_to_the_same_bits(folder, resumed):
    assert [worker["exits"] for worker in resumed] == [[143, 0, 0]] * 2
    assert [worker["places"][0] for worker in resumed] == [["multi_worker", 2, 0, 2], ["multi_worker", 2, 1, 2]]
    log = (folder / "workers" / "train.log").read_text()
    assert "Going on after step 4" in log
    assert "saved after step 6" in log and "Going on after step 6" in log
    whole, parts = steps(folder, "workers_whole"), steps(folder, "workers")
    assert [step["loss_hex"] for step in parts.values()] == [step["loss_hex"] for step in whole.values()]
    with np.load(folder / "workers" / "model.npz") as one, np.load(folder / "workers_whole" / "model.npz") as other:
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_the_numbers_of_two_workers_are_those_of_one_device(folder, processes, resumed):
    assert_same_run(folder, "workers_whole")


def test_keras_own_fit_under_several_workers_is_refused_with_the_way_out(resumed):  # T11
    for worker in resumed:
        assert len(worker["extra"]) == 3
        for message in worker["extra"]:
            assert "keras#20585" in message and "--config.strategy=multi_worker" in message and "step.Learner" in message


def test_the_numbers_of_two_jax_processes_are_those_of_one_device_also_after_a_stop(folder, processes, jax_workers):
    assert [worker["exits"] for worker in jax_workers] == [[143, 0]] * 2
    assert [worker["places"][0] for worker in jax_workers] == [["data_parallel", 4, 0, 2], ["data_parallel", 4, 1, 2]]
    log = (folder / "jax_workers" / "train.log").read_text()
    assert "saved after step 6" in log and "Going on after step 6" in log
    assert_same_run(folder, "jax_workers")


@pytest.mark.slow
def test_a_model_divided_over_two_jax_processes_goes_on_after_a_stop_and_stores_its_averages(folder, processes):
    options = ("--config.strategy=model_parallel", "--config.model_axis=4", "--config.ema=0.9", "--config.eval_every=2")

    def runs(index):
        stopped = run(folder, "jax_model", *options, stop=(6 if index else -1, signal.SIGTERM))
        return [stopped, run(folder, "jax_model", *options)]

    found = finished(*workers(folder, "jax_model", runs, "jax", devices=2))
    assert [worker["exits"] for worker in found] == [[143, 0]] * 2
    assert found[0]["places"][0] == ["model_parallel", 1, 0, 2]
    one = finished(start(folder, "jax_ema", [run(folder, "jax_ema", "--config.ema=0.9", "--config.eval_every=2")]))
    assert one[0]["places"] == [["one_device", 1, 0, 1]]
    for name in ("loss", "grad_norm"):
        values = [[step[name] for step in steps(folder, each).values()] for each in ("jax_ema", "jax_model")]
        np.testing.assert_allclose(values[1], values[0], rtol=1e-5)
    with np.load(folder / "jax_ema" / "model.npz") as one, np.load(folder / "jax_model" / "model.npz") as other:
        for key in one:
            np.testing.assert_allclose(other[key], one[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
@pytest.mark.parametrize("victim", [0, 1])
def test_whichever_worker_is_killed_the_other_ends_within_a_minute(folder, backend, victim):  # T10
    options = ("--config.strategy=multi_worker" if backend == "tensorflow" else "--config.strategy=data_parallel",)
    name = f"killed_{backend}_{victim}"
    pair = workers(
        folder,
        name,
        lambda i: [run(folder, name, *options, stop=(6 if i == victim else -1, signal.SIGKILL))],
        backend,
    )
    finished(pair.pop(victim), exits=(-signal.SIGKILL,))
    process, _ = pair[0]
    try:
        assert process.wait(60) != 0
    finally:
        process.kill()
    finished(*workers(folder, f"{name}_again", lambda i: [run(folder, name, *options)], backend))
    assert list(steps(folder, name)) == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_worker_that_cannot_begin_ends_the_other_within_a_minute(folder, backend):
    options = "--config.strategy=multi_worker" if backend == "tensorflow" else "--config.strategy=data_parallel"
    name = f"failing_{backend}"
    splits = ["--config.pp.train=train", "--config.pp.train=nothing"]
    first, second = workers(folder, name, lambda i: [run(folder, name, options, splits[i], stop=(-1, 0))], backend)
    try:
        assert second[0].wait(120) != 0
        assert "nothing" in second[1].with_suffix(".log").read_text()
        assert first[0].wait(60) != 0
    finally:
        first[0].kill()
        second[0].kill()
