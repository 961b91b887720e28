"""big_vision's preprocessing strings, such as "decode|resize(224)|value_range(-1, 1)", as functions for tf.data.

A string is only ever read: an op is a name of `OPS`, an argument a literal. The numbers are those of google-research/big_vision
(`big_vision/pp/ops_image.py`, `ops_general.py`); random draws are not, they depend on seeds alone.

    prepare = preprocess('decode|inception_crop(224)|flip_lr|value_range|onehot(10, "label", "labels")|keep("image", "labels")')
    data = data.repeat().enumerate().map(lambda index, features: prepare({**features, "seed": index})).batch(32)
"""

import ast
import difflib
import inspect
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import tensorflow as tf

from keras_vit.data import augment, pipeline
from keras_vit.errors import ArgumentError

MAX_SPEC, MAX_OP, MAX_BRACKETS = 10_000, 1_000, 20  # characters, characters, opening brackets in an op: bounds the parser's depth
MAX_SIDE, MAX_CLASSES = 8_000, 1_000_000  # 8,000 x 8,000 is pipeline.MAX_PIXELS
METHODS = ("bilinear", "nearest", "bicubic", "area", "lanczos3", "lanczos5", "gaussian", "mitchellcubic")


def preprocess(spec, *, seed=0):
    """Makes a function of a preprocessing string: a dict of features, for one example -> a dict of features.

    Ops are separated by "|" and applied in order, an empty one is skipped. An op is a name or a call with literals:

    - `decode`: a file's content, scalar string -> uint8 (h, w, 3); see `pipeline.decode`.
    - `resize(size, method="bilinear", antialias=False)`: `size` is one number or [height, width].
    - `resize_small(smaller_size, method="area", antialias=False)`, `resize_long(longer_size, method="area", antialias=True)`:
      the smaller, or longer, side becomes that; the aspect ratio stays. All resizing gives the dtype that came in; to an integer
      it saturates and cuts the fraction off.
    - `central_crop(crop_size=None)`: None is the largest square. `random_crop(crop_size)`.
    - `inception_crop(size=None, area_min=5, area_max=100, method="bilinear", antialias=False)`: a random box of that share of
      the image, in percent, width / height 0.75 to 1.33, then resized unless `size` is None.
    - `decode_jpeg_and_inception_crop(size=None, area_min=5, area_max=100, ratio_min=0.75, ratio_max=1.33, method="bilinear",
      antialias=False)`: `decode` (of any format), then the same.
    - `flip_lr`: left-right, with probability 1/2.
    - `randaug(num_layers=2, magnitude=10)`: `augment.randaugment`, on uint8.
    - `value_range(vmin=-1, vmax=1, in_min=0, in_max=255, clip_values=False)`: float32, in_min..in_max becomes vmin..vmax; the
      last two may be lists, one number for each channel.
    - `onehot(depth, key="labels", key_result=None, multi=True, on=1.0, off=0.0)`: whole numbers -> float32; several labels
      become one vector (depth,), or with `multi=False` (..., depth).
    - `keep(key, *keys)`, `drop(key, *keys)`: keys that the features lack are ignored. `copy(inkey, outkey)`.

    All but the last four read and write features["image"]; `inkey=`, `outkey=`, or `key=` for both, name another feature.

    Args:
        spec: the string, at most 10,000 characters.
        seed: of all random ops. Where `spec` has any, features["seed"] must be a whole number that differs from example to
            example; the same two seeds give the same draws, and each op of a string its own.

    Returns:
        `function(features) -> features`, for eager use or `Dataset.map`; the dict passed in is left as it is.

    Raises:
        ArgumentError: an unknown op; an argument that is missing, unknown, of the wrong kind or not a literal.
            From the function: a feature that is missing or of the wrong kind, an image smaller than a crop, a label out of range.
        tf.errors.InvalidArgumentError: from the function, a file that cannot be decoded; inside tf.data also a crop or a label
            that only the values show to be wrong.
    """
    if not isinstance(spec, str) or len(spec) > MAX_SPEC:
        got = f"{len(spec):,} characters" if isinstance(spec, str) else repr(spec)
        raise ArgumentError(
            f"spec must be a string of at most {MAX_SPEC:,} characters, such as 'resize(224)|flip_lr', got {got}."
        )
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise ArgumentError(f"seed must be a whole number of 64 bits, got {seed!r}.")
    steps = [_step(text.strip()) for text in spec.split("|") if text.strip()]
    drawing = [name for name, _ in steps if OPS[name].random]

    def run(features):
        if not isinstance(features, dict):
            raise ArgumentError(f"features must be a dict such as {{'image': image}}, got {type(features).__name__}. Wrap it.")
        features = dict(features)
        if drawing:
            if "seed" not in features:
                raise ArgumentError(
                    f"{drawing[0]} is random: features['seed'] must be {INDEX}, got only {list(features)}. "
                    "Add it, for example with Dataset.enumerate()."
                )
            index = tf.cast(_value(drawing[0], features, "seed", INDEX), tf.int64)
            key = tf.random.experimental.stateless_fold_in(tf.constant([seed, pipeline.AUGMENT], tf.int64), index)
        for position, (name, step) in enumerate(steps):
            draws = [tf.random.experimental.stateless_fold_in(key, tf.constant(position, tf.int64))] if name in drawing else []
            features = step(features, *draws)
        return features

    return run


