"""The whole state of a run: copied from a model, written whole or not at all, found again after any crash, put back to the bit.

checkpoints = Checkpoints("runs/a/checkpoints")
with lock("runs/a"), Preemption() as preemption:
    checkpoints.check_writable()
    found = checkpoints.latest()
    if found:
        step, arrays, about = found
        check_config(about, now)
        restore(model, arrays)
    ...
        checkpoints.save(step, capture(model), now)
    checkpoints.wait()
"""

import concurrent.futures
import contextlib
import errno
import fnmatch
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import pathlib
import platform
import re
import shutil
import signal
import socket
import tempfile
import threading
import time

import filelock
import keras
import ml_dtypes
import numpy as np

from keras_vit import errors
from keras_vit.checkpoints import files
from keras_vit.version import __version__

_log = logging.getLogger("keras_vit.training")
_SHOWN = 8  # entries of a list in an error

# -- a model's state ------------------------------------------------------------------------------------------------------------

_COUNTER = re.compile(r"_\d+(?=[/_]|$)")


def variables(model):
    """{name: variable} of all that training changes: `GROUP/POSITION/NAME`, the same names in every process.

    The groups are trainable, non_trainable (seed generators of dropout are there), optimizer (slots, iterations, moving averages,
    loss scale) and metrics. Positions are those in the lists of Keras. The rest, for people, is the end of the variable's path
    without numbers: the start depends on where in Keras it was made, numbers on the models that the process made before. Models
    in `model.frozen`, such as a teacher, are left out.

    Args:
        model: a built Keras model. Its optimizer is built, if it is not.

    Raises:
        ArgumentError: the model has no weights yet.
    """
    if not model.built:
        raise errors.ArgumentError(f"{model.name}: it has no weights yet; call it on a batch or build it first.")
    if hasattr(model, "jax_state_sync"):  # while `fit` runs on JAX, the variables are empty
        model.jax_state_sync()
    frozen = {id(variable) for each in getattr(model, "frozen", ()) for variable in each.variables}
    others = [variable for variable in model.non_trainable_variables if id(variable) not in frozen]
    groups = {"trainable": model.trainable_variables, "non_trainable": others}
    if getattr(model, "optimizer", None) is not None:
        if not model.optimizer.built:
            with _scope(model):
                model.optimizer.build(model.trainable_variables)
        groups["optimizer"] = model.optimizer.variables
    groups["metrics"] = model.metrics_variables
    return {
        f"{group}/{position:04}/{_readable(variable.path, 1 if group == 'optimizer' else 2)}": variable
        for group, members in groups.items()
        for position, variable in enumerate(members)
    }


def _readable(path, parts):
    return _COUNTER.sub("", "/".join(path.split("/")[-parts:]))


def capture(model):
    """{name: array} of the whole state of a model, a copy in this process's memory that later steps leave alone.

    It can be taken in a callback while `fit` runs. Of variables on several replicas it holds one value. Under a strategy with
    several workers all of them must call it.

    Args:
        model: as in `variables`.
    """
    return {name: _copied(variable) for name, variable in variables(model).items()}


def restore(model, arrays):
    """Gives a model the state that `capture` took, bit for bit. Nothing is assigned unless everything fits.

    Metrics that the model has not made yet are left out: Keras makes them at the first batch, and `fit` starts them at zero.

    Args:
        model: as in `variables`.
        arrays: {name: array} of numpy, or of JAX from `Sharded`.

    Raises:
        ResumeError: names, shapes or dtypes differ; lists them.
    """
    own = variables(model)
    arrays = {name: array for name, array in arrays.items() if name in own or not name.startswith("metrics/")}
    _check_same(own, {name: (tuple(array.shape), array.dtype.name) for name, array in arrays.items()}, model.name)
    with _scope(model):
        for name, variable in own.items():
            variable.assign(arrays[name])


def _scope(model):
    if keras.config.backend() == "tensorflow":
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


