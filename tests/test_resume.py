"""Runs of the main job against kills, signals, damage, full disks, NaN and changed settings: all end as if nothing had happened.

The names in brackets are the rows of the list of faults that these tests are made from.
"""

import collections
import concurrent.futures
import contextlib
import errno
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_vit import errors, main
from keras_vit.data import pipeline
from keras_vit.training import callbacks, finetune, metrics, report, state

# Few numbers, but all that has a state: dropout, a moving average, a shuffled and augmented stream, evaluations, accumulation
STEPS, SAVED_EVERY = 24, 4
OPTIONS = [
    f"--config.total_steps={STEPS}", f"--config.checkpoint_every={SAVED_EVERY}", "--config.eval_every=10", "--config.batch=16",
    "--config.warmup_steps=4", "--config.accum_steps=2", "--config.ema=0.9", "--config.mixup=0.2", "--config.batch_eval=360",
    "--config.progress_every=0", "--noconfig.export", "--config.model.transformer.dropout_rate=0.1",
    "--config.model.hidden_size=24", "--config.model.transformer.num_layers=2", "--config.model.transformer.mlp_dim=48",
]  # fmt: skip
# For runs in this process, a second each; all three checkpoints are kept
SMALL = [
    *OPTIONS, "--config.total_steps=6", "--config.checkpoint_every=2", "--config.keep_checkpoints=3", "--config.eval_every=3",
    "--config.batch=8", "--config.warmup_steps=1", "--config.accum_steps=1", "--config.mixup=0", "--config.augment=none",
    "--config.model.hidden_size=12", "--config.model.transformer.num_layers=1", "--config.model.transformer.mlp_dim=16",
    "--config.model.patches.size=(4,4)",
]  # fmt: skip
PATIENCE = 300  # seconds until a child that does nothing is a failure

CHILD = """
import json, os, sys, time
if os.environ["DEVICES"] != "1":
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(os.environ["DEVICES"]))
from keras_vit import main
from keras_vit.training import state

main.report.write = lambda *args: None  # seconds of pictures that are tested elsewhere

def held(path, arrays, write=state._write_arrays):
    while not os.path.exists(os.environ["HELD_UNTIL"]):
        time.sleep(0.001)
    return write(path, arrays)

def slow(checkpoints, check=state.Checkpoints.check):  # called once in a step
    time.sleep(0.1)
    check(checkpoints)

if "HELD_UNTIL" in os.environ:
    state._write_arrays = held
if "SLOW" in os.environ:
    state.Checkpoints.check = slow
for line in sys.stdin:
    status = main.main(json.loads(line))
sys.exit(status)
"""


class Child:
    """A process that has imported the main job, or is about to, and waits for command lines to run one after the other.

    Args:
        backend: "tensorflow" or "jax".
        devices: logical CPU devices of TensorFlow.
        **environment: HELD_UNTIL is a file that the child waits for in every save; with SLOW its steps take a tenth of a second.
    """

    def __init__(self, backend="tensorflow", devices=1, **environment):
        environment = {**os.environ, "KERAS_BACKEND": backend, "DEVICES": str(devices), **environment}
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=self.said, stderr=self.said, text=True, env=environment
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()
        self.said.close()

    def begin(self, *commands):
        """Has it run command lines, each a list of options, and then end with the status of the last."""
        lines = [json.dumps(["main", *command]) + "\n" for command in commands]
        self.process.stdin.write("".join(lines))
        self.process.stdin.close()

    def wait_for(self, condition):
        """Waits until a condition holds, or the process has ended; returns whether it holds."""
        until = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None:
                return condition()
            assert time.monotonic() < until, self.tail()
            time.sleep(0.001)
        return True

    def status(self):
        """Waits until it has ended."""
        return self.process.wait(PATIENCE)

    def tail(self):
        """The last of what it said."""
        self.said.seek(0)
        return self.said.read()[-3000:]


def command(folder, *options):
    return [f"--workdir={folder}", *OPTIONS, *options]


