"""What a run reports while it trains: lines, `metrics.jsonl`, TensorBoard events read back, profiles."""

import io
import math
import os
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_vit.data.pixels import Pixels
from keras_vit.errors import ConfigError, DataError
from keras_vit.training import callbacks, metrics
from keras_vit.training.callbacks import Every, Journal, Profile, Progress
from keras_vit.training.metrics import Metrics
from keras_vit.training.step import Learner


def drive(callback, steps, **logs):
    """Calls a callback as `fit` does, for steps with a falling loss; returns the model it sees."""
    model = types.SimpleNamespace(stop_training=False)
    callback.set_model(model)
    callback.on_train_begin()
    for i in range(steps):
        callback.on_train_batch_begin(i)
        callback.on_train_batch_end(i, {"step_loss": 1 / (callback.step + 1), "grad_norm": 2.0, "loss": math.nan, **logs})
    callback.on_train_end()
    return model


def events(folder):
    """Events of all event files of a folder, oldest first."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        yield from tf.compat.v1.train.summary_iterator(str(path))


def scalars(folder):
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "scalars":
                found.setdefault(value.tag, []).append((event.step, float(tf.make_ndarray(value.tensor))))
    return found


def without_seconds(path):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in metrics.read(path)]


# metrics.jsonl


def test_numbers_read_back_to_the_same_bits(tmp_path):
    loss = np.float32(1) / np.float32(3)
    with Metrics(tmp_path / "metrics.jsonl") as written:
        written.write(1, loss=loss, lr=0.1 + 0.2, grad_norm=5e-324, images=7)
        written.write(np.int64(2), loss=math.nan, grad_norm=math.inf)
        assert len(metrics.read(tmp_path / "metrics.jsonl")) == 2  # before it is closed
    first, second = metrics.read(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, "loss": loss, "loss_hex": float(loss).hex(), "lr": 0.1 + 0.2, "grad_norm": 5e-324, "images": 7}
    assert second == {"step": 2, "loss": None, "loss_hex": "nan", "grad_norm": None}


def write_steps(path, start, end):
    with Metrics(path, start) as written:
        for step in range(start + 1, end + 1):
            written.write(step, loss=1 / step, seconds=written.seconds + step)
            if step % 2 == 0:
                written.write(step, accuracy_test=0.5)
        return written.seconds


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "lo', b'{"step": 6}', b"\0" * 50, b"\xff\n"])
def test_a_resumed_file_equals_that_of_a_run_that_never_stopped(tmp_path, torn):
    write_steps(tmp_path / "whole", 0, 8)
    write_steps(tmp_path / "resumed", 0, 5)
    with open(tmp_path / "resumed", "ab") as file:
        file.write(torn)  # by kill -9
    assert len(metrics.read(tmp_path / "resumed")) == 7
    assert write_steps(tmp_path / "resumed", 4, 8) == 4.0  # the seconds before
    assert without_seconds(tmp_path / "resumed") == without_seconds(tmp_path / "whole")
    write_steps(tmp_path / "resumed", 0, 8)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "whole"]


def test_an_evaluation_that_is_repeated_after_a_resume_is_written_once(tmp_path):
    for start in (0, 4):
        with Metrics(tmp_path / "metrics.jsonl", start) as written:
            if start == 0:
                written.write(4, loss=0.5)
            written.write(4, accuracy_test=0.5)
            if start:
                written.write(4, accuracy_train=0.6)
            written.write(5, accuracy_test=0.7)
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert [sorted(set(record) - {"loss_hex", "step"}) for record in records] == [
        ["loss"], ["accuracy_test"], ["accuracy_train"], ["accuracy_test"],
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1.0}', '{"step": 1.5}'])
def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_cut(tmp_path, line):
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match="metrics.jsonl, line 2: expected a JSON object"):
        Metrics(tmp_path / "metrics.jsonl", 3)
    assert (tmp_path / "metrics.jsonl").read_text() == text


# The loop


def test_lines_scalars_and_metrics_count_steps_of_the_run(tmp_path, capsys):
    with Journal(tmp_path) as journal, Metrics(tmp_path / "metrics.jsonl") as written:
        progress = Progress(journal, 7, 8, lambda step: 0.1 * step, every=3, metrics=written)
        assert drive(progress, 7).stop_training
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
    assert "42.9%  loss 0.6111  lr 0.2" in lines[0] and "img/s/core" in lines[0] and "0:00 left" in lines[2]
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert [(each["step"], each["loss"], each["lr"]) for each in records] == [(i, 1 / i, 0.1 * (i - 1)) for i in range(1, 8)]
    seconds = [each["seconds"] for each in records]
    assert seconds == sorted(seconds) and seconds[-1] == progress.seconds
    found = scalars(tmp_path)
    assert set(found) == {"train_loss", "lr", "grad_norm", "img_sec_core_train"}
    assert found["train_loss"] == [
        (3, pytest.approx(11 / 18)),
        (6, pytest.approx((1 / 4 + 1 / 5 + 1 / 6) / 3)),
        (7, pytest.approx(1 / 7)),
    ]
    assert found["lr"][-1] == (7, pytest.approx(0.6))


def test_a_run_that_resumes_counts_on_and_tensorboard_is_told_to_drop_later_steps(tmp_path, capsys):
    for start, end in ((0, 6), (4, 8)):
        with Journal(tmp_path, start) as journal, Metrics(tmp_path / "metrics.jsonl", start) as written:
            progress = Progress(journal, 8, 2, lambda step: 0.1, every=2, metrics=written, start=start)
            drive(progress, end - start)
        assert progress.model.stop_training == (end == 8)
    assert "step 6/8 75.0%" in capsys.readouterr().out.split("First")[-1]
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert [each["step"] for each in records] == list(range(1, 9))
    assert records[4]["seconds"] > records[3]["seconds"]
    starts = [event for event in events(tmp_path) if event.HasField("session_log")]
    assert [event.step for event in starts] == [1, 5]  # the second is what TensorBoard drops by
    assert all(event.session_log.status == tf.compat.v1.SessionLog.START for event in starts)
    assert [step for step, _ in scalars(tmp_path)["lr"]] == [2, 4, 6, 6, 8]


def test_a_run_of_one_step_has_its_line(tmp_path, capsys):
    with Journal(tmp_path) as journal:
        assert drive(Progress(journal, 1, 2, lambda step: 0.1, every=0), 1).stop_training
    assert "step 1/1 100.0%  loss 1.0000  lr 0.1\n" in capsys.readouterr().out
    assert set(scalars(tmp_path)) == {"train_loss", "lr", "grad_norm"}  # no speed of a step that compiles


@pytest.mark.parametrize(
    "steps,start,stride,expected", [(3, 0, 1, [3, 6, 9]), (3, 4, 1, [6, 9]), (3, 0, 2, [4, 6, 10]), (0, 0, 1, [])]
)
def test_actions_come_when_a_multiple_is_reached_or_passed(steps, start, stride, expected):
    called = []
    drive(Every(steps, called.append, start=start, stride=stride), (10 - start) // stride)
    assert called == expected


LEARNER = f"""
import sys, types
sys.path.insert(0, {os.path.dirname(__file__)!r})
import pathlib
import test_callbacks
test_callbacks.fit(pathlib.Path(sys.argv[1]))
"""


def fit(folder):
    """Five steps of a small Learner, of which the second and third are profiled."""
    inputs = keras.Input((4,))
    learner = Learner(inputs, keras.layers.Dense(3)(inputs))
    learner.compile(keras.optimizers.SGD(0.1), keras.losses.CategoricalCrossentropy(from_logits=True))
    batches = tf.data.Dataset.from_tensors((np.ones((2, 4), np.float32), np.eye(3, dtype=np.float32)[:2])).repeat()
    with Journal(folder) as journal, Metrics(folder / "metrics.jsonl") as written:
        progress = Progress(journal, 5, 2, lambda step: 0.1, every=2, metrics=written)
        profile = Profile(journal, *callbacks.profile_steps("2,3", 5))
        learner.fit(batches, steps_per_epoch=5, shuffle=False, verbose=0, callbacks=[progress, profile])


def check_fit(folder):
    losses = [record["loss"] for record in metrics.read(folder / "metrics.jsonl")]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True) and losses[0] > losses[4]
    (trace,) = (folder / "plugins/profile").glob("*/*.xplane.pb")
    assert b"train" in trace.read_bytes()  # the name of a step
    assert "Profile of steps 2 to 3" in (folder / "train.log").read_text()


def test_a_learner_is_recorded_step_by_step_and_profiled(tmp_path):
    fit(tmp_path)
    check_fit(tmp_path)


def test_a_learner_is_recorded_and_profiled_on_jax(tmp_path):
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run([sys.executable, "-c", LEARNER, tmp_path], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check_fit(tmp_path)


# Profiles


@pytest.mark.parametrize("text", ["10", "3,2", "0,4", "2,9", "a,b", "1,2,3"])
def test_steps_that_the_run_has_not_cannot_be_profiled(text):
    with pytest.raises(ConfigError, match=f"FIRST,LAST.*total_steps=8.*got '{text}'"):
        callbacks.profile_steps(text, 8)
    assert callbacks.profile_steps("2,8", 8) == (2, 8)
    assert callbacks.profile_steps("", 8) is None


def test_a_profiler_that_is_in_use_is_an_error_before_training(tmp_path):
    start, stop, _ = callbacks._profiler()
    start(str(tmp_path))
    try:
        with pytest.raises(ConfigError, match="does not start .*leave config.profile out"):
            callbacks.profile_steps("1,2", 8)
    finally:
        stop()


def test_a_run_that_resumes_in_or_after_the_profile_says_that_there_is_none(tmp_path, capsys):
    with Journal(tmp_path) as journal:
        drive(Profile(journal, 2, 5, start=2), 5)
    assert "Steps 2 to 5 are not profiled: the run resumes after step 2." in capsys.readouterr().out
    assert not (tmp_path / "plugins").exists()


# TensorBoard images


def test_augmented_images_come_back_as_people_see_them(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    pixels = Pixels(mean=(120.0, 110.0, 100.0), std=(60.0, 61.0, 62.0))
    normal = pixels.normalize(images)
    normal[0, 0, 0] = (9.0, -9.0, 0.0)  # noise may leave the range
    with Journal(tmp_path) as journal:
        journal.images(0, callbacks.viewable(normal, pixels))
    (value,) = [value for event in events(tmp_path) for value in event.summary.value]
    assert value.tag == "training_batch" and value.metadata.plugin_data.plugin_name == "images"
    width, height, *encoded = tf.make_ndarray(value.tensor)
    assert (width, height) == (b"7", b"5")
    images[0, 0, 0] = (255, 0, 100)
    np.testing.assert_array_equal([tf.io.decode_png(each) for each in encoded], images)


# The screen


@pytest.fixture
def screen(monkeypatch):
    """Puts a file in the place of the standard output."""

    def put(file):
        monkeypatch.setattr(sys, "stdout", file)
        return file

    return put


def test_a_live_line_on_a_terminal_replaces_the_one_before_and_keeps_to_its_width(tmp_path, screen, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    master, slave = os.openpty()
    with screen(os.fdopen(slave, "w")), Journal(tmp_path) as journal:
        journal.line("a" * 50, live=True)
        journal.line("b", live=True)
        journal.line("c")
        shown = ""
        while "c\r\n" not in shown:  # a terminal hands over what it has so far
            shown += os.read(master, 1000).decode()
    os.close(master)
    assert shown == "a" * 19 + "\r\033[Kb\r\033[Kc\r\n"
    assert "a" * 50 in (tmp_path / "train.log").read_text()


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def closed_terminal():
    master, slave = os.openpty()
    file = os.fdopen(slave, "w")
    os.close(master)
    return file


def closed_file():
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("make", [closed_pipe, closed_terminal, closed_file, lambda: None])
def test_a_run_goes_on_when_its_screen_is_gone(tmp_path, screen, make):
    file = screen(make())
    with Journal(tmp_path) as journal:
        journal.line("first", live=True)
        journal.line("second")
        if isinstance(file, io.TextIOWrapper):
            print("other code may print too")
    if file is not None:
        file.close()  # as Python does when it exits
    assert [line.split(": ")[1] for line in (tmp_path / "train.log").read_text().splitlines()] == ["first", "second"]


def test_a_screen_without_the_letters_shows_their_codes(tmp_path, screen):
    file = screen(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with Journal(tmp_path) as journal:
        journal.line("émeu 犬")
    assert file.buffer.getvalue() == b"\\xe9meu \\u72ac\n"
    assert "émeu 犬" in (tmp_path / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("seconds,text", [(0.2, "0:00"), (75.2, "1:15"), (3675, "1:01:15"), (90_000, "25:00:00")])
def test_durations_read_as_clocks(seconds, text):
    assert callbacks.duration(seconds) == text
