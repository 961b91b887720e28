"""The lossy steps between a file and a model, declared and reported: resampling positions and patch kernels.

An adapter has `names`, our weights that it fills together. `plan({name: shape in the file})` gives ({name: shape that comes out},
what it does in words, None for nothing), or raises CheckpointMismatchError; called with {name: array} it returns {name: array}.
"""

import functools
import math

import numpy as np

from keras_vit import errors

MAX_POSITIONS = 2**16  # rows of a file's table; 1,024 pixels in patches of 8 have 16,384
MAX_PATCH = 256  # pixels


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


def bicubic(old, new, xp=np):
    """(new, old) matrix of cubic resampling of a line: half-pixel centres, edges repeated, no antialiasing, a = -0.75.

    As PyTorch's `interpolate(mode="bicubic", align_corners=False)` does along each axis, with the scale that the sides have.

    Args:
        xp: numpy, or `keras.ops` for a `new` that is a tensor.
    """
    scale = old / xp.cast(new, "float64") if xp is not np else old / new
    at = (xp.arange(new, dtype="float64") + 0.5) * scale - 0.5
    low = xp.floor(at)
    matrix = 0.0
    for tap in (-1, 0, 1, 2):
        x = xp.abs(at - low - tap)
        near, far = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
        place = xp.clip(low + tap, 0, old - 1)[:, None] == np.arange(old)
        matrix = matrix + xp.where(place, (near if tap in (0, 1) else far)[:, None], 0.0)
    return matrix


def resample_bicubic(grid, size):
    """(h, w, d) -> (h', w', d): both sides by `bicubic`, as DeiT's fine-tuning at another resolution does."""
    rows, columns = (bicubic(*sides) for sides in zip(grid.shape, size))
    return np.einsum("yh,xw,hwd->yxd", rows, columns, grid.astype(np.float64)).astype(np.float32)


def resample_bilinear(grid, size):
    """(h, w, d) -> (h', w', d): both sides by `bilinear`, as Compact Transformers do."""
    rows, columns = (bilinear(*sides) for sides in zip(grid.shape, size))
    return np.einsum("yh,xw,hwd->yxd", rows, columns, grid.astype(np.float64)).astype(np.float32)


class Positions:
    """Resamples a learned table of positions (1, n, d) from the file's grid to the model's.

    Tables of google-research/vision_transformer start with a row for the class token, those of big_vision do not; a class token
    without a row is the same as one with the row added to it. Either fits either, and the grid decides which one a file is.
    With a distillation token there are always two rows.

    Args:
        grid: (h, w) of the model.
        class_token: whether the model has a class token.
        class_position: whether the model's table starts with a row for it.
        file_grid: (h, w) of the file where it is known, or "square"; None takes a table of the model's own length as it is, as
            the original does, and any other as a square.
        distillation_token: whether the model has a distillation token, and a row for it behind the class token's.
        resample: (h, w, d), (h', w') -> (h', w', d).
    """

    TABLE, TOKEN = "tokens/positions", "tokens/cls"

    def __init__(self, grid, class_token, class_position=True, file_grid=None, distillation_token=False, resample=resample_grid):
        self.grid, self.class_token, self.file_grid = tuple(grid), bool(class_token), file_grid
        self.class_position = bool(class_token and class_position)
        self.distillation_token, self.resample = distillation_token, resample
        self.rows = self.class_position + bool(distillation_token)  # before the grid's
        self.names = (self.TABLE, self.TOKEN) if class_token else (self.TABLE,)

    def source(self, shape):
        """((h, w), rows before the grid) of a table of this shape. Raises CheckpointMismatchError if it cannot be one."""
        if len(shape) != 3 or shape[0] != 1:
            raise errors.CheckpointMismatchError(f"{self.TABLE}: expected shape (1, n, d), got {shape}")
        if shape[1] > MAX_POSITIONS:  # known before anything is inflated
            raise errors.CheckpointMismatchError(f"{self.TABLE}: expected at most {MAX_POSITIONS} positions, got {shape[1]}")
        before = (self.class_position, not self.class_position) if self.class_token else (False,)
        before = (2,) if self.distillation_token else before
        for rows, extra in ((shape[1] - extra, int(extra)) for extra in before):
            if self.file_grid is None and rows == math.prod(self.grid):
                return self.grid, extra
            side = math.isqrt(max(rows, 0))
            grid = (side, side) if self.file_grid in (None, "square") else tuple(self.file_grid)
            if rows > 0 and math.prod(grid) == rows:
                return grid, extra
        token = "with or without a row for the class token" if self.class_token else "without a class token"
        token = "after those of class and distillation token" if self.distillation_token else token
        known = "square" if self.file_grid in (None, "square") else f"{self.file_grid[0]} x {self.file_grid[1]}"
        raise errors.CheckpointMismatchError(
            f"{self.TABLE}: the file has {shape[1]} positions; {token} they form no {known} grid. "
            "If the file's grid is not square, pass grid=(h, w)"
        )

    def plan(self, shapes):
        if self.TABLE not in shapes:
            return shapes, None
        old, extra = self.source(shapes[self.TABLE])
        after = {**shapes, self.TABLE: (1, self.rows + math.prod(self.grid), shapes[self.TABLE][2])}
        does = []
        if old != self.grid:
            lost = self.resample is resample_grid and any(loses_edge(*sides) for sides in zip(old, self.grid))
            note = "; the last row or column becomes 0, as in the original" if lost else ""
            does.append(f"grid {old[0]} x {old[1]} resampled to {self.grid[0]} x {self.grid[1]}{note}")
        if extra != self.rows:
            does.append("the class token's row is added to the class token" if extra else "the class token gets a row of zeros")
        return after, f"{self.TABLE}: {', '.join(does)}" if does else None

    def __call__(self, arrays):
        table = arrays[self.TABLE]
        old, extra = self.source(table.shape)
        first, rows = table[:, :extra], table[0, extra:]
        if old != self.grid:
            rows = self.resample(rows.reshape(*old, -1), self.grid)
        done = dict(arrays)
        if extra and not self.class_position:
            done[self.TOKEN] = arrays[self.TOKEN] + first
            first = first[:, :0]
        elif self.class_position and not extra:
            first = np.zeros((1, 1, table.shape[-1]), np.float32)
        done[self.TABLE] = np.concatenate([first, rows.reshape(1, -1, table.shape[-1])], axis=1)
        return done