@dataclass(frozen=True)
class _Kind:
    """What an argument or a feature must be, in words and as a test; the words are its repr, so that signatures show them."""

    words: str
    holds: callable

    def __repr__(self):
        return self.words


def _whole(value, most):
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e30  # False for NaN


def _list(value, holds):
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(holds, value))


def _size(value):
    return _whole(value, MAX_SIDE) or (_list(value, SIDE.holds) and len(value) == 2)


SIDE = _Kind(f"a whole number from 1 to {MAX_SIDE:,}", lambda value: _whole(value, MAX_SIDE))
SIZE = _Kind(f"a whole number from 1 to {MAX_SIDE:,} or two of them", _size)
ANY_SIZE = _Kind(f"{SIZE}, or None", lambda value: value is None or _size(value))
CLASSES = _Kind(f"a whole number from 1 to {MAX_CLASSES:,}", lambda value: _whole(value, MAX_CLASSES))
METHOD = _Kind(f"one of {METHODS}", lambda value: isinstance(value, str) and value in METHODS)
FLAG = _Kind("True or False", lambda value: isinstance(value, bool))
NUMBER = _Kind("a number of magnitude up to 1e30", _number)
NUMBERS = _Kind(f"{NUMBER} or a list of them", lambda value: _number(value) or _list(value, _number))
PERCENT = _Kind("a number above 0, at most 100", lambda value: _number(value) and 0 < value <= 100)
RATIO = _Kind("a number above 0, at most 1e30", lambda value: _number(value) and value > 0)
KEY = _Kind("a string", lambda value: isinstance(value, str))
ANY_KEY = _Kind("a string or None", lambda value: value is None or isinstance(value, str))

INDEX = _Kind("one whole number, another for each example", lambda x: x.dtype.is_integer and x.shape.rank == 0)
LAYERS = _Kind("a whole number from 1 to 16", lambda value: _whole(value, 16))
MAGNITUDE = _Kind("a number from 0 to 100", lambda value: _number(value) and 0 <= value <= 100)
LABELS = _Kind("whole numbers", lambda x: x.dtype.is_integer)
VALUES = _Kind("numbers", lambda x: x.dtype.is_integer or x.dtype.is_floating)
IMAGE = _Kind("a decoded image (height, width, channels)", lambda x: VALUES.holds(x) and x.shape.rank == 3)
BYTES = _Kind("a uint8 image (height, width, 3)", lambda x: x.dtype == tf.uint8 and x.shape.rank == 3 and x.shape[-1] == 3)
ENCODED = _Kind("the content of an image file, one string", lambda x: x.dtype == tf.string and x.shape.rank == 0)


def _decode():
    return pipeline.decode


def _resize(size: SIZE, method: METHOD = "bilinear", antialias: FLAG = False):
    return lambda image: _resized(image, _pair(size), method, antialias)


def _resize_small(smaller_size: SIDE, method: METHOD = "area", antialias: FLAG = False):
    return lambda image: _resized_side(image, smaller_size, tf.reduce_min, method, antialias)


def _resize_long(longer_size: SIDE, method: METHOD = "area", antialias: FLAG = True):
    return lambda image: _resized_side(image, longer_size, tf.reduce_max, method, antialias)


