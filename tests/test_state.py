"""The whole state of a run, against kills, damage, full disks and changed settings. Runs on TensorFlow and, in part, on JAX.

The names in brackets are the rows of the list of faults that these tests are made from.
"""

import contextlib
import errno
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers

from keras_vit import errors
from keras_vit.training import state

ON_JAX = keras.config.backend() == "jax"
X = np.random.default_rng(0).standard_normal((24, 6)).astype("float32")
Y = X[:, :3] ** 2
ABOUT = {"config": {"batch": 4}, "classes": ["a", "b"]}


def run_here(test, backend, **environment):
    """Runs tests of this file, those whose names contain `test`, in another process."""
    child = f"""
import os, sys
if {backend!r} == "tensorflow":
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import pytest
sys.exit(pytest.main(["-q", "-x", {__file__!r}, "-k", {test!r}, "-m", ""]))
"""
    environment = {**os.environ, "KERAS_BACKEND": backend, **environment, "KERAS_VIT_CHILD": "1"}
    done = subprocess.run([sys.executable, "-c", child], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, (
        done.stdout[-3000:] + done.stderr[-2000:]
    )


def model_with_everything():
    """Dropout in a nested model, batch statistics, moving averages, loss scale and metrics; layers have Keras's own names."""
    inner = keras.Sequential([layers.Dense(8), layers.Dropout(0.3), layers.BatchNormalization()])
    x = keras.Input((6,))
    model = keras.Model(x, layers.Dense(3)(layers.Dropout(0.2)(inner(x))))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01, use_ema=True), dynamic_growth_steps=2)
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


class Captured(keras.callbacks.Callback):
    """The state after every step."""

    def __init__(self):
        super().__init__()
        self.states = []

    def on_train_batch_end(self, batch, logs=None):
        self.states.append(state.capture(self._model))  # not `self.model`, which would sync a JAX model


def trained(model, start, stop):
    """States after the steps from `start` to `stop`, with which the model is left."""
    captured = Captured()
    model.fit(X[4 * start : 4 * stop], Y[4 * start : 4 * stop], batch_size=4, shuffle=False, verbose=0, callbacks=[captured])
    return captured.states


def assert_same(first, second):
    assert list(first) == list(second)
    for name, array in first.items():
        assert (array.dtype, array.shape, array.tobytes()) == (second[name].dtype, second[name].shape, second[name].tobytes()), (
            name
        )


def without_metrics(arrays):
    return {name: array for name, array in arrays.items() if not name.startswith("metrics/")}


def check_resumed_run(make, folder):
    """[T2] A model made anew and given the state of step 3 goes through the states of the run that did not stop."""
    whole = trained(make(), 0, 6)
    groups = {name.partition("/")[0] for name in whole[2]}
    assert groups == {"trainable", "non_trainable", "optimizer", "metrics"}
    for part in ("seed_generator_state", "average", "velocity", "iteration", "dynamic_scale", "moving_mean", "loss/total"):
        found = [name for name in whole[2] if part in name]
        assert found, part
        assert any(whole[2][name].tobytes() != whole[4][name].tobytes() for name in found), part
    checkpoints = state.Checkpoints(folder)
    checkpoints.save(3, whole[2], ABOUT)
    checkpoints.wait()
    step, arrays, about = state.Checkpoints(folder).latest()
    assert (step, about) == (3, ABOUT)
    assert_same(arrays, whole[2])
    keras.Sequential([layers.Dropout(0.1), layers.Dense(2)]).build((1, 4))  # moves the numbers in the names that Keras gives
    model = make()
    state.restore(model, arrays)
    rest = trained(model, 3, 6)
    for got, expected in zip(rest, whole[3:]):
        assert_same(without_metrics(got), without_metrics(expected))
    assert_same(arrays, whole[2])  # what was captured and what was restored is not in the hands of the steps after
    assert_same(state.Checkpoints(folder).latest()[1], whole[2])


def test_resumed_run_goes_through_the_same_states(tmp_path):
    check_resumed_run(model_with_everything, tmp_path)