def _copied(variable):
    array = variable.numpy() if keras.config.backend() == "tensorflow" else keras.ops.convert_to_numpy(variable.value)
    array = np.asarray(array)
    return array if array.flags.owndata and array.flags.writeable else array.copy()


def _check_same(own, given, what):
    """Refuses a state of other names, shapes or dtypes.

    Args:
        own: {name: variable or array}.
        given: {name: (shape, dtype name)} of the state.
        what: whose variables they are, for the message.
    """
    lacking = [f"{name} ({getattr(own[name], 'path', name)})" for name in own if name not in given]
    surplus = [name for name in given if name not in own]
    differing = []
    for name, variable in own.items():
        expected = tuple(variable.shape), str(variable.dtype)
        if name in given and given[name] != expected:
            differing.append(f"{name}: expected {expected[1]} {expected[0]}, got {given[name][1]} {given[name][0]}")
    problems = {"lacking": lacking, "surplus": surplus, "of another shape or dtype": differing}
    if any(problems.values()):
        found = "\n".join(f"- {heading} ({len(names)}): {_listed(names)}" for heading, names in problems.items() if names)
        raise errors.ResumeError(
            f"The saved state is not one of {what}, of which no variable was changed:\n{found}\n"
            "Build model and optimizer as they were when it was saved, or start in another folder."
        )


def _listed(entries):
    more = f"; ... and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return "; ".join(map(str, entries[:_SHOWN])) + more


# -- a state on disk ------------------------------------------------------------------------------------------------------------

FORMAT = 1
STATE, MANIFEST = "state.safetensors", "manifest.json"
_WRITING, _REMOVING = ".writing_", ".removing_"
_CHUNK = 2**23  # bytes that are hashed and written at once, without the interpreter's lock
_DTYPES = {
    np.dtype(name): code
    for name, code in {
        "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
        "uint64": "U64", "int64": "I64", "float16": "F16", ml_dtypes.bfloat16: "BF16", "float32": "F32", "float64": "F64",
        ml_dtypes.float8_e4m3fn: "F8_E4M3", ml_dtypes.float8_e5m2: "F8_E5M2",
    }.items()
}  # fmt: skip
_NAMED = {code: dtype for dtype, code in _DTYPES.items()}


class _Damaged(Exception):
    """What is wrong with a checkpoint: it is passed over."""


