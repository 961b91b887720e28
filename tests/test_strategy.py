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
from keras_vit import errors
from keras_vit.errors import ArgumentError
from keras_vit.training import strategy
from keras_vit.training.contrastive import DUPLICATES, LOSSES
from keras_vit.training.step import Learner

CHILD = pathlib.Path(__file__).with_name("child_strategy.py")
NO_ACCELERATOR = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
STEPS, CLIP = 8, 0.5
RUN = [
    "--config.model.hidden_size=32", "--config.model.transformer.num_layers=1", "--config.model.transformer.num_heads=8",
    "--config.model.transformer.mlp_dim=64", f"--config.total_steps={STEPS}", "--config.warmup_steps=2", "--config.batch=32",
    "--config.base_lr=0.5", f"--config.grad_norm_clip={CLIP}", "--config.optim_dtype=float32", "--config.eval_every=0",
    "--config.progress_every=0", "--config.checkpoint_every=4",
]  # fmt: skip
TOWERS = dict(width=16, depth=1, heads=2, mlp=16, text_width=16, text_depth=1, text_heads=2, text_mlp=16, patch_size=4)
PAIRS = [
    "--config=lit_digits.py", *(f"--config.model.{key}={size}" for key, size in TOWERS.items()), "--config.pp.crop=8",
    "--config.model.out_dim=(16, 16)", "--config.contrastive.towers=UU", f"--config.total_steps={STEPS}",
    "--config.warmup_steps=1", "--config.batch=16", "--config.optimizer=sgd", "--config.base_lr=0.1", "--config.eval_every=0",
    "--config.progress_every=0", "--config.checkpoint_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs are, and the weights that they start from."""
    root = tmp_path_factory.mktemp("strategies")
    keras.utils.set_random_seed(0)
    small = dict(input_shape=(8, 8, 3), patch_size=2, width=32, depth=1, heads=8, mlp=64, classes=10)
    keras_vit.save_npz(keras_vit.ViT(weights=None, name="ViT_digits", **small), root / "ViT_digits.npz")
    towers = keras_vit.LiT_mu(weights=None, input_shape=(8, 8, 3), out_dim=(16, 16), **TOWERS)
    keras_vit.save_npz(towers, root / "towers.npz")
    return root


def run(folder, name, *options, **more):
    """What child_strategy.py is told of a run in `folder`/`name`."""
    return {"workdir": str(folder / name), "options": [*RUN, f"--config.pretrained_dir={folder}", *options], **more}


def pairs(folder, name, *options, **more):
    """The same of a run of two towers."""
    return {"workdir": str(folder / name), "options": [*PAIRS, f"--config.pretrained_dir={folder}/towers.npz", *options], **more}


def start(folder, out, runs, backend="tensorflow", environment=(), **more):
    """A process of child_strategy.py, and the file that it will write."""
    out = folder / f"{out}.json"
    command = [sys.executable, str(CHILD), json.dumps({"out": str(out), "runs": runs, **more})]
    environment = {**os.environ, "KERAS_BACKEND": backend, **NO_ACCELERATOR, **dict(environment)}
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
        pairs(folder, "pairs", "--config.strategy=one_device"),
        pairs(folder, "pairs_mirrored", mirrored),
    ]
    jax = [
        run(folder, "data_2", data, four, places=2),
        run(folder, "data_8", data),
        run(folder, "model", "--config.strategy=model_parallel", "--config.model_axis=4"),
        pairs(folder, "pairs_data_2", data, places=2),
    ]
    refused = [{"name": "model_parallel", "model_axis": 3}, {"name": "model_parallel", "model_axis": 0}, {"name": "mirrored"}]
    started = (
        start(folder, "tensorflow", tensorflow, devices=2, extra="replicas", refused=[{"name": "tpu"}]),
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
    """Two new workers that go on, the second asked to end after step 6; the same two go on again; a run without a stop.

    Then two runs with a mistake: other commands, other folders.
    """
    options = ("--config.strategy=multi_worker",)

    def runs(index):
        stopped = run(folder, "workers", *options, stop=(6 if index else -1, signal.SIGTERM))
        mistakes = [
            run(folder, "mistake", *options, f"--config.seed={index}", stop=(-1, 0)),
            run(folder, f"workers_whole{index or ''}", *options, stop=(-1, 0)),
        ]
        return [stopped, run(folder, "workers", *options), run(folder, "workers_whole", *options), *mistakes]

    return finished(*workers(folder, "resumed", runs, extra="bare"), exits=(1,))


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
    one_device = "pairs" if name.startswith("pairs") else "one_device"
    expected, found = steps(folder, one_device), steps(folder, name)
    assert list(found) == [step for step in expected if step in found] and max(found) == STEPS
    for key in ("loss", "grad_norm", "lr"):
        np.testing.assert_allclose([s[key] for s in found.values()], [expected[step][key] for step in found], rtol=1e-5)
    with np.load(folder / one_device / "model.npz") as one, np.load(folder / name / "model.npz") as other:
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
    "pairs": ["one_device", 1, 0, 1], "pairs_mirrored": ["mirrored", 2, 0, 1],
    "data_2": ["data_parallel", 2, 0, 1], "data_8": ["data_parallel", 8, 0, 1], "model": ["model_parallel", 2, 0, 1],
    "pairs_data_2": ["data_parallel", 2, 0, 1],
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in PLACES if name not in ("one_device", "pairs")])
def test_the_numbers_are_those_of_one_device(folder, processes, name):
    tensorflow, jax = processes
    assert dict(zip(PLACES, tensorflow["places"] + jax["places"]))[name] == PLACES[name]
    assert_same_run(folder, name)