@pytest.mark.skipif("KERAS_VIT_CHILD" not in os.environ or ON_JAX, reason="needs a process with two logical devices")
def test_mirrored_resumed_run_goes_through_the_same_states(tmp_path):
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2

    def make():
        with strategy.scope():
            model = model_with_everything()
            model.compile(keras.optimizers.Adam(0.01, use_ema=True), "mse")
        return model

    whole = trained(make(), 0, 6)
    model = make()
    state.restore(model, whole[2])
    assert_same(without_metrics(state.capture(model)), without_metrics(whole[2]))
    replicas = model.trainable_variables[0].value.values
    assert len(replicas) == 2
    assert replicas[0].numpy().tobytes() == replicas[1].numpy().tobytes() == whole[2]["trainable/0000/dense/kernel"].tobytes()
    for got, expected in zip(trained(model, 3, 6), whole[3:]):
        assert_same(without_metrics(got), without_metrics(expected))


def test_mirrored_run_is_resumed_on_two_logical_devices():
    if ON_JAX:
        pytest.skip("this is the JAX process")
    run_here("mirrored_resumed_run", "tensorflow")


def test_state_tests_pass_on_jax_with_eight_devices():
    if ON_JAX:
        pytest.skip("this is the JAX process")
    tests = "resumed_run_goes_through_the_same_states and not mirrored or sharded_state_comes or lists_what_differs"
    run_here(tests, "jax", XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8")


def test_a_model_without_weights_is_refused():
    with pytest.raises(errors.ArgumentError, match="no weights yet"):
        state.capture(keras.Sequential([layers.Dense(3)]))


def test_restore_lists_what_differs_and_changes_nothing():
    model = model_with_everything()
    before = state.capture(model)
    arrays = {name: np.ones_like(array) for name, array in before.items()}
    kernel, bias, *_ = arrays
    del arrays[bias]
    arrays[kernel] = np.ones((8, 6), np.float32)
    arrays["optimizer/0002/step_counter"] = np.ones((), np.float64)
    arrays["trainable/9999/new"] = np.ones(3, np.float32)
    with pytest.raises(errors.ResumeError) as caught:
        state.restore(model, arrays)
    message = str(caught.value)
    assert f"lacking (1): {bias} (sequential" in message
    assert "surplus (1): trainable/9999/new" in message
    assert f"{kernel}: expected float32 (6, 8), got float32 (8, 6)" in message
    assert "step_counter: expected int" in message and "got float64 ()" in message
    assert_same(state.capture(model), before)


# Files


def plain(step, size=300):
    """A state of every dtype, whose bits include every kind of NaN and follow from the step alone."""
    rng = np.random.default_rng(step)
    dtypes = ("bool", "uint8", "int8", "uint32", "int32", "int64", "float16", ml_dtypes.bfloat16, "float32", "float64")
    arrays = {
        f"group/{i:04}/{np.dtype(dtype)}": rng.integers(
            0, 2 if dtype == "bool" else 256, size * np.dtype(dtype).itemsize, np.uint8
        )
        .view(dtype)
        .reshape(3, -1)
        for i, dtype in enumerate(dtypes)
    }
    return {**arrays, "scalar": np.float32(step).reshape(()), "empty": np.empty((0, 4), np.float16)}


def saved(folder, *steps, **options):
    checkpoints = state.Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, plain(step), {**ABOUT, "examples": 4 * step})
    checkpoints.wait()
    return checkpoints


def test_every_dtype_and_every_bit_comes_back(tmp_path):
    saved(tmp_path / "a", 5)
    step, arrays, about = state.Checkpoints(tmp_path / "a").latest()
    assert (step, about) == (5, {**ABOUT, "examples": 20})
    assert_same(arrays, plain(5))