def bilinear(old, new, xp=np):
    """(new, old) matrix of linear resampling of a line: half-pixel centres, edges repeated, no antialiasing.

    As `tf.image.resize(method="bilinear")` and PyTorch's `interpolate(mode="bilinear", align_corners=False)` do along each axis.

    Args:
        xp: numpy, or `keras.ops` for a `new` that is a tensor.
    """
    scale = old / xp.cast(new, "float64") if xp is not np else old / new
    at = xp.clip((xp.arange(new, dtype="float64")[:, None] + 0.5) * scale - 0.5, 0, old - 1)
    return xp.maximum(0, 1 - xp.abs(at - np.arange(old)))


def antialiased(old, new, xp=np):
    """(new, old) matrix of linear resampling of a line: half-pixel centres, and wider triangles when shrinking.

    As `jax.image.resize(method="linear")` does along each axis; enlarging, the same as `bilinear`.

    Args:
        xp: numpy, or `keras.ops` for a `new` that is a tensor.
    """
    scale = old / xp.cast(new, "float64") if xp is not np else old / new
    distance = (xp.arange(new, dtype="float64")[:, None] + 0.5) * scale - 0.5 - np.arange(old)
    matrix = xp.maximum(0, 1 - xp.abs(distance) / xp.maximum(scale, 1))
    return matrix / xp.sum(matrix, axis=1, keepdims=True)


@functools.cache
def pi_matrices(old, new):
    """One (new, old) matrix for each side, for `resample_patches` from patches of (h, w) = old to new."""
    return tuple(np.linalg.pinv(bilinear(*sides).T) for sides in zip(old, new))


def resample_patches(kernel, size):
    """(h, w, c, d) -> (h', w', c, d): PI-resize of a patch embedding (FlexiViT, arXiv 2212.08013, section 3.4).

    The kernel that gives the resized patch what the old one gave the patch: the pseudo-inverse of bilinear resizing. The
    resizing of an image is that of its rows, then of its columns, and so is the pseudo-inverse.

    Args:
        kernel: float array.
        size: (h', w').
    """
    rows, columns = pi_matrices(tuple(kernel.shape[:2]), tuple(size))
    return np.einsum("yh,xw,hwcd->yxcd", rows, columns, kernel, optimize=True).astype(np.float32)