def told(folder):
    """What a run says of its numbers, in order, without the seconds that they took."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in metrics.read(folder / "metrics.jsonl")]


def weights(folder):
    """{name: bytes} of the stored model."""
    with np.load(folder / "model.npz") as arrays:
        return {name: (arrays[name].dtype.str, arrays[name].shape, arrays[name].tobytes()) for name in arrays.files}


def assert_same_run(folder, reference, steps=STEPS):
    """Two runs have told the same bits of every step and evaluation, and stored the same weights."""
    got, expected = told(folder), told(reference)
    assert [record["step"] for record in expected if "loss_hex" in record] == list(range(1, steps + 1))
    for a, b in zip(got, expected):
        assert a == b
    assert len(got) == len(expected)
    assert weights(folder) == weights(reference)


def last_step(folder):
    """Of `metrics.jsonl`, from its end alone, for it is asked for a thousand times a second; 0 if it says nothing yet."""
    try:
        end = (folder / "metrics.jsonl").read_bytes()[-400:]
    except FileNotFoundError:
        return 0
    return int(([b"0"] + re.findall(rb'"step": (\d+)[^\n]*\n', end))[-1])


def saved_steps(folder):
    return state.Checkpoints(folder / "checkpoints").steps()


def unfinished(folder):
    """Saves and removals that are under way, or were when the process was killed."""
    try:
        return [name for name in os.listdir(folder / "checkpoints") if name.startswith(".")]
    except FileNotFoundError:
        return []


def number_of_file(path):
    return path.stat().st_ino if path.exists() else None


class Storm:
    """Kills a run again and again at random instants and starts it again; when it gets to its end, it is compared.

    Args:
        folder: of the runs.
        backend, devices: of `Child`.
        options: of the command line.
        seed: of the instants.
        **environment: of `Child`.

    Attributes:
        reference: the folder of a run that nobody disturbed.
        kills: {kind of instant: number}; "terminate" and "twice" are no kills: the run was asked to end, once or twice.
        in_saves: kills that left a save or a removal of an old one unfinished.
        runs: that came to their end, with the bits of the reference.
    """

    def __init__(self, folder, backend="tensorflow", devices=1, options=(), seed=0, **environment):
        self.folder, self.options, self.random = folder, options, random.Random(seed)
        self.reference = folder / "reference"
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.child = lambda: Child(backend, devices, **cache, **environment)
        self.kills, self.in_saves, self.runs = collections.Counter(), 0, 0

    def rage(self, kills, kinds):
        """Makes so many kills, of the kinds in turn, and then lets the run end."""
        kinds = itertools.cycle(kinds)
        first = [command(self.reference, *self.options)]
        with contextlib.ExitStack() as stack:
            spare = stack.enter_context(self.child())
            while not self.runs or self._killed() < kills:
                child, more = spare, self._killed() < kills
                if more:  # imports while the other one runs
                    spare = stack.enter_context(self.child())
                folder = self.folder / f"run_{self.runs}"
                before = number_of_file(folder / "metrics.jsonl")
                child.begin(*first, command(folder, *self.options))
                first = []
                if not (more and self._disturb(child, folder, before, next(kinds))):
                    assert child.status() == 0, child.tail()
                    assert_same_run(folder, self.reference)
                    assert not list((folder / "checkpoints").glob("*.corrupt*"))  # a kill damages none
                    self.runs += 1
        return self

    def _killed(self):
        return sum(self.kills.values()) - self.kills["terminate"] - self.kills["twice"]

    def _disturb(self, child, folder, before, kind):
        """Ends a run at an instant of a kind; returns False if it came to its own end before that."""

        def begun():  # what is there is its own
            return number_of_file(folder / "metrics.jsonl") not in (None, before)

        saved = saved_steps(folder)
        after = (saved[-1] if saved else 0) + self.random.randint(1, 2 * SAVED_EVERY)
        some_step = lambda: begun() and last_step(folder) >= min(after, STEPS)  # noqa: E731
        condition, offset = {
            "start": (lambda: f'"pid": {child.process.pid},' in text(folder / ".lock.json"), 1.5),
            "step": (some_step, 0.04),
            "save": (lambda: unfinished(folder) and begun() and last_step(folder) >= after - SAVED_EVERY, 0.003),
            "end": (lambda: begun() and last_step(folder) == STEPS, 1.0),
            "terminate": (some_step, 0.04),
            "twice": (some_step, 0.04),
        }[kind]
        if not child.wait_for(condition):
            return False
        time.sleep(self.random.uniform(0, offset))
        if kind in ("terminate", "twice"):
            child.process.send_signal(signal.SIGTERM)
            time.sleep(self.random.uniform(0, 0.02))
        if kind != "terminate":
            child.process.send_signal(signal.SIGTERM if kind == "twice" else signal.SIGKILL)
        status = child.status()
        if status == 0:
            return False
        allowed = {"terminate": (143,), "twice": (143, -signal.SIGTERM)}.get(kind, (-signal.SIGKILL,))
        assert status in allowed, child.tail()
        saved = saved_steps(folder)
        lost = last_step(folder) - (saved[-1] if saved else 0)
        # Otherwise the steps since the last save, or since the one before while a save is under way
        assert lost <= (0 if status == 143 else SAVED_EVERY * (2 if unfinished(folder) else 1))
        self.in_saves += status == -signal.SIGKILL and bool(unfinished(folder))
        self.kills[kind] += 1
        return True


@pytest.fixture(scope="module")
def storms(tmp_path_factory):
    """{backend: a future of its `Storm`}, at the same time on TensorFlow and JAX."""
    found = {each: Storm(tmp_path_factory.mktemp(each), each) for each in ("tensorflow", "jax")}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {backend: pool.submit(storm.rage, 3, ("step", "save", "step")) for backend, storm in found.items()}


@pytest.mark.parametrize("backend", ("tensorflow", "jax"))
def test_a_run_killed_three_times_ends_with_the_bits_of_one_that_was_not(storms, backend):  # [T1, T2]
    storm = storms[backend].result()
    assert sum(storm.kills.values()) == 3 and storm.runs


AUGMENTED = ["--config.augreg=light1", "--config.cutmix=1.0", "--config.erasing=0.2", "--config.stochastic_depth_rate=0.1"]
LONG_STORMS = [("tensorflow", 1, 100), ("jax", 1, 25), ("tensorflow", 2, 10)]


@pytest.mark.slow  # 16 minutes on 2 cores
@pytest.mark.parametrize("backend, devices, kills", LONG_STORMS, ids=("tensorflow", "jax", "mirrored"))
def test_a_storm_of_kills_and_preemptions_changes_no_bit(tmp_path, backend, devices, kills):  # [T1, T2, T3]
    options = AUGMENTED + (["--config.strategy=mirrored"] if devices > 1 else [])
    storm = Storm(tmp_path, backend, devices, options, seed=1)
    storm.rage(kills, ("step", "save", "terminate", "step", "start", "save", "twice", "step", "end"))
    print(f"{backend} on {devices}: {dict(storm.kills)}, {storm.in_saves} of them inside a save; {storm.runs} runs ended alike")
    assert storm.in_saves


# Signals


@pytest.fixture(scope="module")
def calm(storms):
    """The folder of a run on TensorFlow that nobody disturbed."""
    return storms["tensorflow"].result().reference


def test_preempted_runs_lose_no_step_and_a_second_run_in_the_folder_is_refused(calm, tmp_path, capsys):  # [T3, T8]
    folder, gate = tmp_path / "run", tmp_path / "gate"
    with Child(SLOW="1") as first, Child(HELD_UNTIL=str(gate)) as held, Child() as last:
        # Ctrl-C in a save, then SIGTERM in a step
        first.begin(command(folder), command(folder))
        assert first.wait_for(lambda: unfinished(folder)), first.tail()
        first.process.send_signal(signal.SIGINT)
        assert first.wait_for(lambda: "Asked to end" in text(folder / "train.log")), first.tail()
        interrupted = last_step(folder)
        assert saved_steps(folder)[-1] == interrupted < STEPS
        assert first.wait_for(lambda: last_step(folder) > interrupted), first.tail()
        first.process.send_signal(signal.SIGTERM)
        assert first.status() == main.EXIT_PREEMPTED == 143, first.tail()
        preempted = last_step(folder)
        assert saved_steps(folder)[-1] == preempted < STEPS
        assert told(folder) == [record for record in told(calm) if record["step"] <= preempted]

        # Another run comes while one is at work, which then ends at once at a second signal although its save hangs
        held.begin(command(folder))
        assert held.wait_for(lambda: unfinished(folder)), held.tail()
        before = contents(folder / "checkpoints")
        assert main.main(["main", *command(folder)]) == 1
        message = one_error(capsys)
        assert f"{folder}: another run is at work here (process {held.process.pid} on {socket.gethostname()} since 2" in message
        assert contents(folder / "checkpoints") == before and not gate.exists()
        held.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert held.process.poll() is None
        for _ in range(100):  # as long as Python has not seen the first, another is none
            if held.process.poll() is None:
                held.process.send_signal(signal.SIGTERM)
                time.sleep(0.01)
        assert held.status() in (-signal.SIGTERM, 143)
        assert saved_steps(folder)[-1] == preempted

        last.begin(command(folder))
        assert last.status() == 0, last.tail()
    assert_same_run(folder, calm)


def text(path):
    return path.read_text() if path.exists() else ""


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# Runs in this process


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    """A run's report takes a second and is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "write", lambda *args: None)
        yield