def test_the_format_is_the_public_one(tmp_path):
    """A reader written from the format's description alone: 8 bytes of length, a JSON header, the numbers."""
    data = (saved(tmp_path, 5).path(5) / "state.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert header["group/0007/bfloat16"]["dtype"] == "BF16"
    for name, array in plain(5).items():
        begin, end = header[name]["data_offsets"]
        assert (header[name]["shape"], numbers[begin:end]) == (list(array.shape), array.tobytes())
    assert (8 + length) % 8 == 0


def test_arrays_in_another_order_of_memory_are_saved_by_value(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    checkpoints = state.Checkpoints(tmp_path)
    checkpoints.save(1, {"transposed": array.T, "strided": array[::2, ::3]}, {}, background=False)
    arrays, _ = checkpoints.load(1)
    np.testing.assert_array_equal(arrays["transposed"], array.T)
    np.testing.assert_array_equal(arrays["strided"], array[::2, ::3])


def test_nothing_saved_is_none(tmp_path):
    assert state.Checkpoints(tmp_path / "absent").latest() is None
    (tmp_path / ".writing_00000003").mkdir()
    assert state.Checkpoints(tmp_path).latest() is None


def test_arguments_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(errors.ArgumentError, match="at least 2"):
        state.Checkpoints(tmp_path, keep=1)
    with pytest.raises(errors.ArgumentError, match="'ignore'"):
        state.Checkpoints(tmp_path, on_error="ignore")
    checkpoints = state.Checkpoints(tmp_path)
    for arrays, about in (({"a": np.array(["text"])}, {}), ({"a": np.zeros(2, ">f4")}, {}), (plain(0), {"object": object()})):
        with pytest.raises(errors.ArgumentError, match=r"step_00000001: (a is of dtype|about cannot be)"):
            checkpoints.save(1, arrays, about)
    assert not list(tmp_path.iterdir())
    checkpoints.save(1, plain(1), {})
    with pytest.raises(errors.ArgumentError, match="step 1 is saved already"):
        checkpoints.save(1, plain(1), {})


def test_older_ones_than_the_kept_are_removed_and_damaged_ones_do_not_count(tmp_path, caplog):
    checkpoints = saved(tmp_path, 1, 2, 3, 10, keep=3)
    assert checkpoints.steps() == [2, 3, 10]
    (checkpoints.path(10) / "manifest.json").unlink()
    saved(tmp_path, 100_000_000, keep=2)  # a new process, which has verified nothing
    assert state.Checkpoints(tmp_path).steps() == [3, 10, 100_000_000]
    assert "manifest.json is missing" in caplog.text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_order_is_that_of_steps_whatever_the_clock_says(tmp_path, monkeypatch):  # [T9]
    for step, now in ((1, 2e9), (2, 1e9), (3, 0)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        monkeypatch.setattr(time, "gmtime", lambda now=now, gmtime=time.gmtime: gmtime(now))
        os.utime(saved(tmp_path, step).path(step), (now, now))
    assert state.Checkpoints(tmp_path).latest()[0] == 3
    assert state.Checkpoints(tmp_path).steps() == [2, 3]


def test_a_moved_folder_works(tmp_path):  # [T9]
    with state.lock(tmp_path / "a"):
        saved(tmp_path / "a" / "checkpoints", 1, 2)
    (tmp_path / "a").rename(tmp_path / "b")
    with state.lock(tmp_path / "b"):
        assert state.Checkpoints(tmp_path / "b" / "checkpoints").latest()[0] == 2


# Damage


def test_every_flipped_bit_and_every_cut_is_seen(tmp_path):  # [T4]
    checkpoints = state.Checkpoints(tmp_path)
    arrays = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.int32)}
    checkpoints.save(1, arrays, ABOUT, background=False)
    rng = random.Random(0)
    for name in ("state.safetensors", "manifest.json"):
        path = checkpoints.path(1) / name
        whole = path.read_bytes()
        for at in range(len(whole)):
            mutant = bytearray(whole)
            mutant[at] ^= 1 << rng.randrange(8)
            path.write_bytes(mutant)
            with pytest.raises(errors.ResumeError, match="step_00000001.*use another"):
                checkpoints.load(1)
        for mutant in (*(whole[:end] for end in range(0, len(whole), 7)), whole + b"\0", whole[:8] + whole[16:]):
            path.write_bytes(mutant)
            with pytest.raises(errors.ResumeError, match="step_00000001.*use another"):
                checkpoints.load(1)
        path.write_bytes(whole)
        assert_same(checkpoints.load(1)[0], arrays)


DAMAGE = {
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "flipped in the middle": lambda path: path.write_bytes(
        path.read_bytes().replace(b"\x00", b"\x01", 1).replace(b"step", b"stEp", 1)
    ),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": pathlib.Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("file", ("state.safetensors", "manifest.json"))
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_gives_way_to_the_one_before_and_says_so(tmp_path, caplog, file, damage):  # [T4]
    checkpoints = saved(tmp_path, 7, 8)
    DAMAGE[damage](checkpoints.path(8) / file)
    step, arrays, _ = state.Checkpoints(tmp_path).latest()
    assert step == 7
    assert_same(arrays, plain(7))
    assert file in caplog.text and "step_00000008" in caplog.text and "It is now step_00000008.corrupt" in caplog.text
    assert state.Checkpoints(tmp_path).steps() == [7]
    again = saved(tmp_path, 8)  # the run comes to that step again
    DAMAGE[damage](again.path(8) / file)
    assert again.latest()[0] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000007",
        "step_00000008.corrupt",
        "step_00000008.corrupt1",
    ]


def test_a_checkpoint_of_another_step_or_emptied_folder_is_damaged(tmp_path):
    checkpoints = saved(tmp_path, 7, 8)
    shutil.copytree(checkpoints.path(7), checkpoints.path(9))
    checkpoints.path(10).mkdir()
    assert checkpoints.latest()[0] == 8
    assert checkpoints.steps() == [7, 8]


def test_if_none_is_intact_a_run_never_starts_from_zero(tmp_path):  # [T4]
    checkpoints = saved(tmp_path, 7, 8)
    for step in (7, 8):
        (checkpoints.path(step) / "state.safetensors").unlink()
    for _ in range(2):  # also when they lie aside already
        with pytest.raises(
            errors.ResumeError, match=r"none of its checkpoints is intact \(step_00000007.corrupt; step_00000008.corrupt\)"
        ):
            state.Checkpoints(tmp_path).latest()


def test_a_newer_format_is_refused_and_left_alone(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(state, "FORMAT", 2)
        saved(tmp_path, 7)
    with pytest.raises(errors.ResumeError, match="of format 2, this version of keras_vit reads 1"):
        state.Checkpoints(tmp_path).latest()
    assert state.Checkpoints(tmp_path).steps() == [7]


def test_what_cannot_be_read_for_want_of_rights_is_not_called_damaged(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 7)

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "read_bytes", refused)
    with pytest.raises(errors.CacheError, match="step_00000007: cannot be read"):
        checkpoints.latest()
    assert checkpoints.steps() == [7]


# Saves that fail


@contextlib.contextmanager
def no_file_larger_than(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_disk_that_fills_up_during_a_save_leaves_the_older_and_names_the_bytes(tmp_path):  # [T5]
    checkpoints = saved(tmp_path, 1, 2)
    with no_file_larger_than(5000):
        checkpoints.save(3, plain(3), ABOUT)
        with pytest.raises(
            errors.CacheError, match=r"step_00000003: a checkpoint of 1\d,\d{3} bytes could not be written: File too large"
        ):
            checkpoints.wait()
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert state.Checkpoints(tmp_path).latest()[0] == 2
    checkpoints.save(3, plain(3), ABOUT)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]


def test_a_disk_without_room_is_seen_before_writing(tmp_path, monkeypatch):  # [T5]
    checkpoints = saved(tmp_path, 1, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(errors.CacheError, match=r"checkpoint of \d+,\d{3} bytes could not be written: only 1,000 bytes are free"):
        checkpoints.save(3, plain(3), ABOUT)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_a_run_told_to_continue_goes_on_without_the_save_that_failed(tmp_path, caplog):  # [T5]
    checkpoints = saved(tmp_path, 1, 2, on_error="continue")
    with no_file_larger_than(5000):
        checkpoints.save(3, plain(3), ABOUT)
        checkpoints.wait()
    assert "Training goes on without it" in caplog.text and "bytes could not be written" in caplog.text
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(4, plain(4), ABOUT)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]


@pytest.mark.parametrize("then", ("check", "wait", "save"))
@pytest.mark.parametrize("fault", (OSError(errno.EIO, "Input/output error"), ValueError("a bug")), ids=("disk", "bug"))
@pytest.mark.parametrize("where", ("replace", "fsync"))
def test_a_save_that_fails_in_the_background_raises_in_the_next_call(tmp_path, monkeypatch, then, fault, where):  # [T12]
    checkpoints = saved(tmp_path, 1, 2)

    def failing(*args):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(os, where, failing)
        checkpoints.save(3, plain(3), ABOUT)
        while not checkpoints._saving.done():
            time.sleep(0.001)
    assert checkpoints.steps() == [1, 2]
    expected, match = (errors.CacheError, "step_00000003.*Input/output") if isinstance(fault, OSError) else (ValueError, "a bug")
    with pytest.raises(expected, match=match):
        checkpoints.save(4, plain(4), ABOUT) if then == "save" else getattr(checkpoints, then)()
    checkpoints.check()  # it is raised once
    checkpoints.save(4, plain(4), ABOUT)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_training_goes_on_while_a_save_is_written_and_the_next_save_waits(tmp_path, monkeypatch):
    gate, order = threading.Event(), []
    write = state._write_arrays

    def slow(path, arrays):
        assert gate.wait(10)
        order.append(path.parent.name)
        return write(path, arrays)

    monkeypatch.setattr(state, "_write_arrays", slow)
    checkpoints = state.Checkpoints(tmp_path)
    checkpoints.save(1, plain(1), ABOUT)
    checkpoints.check()
    assert not checkpoints.steps() and not order  # back before it was written
    second = threading.Thread(target=checkpoints.save, args=(2, plain(2), ABOUT))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    gate.set()
    second.join()
    checkpoints.wait()
    assert order == [".writing_00000001", ".writing_00000002"]
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize(
    "fault", (OSError(errno.EROFS, "Read-only file system"), PermissionError(errno.EACCES, "Permission denied"))
)
def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch, fault):  # [T9]
    def refused(*args, **kwargs):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(state.tempfile, "TemporaryFile", refused)
        with pytest.raises(errors.CacheError, match=f"{tmp_path}.*{fault.strerror}"):
            state.Checkpoints(tmp_path).check_writable()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(errors.CacheError, match="expected a folder to write checkpoints to"):
        state.Checkpoints(tmp_path / "file" / "checkpoints").check_writable()
    with pytest.raises(errors.CacheError, match="cannot be locked"), state.lock(tmp_path / "file"):
        raise AssertionError("it was locked")
    if os.getuid():
        os.chmod(tmp_path, 0o555)
        with pytest.raises(errors.CacheError, match="expected a folder to write checkpoints to"):
            state.Checkpoints(tmp_path).check_writable()
        os.chmod(tmp_path, 0o755)