class Checkpoints:
    """The checkpoints of a run, `step_00001200/` and so on in one folder; a kill at any instant leaves a whole one or none.

    Each holds the arrays as `state.safetensors` (the public format: a JSON header, then plain numbers) and `manifest.json`: step,
    what the caller says of the run, size and sha256 of the file, and the sha256 of itself. It is written beside, flushed to the
    disk and renamed. Only numbers of steps order them, never the clock.

    Args:
        folder: of the run's checkpoints; made by `check_writable` or the first save.
        keep: so many intact ones stay at least, at least 2.
        on_error: "stop": a save that fails raises in the next call; "continue": it is logged, and training goes on. Either way
            the older checkpoints stay.

    Raises:
        ArgumentError: an argument is out of range.
    """

    def __init__(self, folder, keep=2, on_error="stop"):
        if keep < 2 or on_error not in ("stop", "continue"):
            raise errors.ArgumentError(
                f"Checkpoints: keep must be at least 2 and on_error 'stop' or 'continue', got {keep} and {on_error!r}."
            )
        self.folder, self.keep, self.on_error = pathlib.Path(folder), keep, on_error
        self._first = True  # of the processes that write here
        self._saving = None
        self._intact = set()  # steps that this process wrote or verified

    def steps(self):
        """Numbers of the steps that have a checkpoint, in order; they are not verified."""
        return sorted(int(found[1]) for found in self._found(r"step_(\d{8,})"))

    def path(self, step):
        """The folder of a step's checkpoint."""
        return self.folder / f"step_{step:08}"

    def check_writable(self):
        """Makes the folder, tries to write there, and removes what killed saves left. For one process, before step 1.

        Raises:
            CacheError: it cannot be written.
        """
        try:
            self._make()
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(b"0")
                file.flush()
                os.fsync(file.fileno())
            self._clean()
        except OSError as error:
            raise errors.CacheError(
                f"{self.folder}: expected a folder to write checkpoints to, got: {error.strerror or error}. Nothing was trained; "
                "mend its rights or make room, or choose another folder."
            ) from error

    def save(self, step, arrays, about, background=True):
        """Writes a checkpoint, first waiting for the one before; returns at once, while another thread writes.

        Args:
            step: updates made.
            arrays: {name: array} that nobody changes any more, as `capture` gives them.
            about: dict of what JSON can hold: configuration, versions, data, see `described`.
            background: False writes before it returns.

        Raises:
            CacheError: this save or the one before could not be written, and on_error is "stop"; names the bytes needed.
            ArgumentError: this step has a checkpoint, or arrays or about cannot be written.
        """
        self.wait()
        if self.path(step).exists():
            raise errors.ArgumentError(f"{self.path(step)}: step {step} is saved already; remove it to save it again.")
        try:
            about = json.loads(json.dumps(about))
        except (TypeError, ValueError) as error:
            raise errors.ArgumentError(
                f"{self.path(step)}: about cannot be written as JSON ({error}). Nothing was saved."
            ) from error
        for name, array in arrays.items():
            if np.dtype(array.dtype) not in _DTYPES:
                raise errors.ArgumentError(
                    f"{self.path(step)}: {name} is of dtype {array.dtype}, which has no place in the format."
                )
        head = {
            "format": FORMAT,
            "step": int(step),
            "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "about": about,
            "arrays": {name: [list(array.shape), array.dtype.name] for name, array in arrays.items()},
        }
        needed = sum(array.nbytes for array in arrays.values()) + 2 * len(_rendered(head))
        with self._failing(step, needed):
            if self._first:
                self._begin(step, needed)
            write = self._writer(self._temporary(step), arrays)
            executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
            self._saving = executor.submit(self._commit, step, needed, head, write)
            executor.shutdown(wait=False)
        if not background:
            self.wait()

    def check(self):
        """Raises what a save in the background failed with, once; does not wait."""
        if self._saving and self._saving.done():
            self.wait()

    def wait(self):
        """Waits for the save in the background, if there is one, and raises what it failed with."""
        saving, self._saving = self._saving, None
        if saving:
            saving.result()

    def latest(self):
        """The newest intact checkpoint: (step, {name: array}, about); None if nothing was ever saved.

        Damaged ones are passed over, renamed to `step_00001200.corrupt` and named in a warning.

        Raises:
            ResumeError: there are checkpoints, but none is intact, or the newest is of a newer format.
            CacheError: a checkpoint cannot be read for want of rights or by a fault of the file system that may pass.
        """
        return self._newest(self._loaded)

    def load(self, step):
        """({name: array}, about) of one checkpoint.

        Raises:
            ResumeError: it is missing, damaged or of a newer format. CacheError: it cannot be read.
        """
        try:
            return self._loaded(step)[1:]
        except _Damaged as fault:
            raise errors.ResumeError(f"{self.path(step)}: {fault}; use another of steps {self.steps()}.") from fault

    def _found(self, pattern):
        """Matches of the names in the folder."""
        names = os.listdir(self.folder) if self.folder.is_dir() else ()
        return [found for found in (re.fullmatch(pattern, name) for name in names) if found]

    # Saving

    @contextlib.contextmanager
    def _failing(self, step, needed):
        """Makes of an OSError the one that users see, or a warning."""
        try:
            yield
        except OSError as error:
            shutil.rmtree(self._temporary(step), ignore_errors=True)  # what cannot be removed now, `_clean` removes
            text = (
                f"{self.path(step)}: a checkpoint of {needed:,} bytes could not be written: {error.strerror or error}. Older "
                f"ones are as they were (of steps {_listed(self.steps()) or 'none'}). Make room or choose another folder."
            )
            if self.on_error == "stop":
                raise errors.CacheError(text) from error
            _log.warning("%s Training goes on without it.", text)

    def _temporary(self, step):
        return self.folder / f"{_WRITING}{step:08}"

    def _clean(self):
        for found in self._found(f"({re.escape(_WRITING)}|{re.escape(_REMOVING)}).*"):
            shutil.rmtree(self.folder / found[0])

    def _make(self):
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            _sync(self.folder.parent)

    def _begin(self, step, needed):
        self._make()
        self._clean()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"only {free:,} bytes are free")
        self._temporary(step).mkdir()

    def _writer(self, temporary, arrays):
        """What writes the arrays when it is called, in another thread, and returns {file: its size and sha256}."""
        return lambda: {STATE: _write_arrays(temporary / STATE, arrays)}

    def _commit(self, step, needed, head, write):
        with self._failing(step, needed):
            temporary = self._temporary(step)
            manifest = {**head, "files": write()}
            with open(temporary / MANIFEST, "xb") as file:
                file.write(_rendered(manifest))
                file.flush()
                os.fsync(file.fileno())
            _sync(temporary)
            os.replace(temporary, self.path(step))
            _sync(self.folder)
            self._intact.add(step)
            self._prune(step)

    def _prune(self, newest):
        """Removes what is older than `keep` intact ones; only those that this process has not yet verified are read."""
        kept = 0
        for step in reversed([step for step in self.steps() if step <= newest]):
            if kept == self.keep:
                removing = self.folder / f"{_REMOVING}{step:08}"
                os.replace(self.path(step), removing)  # so that it never looks like one that was damaged
                shutil.rmtree(removing)
            elif step in self._intact or self._verifies(step):
                kept += 1

    def _verifies(self, step):
        try:
            self._verify(step)
        except _Damaged as fault:
            _log.warning("%s: %s; it does not count among the checkpoints to keep.", self.path(step), fault)
            return False
        return True

    # Reading

    def _newest(self, read):
        """`read(step)` of the newest checkpoint for which it does not raise _Damaged."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                return read(step)
            except _Damaged as fault:
                _log.warning("%s: %s. %s; the checkpoint before it is tried.", self.path(step), fault, self._put_aside(step))
        damaged = sorted(found[0] for found in self._found(r"step_.*\.corrupt.*")) or steps
        if damaged:
            raise errors.ResumeError(
                f"{self.folder}: none of its checkpoints is intact ({_listed(damaged)}). Bring one back from a copy, or start "
                "anew in another folder, or here after removing these."
            )
        return None

    def _put_aside(self, step):
        """Renames a damaged checkpoint; says what came of it."""
        number, aside = 1, self.path(step).with_suffix(".corrupt")
        while aside.exists():
            number, aside = number + 1, self.path(step).with_suffix(f".corrupt{number}")
        try:
            os.replace(self.path(step), aside)
        except OSError as error:  # also where another worker of this run has just done it
            return f"It could not be renamed ({error.strerror})"
        return f"It is now {aside.name}"

    def _loaded(self, step):
        """(step, arrays, about), read and verified in one go."""
        with self._reading(step):
            manifest = self._manifest(step)
            arrays = _read_arrays(self.path(step) / STATE, manifest["files"].get(STATE))
        self._intact.add(step)
        return step, arrays, manifest["about"]

    def _verify(self, step):
        """The manifest of an intact checkpoint; raises _Damaged otherwise."""
        with self._reading(step):
            manifest = self._manifest(step)
            for name, record in manifest["files"].items():
                if _record(self.path(step) / name) != record:
                    raise _Damaged(f"{name} does not have the size and sha256 that the manifest says")
        self._intact.add(step)
        return manifest

    @contextlib.contextmanager
    def _reading(self, step):
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise _Damaged(f"{pathlib.Path(error.filename).name} is missing or no file") from error
        except OSError as error:
            if error.errno == errno.EIO:
                raise _Damaged(f"the disk cannot read it ({error})") from error
            raise errors.CacheError(
                f"{self.path(step)}: cannot be read ({error}). Nothing was changed; mend that and retry."
            ) from error

    def _manifest(self, step):
        text = (self.path(step) / MANIFEST).read_bytes()
        try:
            manifest = json.loads(text)
            whole = _rendered(manifest) == text
        except (ValueError, AttributeError, TypeError) as error:
            raise _Damaged(f"{MANIFEST} is no JSON object") from error
        if not whole:
            raise _Damaged(f"{MANIFEST} is not what was written")
        if manifest["format"] != FORMAT:
            raise errors.ResumeError(
                f"{self.path(step)}: it is of format {manifest['format']}, this version of keras_vit reads {FORMAT}; use the one "
                "that wrote it."
            )
        if manifest["step"] != step:
            raise _Damaged(f"{MANIFEST} is of step {manifest['step']}")
        return manifest


def _rendered(manifest):
    """The bytes of a manifest, with the sha256 of all else in it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**rest, "sha256": digest}, indent=1, sort_keys=True).encode()