class PatchKernel:
    """Resamples the kernel of the patch embedding to the model's patch size (h, w), by `resample_patches`.

    Args:
        size: (h, w). kernel: our name of it.
    """

    def __init__(self, size, kernel="patches/kernel"):
        self.size, self.names = tuple(size), (kernel,)

    def plan(self, shapes):
        ((kernel, shape),) = shapes.items()
        if len(shape) != 4 or max(shape[:2]) > MAX_PATCH:
            raise errors.CheckpointMismatchError(f"{kernel}: expected (h, w, c, d), h and w at most {MAX_PATCH}, got {shape}")
        if shape[:2] == self.size:
            return shapes, None
        does = f"{kernel}: patches of {shape[0]} x {shape[1]} resampled to {self.size[0]} x {self.size[1]}"
        return {kernel: (*self.size, *shape[2:])}, does

    def __call__(self, arrays):
        return {kernel: resample_patches(array, self.size) for kernel, array in arrays.items()}


def bisected(steps, reach):
    """The q of 1 + q + ... + q**(steps - 1) = reach, as BEiT's fine-tuning bisects it: never below 1.01 nor above 1.5."""
    low, high, q = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**steps) / (1 - q) > reach else (q, high)
    return q


def relative_coordinates(old, new):
    """(2 * old - 1,): where the distances in a line of `old` patches lie among those in one of `new`, which they then stand for.

    They are 0, 1, 1 + q, 1 + q + q**2 ... and their negatives: near distances keep their meaning, and the farthest becomes the
    new line's farthest. For a shorter line, and a slightly longer one, q is 1.01, and far distances of the file are left out.
    """
    steps = np.cumsum(bisected(old - 1, new - 1) ** np.arange(old - 1, dtype=np.float64))
    return np.concatenate([-steps[::-1], [0.0], steps])


def _splines(knots, degree, at):
    """(len(at), len(knots) - degree - 1) values of the B-splines of these knots (Cox and de Boor); `at` within them."""
    last = np.flatnonzero(knots[:-1] < knots[1:])[-1]
    piece = np.minimum(np.searchsorted(knots, at, "right") - 1, last)
    values = (piece[:, None] == np.arange(len(knots) - 1)).astype(np.float64)
    for k in range(1, degree + 1):
        width = knots[k:] - knots[:-k]
        share = (at[:, None] - knots[:-k]) * np.divide(1, width, out=np.zeros_like(width), where=width > 0)
        values = share[:, :-1] * values[:, :-1] + np.where(width[1:] > 0, 1 - share[:, 1:], 0) * values[:, 1:]
    return values


def cubic_spline(at, points):
    """(len(at), len(points)) matrix that reads the cubic spline through values at `points` (increasing) at `at`.

    It has no knots at the second and the last but one point, and is constant outside of the points: `scipy.interpolate.interp2d`
    of kind "cubic" along each axis. Fewer than four points have the polynomial through them.
    """
    at, points = (np.asarray(each, np.float64) for each in (at, points))
    if len(points) == 1:
        return np.ones((len(at), 1))
    degree = min(3, len(points) - 1)
    knots = np.concatenate([points[:1].repeat(degree + 1), points[2:-2], points[-1:].repeat(degree + 1)])
    matrices = [_splines(knots, degree, np.clip(each, points[0], points[-1])) for each in (at, points)]
    return np.linalg.solve(matrices[1].T, matrices[0].T).T


def broken_line(at, points):
    """(len(at), len(points)) matrix that reads straight lines through values at `points`, which increase, constant outside."""
    return np.stack([np.interp(at, points, one) for one in np.eye(len(points))], axis=1)


def _relative_rows(table, old):
    return table[:-3].reshape(*(2 * side - 1 for side in old), -1)


def resample_relative(table, old, new, line=cubic_spline):
    """(rows, heads) -> (rows', heads): a table of relative positions of a grid `old` = (h, w) for the grid `new`.

    As BEiT's fine-tuning does: cubic splines between `relative_coordinates`. The last three rows, the class token's, stay.

    Args:
        line: (positions, coordinates) -> matrix; `broken_line` for what timm does where there is no scipy.
    """
    lines = (np.eye(2 * o - 1) if o == n else line(np.arange(1 - n, n), relative_coordinates(o, n)) for o, n in zip(old, new))
    rows = np.einsum("yh,xw,hwd->yxd", *lines, _relative_rows(table, old).astype(np.float64), optimize=True)
    return np.concatenate([rows.reshape(-1, table.shape[1]).astype(np.float32), table[-3:]])


def resample_relative_simply(table, old, new):
    """As `resample_relative`, but by `resample_bicubic`, timm's "simple" way: all distances are stretched alike."""
    rows = resample_bicubic(_relative_rows(table, old), [2 * side - 1 for side in new])
    return np.concatenate([rows.reshape(-1, table.shape[1]), table[-3:]])