def test_what_killed_saves_left_is_removed_at_the_next_start(tmp_path):
    checkpoints = saved(tmp_path, 1)
    for name in (".writing_00000002", ".removing_00000000"):
        shutil.copytree(checkpoints.path(1), tmp_path / name)
    state.Checkpoints(tmp_path).check_writable()
    assert names(tmp_path) == ["step_00000001"]


# Kills

NURSERY = """
import os, signal, sys, time
import numpy as np
from keras_vit.training import state

def save(folder, step):
    checkpoints, step = state.Checkpoints(folder), int(step)
    checkpoints.check_writable()
    while True:
        step += 1
        checkpoints.save(step, {"a": np.full(200_000, step), "b": np.full((3, 50_000), step, np.float32)}, {"step": step})
        checkpoints.wait()
        print("saved", step, flush=True)

def lock(folder):
    with state.lock(folder):
        print("locked", flush=True)
        time.sleep(60)

def preempted(pid, interrupt):
    if pid == "1":
        os.getpid = lambda: 1  # as in a container
    signal.signal(signal.SIGINT, signal.SIG_IGN if interrupt == "ignored" else signal.default_int_handler)
    with state.Preemption() as preemption:
        print("ready", flush=True)
        while not preemption.requested:
            time.sleep(0.001)
        print("saving", flush=True)
        time.sleep(60)

for line in sys.stdin:  # forks: an import for each would take seconds
    name, *arguments = line.split()
    child = os.fork()
    if not child:
        print("began", os.getpid(), flush=True)
        globals()[name](*arguments)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """A process that forks children which do one of the functions in NURSERY, one after the other."""

    def __init__(self):
        environment = {**os.environ, "KERAS_BACKEND": "numpy"}
        command = [sys.executable, "-c", NURSERY]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)

    def begin(self, *words):
        """Has a child do something; returns its pid."""
        print(*words, file=self.process.stdin, flush=True)
        return int(self.told("began"))

    def told(self, word):
        """What follows the word in the next line."""
        got, *rest = self.process.stdout.readline().split()
        assert got == word, (got, rest)
        return rest[0] if rest else None


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    with nursery.process:
        yield nursery
        os.killpg(nursery.process.pid, signal.SIGKILL)  # with a child that a failed test has left


def storm(nursery, folder, kills):
    """Kills a process that only saves, again and again, and checks what is there after each kill; returns kinds of names seen."""
    rng, seen, acknowledged = random.Random(0), set(), 0
    for _ in range(kills):
        child = nursery.begin("save", folder, acknowledged)
        threading.Timer(rng.uniform(0, 0.15), os.kill, (child, signal.SIGKILL)).start()
        while (line := nursery.process.stdout.readline().split())[0] == "saved":
            acknowledged = int(line[1])
        assert line == ["ended", "-9"]
        seen |= {path.name.partition("_")[0] for path in folder.iterdir()}
        acknowledged = check_after_kill(folder, acknowledged)
    return seen


def check_after_kill(folder, acknowledged):
    checkpoints = state.Checkpoints(folder)
    found = checkpoints.latest()
    if not acknowledged and not found:
        return 0
    step, arrays, about = found
    assert step >= acknowledged
    assert about == {"step": step} and (arrays["a"] == step).all() and (arrays["b"] == step).all()
    for each in checkpoints.steps():
        checkpoints.load(each)
    assert len(checkpoints.steps()) >= min(2, acknowledged)
    return step


@pytest.mark.parametrize("kills", (3, pytest.param(50, marks=pytest.mark.slow)))
def test_a_kill_at_any_instant_loses_no_acknowledged_save(nursery, tmp_path, kills):  # [T1]
    seen = storm(nursery, tmp_path, kills)
    assert "step" in seen
    if kills == 50:
        assert ".writing" in seen  # some kills fell into a save
    state.Checkpoints(tmp_path).check_writable()
    assert all(name.startswith("step_") for name in names(tmp_path))


# Runs that go on


CONFIG = {"batch": 512, "pp": {"crop": 224}, "lr_rules": ("a=1",), "progress_every": 10, "optimizer": "sgd"}


def test_described_says_what_json_can_hold():
    import ml_collections

    about = state.described(ml_collections.ConfigDict(CONFIG), data="f00", classes=["a"])
    assert about["config"] == {**CONFIG, "lr_rules": ["a=1"]}
    assert about["version"]["keras"] == keras.version() and about["version"]["backend"] == keras.config.backend()
    assert about == json.loads(json.dumps(about)) == state.described(CONFIG, data="f00", classes=["a"])
    assert about["config_sha256"] != state.described({**CONFIG, "batch": 1})["config_sha256"]


def test_a_changed_setting_data_or_version_is_refused_by_name():  # [T7]
    old = {**state.described(CONFIG, data="f00", classes=["a", "b"]), "examples": 40}
    state.check_config(old, state.described({**CONFIG, "progress_every": 1}, data="f00", classes=("a", "b")))
    new = state.described({**CONFIG, "batch": 256, "pp": {"crop": 384}, "remat": True}, data="f11", classes=["a", "c"])
    new["version"]["keras"] = "9.9"
    with pytest.raises(errors.ResumeError) as caught:
        state.check_config(old, new)
    for change in (
        "batch: 512 -> 256", "pp.crop: 224 -> 384", "remat: not set -> true", f'version.keras: "{keras.version()}" -> "9.9"',
        'data: "f00" -> "f11"', 'classes: ["a", "b"] -> ["a", "c"]', "(6)",
    ):  # fmt: skip
        assert change in str(caught.value)
    with pytest.raises(errors.ResumeError, match=r"\(2\): batch: 512 -> 256; remat"):
        state.check_config(old, new, allow_change=("pp", "version.*", "data", "classes"))
    state.check_config(old, new, allow_change=("pp", "version.*", "data", "classes", "batch", "remat"))


def test_what_never_matters_are_settings_that_exist():
    from keras_vit.configs.common import get_config

    config = get_config()
    known = {*config, "workdir", "config_sha256", "examples", "masked.tokenizer"}  # the last one of configs/mim.py
    assert set(state.NEVER_MATTERS) <= known | {f"distillation.{key}" for key in config.distillation}


def test_a_second_run_is_refused_with_pid_and_host_and_a_dead_one_is_not_in_the_way(nursery, tmp_path):  # [T8]
    first = nursery.begin("lock", tmp_path)
    nursery.told("locked")
    with pytest.raises(errors.ResumeError, match=rf"process {first} on {os.uname().nodename} since 20"), state.lock(tmp_path):
        raise AssertionError("it was locked twice")
    os.kill(first, signal.SIGKILL)
    nursery.told("ended")
    with state.lock(tmp_path):
        with pytest.raises(errors.ResumeError, match=f"process {os.getpid()} on"), state.lock(tmp_path):
            raise AssertionError("it was locked twice")
        (tmp_path / ".lock.json").unlink()
        with pytest.raises(errors.ResumeError, match="not yet said"), state.lock(tmp_path):
            raise AssertionError("it was locked twice")
    with state.lock(tmp_path):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
    assert names(tmp_path) == [".lock"]


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_first_signal_asks_for_a_save_and_handlers_are_put_back(number):  # [T3]
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with state.Preemption() as preemption:
        assert preemption.requested is False
        os.kill(os.getpid(), number)
        assert preemption.requested is True
    assert {each: signal.getsignal(each) for each in before} == before


@pytest.mark.parametrize("pid", ("its own", "1"))
@pytest.mark.parametrize("name", ("SIGTERM", "SIGINT"))
def test_a_second_signal_ends_a_save_that_hangs(nursery, pid, name):  # [T3]
    number = getattr(signal, name)
    child = nursery.begin("preempted", pid.split()[0], "ignored" if name == "SIGTERM" else "heard")
    nursery.told("ready")
    if name == "SIGTERM":
        os.kill(child, signal.SIGINT)  # it was ignored before, and still is
    os.kill(child, number)
    nursery.told("saving")
    os.kill(child, number)
    assert int(nursery.told("ended")) == (128 + number if pid == "1" else -number)


def test_preemption_in_another_thread_says_that_it_hears_nothing(caplog):
    def enter():
        with state.Preemption() as preemption:
            assert not preemption.requested

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in caplog.text and signal.getsignal(signal.SIGTERM) == before


# State that is divided over devices


@pytest.mark.skipif(not ON_JAX, reason="orbax-checkpoint writes arrays of JAX")
def test_sharded_state_comes_back_divided_as_it_was(tmp_path, caplog):
    import jax

    pytest.importorskip("orbax.checkpoint")
    assert len(jax.devices()) == 8
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("batch", "model"))

    def divided(value, *axes):
        return jax.device_put(value, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))

    def arrays(step):
        kernel = np.random.default_rng(step).standard_normal((8, 16)).astype("float32")
        return {
            "trainable/0000/a/kernel": divided(kernel, "batch", "model"),
            "trainable/0001/a/bias": divided(kernel[0].astype(ml_dtypes.bfloat16), "model"),
            "optimizer/0000/iteration": divided(np.int32(step)),
        }

    checkpoints = state.Sharded(tmp_path)
    assert checkpoints.latest(arrays(0)) is None
    checkpoints.check_writable()
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    for step in (1, 2, 3):
        now = arrays(step)
        checkpoints.save(step, now, ABOUT)
        add(now)  # may take the memory of what is being saved
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    step, found, about = state.Sharded(tmp_path).latest(arrays(0))
    assert (step, about) == (3, ABOUT)
    for name, array in arrays(3).items():
        assert found[name].sharding == array.sharding and found[name].dtype == array.dtype
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes()
    with pytest.raises(errors.ResumeError, match=r"surplus \(1\): optimizer/0000/iteration"):
        checkpoints.latest({name: array for name, array in arrays(0).items() if "kernel" in name or "bias" in name})
    files = sorted(path for path in checkpoints.path(3).rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) > 3
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert not checkpoints._verifies(3), path
        path.write_bytes(whole)
    assert checkpoints._verifies(3)
    (checkpoints.path(3) / "manifest.json").unlink()
    assert checkpoints.latest(arrays(0))[0] == 2
    assert "step_00000003.corrupt" in caplog.text


@pytest.mark.skipif(ON_JAX, reason="it is for JAX")
def test_sharded_state_of_another_backend_is_refused(tmp_path):
    with pytest.raises(errors.ArgumentError, match="it is for JAX, not for tensorflow; use Checkpoints"):
        state.Sharded(tmp_path)


def test_missing_orbax_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(errors.ArgumentError, match=r"pip install 'keras_vit\[sharded\]'"):
        state.Sharded(tmp_path)


TWO = """
import logging, os, sys
import jax, numpy as np
folder, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, process)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from keras_vit.training import state

assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
placed = NamedSharding(Mesh(np.array(jax.devices()), ("model",)), PartitionSpec("model"))

def arrays(step):
    value = np.arange(32, dtype=np.float32).reshape(8, 4) + step
    return {"trainable/0000/kernel": jax.make_array_from_callback(value.shape, placed, lambda index: value[index])}

def check(found, step):
    array, expected = found["trainable/0000/kernel"], np.arange(32, dtype=np.float32).reshape(8, 4) + step
    assert array.sharding == placed and not array.is_fully_addressable
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])

checkpoints = state.Sharded(folder)
assert checkpoints.latest(arrays(0)) is None
if process == 0:
    checkpoints.check_writable()
total = jax.jit(lambda x: x.sum())
for step in (1, 2, 3):
    checkpoints.save(step, arrays(step), {"step": step})
    for _ in range(20):
        total(arrays(step)["trainable/0000/kernel"]).block_until_ready()  # steps with collectives, meanwhile
checkpoints.wait()
step, found, about = checkpoints.latest(arrays(0))
assert (step, about) == (3, {"step": 3}), (step, about)
check(found, 3)
if process == 0:
    os.truncate(checkpoints.path(3) / "manifest.json", 10)
step, found, about = checkpoints.latest(arrays(0))
assert (step, about, checkpoints.steps()) == (2, {"step": 2}, [2])
check(found, 2)
if process == 0:
    os.unlink(checkpoints.path(2) / "manifest.json")
try:
    checkpoints.latest(arrays(0))
except state.errors.ResumeError as error:
    print("refused:", error)
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_their_shards_of_one_state(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, tmp_path, str(port), str(process)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    told = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], [text[-2000:] for pair in told for text in pair]
    assert "none of its checkpoints is intact" in told[0][0] and "first process found no checkpoint" in told[1][0]