def _record(path, flush=False):
    """Size and sha256 of a file."""
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(folder):
    """Has the disk know the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(arrays):
    """The first bytes of a safetensors file."""
    entries, end = {}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": _DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_arrays(path, arrays):
    """Writes a safetensors file through to the disk; returns its size and sha256, computed on the way."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file:
        for data in itertools.chain([memoryview(_header(arrays))], map(_bytes, arrays.values())):
            for start in range(0, len(data), _CHUNK):
                piece = data[start : start + _CHUNK]
                digest.update(piece)
                size += len(piece)
                while piece:
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _bytes(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read_arrays(path, record):
    """{name: array} of a safetensors file that is as its record says; raises _Damaged otherwise."""
    if record is None:
        raise _Damaged(f"it has no {STATE}")
    digest = hashlib.sha256()

    def read(data):
        for start in range(0, len(data), _CHUNK):
            piece = data[start : start + _CHUNK]
            if file.readinto(piece) != len(piece):
                raise _Damaged(f"{path.name} is cut short")
            digest.update(piece)
        return data

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != record["size"]:
            raise _Damaged(f"{path.name}: expected {record['size']:,} bytes, got {size:,}")
        try:
            length = int.from_bytes(read(memoryview(bytearray(8))), "little")
            header = json.loads(bytes(read(memoryview(bytearray(min(length, size))))))
            plan = {name: (tuple(entry["shape"]), _NAMED[entry["dtype"]]) for name, entry in header.items()}
            if 8 + length + sum(math.prod(shape) * dtype.itemsize for shape, dtype in plan.values()) != size:
                raise ValueError("it promises another number of bytes")
            arrays = {}
            for name, (shape, dtype) in plan.items():
                arrays[name] = np.empty(shape, dtype)
                read(arrays[name].reshape(-1).view(np.uint8).data)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise _Damaged(f"{path.name} has a damaged header ({type(error).__name__}: {str(error)[:80]})") from error
    if digest.hexdigest() != record["sha256"]:
        raise _Damaged(f"{path.name}: expected sha256 {record['sha256']}, got {digest.hexdigest()}")
    return arrays


class Sharded(Checkpoints):
    """`Checkpoints` of JAX arrays that are divided over the devices of one or several processes, written by orbax-checkpoint.

    Every process writes and reads its own shards, in a folder that all see. All processes call `save`, `wait` and `latest`, the
    first one alone `check_writable`. `save` takes {name: variable.value} and has copied it to the host's memory when it returns.

    Args:
        folder, keep, on_error: of `Checkpoints`.

    Raises:
        ArgumentError: the backend is not JAX, or orbax-checkpoint is not installed.
    """

    def __init__(self, folder, keep=2, on_error="stop"):
        super().__init__(pathlib.Path(folder).absolute(), keep, on_error)
        if keras.config.backend() != "jax":
            raise errors.ArgumentError(f"Sharded: it is for JAX, not for {keras.config.backend()}; use Checkpoints.")
        try:
            import orbax.checkpoint
        except ImportError as error:
            raise errors.ArgumentError(
                f"Sharded: what is divided over devices is written by orbax-checkpoint, which cannot be imported ({error}); "
                "pip install 'keras_vit[sharded]'."
            ) from error
        import jax

        self._orbax, self._processes, self._first = orbax.checkpoint, jax.process_count(), jax.process_index() == 0

    def latest(self, like):
        """As in `Checkpoints`, on every process the same; arrays lie on the devices as those of `like` do.

        Args:
            like: {name: jax.Array or jax.ShapeDtypeStruct with a sharding} of what is expected.

        Raises:
            ResumeError: also where names, shapes or dtypes are others than those of `like`.
        """
        step, fault = -1, None
        if self._first:
            try:
                manifest = self._newest(self._verify)
                step = manifest["step"] if manifest else -1
            except errors.KerasViTError as error:  # raised below: the others wait for an answer
                step, fault = -2, error
        if self._processes > 1:
            from jax.experimental import multihost_utils

            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step == -2:
            raise fault or errors.ResumeError(
                f"{self.folder}: the first process found no checkpoint that can be used; see its error."
            )
        return None if step < 0 else (step, *self.load(step, like))

    def load(self, step, like):
        """As in `Checkpoints`, for arrays `like` those of `latest`; only the first process verifies, and only in `latest`."""
        import jax

        try:
            with self._reading(step):
                manifest = self._manifest(step)
        except _Damaged as fault:
            raise errors.ResumeError(f"{self.path(step)}: {fault}; use another of steps {self.steps()}.") from fault
        _check_same(like, {name: (tuple(shape), dtype) for name, (shape, dtype) in manifest["arrays"].items()}, "this model")
        target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in like.items()}
        with self._checkpointer() as checkpointer:
            return checkpointer.restore(self.path(step) / "state", target), manifest["about"]

    def _checkpointer(self):
        options = self._orbax.options.MultiprocessingOptions(active_processes=set(range(self._processes)))
        return self._orbax.StandardCheckpointer(multiprocessing_options=options)

    def _writer(self, temporary, arrays):
        checkpointer = self._checkpointer()
        checkpointer.save(temporary / "state", arrays)

        def write():
            checkpointer.close()  # waits until all processes have written
            if not self._first:
                return None
            found = sorted(path for path in temporary.rglob("*") if path.is_file())
            for path in {path.parent for path in found}:
                _sync(path)
            return {path.relative_to(temporary).as_posix(): _record(path, flush=True) for path in found}

        return write

    def _commit(self, step, needed, head, write):
        if self._first:
            super()._commit(step, needed, head, write)
        else:
            write()


