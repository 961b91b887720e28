"""`metrics.jsonl`: the numbers of every step and evaluation, one JSON object a line, the same bits after a resume."""

import json
import math
import os
import pathlib

from keras_vit import errors
from keras_vit.checkpoints import files


class Metrics:
    """Appends to a run's `metrics.jsonl`; each line is with the operating system when `write` returns. A context manager.

    A run that resumes gives the number of steps it had made: what the file says of later steps is cut off, whole or torn by a
    kill, before anything is added. Apart from "seconds", the file then ends as that of a run that never stopped.

    Args:
        path: of the file, in a folder that exists.
        start: steps made before; 0 begins the file anew.

    Attributes:
        seconds: of training before `start`, as the kept lines say.

    Raises:
        DataError: the file of a resumed run has a line that is none of this class's, other than a torn last one.
    """

    def __init__(self, path, start=0):
        path = pathlib.Path(path)
        lines = [(line, record) for line, record in _lines(path) if record["step"] <= start] if start and path.exists() else []
        with files.replacing(path) as temporary, open(temporary, "wb") as kept:
            kept.writelines(line for line, _ in lines)
            kept.flush()
            os.fsync(kept.fileno())
        self.seconds = max((record.get("seconds", 0.0) for _, record in lines), default=0.0)
        self._start, self._said = start, {_names(record) for _, record in lines if record["step"] == start}
        self._file = open(path, "ab")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, step, **values):
        """Adds {"step": step, **values}; numbers read back to the same bits. "loss" is followed by "loss_hex", its `float.hex`.

        JSON has no NaN and no infinity: they are written as null; "loss_hex" still tells which. What the file kept of step
        `start` is not said again, for a run that was stopped after an evaluation repeats it.
        """
        record = {"step": int(step)}
        for name, value in values.items():
            record[name] = _number(value)
            if name == "loss":
                record["loss_hex"] = float(value).hex()
        if record["step"] == self._start and _names(record) in self._said:
            return
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()


def read(path):
    """The records of a `metrics.jsonl`, a list of dicts in the order of the file; a torn last line is left out.

    Raises:
        DataError: a line before the last is no JSON object with a whole "step".
        FileNotFoundError: there is no such file.
    """
    return [record for _, record in _lines(path)]


def _names(record):
    return frozenset(record)


def _number(value):
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _lines(path):
    """(the line's bytes, its record) of every line."""
    lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if line.endswith(b"\n") and isinstance(record, dict) and type(record.get("step")) is int:
            yield line, record
        elif number < len(lines):
            raise errors.DataError(
                f"{path}, line {number}: expected a JSON object with a whole number as 'step', got {line[:80]!r}. "
                "Move the file away; a run that resumes then begins a new one."
            )