def test_every_contrastive_loss_and_its_gradient_are_those_of_the_whole_batch(processes):
    found = processes[0]["extra"]["pairs"]
    assert set(found) == {f"{kind} {duplicates}" for kind in LOSSES for duplicates in DUPLICATES}
    for one, two in found.values():
        for mine, both in zip(one, two):
            np.testing.assert_allclose(both, mine, rtol=1e-5, atol=1e-6)


def test_replicas_draw_other_dropout_masks_and_go_on_from_the_same_seed(processes):
    (one, two), seeds = processes[0]["extra"]["norms"], processes[0]["extra"]["seeds"]
    for mine, both in zip(one, two):  # the same masks on both replicas would give the same gradient
        assert abs(mine / both - 1) > 1e-3
    assert two[0] != two[1]
    assert seeds and all(len(each) == 2 and each[0] == each[1] for each in seeds)


def test_a_model_made_before_moves_into_the_scope_in_which_it_is_compiled(processes):
    found = processes[0]["extra"]
    np.testing.assert_allclose(found["moved"][1], found["moved"][0], rtol=1e-5)
    assert found["moved"][0][2] < found["moved"][0][0]
    assert found["copies"] and set(found["copies"]) == {2}
    assert found["difference"] < 1e-6


def test_one_device_after_a_distribution_of_jax_is_one_device(processes):
    assert processes[1]["extra"] == [False, "one_device", True]


def test_tpu_is_refused_where_there_is_none_with_the_way_out(processes):
    (message,) = processes[0]["refused"]
    assert "finds no TPU here" in message and "KERAS_BACKEND=jax and strategy data_parallel" in message


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
    assert [worker["exits"][:3] for worker in resumed] == [[143, 0, 0]] * 2
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


def test_workers_with_other_commands_or_folders_refuse_to_begin(folder, resumed):
    assert [worker["exits"][3:] for worker in resumed] == [[1, 1]] * 2
    for index in range(2):
        log = (folder / f"resumed_{index}.log").read_text()
        assert "ConfigError: the workers have different configurations" in log
        assert "the workers found checkpoints of different steps there" in log
    assert not (folder / "mistake").exists()


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


@pytest.fixture
def no_cluster(monkeypatch):
    for name in ("TF_CONFIG", "TPU_NAME", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)