# -- a run that goes on ---------------------------------------------------------------------------------------------------------

# What may change between the parts of a run without changing what it computes, below `config` or beside it; patterns
NEVER_MATTERS = (
    "workdir", "pretrained_dir", "tfds_data_dir", "tfds_manual_dir",  # where things lie; the weights are in the checkpoint
    "progress_every", "eval_every", "checkpoint_every", "keep_checkpoints", "on_save_error", "profile", "train_sample",
    "batch_eval", "export", "prefetch", "allow_change",
    "distillation.teacher", "distillation.cache", "masked.tokenizer",  # where they lie; which models these are, digests say
    "config_sha256", "examples",  # `described` and `Checkpoints.save` put them there
)  # fmt: skip


def versions():
    """{name: version} of Python, the backend and the packages that a run's numbers depend on."""
    backend = keras.config.backend()
    packages = sorted({"keras", "numpy", "tensorflow", backend} | ({"jaxlib"} if backend == "jax" else set()))
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "keras_vit": __version__, "backend": backend, **found}


def described(config, **more):
    """What a checkpoint says of its run: dict(config, config_sha256, version, **more), of what JSON can hold.

    Args:
        config: dict or `ml_collections.ConfigDict`.
        **more: such as data="its fingerprint", classes=[names].
    """
    config = json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else dict(config), sort_keys=True))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return {"config": config, "config_sha256": digest, "version": versions(), **more}