def run(folder, *options):
    """The status of a small run in this process."""
    return main.main(["main", f"--workdir={folder}", *SMALL, *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a small run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder) == 0
    return folder


@pytest.fixture
def half(whole, tmp_path):
    """The folder of a small run that was killed before its last checkpoint and model were written: it has those of steps 2, 4."""
    folder = tmp_path / "half"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("step_00000006", "model.*"))
    return folder


def one_error(capsys):
    """The only line on stderr that is one of this package's."""
    found = [line for line in capsys.readouterr().err.splitlines() if re.match(r"\w+Error: ", line)]
    assert len(found) == 1
    return found[0]


def assert_ends_like(folder, whole, *options):
    assert run(folder, *options) == 0
    assert_same_run(folder, whole, steps=6)


@pytest.mark.parametrize("file, damaged, going_on", (("state.safetensors", (4,), 2), ("manifest.json", (2, 4), None)))
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_never_to_none(half, whole, caplog, capsys, file, damaged, going_on):
    for step in damaged:  # [T4]
        path = half / f"checkpoints/step_{step:08}" / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    if going_on:
        assert_ends_like(half, whole)
        log = text(half / "train.log")
        assert f"Going on after step 2, from {half}/checkpoints/step_00000002" in log
        assert "Damaged ones lie aside: step_00000004.corrupt." in log
    else:
        assert run(half) == 1
        assert "none of its checkpoints is intact (step_00000002.corrupt; step_00000004.corrupt)" in capsys.readouterr().err
        assert not (half / "model.npz").exists()
    for step in damaged:
        assert f"step_{step:08}: {file}" in caplog.text