def cluster(**tasks):
    kind, index = tasks.pop("task", ("worker", 0))
    return json.dumps({"cluster": tasks, "task": {"type": kind, "index": index}})


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="for TensorFlow; JAX is tried in another process")
@pytest.mark.parametrize(
    ("arguments", "config", "match"),
    [
        ({"name": "everywhere"}, None, "on tensorflow there are auto, .*; nothing is called so"),
        ({"name": "data_parallel"}, None, "it is one of jax: set KERAS_BACKEND=jax"),
        ({"name": "parameter_server"}, None, "keras#18624.*Use multi_worker"),
        ({"name": "mirrored", "model_axis": 2}, None, "model_axis is for strategy 'model_parallel'"),
        ({"name": "multi_worker"}, None, "TF_CONFIG is not set. Give each machine"),
        ({"name": "multi_worker"}, "{", "TF_CONFIG must be like .*, got '{'"),
        ({"name": "multi_worker"}, "[]", "TF_CONFIG must be like"),
        ({"name": "multi_worker"}, '{"cluster": {"worker": ["a:1"]}}', "TF_CONFIG must be like"),
        ({"name": "auto"}, "{", "TF_CONFIG must be like"),
        ({"name": "multi_worker"}, cluster(worker=["a:1", "b:1"], ps=["c:1"]), "keras#18624"),
        ({"name": "multi_worker"}, cluster(chief=["a:1"], worker=["b:1"]), "list all tasks as 'worker'"),
        ({"name": "multi_worker"}, cluster(worker=["a:1", "b:1"], task=("worker", 2)), "an index from 0 to 1"),
        ({"name": "multi_worker"}, cluster(worker=["a:1", "b:1"], task=("chief", 0)), "an index from 0 to 1"),
    ],
)
def test_what_cannot_be_opened_is_refused_at_entry_with_the_way_out(arguments, config, match, no_cluster, monkeypatch):
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ArgumentError, match=match):
        strategy.open_strategy(**arguments)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="for TensorFlow; JAX is tried in another process")
def test_auto_is_the_widest_that_is_there(no_cluster, monkeypatch):
    import tensorflow as tf

    assert strategy.open_strategy().name == "one_device"
    monkeypatch.setenv("TF_CONFIG", cluster(worker=["a:1"]))
    assert strategy.open_strategy().name == "one_device"
    monkeypatch.setattr(strategy, "_MultiWorker", lambda it: f"several of {it}")
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", lambda: "workers")
    monkeypatch.setenv("TF_CONFIG", cluster(worker=["a:1", "b:1"]))
    assert strategy.open_strategy() == "several of workers"


def test_sizes_that_a_place_cannot_divide_are_refused_with_the_numbers():
    place = strategy.Place()
    place.check_batch(7)
    place.check_sizes(heads=3, mlp=7)
    place.check_precision("mixed_float16")
    place.name, place.replicas, place.model_axis = "model_parallel", 2, 4
    place.check_batch(16, 4)
    with pytest.raises(ArgumentError, match="12 cannot be divided over 2 replicas in 4 parts each; take a multiple of 8"):
        place.check_batch(12, 4)
    with pytest.raises(ArgumentError, match="{'heads': 6} cannot be divided over 4 devices"):
        place.check_sizes(heads=6, mlp=64)


def test_errors_of_other_kinds_are_not_called_a_lost_worker(tmp_path):
    fault = OSError("gs://bucket/file: the network is unreachable")
    with pytest.raises(OSError, match="gs://bucket/file") as caught:
        strategy._raise_lost(tmp_path, fault)
    assert caught.value is fault
    with pytest.raises(
        errors.TrainingError, match=f"lost .Collective ops is aborted by: Socket closed.; .* go on from {tmp_path}"
    ):
        strategy._raise_lost(
            tmp_path, RuntimeError("Graph execution error:\n\nCollective ops is aborted by: Socket closed\nmore")
        )


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"NUM_PROCESSES": "2"}, "'PROCESS_ID': None.*set all three or none"),
        ({"NUM_PROCESSES": "two", "PROCESS_ID": "0", "JOB_ADDRESSES": "a:1"}, "invalid literal.*set all three or none"),
        ({"NUM_PROCESSES": "2", "PROCESS_ID": "2", "JOB_ADDRESSES": "a:1"}, "2 is not from 0 to 1"),
        ({"NUM_PROCESSES": "2", "PROCESS_ID": "0", "JOB_ADDRESSES": "a"}, "'a' is no host:port"),
    ],
)
def test_processes_of_jax_that_are_half_described_are_refused(given, match, no_cluster, monkeypatch):
    pytest.importorskip("jax")
    for name, value in given.items():
        monkeypatch.setenv(f"KERAS_DISTRIBUTION_{name}", value)
    with pytest.raises(ArgumentError, match=match):
        strategy._join_processes()