def check_config(old, new, allow_change=()):
    """Refuses to go on with another configuration, data or package than before.

    Args:
        old, new: dicts such as `described` gives: of the checkpoint, of now. Fields are named `version.keras`, and those of
            `config` without that word: `batch`, `pp.crop`.
        allow_change: names or patterns of what may differ; a name allows all below it.

    Raises:
        ResumeError: lists every other field that differs, with both values; `NEVER_MATTERS` does not count.
    """
    old, new = _flat(json.loads(json.dumps(old))), _flat(json.loads(json.dumps(new)))
    allowed = (*NEVER_MATTERS, *allow_change)
    changed = [
        f"{name}: {old.get(name, 'not set')} -> {new.get(name, 'not set')}"
        for name in sorted({**old, **new})
        if old.get(name) != new.get(name)
        and not any(fnmatch.fnmatchcase(name, each) or name.startswith(f"{each}.") for each in allowed)
    ]
    if changed:
        raise errors.ResumeError(
            f"The run was begun with other settings ({len(changed)}): {'; '.join(changed)}. Go on with those, start in another "
            "folder, or allow each by name in allow_change (--config.allow_change); it is then another run than without the stop."
        )


def _flat(nested, prefix=""):
    """{dotted name: value as JSON}."""
    if not isinstance(nested, dict) or not nested:
        return {prefix.removesuffix("."): json.dumps(nested)}
    return {
        name: value
        for key, each in nested.items()
        for name, value in _flat(each, "" if not prefix and key == "config" else f"{prefix}{key}.").items()
    }


