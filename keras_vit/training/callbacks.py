"""What a run reports while it trains: a live line, `train.log`, TensorBoard, profiles; and what happens every so many steps."""

import itertools
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf

from keras_vit.errors import ConfigError

_log = logging.getLogger("keras_vit.training")
_numbers = itertools.count()  # of this process's event files

# What `tf.summary.scalar` and `tf.summary.image` write; those need the tensorboard package, which TensorFlow no longer installs.
_SCALAR = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": "scalars"}, data_class="DATA_CLASS_SCALAR")
_IMAGES = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": "images"}, data_class="DATA_CLASS_BLOB_SEQUENCE")


class Journal:
    """A run's `train.log` and TensorBoard events in its folder, and its lines on the screen. A context manager.

    What `keras_vit` logs meanwhile goes to `train.log` too. A terminal that is closed, or a pipe that nobody reads any more, ends
    the lines on the screen, not the run.

    Args:
        folder: exists.
        start: steps made before training begins or resumes here: TensorBoard then drops what earlier files say of later steps.
            None for what is said before or after training; nothing is dropped.
    """

    def __init__(self, folder, start=None):
        self._handler = logging.FileHandler(os.path.join(folder, "train.log"), encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.folder, self._start, self._events, self._live = os.fspath(folder), start, None, False

    def __enter__(self):
        root = logging.getLogger("keras_vit")
        self._level, root.propagate = root.level, False
        root.addHandler(self._handler)
        root.setLevel(logging.INFO)
        return self

    def __exit__(self, *error):
        if self._live:
            _show("\n")
        root = logging.getLogger("keras_vit")
        root.removeHandler(self._handler)
        root.setLevel(self._level)
        root.propagate = True
        self._handler.close()
        if self._events:
            self._events.close()

    def line(self, text, live=False):
        """Logs and prints a line; on a terminal a live one is overwritten by the next, and cut to the terminal's width."""
        _log.info("%s", text)
        live = live and sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
        start = "\r\033[K" if self._live else ""
        _show(start + (text[: shutil.get_terminal_size().columns - 1] if live else f"{text}\n"))
        self._live = live

    def scalars(self, step, **values):
        """Writes scalars for TensorBoard."""
        tensors = {name: tf.make_tensor_proto(float(value), tf.float32) for name, value in values.items()}
        self._add(step, _SCALAR, tensors)

    def images(self, step, images, name="training_batch"):
        """Writes (b, H, W, 3) uint8 images for TensorBoard, side by side under one name."""
        with tf.device("CPU"):
            encoded = [tf.io.encode_png(image).numpy() for image in images]
        size = (str(side).encode() for side in (images.shape[2], images.shape[1]))  # width, height
        self._add(step, _IMAGES, {name: tf.make_tensor_proto([*size, *encoded], tf.string)})

    def _add(self, step, metadata, tensors):
        """Appends one event; it is with the operating system when this returns."""
        if self._events is None:
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
            self._events = tf.io.TFRecordWriter(os.path.join(self.folder, name))
            self._event(file_version="brain.Event:2")
            if self._start is not None:  # from the second such event on, TensorBoard drops
                self._event(step=self._start + 1, session_log=tf.compat.v1.SessionLog(status="START"))
        values = [tf.compat.v1.Summary.Value(tag=tag, metadata=metadata, tensor=tensor) for tag, tensor in tensors.items()]
        self._event(step=step, summary=tf.compat.v1.Summary(value=values))
        self._events.flush()

    def _event(self, **fields):
        self._events.write(tf.compat.v1.Event(wall_time=time.time(), **fields).SerializeToString())


class Silent:
    """The `Journal` of a worker that is not the chief: says and writes nothing."""

    folder = None

    def line(self, text, live=False):
        """Nothing."""

    def scalars(self, step, **values):
        """Nothing."""

    def images(self, step, images, name="training_batch"):
        """Nothing."""


def _show(text):
    """Prints `text` as far as the terminal has its letters; nothing once the terminal is gone."""
    try:
        try:
            print(text, end="", flush=True)
        except UnicodeEncodeError:
            coding = sys.stdout.encoding
            print(text.encode(coding, "backslashreplace").decode(coding), end="", flush=True)
    except ValueError:  # closed in this process
        return
    except OSError:  # What is still buffered would fail again when Python exits, so it goes nowhere
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
        except OSError as error:
            _log.info("the screen is gone: %s", error)


def viewable(images, pixels):
    """(b, H, W, 3) in a model's range -> the same as uint8, 0..255, for people to look at.

    Args:
        images: array, as a training batch has them.
        pixels: `data.pixels.Pixels` that brought them into range; undone here. What augmentation moved out of it is clipped.
    """
    images = np.asarray(images, np.float32) * np.float32(pixels.std) + np.float32(pixels.mean)
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


class Counting(keras.callbacks.Callback):
    """Counts the steps of a run, whatever the epochs of Keras.

    Args:
        start: steps made before.
        stride: steps between two calls of `on_train_batch_end` (`steps_on_device` of the learner).

    Attributes:
        step: made so far.
    """

    def __init__(self, start=0, stride=1):
        super().__init__()
        self.step, self.start, self.stride = start, start, stride

    def on_train_batch_end(self, batch, logs=None):
        self.step += self.stride

    def passed(self, every):
        """Whether the last call reached or passed a multiple of `every`; never for 0."""
        return bool(every) and self.step // every > (self.step - self.stride) // every


class Every(Counting):
    """Calls `action(step)` after every so many steps, counted from 1 over all epochs.

    Args:
        steps: 0 for never.
        action: a function of the step's number; the model's weights are in place on every backend.
        **counting: of `Counting`.
    """

    def __init__(self, steps, action, **counting):
        super().__init__(**counting)
        self.steps, self.action = steps, action

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if self.passed(self.steps):
            _ = self.model  # on JAX, asking for the model brings its weights up to date
            self.action(self.step)


class Progress(Counting):
    """The live line, the scalars and the lines of `metrics.jsonl` of a `step.Learner`'s run; stops it at the last step.

    Scalars have the original's names: train_loss and grad_norm (means over the steps since the last line), lr (of the step's own
    update), img_sec_core_train. In `metrics.jsonl` every step has its loss, lr, grad_norm (before clipping) and the seconds of
    training up to its end, evaluations between steps included.

    Args:
        journal: a `Journal`.
        total_steps: after which training stops.
        batch: images in a step, on all devices.
        schedule: updates made before -> learning rate.
        every: steps between two lines; 0 for only one at the end.
        metrics: a `metrics.Metrics` for every step, or None.
        devices: over which the speed is divided.
        **counting: of `Counting`.

    Attributes:
        seconds: of training to now, compilation and those before a resume included.
    """

    def __init__(self, journal, total_steps, batch, schedule, every=10, metrics=None, devices=1, **counting):
        super().__init__(**counting)
        self.journal, self.total_steps, self.batch, self.schedule = journal, total_steps, batch, schedule
        self.every, self.metrics, self.devices = every, metrics, devices
        self._before = self.seconds = metrics.seconds if metrics else 0.0
        self._losses, self._norms = [], []

    def on_train_begin(self, logs=None):
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        now = time.perf_counter()
        self.seconds = self._before + now - self._began
        loss, norm = float(logs["step_loss"]), float(logs["grad_norm"])
        with keras.device(_cpu()):  # an accelerator would wait for this
            rate = float(self.schedule(self.step - 1))
        self._losses.append(loss)
        self._norms.append(norm)
        if self.metrics:
            self.metrics.write(self.step, loss=loss, lr=rate, grad_norm=norm, seconds=self.seconds)
        first = self.step == self.start + self.stride
        if first:  # leaves the compilation out of rates
            self._first = self._last = now, self.step
            self.journal.line(f"The first step took {now - self._began:.1f} s, compilation included.")
        if self.passed(self.every) or self.step >= self.total_steps:
            self._report(now, rate, timed=not first)
        if self.step >= self.total_steps:
            self.model.stop_training = True

    def _report(self, now, rate, timed):
        loss, norm = (float(np.mean(values)) for values in (self._losses, self._norms))
        line = f"step {self.step}/{self.total_steps} {self.step / self.total_steps:.1%}  loss {loss:.4f}  lr {rate:.3g}"
        values = dict(train_loss=loss, lr=rate, grad_norm=norm)
        if timed:
            (then, step), (first, first_step) = self._last, self._first
            values["img_sec_core_train"] = speed = (self.step - step) * self.batch / (now - then) / self.devices
            left = (now - first) / (self.step - first_step) * (self.total_steps - self.step)
            line += f"  {speed:.1f} img/s/core  {duration(left)} left"
        self._last = now, self.step
        self._losses, self._norms = [], []
        self.journal.line(line, live=True)
        self.journal.scalars(self.step, **values)


def _cpu():
    """The name of this process's own CPU; "cpu:0" is that of the first among several processes of JAX."""
    if keras.config.backend() != "jax":
        return "cpu:0"
    import jax

    return f"cpu:{jax.local_devices(backend='cpu')[0].id}"


def profile_steps(text, total_steps):
    """`"10,13"` -> (10, 13), the first and the last step to profile; None for nothing.

    Raises:
        ConfigError: no such text, steps that the run has not, or a backend or installation whose profiler does not start.
    """
    if not text:
        return None
    found = re.fullmatch(r"([1-9]\d*),([1-9]\d*)", text)
    if not found or not int(found[1]) <= int(found[2]) <= total_steps:
        raise ConfigError(
            f"config.profile must be FIRST,LAST, steps in order from 1 to config.total_steps={total_steps}, such as '10,13', "
            f"got {text!r}."
        )
    start, stop, _ = _profiler()
    with tempfile.TemporaryDirectory() as folder:
        try:
            start(folder)
            stop()
        except Exception as error:  # what fails here differs by backend, driver and installation
            raise ConfigError(
                f"config.profile={text!r}: the profiler of {keras.config.backend()} does not start ({error}); end what else "
                "profiles this process or its devices, or leave config.profile out."
            ) from error
    return int(found[1]), int(found[2])


def _profiler():
    """(start(folder), stop(), annotation(step) -> context manager) of the backend."""
    if keras.config.backend() == "tensorflow":
        profiler = tf.profiler.experimental
        return profiler.start, profiler.stop, lambda step: profiler.Trace("train", step_num=step, _r=1)
    if keras.config.backend() == "jax":
        from jax import profiler

        return profiler.start_trace, profiler.stop_trace, lambda step: profiler.StepTraceAnnotation("train", step_num=step)
    raise ConfigError(f"config.profile: steps are profiled on TensorFlow and JAX, not on {keras.config.backend()}; leave it out.")


class Profile(Counting):
    """Writes a profile of some steps to `plugins/profile` in the run's folder, for TensorBoard's profile plugin or xprof.

    Args:
        journal: a `Journal`; says where the profile is.
        first, last: of the steps, from `profile_steps`. A run that resumes after `first` leaves the profile out and says so.
        **counting: of `Counting`.
    """

    def __init__(self, journal, first, last, **counting):
        super().__init__(**counting)
        self.journal, self.first, self.last = journal, first, last
        self._start, self._stop, self._annotation = _profiler()
        self._step = None
        self._state = "waits" if first > self.start else "done"
        if self._state == "done":
            journal.line(f"Steps {first} to {last} are not profiled: the run resumes after step {self.start}.")

    def on_train_batch_begin(self, batch, logs=None):
        if self._state == "waits" and self.step + self.stride >= self.first:
            self._start(self.journal.folder)
            self._state, self.first = "runs", self.step + 1
        if self._state == "runs":
            self._step = self._annotation(self.step + 1)
            self._step.__enter__()

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if self._state == "runs":
            self._step.__exit__(None, None, None)
            if self.step >= self.last:
                self._finish()

    def on_train_end(self, logs=None):
        if self._state == "runs":
            self._finish()

    def _finish(self):
        self._stop()
        self._state = "done"
        where = os.path.join(self.journal.folder, "plugins", "profile")
        self.journal.line(f"Profile of steps {self.first} to {self.step}: {where}")


def duration(seconds):
    """75.2 -> "1:15", 3675.0 -> "1:01:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