@contextlib.contextmanager
def no_file_larger_than(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_which_goes_on_when_there_is_room(half, whole, monkeypatch, capsys):  # [T5]
    before = contents(half / "checkpoints")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
        assert run(half) == 1
    assert re.search(
        r"^CacheError: .*step_00000006: a checkpoint of \d\d,\d{3} bytes could not be written: only 1,000 bytes are free. Older "
        r"ones are as they were \(of steps 2; 4\). Make room",
        capsys.readouterr().err,
        re.M,
    )
    with no_file_larger_than(10_000):
        assert run(half) == 1
    assert re.search(r"^CacheError: .*File too large", capsys.readouterr().err, re.M)
    assert contents(half / "checkpoints") == before
    assert not list(half.glob("model.*")) + list(half.glob(".model*"))
    assert_ends_like(half, whole)


def test_a_disk_that_is_full_for_tensorflow_is_said_so_and_full_memory_is_not(tmp_path):  # [T5]
    with pytest.raises(errors.CacheError, match=f"{tmp_path}: .* No space left on device"), main._written(tmp_path):
        raise tf.errors.ResourceExhaustedError(None, None, "events.out; No space left on device")
    with pytest.raises(tf.errors.ResourceExhaustedError), main._written(tmp_path):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")


def at_step(monkeypatch, step, action):
    """Has `action()` called in a run, after so many steps from where it begins; saves in the background have ended then."""
    check, steps = state.Checkpoints.check, itertools.count(1)

    def checked(checkpoints):
        if next(steps) == step:
            checkpoints.wait()
            action()
        check(checkpoints)

    monkeypatch.setattr(state.Checkpoints, "check", checked)


def test_a_run_told_to_continue_outlives_a_full_disk(whole, tmp_path, monkeypatch, capsys):  # [T5]
    stack = contextlib.ExitStack()
    with stack:
        stack.enter_context(no_file_larger_than(10_000))
        at_step(monkeypatch, 5, stack.close)
        assert_ends_like(tmp_path / "run", whole, "--config.on_save_error=continue")
    assert saved_steps(tmp_path / "run") == [6]
    log = text(tmp_path / "run/train.log")
    for step in (2, 4):
        assert f"step_{step:08}: a checkpoint of" in log and f"step {step}: the model could not be stored" in log


def test_a_save_that_fails_in_the_background_ends_the_run_and_is_never_said_to_be_made(whole, tmp_path, monkeypatch, capsys):
    folder, replace, check = tmp_path / "run", os.replace, state.Checkpoints.check  # [T12]

    def failing(source, target):
        if ".writing_00000004" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        return replace(source, target)

    def when_done(checkpoints):
        if checkpoints._saving:
            concurrent.futures.wait([checkpoints._saving])
        check(checkpoints)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        patched.setattr(state.Checkpoints, "check", when_done)
        assert run(folder) == 1
    message = one_error(capsys)
    assert message.startswith("CacheError") and "step_00000004: a checkpoint of" in message and "Input/output error" in message
    assert saved_steps(folder) == [2] and last_step(folder) == 5
    assert_ends_like(folder, whole)


# Numbers that are not finite


def poisoned(monkeypatch, step, value):
    """Makes one number of the images of a step, counted from 1, another; there is no image file that holds NaN."""
    train_batches = pipeline.train_batches

    def batches(source, *, batch, start, **options):
        def replaced(number, pair):
            images, labels = pair
            return tf.where(number == step - 1, tf.concat([images[:1] * value, images[1:]], 0), images), labels

        return train_batches(source, batch=batch, start=start, **options).enumerate(start // batch).map(replaced)

    monkeypatch.setattr(pipeline, "train_batches", batches)


@pytest.mark.parametrize("step, value", ((6, math.nan), (5, -math.inf)))
def test_a_step_that_is_not_finite_is_not_made_and_its_examples_are_named(half, whole, monkeypatch, capsys, step, value):  # [T6]
    with monkeypatch.context() as patched:
        poisoned(patched, step, value)
        assert run(half) == 1
    message = one_error(capsys)
    if step == 5:  # the first from here, which is looked at before
        assert message.startswith("DataError: The first batch of 8 examples cannot be trained on")
    else:
        source = pipeline.open_source("digits", "train")
        examples = [each.index for each in pipeline.positions(source, seed=0, start=40, count=8)]
        assert message.startswith("NonFiniteError: step 6: loss nan")
        assert f"Its batch: examples {', '.join(map(str, examples))}. " in message
        assert f"Last good checkpoint: {half}/checkpoints/step_00000004. " in message
    assert saved_steps(half) == [2, 4]
    assert_ends_like(half, whole)


@pytest.mark.parametrize(
    "rate, options, found",
    (
        ("1e30", (), r"NonFiniteError: step 6: loss (nan|inf).* the step was not made. Its batch: examples \d+, "),
        # The loss of step 5 is that of weights that are still finite
        ("1e39", ("--config.checkpoint_every=1",), r"NonFiniteError: step 5: trainable/0000/\S+ is not finite and was not saved"),
    ),
    ids=("seen in the loss", "seen in the weights"),
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_run_that_diverges_stops_and_goes_on_with_another_learning_rate(half, whole, capsys, rate, options, found):  # [T6]
    changed = f"--config.base_lr={rate}"
    assert run(half, changed, *options) == 1
    assert f"ResumeError: The run was begun with other settings (1): base_lr: 0.03 -> {rate[0]}e" in one_error(capsys)
    assert run(half, changed, *options, "--config.allow_change=base_lr") == 1
    message = one_error(capsys)
    assert re.match(found, message) and f"Last good checkpoint: {half}/checkpoints/step_00000004. " in message
    assert saved_steps(half) == [2, 4] and not list(half.glob("model.*"))
    assert_all_finite(half / "checkpoints")
    if not options:
        assert run(half, "--config.base_lr=0.01", "--config.allow_change=base_lr") == 0
        assert weights(half) != weights(whole)
        assert_all_finite(half / "checkpoints")


class Disturbed(state.Checkpoints):
    """Checkpoints of a run in which, after a step, a number of a variable becomes another."""

    def __init__(self, folder, learner, step, name, value):
        super().__init__(folder, keep=10)
        self.learner, self.step, self.name, self.value = learner, step, name, value

    def check(self):
        super().check()
        self.step -= 1
        if self.step == 0 and self.name:
            variable = next(each for name, each in state.variables(self.learner).items() if name.endswith(self.name))
            array = keras.ops.convert_to_numpy(variable.value).copy()
            array.flat[-1] = self.value
            variable.assign(array)


FAULTS = ("image", "label", "patches/bias", "fc1_kernel_trace", "head_bias_average", "fc2/kernel")


@pytest.mark.parametrize("faults", (12, pytest.param(100, marks=pytest.mark.slow)))
def test_no_checkpoint_ever_holds_a_number_that_is_not_finite(tmp_path, faults):  # [T6]
    """At any step, in an image, a label, a weight, a trace or a moving average; one model for all, to save time."""
    config, _ = main.parse(["main", "--workdir=unused", *SMALL])
    learner, schedule = main.build_learner(config, main.build_model(config, 10))
    rng, numbers = random.Random(0), np.random.default_rng(0)
    begun = state.capture(learner)
    data = {
        "image": numbers.standard_normal((6, 8, 8, 8, 3)).astype("float32"),
        "label": np.eye(10, dtype="float32")[numbers.integers(0, 10, (6, 8))],
    }

    def trained(checkpoints, every, images, labels):
        """The state after 6 steps, from the newest checkpoint on."""
        start, arrays, _ = checkpoints.latest() or (0, begun, {})
        state.restore(learner, arrays)
        finetune.finetune(
            learner,
            tf.data.Dataset.from_tensor_slices((images, labels)).skip(start),
            [(data["image"][0], data["label"][0])],
            finetune.Run(
                total_steps=6, batch=8, schedule=schedule, journal=callbacks.Silent(), store=lambda: None, start=start,
                checkpoints=checkpoints, checkpoint_every=every,
            ),
        )  # fmt: skip
        return checkpoints.load(6)[0]

    whole = trained(state.Checkpoints(tmp_path / "whole"), 2, *data.values())
    for number in range(faults):
        step, every, value = rng.randint(1, 5), rng.randint(1, 2), rng.choice((math.nan, math.inf, -math.inf))
        place = FAULTS[number % len(FAULTS)]
        bad = {name: array.copy() for name, array in data.items()}
        seen = step
        if place in bad:
            bad[place][step - 1, rng.randrange(8)].flat[rng.randrange(10)] = value
        elif step % every:  # it is not saved then, but found in the next step
            seen += 1
        folder = tmp_path / f"{number}"
        with pytest.raises(errors.NonFiniteError, match=f"^step {seen}: ") as caught:
            trained(Disturbed(folder, learner, step, place not in bad and place, value), every, *bad.values())
        checkpoints = state.Checkpoints(folder, keep=10)
        saved = checkpoints.steps()
        assert saved == list(range(every, seen, every)), (place, step, every)
        last = f"Last good checkpoint: {checkpoints.path(saved[-1])}. " if saved else "There is no checkpoint yet. "
        assert last in str(caught.value)
        assert_all_finite(folder)
        for name, array in trained(checkpoints, every, *data.values()).items():
            assert name.startswith("metrics/") or array.tobytes() == whole[name].tobytes(), name


def assert_all_finite(folder):
    checkpoints = state.Checkpoints(folder)
    for step in checkpoints.steps():
        for name, array in checkpoints.load(step)[0].items():
            assert np.isfinite(array.astype("float64")).all(), (step, name)


# Another run than before


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """{train,test}/<class>/0.png for the classes 0, ..., 8 and nine."""
    folder, numbers = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, name in itertools.product(("train", "test"), (*"012345678", "nine")):
        (folder / split / name).mkdir(parents=True)
        (folder / split / name / "0.png").write_bytes(tf.io.encode_png(numbers.integers(0, 256, (8, 8, 3), np.uint8)).numpy())
    return folder


def test_changed_settings_and_data_are_refused_by_name_and_allowed_by_name(half, whole, pictures, capsys):  # [T7]
    def others(*options):
        return run(half, *(f"--config.{option}" for option in options))

    before = contents(half)
    for options, named in (
        (("batch=16", "seed=1"), "ResumeError: The run was begun with other settings (2): batch: 8 -> 16; seed: 0 -> 1."),
        (("optimizer=adamw",), 'ResumeError: The run was begun with other settings (1): optimizer: "sgd" -> "adamw".'),
        (("model.transformer.dropout_rate=0.2",), "(1): model.transformer.dropout_rate: 0.1 -> 0.2."),
        (("optimizer=adamw", "allow_change=optimizer"), "ResumeError: The saved state is not one of "),
        ((f"dataset={pictures}",), f"DataError: {pictures} (train) is not the data of before: classes only before: '9'; "),
        ((f"dataset={pictures}", "allow_change=data"), f'(1): dataset: "digits" -> "{pictures}".'),
    ):
        assert others(*options) == 1
        assert named in one_error(capsys)
    assert contents(half) == before
    assert others(f"dataset={pictures}", "batch=16", "seed=1", "allow_change=('batch','seed','dataset','data')") == 0
    assert last_step(half) == 6 and weights(half) != weights(whole)


def test_another_version_of_a_package_is_refused_and_allowed_by_name(half, whole, capsys):  # [T7]
    checkpoints = state.Checkpoints(half / "checkpoints")
    arrays, about = checkpoints.load(4)
    shutil.rmtree(checkpoints.path(4))
    about["version"]["keras"] = "3.0.0"
    checkpoints.save(4, arrays, about, background=False)
    assert run(half) == 1
    assert f'(1): version.keras: "3.0.0" -> "{keras.version()}". Go on with those,' in one_error(capsys)
    assert_ends_like(half, whole, "--config.allow_change=version.keras")


# Folders


def test_a_moved_folder_goes_on_although_the_clock_went_back(half, whole, tmp_path, monkeypatch):  # [T9]
    then = time.time() - 10 * 365 * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: then)
    assert_ends_like(half.rename(tmp_path / "moved"), whole)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, monkeypatch, capsys):  # [T9]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("in the way")
    assert run(tmp_path / "run") == 1
    assert re.match(rf"CacheError: {tmp_path}/run/checkpoints: expected a folder to write checkpoints to", one_error(capsys))
    (tmp_path / "run/checkpoints").unlink()

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert run(tmp_path / "run") == 1
    assert "to write checkpoints to, got: Read-only file system. Nothing was trained" in one_error(capsys)
    assert not (tmp_path / "run/metrics.jsonl").exists()