@contextlib.contextmanager
def lock(folder):
    """Keeps a folder for this process for the time of a `with`. The kernel frees it when the process ends, however it ends.

    Args:
        folder: of a run; made if it is not there. It may be moved between runs.

    Raises:
        ResumeError: another process, or this one, has it; names its pid and host.
        CacheError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    holder = folder / ".lock.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = filelock.FileLock(folder / ".lock")
        kept.acquire(timeout=0)
    except filelock.Timeout:
        raise errors.ResumeError(
            f"{folder}: another run is at work here ({_holder(holder)}). Wait for it, end it, or choose another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise errors.CacheError(f"{folder}: cannot be locked ({error}). Mend its rights or choose another folder.") from error
    try:
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with files.replacing(holder) as temporary:
            pathlib.Path(temporary).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)
    finally:
        kept.release()


def _holder(path):
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is just starting
        return "a process that has not yet said which"


class Preemption:
    """Notes SIGTERM, which a preempted machine sends, and SIGINT (Ctrl-C) for the time of a `with`, so that a run saves and ends.

    The first signal sets `requested`. A second one ends the process at once, in the midst of whatever it computes, with status
    143 (SIGINT: 130) in a shell. Signals that were ignored before, as under nohup, still are. Handlers are as before after the
    `with`. In a thread other than the main one nothing is noted, and a warning says so.

    Attributes:
        requested: whether to save at the end of this step and exit; by convention with status 143.
    """

    def __init__(self):
        self.requested = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            _log.warning(
                "Signals reach only the main thread of Python: SIGTERM will not save this run. Train in the main thread."
            )
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number, frame):
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        if os.getpid() != 1:  # The kernel's own action does not wait for Python; but it spares the first process of a container
            for each in self._before:
                signal.signal(each, signal.SIG_DFL)
