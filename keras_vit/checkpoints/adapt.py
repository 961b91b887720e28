"""The lossy steps between a file and a model, declared and reported: resampling the table of positions."""

import math

import numpy as np

from keras_vit import errors

MAX_POSITIONS = 2**16  # rows of a file's table; 1,024 pixels in patches of 8 have 16,384


def resample_grid(grid, size):
    """(h, w, d) -> (h', w', d): corner-aligned linear resampling, without antialiasing when shrinking.

    The value at i is read at i * (old - 1) / (new - 1). Equals `scipy.ndimage.zoom(order=1)` of the original's
    `interpolate_posembed` (google-research/vision_transformer, checkpoint.py), its flaw included: for some sizes (see
    `loses_edge`) the last row or column is read a rounding error outside the grid and is 0.

    Args:
        grid: float array.
        size: (h', w').
    """
    result = np.asarray(grid, np.float64)
    for axis, new in enumerate(size):
        old = result.shape[axis]
        at = _coordinates(old, new)
        low = np.minimum(at.astype(int), max(old - 2, 0))
        high, share = np.minimum(low + 1, old - 1), at - low
        inside, share = (v.reshape([-1 if i == axis else 1 for i in range(3)]) for v in (at <= old - 1, share))
        result = inside * (np.take(result, low, axis) * (1 - share) + np.take(result, high, axis) * share)
    return result.astype(np.float32)


def _coordinates(old, new):
    return np.arange(new) * ((old - 1) / max(new - 1, 1))


def loses_edge(old, new):
    """Whether the original's resampling from `old` to `new` rows leaves the last one at 0; so for 24 -> 22, not for 14 -> 24."""
    return bool(_coordinates(old, new)[-1] > old - 1)


class Positions:
    """Resamples a learned table (1, n, d) from the file's grid to the model's.

    Args:
        name: what the weight is called, for messages.
        grid: (h, w) of the model.
        class_token: whether the model's table starts with the class token, which is kept as it is. The model decides this, not
            the count of rows.
        file_grid: (h, w) of the file where it is known, or "square"; None takes a table of the model's own length as it is, as
            the original does, and any other as a square.
    """

    def __init__(self, name, grid, class_token, file_grid=None):
        self.name, self.grid, self.class_token, self.file_grid = name, tuple(grid), bool(class_token), file_grid

    def source_grid(self, shape, width):
        """The (h, w) that a table of this shape holds. Raises CheckpointMismatchError if it cannot be one of this model's."""
        if len(shape) != 3 or shape[0] != 1 or shape[2] != width:
            raise errors.CheckpointMismatchError(f"{self.name}: expected shape (1, n, {width}), got {shape}")
        if shape[1] > MAX_POSITIONS:  # known before anything is inflated
            raise errors.CheckpointMismatchError(f"{self.name}: expected at most {MAX_POSITIONS} positions, got {shape[1]}")
        rows = shape[1] - self.class_token
        if self.file_grid in (None, "square"):
            side = math.isqrt(max(rows, 0))
            grid = self.grid if self.file_grid is None and rows == math.prod(self.grid) else (side, side)
        else:
            grid = tuple(self.file_grid)
        if rows < 1 or math.prod(grid) != rows:
            token = "one row for the class token" if self.class_token else "no class token"
            raise errors.CheckpointMismatchError(
                f"{self.name}: the file has {shape[1]} positions; with {token} they form no {grid[0]} x {grid[1]} grid. "
                "If the file's grid is not square, pass grid=(h, w)"
            )
        return grid

    def describe(self, shape, width):
        """What is done to a table of this shape, in words; None if nothing. Raises as `source_grid`."""
        old = self.source_grid(shape, width)
        if old == self.grid:
            return None
        lost = any(loses_edge(*sides) for sides in zip(old, self.grid))
        note = "; the last row or column becomes 0, as in the original" if lost else ""
        return f"{self.name}: grid {old[0]} x {old[1]} resampled to {self.grid[0]} x {self.grid[1]}{note}"

    def __call__(self, table):
        """(1, n, d) -> (1, n', d)."""
        old = self.source_grid(table.shape, table.shape[-1])
        if old == self.grid:
            return table
        tokens, rows = table[:, : int(self.class_token)], table[0, int(self.class_token) :]
        new = resample_grid(rows.reshape(*old, -1), self.grid)
        return np.concatenate([tokens, new.reshape(1, -1, table.shape[-1])], axis=1)