class RelativePositions:
    """Resamples a table of relative positions (rows, heads) from the file's grid to the model's.

    Of a grid (h, w) it has (2 * h - 1) * (2 * w - 1) + 3 rows; see `models.beit`.

    Args:
        name: of the weight.
        grid: (h, w) of the model.
        file_grid: (h, w) of the file where it is known, or "square"; None takes a table of the model's own length as it is.
        resample: `resample_relative` or `resample_relative_simply`.
    """

    def __init__(self, name, grid, file_grid=None, resample=resample_relative):
        self.names, self.grid, self.file_grid, self.resample = (name,), tuple(grid), file_grid, resample

    def source(self, shape):
        """(h, w) of a table of this shape. Raises CheckpointMismatchError if it cannot be one."""
        (name,) = self.names
        if len(shape) != 2 or shape[0] > MAX_POSITIONS:
            raise errors.CheckpointMismatchError(f"{name}: expected (n, heads), n at most {MAX_POSITIONS}, got {shape}")
        side = (math.isqrt(max(shape[0] - 3, 0)) + 1) // 2
        grid = self.file_grid if isinstance(self.file_grid, tuple) else (side, side)
        for each in [self.grid, grid] if self.file_grid is None else [grid]:
            if relative_distances(each) == shape[0]:
                return each
        raise errors.CheckpointMismatchError(
            f"{name}: the file has {shape[0]} rows; no {'square' if self.file_grid in (None, 'square') else grid} grid "
            "has so many. If the file's grid is not square, pass grid=(h, w)"
        )

    def plan(self, shapes):
        ((name, shape),) = shapes.items()
        old = self.source(shape)
        if old == self.grid:
            return shapes, None
        does = f"{name}: grid {old[0]} x {old[1]} resampled to {self.grid[0]} x {self.grid[1]}"
        return {name: (relative_distances(self.grid), shape[1])}, does

    def __call__(self, arrays):
        ((name, table),) = arrays.items()
        return {name: self.resample(table, self.source(table.shape), self.grid)}


def relative_distances(grid):
    """Rows of a table of relative positions for a grid (h, w): one for each distance, and the three of the class token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


class TokenCount:
    """No lossy step, but the refusal of one: weights that mix a fixed number of tokens fit one grid of patches only.

    Args:
        kernel: the weight whose first axis is that of the tokens.
        grid: (h, w) of the model. patch: (height, width) of its patches.
        file_grid: (h, w) of the file where it is known, "square", or None; then any grid of that many patches is right, since the
            file does not say which one it was.
    """

    def __init__(self, kernel, grid, patch, file_grid):
        self.names, self.grid, self.patch, self.file_grid = (kernel,), grid, patch, file_grid

    def pixels(self, shape):
        """(H, W) of the images that a file's kernel of this shape is for; None where it says none."""
        grid = self._made_for(_tokens(shape))
        return grid and tuple(side * p for side, p in zip(grid, self.patch))

    def check(self, name, record, shape, grid):
        """Raises ArgumentError where a model `name` of a grid (h, w) cannot use a record's file with a kernel of this shape."""
        misfit = self._misfit(_tokens(shape), tuple(grid))
        if misfit:
            raise errors.ArgumentError(f"{name}: {record.source}: {misfit}.")

    def plan(self, shapes):
        misfit = self._misfit(_tokens(shapes[self.names[0]]), tuple(self.grid))
        if misfit:
            raise errors.CheckpointMismatchError(misfit)
        return shapes, None

    def _made_for(self, tokens):
        """(h, w) of the patches that a file's tokens were: the one it records, else a square; None if it is none."""
        if not isinstance(self.file_grid, (str, type(None))) and math.prod(self.file_grid) == tokens:
            return tuple(self.file_grid)
        side = math.isqrt(tokens)
        return (side, side) if tokens and side**2 == tokens else None

    def _misfit(self, tokens, grid):
        made_for = self._made_for(tokens)
        if not tokens or grid == made_for or (self.file_grid is None and math.prod(grid) == tokens):
            return None
        sides = made_for and tuple(side * p for side, p in zip(made_for, self.patch))
        shape = f"{made_for[0]} x {made_for[1]}, input_shape={(*sides, 3)}" if made_for else "not of a square"
        return (
            f"its weights fix the grid of patches and cannot be resampled: they are for {tokens} ({shape}), but the model has "
            f"{grid[0]} x {grid[1]} of {self.patch[0]} x {self.patch[1]} pixels; build it with an input_shape that fits"
        )


def _tokens(shape):
    """The tokens that a file's mixing kernel (n, ...) is for; 0 where it cannot be one, which loading will report."""
    return shape[0] if shape and shape[0] <= MAX_POSITIONS else 0