def test_processes_of_jax_are_joined_as_described_and_a_lost_one_is_noticed_within_a_minute(no_cluster, monkeypatch):
    jax = pytest.importorskip("jax")
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where, **times: asked.append((where, times)))
    strategy._join_processes()
    assert asked == []
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    strategy._join_processes()
    assert asked == []
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    strategy._join_processes()
    for name, value in {"NUM_PROCESSES": "2", "PROCESS_ID": "1", "JOB_ADDRESSES": "a:1,b:2"}.items():
        monkeypatch.setenv(f"KERAS_DISTRIBUTION_{name}", value)
    strategy._join_processes()
    assert [where for where, _ in asked] == [(), ("a:1", 2, 1)]
    assert all(times["heartbeat_timeout_seconds"] < 60 for _, times in asked)


@pytest.mark.parametrize(
    ("workers", "replicas", "slices"),
    [(2, 4, [(0, 2), (1, 2)]), (2, 1, [(0, 1), (0, 1)]), (4, 2, [(0, 2), (0, 2), (1, 2), (1, 2)])],
)
def test_processes_that_hold_parts_of_one_model_read_the_same_examples(workers, replicas, slices):
    place = strategy.Mesh.__new__(strategy.Mesh)
    place.workers, place.replicas, found = workers, replicas, []
    for place.worker in range(workers):
        found.append(place.batches(lambda *shard: shard, 8))
    assert found == slices


def test_heads_and_hidden_layers_are_divided_with_their_slots_and_nothing_else_is():
    layouts = strategy.layout_map(keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"]))
    divided = {
        "block_0/attention/qkv_kernel": (None, None, "model", None),
        "block_11/attention/qkv_bias": (None, "model", None),
        "momentum_sgd/block_0_attention_out_kernel_trace": ("model", None, None),
        "adam_w/block_3_mlp_fc1_kernel_second": (None, "model"),
        "block_0/mlp/fc1/bias": ("model",),
        "optimizer/block_0_mlp_fc2_kernel_average": ("model", None),
    }
    assert {path: layouts[path].axes for path in divided} == divided
    for path in (
        "block_0/attention/out_bias",
        "block_0/mlp/fc2/bias",
        "head/kernel",
        "tokens/positions",
        "block_0/mlp_norm/gamma",
    ):
        assert layouts[path] is None
    for slot in ("rows", "columns"):  # of Adafactor, of other shapes than their weights
        assert layouts[f"adafactor/block_0_mlp_fc1_kernel_{slot}"] is None


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="for TensorFlow")
@pytest.mark.parametrize("kind", ["ParameterServerStrategyV2", "CollectiveAllReduceStrategy"])
def test_keras_own_training_is_refused_where_it_fails_and_elsewhere_not(kind):
    model = keras_vit.ViT(weights=None, input_shape=(8, 8, 3), patch_size=4, width=8, depth=1, heads=2, mlp=8, classes=2)
    model.compile("sgd", "categorical_crossentropy")
    found = type(kind, (), {"num_replicas_in_sync": 2})()
    model._distribute_strategy = found
    images, labels = np.zeros((2, 8, 8, 3), np.float32), np.eye(2)
    for call in (lambda: model.compile("sgd", "mse"), lambda: model.fit(images, labels)):
        with pytest.raises(ArgumentError, match=f"under {kind}.*--config.strategy=multi_worker"):
            call()
    learner = Learner(model.inputs, model.outputs)
    learner._distribute_strategy = found
    if kind == "ParameterServerStrategyV2":
        with pytest.raises(ArgumentError, match="keras#18624"):
            learner.compile("sgd", "categorical_crossentropy")
    model._distribute_strategy = None
    assert np.isfinite(model.fit(images, labels, verbose=0).history["loss"]).all()


@pytest.mark.slow
def test_digits_are_learned_on_two_devices_as_on_one(folder):
    options = ["--config.strategy=mirrored", "--config.eval_every=0", "--config.export=False"]
    finished(start(folder, "digits", [{"workdir": str(folder / "digits"), "options": options}], devices=2), timeout=1200)
    last = (folder / "digits" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["accuracy_test"] > 0.96


@pytest.mark.slow
def test_a_model_divided_over_two_jax_processes_goes_on_after_a_stop_and_stores_its_averages(folder):
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
    process, out = pair[0]
    try:
        assert process.wait(60) != 0
    finally:
        process.kill()
    if (backend, victim) != ("jax", 0):  # without the first process JAX ends the others itself, maybe before they can speak
        assert f"start all workers again: they go on from {folder / name}." in out.with_suffix(".log").read_text()
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
