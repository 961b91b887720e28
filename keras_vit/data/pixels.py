"""How a checkpoint wants its images: a fact that belongs to the weights and travels with them."""

import sys
from dataclasses import asdict, dataclass, fields
from math import floor, isfinite
from numbers import Real

import keras
import numpy as np

from keras_vit.errors import ArgumentError

RESIZES, CROPS = ("bilinear", "bicubic"), ("squash", "center", "cover")
LEAST_FRACTION = 0.01
IMAGENET_MEAN = (123.675, 116.28, 103.53)  # 255 * (0.485, 0.456, 0.406), of the training images, as PyTorch's packages have it
IMAGENET_STD = (58.395, 57.12, 57.375)  # 255 * (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pixels:
    """The preprocessing that a checkpoint was trained or evaluated with.

    The default is that of google-research/vision_transformer (`vit_jax/input_pipeline.py`): the image is squashed to the
    size asked for, bilinear without antialias, and its values are brought to [-1, 1] by `(x - 127.5) / 127.5`. `IMAGENET` is that
    of PyTorch's packages, `dataclasses.replace(IMAGENET, crop_fraction=0.9)` another one of theirs.

    Args:
        mean: three finite numbers, red, green, blue, on the 0..255 scale; subtracted.
        std: three finite numbers above 0, same order and scale; divided by after that.
        resize: "bilinear", or "bicubic" (Keys's kernel; a = -0.5 with antialias), the interpolation.
        antialias: whether the interpolation's support widens when an image is made smaller. It is then Pillow's: first along the
            width, then the height, each rounded and cut to 0..255. On the photographs of scikit-learn, for 224 of 256 pixels,
            1 value in 2,000 (bicubic; bilinear 1 in 200) differs from Pillow's, by 1 of 255.
        crop: what evaluation takes of an image whose aspect ratio is another one than that of the size asked for.
            - "squash": all of it; height and width are resized independently.
            - "center": the aspect ratio is kept. The image is resized to cover floor(size / crop_fraction), of a square the
              shorter side, and the size asked for is cut out of its centre; torchvision's `Resize` and `CenterCrop`.
            - "cover": as "center" with crop_fraction 1, but the longer side is rounded to the nearest whole number, a half to the
              even one, and the corner is rounded down; `PreprocessImages(crop=True)` of google-research/vision_transformer.
        crop_fraction: from 0.01 to 1; with "squash" and "cover" it must be 1.
        whole: whether evaluation cuts the resized values down to whole numbers, as that class does for LiT.

    Raises:
        ArgumentError: a value is none of those.
    """

    mean: tuple = (127.5, 127.5, 127.5)
    std: tuple = (127.5, 127.5, 127.5)
    resize: str = "bilinear"
    antialias: bool = False
    crop: str = "squash"
    crop_fraction: float = 1.0
    whole: bool = False

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three_numbers(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise ArgumentError(f"Pixels.std must be above 0, got {self.std}. Give the deviations on the 0..255 scale.")
        choices = dict(resize=RESIZES, antialias=(False, True), crop=CROPS, whole=(False, True))
        for name, known in choices.items():
            value = getattr(self, name)
            if not any(value is k or (isinstance(k, str) and value == k) for k in known):
                raise ArgumentError(f"Pixels.{name} must be one of {known}, got {value!r}. Leave it out for {known[0]!r}.")
        fraction = self.crop_fraction
        least = LEAST_FRACTION if self.crop == "center" else 1
        if not isinstance(fraction, Real) or isinstance(fraction, bool) or not least <= fraction <= 1:
            raise ArgumentError(
                f"Pixels.crop_fraction must be a number from {LEAST_FRACTION} to 1, and 1 with other crops than 'center'; got "
                f"{fraction!r} with crop={self.crop!r}. Leave it out for 1."
            )
        object.__setattr__(self, "crop_fraction", float(fraction))

    def covered(self, size):
        """(height, width) that "center" resizes an image to cover before it cuts out `size`, (height, width)."""
        return tuple(floor(side / self.crop_fraction) for side in size)

    def describe(self, size):
        """How an image is brought to `size`, (height, width), in words."""
        how = f"{self.resize} {'with' if self.antialias else 'without'} antialiasing"
        how += ", values cut down to whole numbers" if self.whole else ""
        height, width = size
        if self.crop == "squash":
            return f"{how}, to {height} x {width} whatever the aspect ratio"
        cover = self.covered(size)
        covers = f"the shorter side to {cover[0]}" if height == width else f"to cover {cover[0]} x {cover[1]}"
        return f"{how}, {covers}, then the central {height} x {width}"

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


# How DeiT's authors evaluate: of 256 pixels the central 224
IMAGENET = Pixels(IMAGENET_MEAN, IMAGENET_STD, resize="bicubic", antialias=True, crop="center", crop_fraction=0.875)
