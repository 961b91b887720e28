"""What a run reports while it trains: a live line, `train.log`, TensorBoard scalars; and what happens every so many steps."""

import logging
import os
import sys
import time

import keras
import tensorflow as tf

_log = logging.getLogger("keras_vit.training")

# What `tf.summary.scalar` writes; that function itself needs the tensorboard package, which TensorFlow no longer installs.
_SCALAR = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": "scalars"}, data_class="DATA_CLASS_SCALAR")


class Journal:
    """A run's `train.log` and TensorBoard scalars in its folder, and its lines on the screen. A context manager.

    What `keras_vit` logs meanwhile goes to `train.log` too.

    Args:
        folder: exists.
    """

    def __init__(self, folder):
        self._handler = logging.FileHandler(os.path.join(folder, "train.log"), encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._folder, self._writer, self._live = os.fspath(folder), None, False

    def __enter__(self):
        root = logging.getLogger("keras_vit")
        self._level, root.propagate = root.level, False
        root.addHandler(self._handler)
        root.setLevel(logging.INFO)
        return self

    def __exit__(self, *error):
        if self._live:
            print()
        root = logging.getLogger("keras_vit")
        root.removeHandler(self._handler)
        root.setLevel(self._level)
        root.propagate = True
        self._handler.close()
        if self._writer:
            self._writer.close()

    def line(self, text, live=False):
        """Logs and prints a line; on a terminal a live one is overwritten by the next."""
        _log.info("%s", text)
        live = live and sys.stdout.isatty()
        start = "\r\033[K" if self._live else ""
        print(start + text, end="" if live else "\n", flush=True)
        self._live = live

    def scalars(self, step, **values):
        """Writes scalars for TensorBoard."""
        self._writer = self._writer or tf.summary.create_file_writer(self._folder)
        with self._writer.as_default(step):
            for name, value in values.items():
                tf.summary.write(name, tf.constant(value, tf.float32), metadata=_SCALAR)
        self._writer.flush()


class Every(keras.callbacks.Callback):
    """Calls `action(step)` after every so many steps, counted from 1 over all epochs.

    Args:
        steps: 0 for never.
        action: a function of the step's number; the model's weights are in place on every backend.
    """

    def __init__(self, steps, action):
        super().__init__()
        self.steps, self.action, self.step = steps, action, 0

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.steps and self.step % self.steps == 0:
            _ = self.model  # on JAX, asking for the model brings its weights up to date
            self.action(self.step)


class Progress(keras.callbacks.Callback):
    """A line and scalars after every epoch, which is as long as the caller wants to wait for one; stops at the last step.

    Scalars have the original's names: train_loss (mean over the epoch), lr, img_sec_core_train.

    Args:
        journal: a `Journal`.
        total_steps: after which training stops.
        batch: images in a step.
        schedule: step -> learning rate.

    Attributes:
        seconds: from the first step to now, the first and its compilation included.
    """

    def __init__(self, journal, total_steps, batch, schedule):
        super().__init__()
        self.journal, self.total_steps, self.batch, self.schedule = journal, total_steps, batch, schedule
        self.step, self.seconds = 0, 0.0

    def on_train_begin(self, logs=None):
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        self.seconds = time.perf_counter() - self._began
        if self.step == 1:  # leaves the compilation out of rates
            self._first = self._last = time.perf_counter(), 1
            self.journal.line(f"The first step took {self.seconds:.1f} s, compilation included.")
        if self.step == self.total_steps:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter()
        (then, step), (first, _) = self._last, self._first
        speed = (self.step - step) * self.batch / (now - then) if self.step > step else 0.0
        left = (now - first) / max(self.step - 1, 1) * (self.total_steps - self.step)
        rate, loss = float(self.schedule(self.step)), float(logs["loss"])
        self._last = now, self.step
        self.journal.line(
            f"step {self.step}/{self.total_steps} {self.step / self.total_steps:.1%}  loss {loss:.4f}  lr {rate:.3g}  "
            f"{speed:.1f} img/s/core  {_duration(left)} left",
            live=True,
        )
        self.journal.scalars(self.step, train_loss=loss, lr=rate, img_sec_core_train=speed)


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
