"""How a checkpoint wants its images: a fact that belongs to the weights and travels with them."""

import sys
from dataclasses import asdict, dataclass, fields
from math import isfinite
from numbers import Real

import keras
import numpy as np

from keras_vit.errors import ArgumentError


@dataclass(frozen=True)
class Pixels:
    """The preprocessing that a checkpoint was trained with.

    The default is that of google-research/vision_transformer (`vit_jax/input_pipeline.py`): the image is squashed to the
    size asked for, bilinear without antialias, and its values are brought to [-1, 1] by `(x - 127.5) / 127.5`.

    Args:
        mean: three finite numbers, red, green, blue, on the 0..255 scale; subtracted.
        std: three finite numbers above 0, same order and scale; divided by after that.
        resize: "bilinear", the interpolation.
        antialias: whether the interpolation's support widens when an image is made smaller.
        crop: "squash", height and width are resized independently, whatever the aspect ratio, and nothing is cut off.

    Raises:
        ArgumentError: a value is none of those.
    """

    mean: tuple = (127.5, 127.5, 127.5)
    std: tuple = (127.5, 127.5, 127.5)
    resize: str = "bilinear"
    antialias: bool = False
    crop: str = "squash"

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three_numbers(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise ArgumentError(f"Pixels.std must be above 0, got {self.std}. Give the deviations on the 0..255 scale.")
        for name, known in (("resize", ("bilinear",)), ("antialias", (False, True)), ("crop", ("squash",))):
            value = getattr(self, name)
            if not any(value is k or (isinstance(k, str) and value == k) for k in known):
                raise ArgumentError(f"Pixels.{name} must be one of {known}, got {value!r}. Leave it out for {known[0]!r}.")

    def normalize(self, x):
        """(..., H, W, 3) on the 0..255 scale -> the same shape, float32: `(float32(x) - mean) / std`.

        Exact in numpy, eager TensorFlow and tf.data; a compiler (XLA, a `tf.function`'s optimizer) may multiply by `1 / std`
        instead, which moves the last bit.

        Args:
            x: numpy array (or what numpy reads as one), `tf.Tensor` on any backend, tensor of the current backend, or
                KerasTensor; integers or floats.

        Returns:
            The same kind of tensor as `x`; numpy for anything that is not a tensor.

        Raises:
            ArgumentError: the last axis is not 3, there are fewer than 3 axes, or the values are neither integers nor floats.
        """
        # One number for all channels where they agree: broadcasting three takes TensorFlow many times as long
        mean, std = (np.float32(values if len(set(values)) > 1 else values[0]) for values in (self.mean, self.std))
        if isinstance(x, keras.KerasTensor) or keras.ops.is_tensor(x):
            _check_images(x.shape, keras.backend.standardize_dtype(x.dtype))
            return (keras.ops.cast(x, "float32") - mean) / std
        tf = sys.modules.get("tensorflow")  # no import: a tf.Tensor can only exist once someone else has imported it
        if tf is not None and tf.is_tensor(x):
            _check_images(x.shape, x.dtype.name)
            return (tf.cast(x, tf.float32) - mean) / std
        x = np.asarray(x)
        _check_images(x.shape, x.dtype.name)
        return (x.astype(np.float32) - mean) / std

    def asdict(self):
        """This record as a dict of lists, strings and booleans, as JSON keeps it; `from_dict` reads it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, record):
        """The `Pixels` that `asdict` described; what is missing takes its default.

        Raises:
            ArgumentError: `record` is no dict, has an unknown key, or a value that `Pixels` refuses.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(record, dict) or set(record) - set(known):
            got = sorted(map(str, record)) if isinstance(record, dict) else repr(record)
            raise ArgumentError(f"Pixels.from_dict expects a dict with keys among {known}, got {got}. Pass what asdict() gave.")
        return cls(**record)


def _three_numbers(name, value):
    numbers = tuple(value) if isinstance(value, (tuple, list, np.ndarray)) else ()
    if len(numbers) != 3 or not all(isinstance(n, Real) and not isinstance(n, bool) and isfinite(n) for n in numbers):
        raise ArgumentError(f"Pixels.{name} must be three finite numbers (red, green, blue; 0..255 scale), got {value!r}.")
    return tuple(map(float, numbers))


def _check_images(shape, dtype):
    rank = len(shape) if getattr(shape, "rank", 0) is not None else None
    if rank is None or rank < 3 or shape[-1] != 3:
        got = "an unknown shape" if rank is None else f"shape {tuple(shape)}"
        raise ArgumentError(f"Images must have the shape (..., height, width, 3), got {got}. Convert to RGB, channels last.")
    if not dtype.startswith(("uint", "int", "float", "bfloat")):
        raise ArgumentError(f"Images must be integers or floats on the 0..255 scale, got {dtype}. Cast them, e.g. to uint8.")