def _central_crop(crop_size: ANY_SIZE = None):
    def crop(image):
        extent = tf.shape(image)[:2]
        if crop_size is None:
            height = width = tf.reduce_min(extent)
        else:
            (height, width), image = _pair(crop_size), _covered("central_crop", image, _pair(crop_size))
        return tf.image.crop_to_bounding_box(image, (extent[0] - height) // 2, (extent[1] - width) // 2, height, width)

    return crop


def _random_crop(crop_size: SIZE):
    size = _pair(crop_size)
    return lambda image, seed: tf.image.stateless_random_crop(
        _covered("random_crop", image, size), [*size, image.shape[-1]], seed
    )


def _inception_crop(
    size: ANY_SIZE = None, area_min: PERCENT = 5, area_max: PERCENT = 100, method: METHOD = "bilinear", antialias: FLAG = False
):
    return _crop_and_resize(size, (area_min, area_max), (0.75, 1.33), method, antialias)


def _decode_jpeg_and_inception_crop(
    size: ANY_SIZE = None,
    area_min: PERCENT = 5,
    area_max: PERCENT = 100,
    ratio_min: RATIO = 0.75,
    ratio_max: RATIO = 1.33,
    method: METHOD = "bilinear",
    antialias: FLAG = False,
):
    crop = _crop_and_resize(size, (area_min, area_max), (ratio_min, ratio_max), method, antialias)
    return lambda data, seed: crop(pipeline.decode(data), seed)


def _flip_lr():
    return tf.image.stateless_random_flip_left_right


def _randaug(num_layers: LAYERS = 2, magnitude: MAGNITUDE = 10):
    return lambda image, seed: augment.randaugment(image, num_layers, magnitude, seed)


def _value_range(vmin: NUMBER = -1, vmax: NUMBER = 1, in_min: NUMBERS = 0, in_max: NUMBERS = 255.0, clip_values: FLAG = False):
    low, high = np.float32(in_min), np.float32(in_max)
    channels = max(low.size, high.size)
    if {low.size, high.size} - {1, channels} or (low == high).any():
        raise ArgumentError(f"value_range: in_min and in_max must differ and be of one length, got {in_min} and {in_max}.")

    def scale(values):
        if channels > 1 and values.shape[-1:] != [channels]:
            raise ArgumentError(f"value_range: the last axis must be {channels}, as in_min and in_max are, got {values.shape}.")
        values = vmin + (tf.cast(values, tf.float32) - low) / (high - low) * (vmax - vmin)
        return tf.clip_by_value(values, min(vmin, vmax), max(vmin, vmax)) if clip_values else values

    return scale


def _onehot(
    depth: CLASSES,
    key: KEY = "labels",
    key_result: ANY_KEY = None,
    multi: FLAG = True,
    on: NUMBER = 1.0,
    off: NUMBER = 0.0,
):
    def encode(features):
        hot = pipeline.one_hot(tf.cast(_value("onehot", features, key, LABELS), tf.int64), depth) > 0
        if multi:
            hot = tf.reduce_any(tf.reshape(hot, [-1, depth]), 0)
        return {**features, key_result or key: tf.where(hot, float(on), float(off))}

    return encode


def _keep(key: KEY, *keys: KEY):
    return lambda features: {name: value for name, value in features.items() if name in (key, *keys)}


def _drop(key: KEY, *keys: KEY):
    return lambda features: {name: value for name, value in features.items() if name not in (key, *keys)}


def _copy(inkey: KEY, outkey: KEY):
    return lambda features: {**features, outkey: _feature("copy", features, inkey)}


@dataclass(frozen=True)
class _Op:
    """`make(arguments)` gives the function; it changes one feature that must be `takes`, or, with None, the whole dict."""

    make: callable
    takes: _Kind | None = IMAGE
    random: bool = False


OPS = {
    "decode": _Op(_decode, ENCODED),
    "decode_jpeg_and_inception_crop": _Op(_decode_jpeg_and_inception_crop, ENCODED, random=True),
    "resize": _Op(_resize),
    "resize_small": _Op(_resize_small),
    "resize_long": _Op(_resize_long),
    "central_crop": _Op(_central_crop),
    "random_crop": _Op(_random_crop, random=True),
    "inception_crop": _Op(_inception_crop, random=True),
    "flip_lr": _Op(_flip_lr, random=True),
    "randaug": _Op(_randaug, BYTES, random=True),
    "value_range": _Op(_value_range, VALUES),
    "onehot": _Op(_onehot, None),
    "keep": _Op(_keep, None),
    "drop": _Op(_drop, None),
    "copy": _Op(_copy, None),
}


def _step(text):
    """One op as text -> its name, and a function: features, and a seed where it is random -> features."""
    name, args, keywords = _parsed(text)
    op = OPS[name]
    routes = {"key": ANY_KEY, "inkey": KEY, "outkey": KEY} if op.takes else {}
    route = {way: keywords.pop(way) for way in routes if way in keywords}
    signature = inspect.signature(op.make)
    try:
        bound = signature.bind(*args, **keywords)
    except TypeError as error:
        more = f", and by name {', '.join(routes)}" if routes else ""
        raise ArgumentError(f"{name}: {error}. It takes {signature}{more}; got {text!r:.80}.") from None
    for argument, value in bound.arguments.items():
        parameter = signature.parameters[argument]
        for each in value if parameter.kind is parameter.VAR_POSITIONAL else [value]:
            _check(name, argument, parameter.annotation, each)
    for way, value in route.items():
        _check(name, way, routes[way], value)
    function = op.make(*bound.args, **bound.kwargs)
    if op.takes is None:
        return name, function
    source, target = (route.get("key") or route.get(way, "image") for way in ("inkey", "outkey"))

    def change(features, *seed):
        return {**features, target: function(_value(name, features, source, op.takes), *seed)}

    return name, change


def _parsed(text):
    """'resize(32, antialias=True)' -> ("resize", [32], {"antialias": True}): a known name, literals, nothing else."""
    if len(text) > MAX_OP or sum(map(text.count, "([{")) > MAX_BRACKETS:
        limits = f"{MAX_OP:,} characters and {MAX_BRACKETS} brackets"
        raise ArgumentError(f"An op has at most {limits}, got {len(text):,} characters, {text!r:.80}.")
    call, reason = None, "neither"
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error
    called = call.func if isinstance(call, ast.Call) else call
    if not isinstance(called, ast.Name):
        raise ArgumentError(f"An op must be a name, or a call such as resize(32, method='area'), got {text!r:.80} ({reason}).")
    name = called.id
    if name not in OPS:
        near = difflib.get_close_matches(name, OPS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(f"There is no op {name!r:.80}.{hint} Known ops: {', '.join(OPS)}.")
    if called is call:
        return name, [], {}
    keywords = [keyword.arg for keyword in call.keywords]
    if None in keywords or len(set(keywords)) < len(keywords):
        raise ArgumentError(f"{name}: an argument must be named once, and without **, got {text!r:.80}.")

    def literal(node):
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, OverflowError, RecursionError):
            got = ast.get_source_segment(text, node)
            raise ArgumentError(f"{name}: an argument must be a literal (number, string, list, ...), got {got!r:.80}.") from None

    return name, [literal(node) for node in call.args], {keyword.arg: literal(keyword.value) for keyword in call.keywords}


def _check(op, argument, kind, value):
    if not kind.holds(value):
        raise ArgumentError(f"{op}: {argument} must be {kind}, got {value!r:.80}.")


def _feature(op, features, key):
    if key not in features:
        raise ArgumentError(f"{op}: there is no feature {key!r}, only {list(features)}. Add it, or name another one.")
    return features[key]


def _value(op, features, key, kind):
    """features[key] as a tensor of that kind."""
    value = _feature(op, features, key)
    try:
        value = tf.convert_to_tensor(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"{op}: feature {key!r} must be {kind}, got {type(value).__name__}. Pass an array.") from error
    if not kind.holds(value):
        raise ArgumentError(f"{op}: feature {key!r} must be {kind}, got {value.dtype.name} of shape {value.shape}.")
    return value


def _pair(size):
    return [size, size] if isinstance(size, int) else list(size)


def _covered(op, image, size):
    """`image`, or an error where it is smaller than `size` (height, width)."""
    extent = tf.shape(image)[:2]
    known, message = tf.get_static_value(extent), f"{op}: the image must be at least {tuple(size)} pixels, got"
    if known is not None and (known < size).any():
        raise ArgumentError(f"{message} {tuple(known.tolist())}. Put a resize before it.")
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(extent >= size), [message, extent])]):
        return tf.identity(image)


def _resized(image, size, method, antialias):
    return tf.saturate_cast(tf.image.resize(image, size, method, antialias=antialias), image.dtype)


def _resized_side(image, side, of, method, antialias):
    """`side` becomes the smaller or larger (`of`) of height and width; float32 rounding to even, as the original."""
    extent = tf.cast(tf.shape(image)[:2], tf.float32)
    size = tf.cast(tf.round(extent * (tf.cast(side, tf.float32) / of(extent))), tf.int32)
    return _resized(image, tf.maximum(size, 1), method, antialias)


def _crop_and_resize(size, area, ratio, method, antialias):
    if area[0] > area[1] or ratio[0] > ratio[1]:
        raise ArgumentError(f"An inception crop's least area and ratio must not exceed the largest, got {area} and {ratio}.")

    def crop(image, seed):
        y, x, height, width = tf.unstack(pipeline.random_box(tf.shape(image), seed, (area[0] / 100, area[1] / 100), ratio))
        image = tf.image.crop_to_bounding_box(image, y, x, height, width)
        return image if size is None else _resized(image, _pair(size), method, antialias)

    return crop
