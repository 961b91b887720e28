import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable("keras_vit")
class Patches(keras.layers.Conv2D):
    """(b, H, W, c) -> (b, H / p, W / p, d): cuts the image into patches and maps each linearly to d numbers.

    Args:
        width: d, the width of the tokens.
        patch_size: p, or (height, width) of a patch in pixels.
    """

    def __init__(self, width, patch_size, **kwargs):
        self.width, self.patch_size = width, patch_size
        super().__init__(
            width,
            patch_size,
            strides=patch_size,
            padding="valid",
            data_format="channels_last",
            kernel_initializer="lecun_normal",
            **kwargs,
        )

    def get_config(self):
        kept = ("name", "trainable", "dtype")
        config = {key: value for key, value in super().get_config().items() if key in kept}
        return {**config, "width": self.width, "patch_size": self.patch_size}


def sincos2d(h, w, d, xp=np):
    """(1, h * w, d) float64: fixed positions of a grid, the sines and cosines of x, then of y (MoCo v3, arXiv 2104.02057).

    Args:
        xp: numpy, or `keras.ops` for sides that are tensors.
    """
    omega = 10_000.0 ** -(np.arange(d // 4) / (d // 4 - 1))
    y, x = (xp.arange(side, dtype="float64")[:, None] * omega for side in (h, w))
    lines = [xp.sin(x)[None], xp.cos(x)[None], xp.sin(y)[:, None], xp.cos(y)[:, None]]
    table = xp.concatenate([xp.broadcast_to(line, (h, w, d // 4)) for line in lines], -1)
    return xp.reshape(table, (1, -1, d))


def aligned(old, new):
    """(new, old) float32 matrix that resamples a line as `checkpoints.adapt.resample_grid` does; `new` may be a tensor.

    Linear between corners, the original's flaw included: a row that rounding puts outside the old line is 0.
    """
    step = (old - 1) / ops.cast(ops.maximum(new - 1, 1), "float64")
    at = (ops.arange(new, dtype="float64") * step)[:, None]
    hats = ops.maximum(0.0, 1 - ops.abs(at - np.arange(old, dtype="float64")))
    return ops.cast(ops.where(at <= old - 1, hats, 0.0), "float32")


def resampled(x, rows, columns):
    """(h, w, ...) -> (h', w', ...) float32: a matrix (h', h) along the rows, then one (w', w) along the columns."""
    rows, columns = ops.cast(rows, "float32"), ops.cast(columns, "float32")
    (h, w), rest, new_h, new_w = x.shape[:2], x.shape[2:], ops.shape(rows)[0], ops.shape(columns)[0]
    x = ops.matmul(rows, ops.reshape(ops.cast(x, "float32"), (h, -1)))
    x = ops.matmul(columns, ops.reshape(x, (new_h, w, -1)))
    return ops.reshape(x, (new_h, new_w, *rest))


@keras.saving.register_keras_serializable("keras_vit")
class MaskToken(keras.layers.Layer):
    """[(b, h, w, d), (b, h, w)] -> (b, h, w, d): one learned token in the place of each masked patch (arXiv 2106.08254)."""

    def build(self, input_shape):
        normal = keras.initializers.TruncatedNormal(stddev=0.02)
        self.token = self.add_weight(shape=(input_shape[0][-1],), initializer=normal, name="token")

    def call(self, inputs):
        x, hidden = inputs
        hidden = ops.cast(hidden, x.dtype)[..., None]
        return x * (1 - hidden) + ops.cast(self.token, x.dtype) * hidden

    def compute_output_shape(self, input_shape):
        return input_shape[0]


@keras.saving.register_keras_serializable("keras_vit")
class Tokens(keras.layers.Layer):
    """(b, h, w, d) -> (b, n, d): rows of the grid one after the other, a class token before them, plus positions.

    n is h * w, and one more for each learned token. Positions are learned for the grid that the layer is built for; on another
    one, which TensorFlow may leave open until the graph runs, they are resampled as loading a checkpoint does.

    Args:
        class_token: whether to put a learned token before the grid's.
        class_position: whether the learned tokens have positions too, the first of the table; without, positions are added
            before they are put in front.
        positions: "learned", "sincos2d" for the fixed ones of `sincos2d`, or "none".
        stddev: of the learned positions' random values at the start.
        distillation_token: whether a second learned token follows the class token (DeiT, arXiv 2012.12877).
        token_stddev: of the learned tokens' random values at the start.
    """

    def __init__(
        self,
        class_token=True,
        class_position=True,
        positions="learned",
        stddev=0.02,
        distillation_token=False,
        token_stddev=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.class_token, self.class_position, self.kind, self.stddev = class_token, class_position, positions, stddev
        self.distillation_token, self.token_stddev = distillation_token, token_stddev
        self.learned = bool(class_token) + bool(distillation_token)  # tokens before the grid's
        self.before = self.learned if class_position else 0  # positions before the grid's

    def get_config(self):
        config = dict(class_token=self.class_token, class_position=self.class_position, positions=self.kind, stddev=self.stddev)
        config |= dict(distillation_token=self.distillation_token, token_stddev=self.token_stddev)
        return {**super().get_config(), **config}

    def build(self, input_shape):
        _, h, w, d = input_shape
        self.grid = (h, w)
        start = keras.initializers.RandomNormal(stddev=self.token_stddev) if self.token_stddev else "zeros"
        names = ["cls"] * bool(self.class_token) + ["dist"] * bool(self.distillation_token)
        self.tokens = [self.add_weight(shape=(1, 1, d), initializer=start, name=name) for name in names]
        if self.kind == "none":
            self.positions = np.zeros((1, 1, 1), "float32")
        elif self.kind == "sincos2d":
            if d % 4 or d < 8:
                raise ValueError(f"Tokens {self.name!r}: positions='sincos2d' need a width that is a multiple of 4, got {d}.")
            self.positions = sincos2d(h, w, d).astype("float32")
        else:
            shape, learned = (1, self.before + h * w, d), self.kind == "learned"
            self.positions = self.add_weight(shape=shape, initializer=self.first_positions, trainable=learned, name="positions")

    def first_positions(self, shape, dtype=None):
        """What a table of positions that is a weight starts with."""
        return keras.initializers.RandomNormal(stddev=self.stddev)(shape, dtype)

    def positions_at(self, grid):
        """(1, n, d): the positions of a grid (h, w), the learned tokens' first where they have some; the sides may be tensors."""
        if self.kind == "none" or (all(isinstance(side, int) for side in grid) and tuple(grid) == self.grid):
            return self.positions
        if self.kind == "sincos2d":
            return ops.cast(sincos2d(*grid, self.positions.shape[-1], ops), "float32")
        table, d = ops.cast(self.positions, "float32"), self.positions.shape[-1]
        rows = resampled(ops.reshape(table[0, self.before :], (*self.grid, d)), *map(self.line, self.grid, grid))
        rows = ops.reshape(rows, (1, -1, d))
        return ops.concatenate([table[:, : self.before], rows], axis=1) if self.before else rows

    line = staticmethod(aligned)  # (old side, new side) -> the matrix that resamples positions along it

    def call(self, x):
        h, w = ops.shape(x)[1:3]
        x = ops.reshape(x, (-1, h * w, x.shape[-1]))
        positions = ops.cast(self.positions_at((h, w)), x.dtype)
        if not self.learned:
            return x + positions
        size = (ops.shape(x)[0], 1, x.shape[-1])
        tokens = [ops.broadcast_to(ops.cast(token, x.dtype), size) for token in self.tokens]
        if self.class_position:
            return ops.concatenate([*tokens, x], axis=1) + positions
        return ops.concatenate([*tokens, x + positions], axis=1)

    def compute_output_shape(self, input_shape):
        b, h, w, d = input_shape
        return (b, None if None in (h, w) else h * w + self.learned, d)
