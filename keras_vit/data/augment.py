"""Augmentation on tf.data: RandAugment as "How to train your ViT?" used it, Mixup, CutMix, random erasing, small shifts.

The crop and flip of the original are in `data.pipeline`, whose `train_batches` applies all of this where it is asked to. Every
draw is a function of a seed (two integers) alone. Keras's own layers of these names draw from a stateful generator, for each
example of a batch: they cannot give the same batch to one worker and to several, nor after a resume.

RandAugment is that of google-research/big_vision (`pp/archive/autoaugment.py`, which came from tensorflow/tpu), value by value.
There `rotate`, `translate` and `transform` are tensorflow-addons', here they are TensorFlow's own projective transform.
"""

import functools
import math
from numbers import Real

import numpy as np
import tensorflow as tf

from keras_vit.errors import ArgumentError

FILL = 128  # what an operation that moves pixels, or cuts them out, leaves behind
ERASING_TRIES = 64  # boxes drawn for one image; that none of them fits has a probability below 1e-9

# RandAugment's layers and magnitude, Mixup's alpha: "How to train your ViT?" (arXiv 2106.10270), as in big_vision's vit_i21k.py
LEVELS = {
    "none": (0, 0, 0.0),
    "light1": (2, 0, 0.0),  # not nothing: operations at magnitude 0
    "light2": (2, 10, 0.2),
    "medium1": (2, 15, 0.2),
    "medium2": (2, 15, 0.5),
    "strong1": (2, 20, 0.5),
    "strong2": (2, 20, 0.8),
}


def augreg_level(name):
    """(RandAugment's layers, its magnitude, Mixup's alpha) of a level of "How to train your ViT?".

    The published files and the recipe name the same seven levels differently. Here a name is the recipe's, a key of `LEVELS`; of
    the files' names "light0" is accepted too and means light1. A file's "light1" is light2 here: pass "light2" for it. (That is
    inferred from the order of the names; nothing published says it.)

    Raises:
        ArgumentError: there is no such level.
    """
    found = LEVELS.get("light1" if name == "light0" else name) if isinstance(name, str) else None
    if found is None:
        raise ArgumentError(f"An augmentation level must be one of {', '.join(LEVELS)}, got {name!r}.")
    return found


# ---------------------------------------------------------------- the 16 operations: uint8 (h, w, 3) -> the same


def auto_contrast(image):
    """(h, w, 3) -> the same: stretches each channel to 0..255; a channel of one value stays."""
    planes = _planes(image)
    low, high = (tf.cast(of(planes, 1, keepdims=True), tf.float32) for of in (tf.reduce_min, tf.reduce_max))
    scale = 255.0 / tf.where(high > low, high - low, 1.0)
    stretched = _bytes(tf.cast(planes, tf.float32) * scale + -low * scale)
    return _interleaved(tf.where(high > low, stretched, planes), image)


def equalize(image):
    """(h, w, 3) -> the same: makes each channel's histogram flat; a channel with too few values for that stays."""
    values = tf.cast(_planes(image), tf.int32) + [[0], [256], [512]]
    counts = tf.reshape(tf.math.bincount(tf.reshape(values, [-1]), minlength=768, maxlength=768), [3, 256])
    last = tf.gather(tf.reshape(counts, [-1]), tf.reduce_max(values, 1, keepdims=True))
    step = (tf.shape(values)[1] - last) // 255
    table = (tf.cumsum(counts, axis=1, exclusive=True) + step // 2) // tf.maximum(step, 1)
    table = tf.where(step > 0, tf.clip_by_value(table, 0, 255), tf.range(256))
    return _interleaved(tf.gather(tf.reshape(tf.cast(table, tf.uint8), [-1]), values), image)


def invert(image):
    """(h, w, 3) -> the same: 255 minus the value."""
    return tf.bitwise.invert(image)


def rotate(image, degrees):
    """(h, w, 3) -> the same: turns about the centre, counter-clockwise where `degrees` is above 0; nearest neighbour."""
    angle = tf.cast(degrees, tf.float32) * (math.pi / 180)
    height, width = (tf.cast(side - 1, tf.float32) for side in tf.unstack(tf.shape(image)[:2]))
    cosine, sine = tf.cos(angle), tf.sin(angle)
    right = (width - (cosine * width - sine * height)) / 2
    down = (height - (sine * width + cosine * height)) / 2
    return _transformed(image, [cosine, -sine, right, sine, cosine, down])


def posterize(image, bits):
    """(h, w, 3) -> the same: keeps the highest `bits` of 8, at least one."""
    shift = tf.constant(min(max(8 - bits, 0), 7), tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift)


def solarize(image, threshold):
    """(h, w, 3) -> the same: inverts the values from `threshold` on.

    The original's threshold is a byte: 256, its argument at magnitude 10, counts as 0 and inverts all; 384 counts as 128.
    """
    return tf.bitwise.bitwise_xor(image, 255 * tf.cast(image >= tf.constant(threshold % 256, tf.uint8), tf.uint8))


def color(image, factor):
    """(h, w, 3) -> the same: moves away from gray, the image at `factor` 0, over itself at 1."""
    return _blended(tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image)), image, factor)


def contrast(image, factor):
    """(h, w, 3) -> the same: moves away from one gray, the image at `factor` 0, over itself at 1.

    That gray is meant to be the mean. The original divides the number of pixels by 256 instead (at most 255): 196 at 224 x 224.
    """
    return _blended(tf.cast(tf.minimum(tf.size(image) // 3 // 256, 255), tf.uint8), image, factor)


def brightness(image, factor):
    """(h, w, 3) -> the same: times `factor`."""
    return _blended(tf.constant(0, tf.uint8), image, factor)


def sharpness(image, factor):
    """(h, w, 3), at least 3 x 3 -> the same: moves away from a smoothed image; the outermost pixels stay."""
    # A convolution adds as the processor has it, and a sum that is a whole number is then cut to that or to the one below. This
    # is how the original's was added: row by row in float32, each product fused with its sum, which float64 shows exactly.
    kernel = np.float32([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / np.float32(13)
    values, smooth = tf.cast(image, tf.float64), 0.0
    height, width = (tf.shape(image)[axis] - 2 for axis in (0, 1))
    for y, x in np.ndindex(3, 3):
        product = values[y : y + height, x : x + width] * np.float64(kernel[y, x])
        smooth = tf.cast(product + tf.cast(smooth, tf.float64), tf.float32)
    inner = _blended(_bytes(smooth), image[1:-1, 1:-1], factor)
    middle = tf.concat([image[1:-1, :1], inner, image[1:-1, -1:]], 1)
    return tf.concat([image[:1], middle, image[-1:]], 0)


def shear_x(image, level):
    """(h, w, 3) -> the same: row y moves left by `level` times y pixels; nearest neighbour."""
    return _transformed(image, [1.0, level, 0.0, 0.0, 1.0, 0.0])


def shear_y(image, level):
    """(h, w, 3) -> the same: column x moves up by `level` times x pixels; nearest neighbour."""
    return _transformed(image, [1.0, 0.0, 0.0, level, 1.0, 0.0])


def translate_x(image, pixels):
    """(h, w, 3) -> the same: moves left by `pixels`."""
    return _transformed(image, [1.0, 0.0, pixels, 0.0, 1.0, 0.0])


def translate_y(image, pixels):
    """(h, w, 3) -> the same: moves up by `pixels`."""
    return _transformed(image, [1.0, 0.0, 0.0, 0.0, 1.0, pixels])


def cutout(image, half, centre):
    """(h, w, 3) -> the same: a square of side 2 * `half` around `centre` (y, x), as far as it lies in the image, becomes 128."""
    height, width = tf.unstack(tf.shape(image)[:2])
    rows, columns = tf.range(height) - centre[0], tf.range(width) - centre[1]
    inside = ((rows >= -half) & (rows < half))[:, None] & ((columns >= -half) & (columns < half))
    return tf.where(inside[..., None], tf.constant(FILL, image.dtype), image)


def solarize_add(image, addition):
    """(h, w, 3) -> the same: adds to the values below 128, up to 255."""
    return image + tf.minimum(255 - image, min(addition, 255)) * tf.cast(image < 128, tf.uint8)


def _times(unit, kind=float):
    return lambda magnitude: (kind(magnitude / 10 * unit),)


def _no_arguments(magnitude):
    return ()


def _factor(magnitude):
    return (magnitude / 10 * 1.8 + 0.1,)


# In the original's order, which an operation's number refers to: the function, and its arguments by magnitude
OPERATIONS = {
    "AutoContrast": (auto_contrast, _no_arguments),
    "Equalize": (equalize, _no_arguments),
    "Invert": (invert, _no_arguments),
    "Rotate": (rotate, _times(30.0)),
    "Posterize": (posterize, _times(4, int)),
    "Solarize": (solarize, _times(256, int)),
    "Color": (color, _factor),
    "Contrast": (contrast, _factor),
    "Brightness": (brightness, _factor),
    "Sharpness": (sharpness, _factor),
    "ShearX": (shear_x, _times(0.3)),
    "ShearY": (shear_y, _times(0.3)),
    "TranslateX": (translate_x, _times(100.0)),
    "TranslateY": (translate_y, _times(100.0)),
    "Cutout": (cutout, _times(40, int)),  # and the centre, which is drawn
    "SolarizeAdd": (solarize_add, _times(110, int)),
}
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")  # their argument is negated in half of the draws


def randaugment(image, layers, magnitude, seed):
    """uint8 (h, w, 3) -> the same: `layers` operations one after the other, each drawn uniformly from the 16.

    RandAugment (arXiv 1909.13719) as AugReg used it: every operation at the same `magnitude`, in pixels and levels that do not
    depend on the image's size.

    Args:
        image: at least 3 x 3.
        layers: whole number, 0 or more.
        magnitude: 0 or more; 10 is what AutoAugment took for the strongest, AugReg goes to 20.
        seed: two integers.

    Raises:
        ArgumentError: the image is not uint8 with three channels, or a number is out of range.
    """
    check_randaugment(layers, magnitude)
    image = tf.convert_to_tensor(image)
    if image.dtype != tf.uint8 or image.shape.rank != 3 or image.shape[-1] != 3:
        got = f"{image.dtype.name} of shape {image.shape}"
        raise ArgumentError(f"randaugment takes a uint8 image (height, width, 3), got {got}. Put it before the normalisation.")
    for layer in range(layers):
        image = _one_of_all(image, magnitude, tf.random.experimental.stateless_fold_in(seed, layer))
    return image


def _one_of_all(image, magnitude, seed):
    which, sign, *centre = tf.unstack(tf.random.stateless_uniform([4], seed))
    centre = tf.cast(tf.cast(tf.shape(image)[:2], tf.float32) * tf.stack(centre), tf.int32)

    def branch(name):
        function, arguments = OPERATIONS[name]
        values = arguments(magnitude)
        if name in SIGNED:
            values = [tf.where(sign < 0.5, value, -value) for value in values]
        return lambda: function(image, *values, *([centre] if name == "Cutout" else []))

    branches = [branch(name) for name in OPERATIONS]
    return tf.ensure_shape(tf.switch_case(tf.cast(which * len(branches), tf.int32), branches), image.shape)


def increasing_randaugment(image, layers, magnitude, deviation, seed):
    """uint8 (h, w, 3) -> the same: RandAugment as timm has it, whose operations all grow with the magnitude ("inc1").

    `layers` operations in a row, each one of `INCREASING`, made with probability 1/2 at a magnitude of its own: normal around
    `magnitude` with that deviation, cut to 0..10. DeiT, BEiT and PoolFormer train with "rand-m9-mstd0.5-inc1", 2 operations at 9
    with deviation 0.5. (timm moves pixels by bilinear or bicubic interpolation, at random, and fills with the mean colour; here
    it is the nearest neighbour, and 128.)

    Args:
        image: before the normalisation.
        layers: how many; 0 for none. magnitude: 0 to 10. deviation: of the magnitude, 0 for none.
        seed: two integers.
    """
    for layer in range(layers):
        seeds = tf.random.split(tf.random.experimental.stateless_fold_in(seed, layer), 2)
        which, sign, made = tf.unstack(tf.random.stateless_uniform([3], seeds[0]))
        drawn = magnitude + deviation * tf.random.stateless_normal([], seeds[1])
        image = tf.cond(made < 0.5, functools.partial(_one_increasing, image, drawn, which, sign), lambda image=image: image)
    return image


def _one_increasing(image, magnitude, which, sign):
    level = tf.clip_by_value(magnitude, 0.0, 10.0) / 10
    signed = tf.where(sign < 0.5, level, -level)
    branches = [functools.partial(operation, image, level, signed) for operation in INCREASING.values()]
    return tf.ensure_shape(tf.switch_case(tf.cast(which * len(branches), tf.int32), branches), image.shape)


def _around_the_mean(image, factor):
    """(h, w, 3) -> the same: away from the mean of its gray over itself, as Pillow's contrast."""
    gray = tf.cast(tf.image.rgb_to_grayscale(image), tf.float32)
    return _blended(tf.cast(tf.reduce_mean(gray) + 0.5, tf.uint8), image, factor)


def _keeping_bits(image, bits):
    """(h, w, 3) -> the same: keeps the highest `bits` of 8, a tensor; with 0 it is black."""
    return tf.bitwise.bitwise_and(image, tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8))


def _grown(level, most):
    return tf.cast(level * most, tf.int32)


def _stronger(signed):
    return tf.maximum(0.1, 1 + 0.9 * signed)


def _side(image, axis):
    return tf.cast(tf.shape(image)[axis], tf.float32)


# timm's operations with its arguments: (image, level from 0 to 1, the same with a random sign) -> image
INCREASING = {
    "AutoContrast": lambda image, level, signed: auto_contrast(image),
    "Equalize": lambda image, level, signed: equalize(image),
    "Invert": lambda image, level, signed: invert(image),
    "Rotate": lambda image, level, signed: rotate(image, 30.0 * signed),
    "PosterizeIncreasing": lambda image, level, signed: _keeping_bits(image, 4 - _grown(level, 4)),
    "SolarizeIncreasing": lambda image, level, signed: tf.where(
        tf.cast(image, tf.int32) < 256 - _grown(level, 256), image, invert(image)
    ),
    "SolarizeAdd": lambda image, level, signed: tf.where(
        image < 128, tf.cast(tf.minimum(tf.cast(image, tf.int32) + _grown(level, 110), 255), tf.uint8), image
    ),
    "ColorIncreasing": lambda image, level, signed: color(image, _stronger(signed)),
    "ContrastIncreasing": lambda image, level, signed: _around_the_mean(image, _stronger(signed)),
    "BrightnessIncreasing": lambda image, level, signed: brightness(image, _stronger(signed)),
    "SharpnessIncreasing": lambda image, level, signed: sharpness(image, _stronger(signed)),
    "ShearX": lambda image, level, signed: shear_x(image, 0.3 * signed),
    "ShearY": lambda image, level, signed: shear_y(image, 0.3 * signed),
    "TranslateXRel": lambda image, level, signed: translate_x(image, 0.45 * signed * _side(image, 1)),
    "TranslateYRel": lambda image, level, signed: translate_y(image, 0.45 * signed * _side(image, 0)),
}


def check_randaugment(layers, magnitude, deviation=0.0):
    """Refuses numbers that `randaugment` or `increasing_randaugment` cannot use, with an `ArgumentError`."""
    if isinstance(deviation, bool) or not isinstance(deviation, Real) or not 0 <= deviation <= 10:
        raise ArgumentError(f"randaugment: the magnitude's deviation must be a number from 0 to 10, got {deviation!r}.")
    if isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers <= 16:
        raise ArgumentError(f"randaugment: layers must be a whole number from 0 to 16, got {layers!r}.")
    if isinstance(magnitude, bool) or not isinstance(magnitude, Real) or not 0 <= magnitude <= 100:
        raise ArgumentError(f"randaugment: magnitude must be a number from 0 to 100, got {magnitude!r}.")


def _planes(image):
    """(h, w, 3) -> (3, h * w), where a number for each channel costs little."""
    return tf.reshape(tf.transpose(image, [2, 0, 1]), [3, -1])


def _interleaved(planes, image):
    """The inverse of `_planes`, with the shape of `image`."""
    return tf.reshape(tf.transpose(planes), tf.shape(image))


def _bytes(values):
    """Floats -> uint8: clipped to 0..255, the fraction cut off."""
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _blended(first, second, factor):
    """first + factor * (second - first) in float32, as uint8."""
    first, second = tf.cast(first, tf.float32), tf.cast(second, tf.float32)
    return _bytes(first + factor * (second - first))


def _transformed(image, matrix):
    """The pixel of the result at (x, y) is the one of `image` at the matrix's first two rows times (x, y, 1); else FILL."""
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=[[*matrix, 0.0, 0.0]],
        output_shape=tf.shape(image)[:2],
        fill_value=float(FILL),
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]


# ---------------------------------------------------------------- batches and normalised images


def mix(batch, partners, seed, *, mixup_alpha=0.0, cutmix_alpha=0.0, switch=0.5):
    """((b, h, w, c), (b, classes)) and the same -> the same: `mixup` or `cutmix`, with numbers drawn for the whole batch.

    Args:
        batch: float images and labels.
        partners: what each example is mixed with; in AugReg and timm the batch rolled by one.
        seed: two integers.
        mixup_alpha: Mixup's share is drawn from Beta(alpha, alpha), and the larger of it and 1 minus it taken, as in big_vision;
            0 for no Mixup.
        cutmix_alpha: the same for CutMix, but the share is taken as it is drawn.
        switch: where both are above 0, the probability of CutMix; one half in timm.
    """
    seeds = tf.random.split(seed, 4)

    def mixed_up():
        share = _beta(mixup_alpha, seeds[0])
        return mixup(batch, partners, tf.maximum(share, 1 - share))

    def cut():
        centre = tf.random.stateless_uniform([2], seeds[2]) * tf.cast(tf.shape(batch[0])[1:3], tf.float32)
        return cutmix(batch, partners, _beta(cutmix_alpha, seeds[1]), tf.cast(centre, tf.int32))

    if mixup_alpha and cutmix_alpha:
        return tf.cond(tf.random.stateless_uniform([], seeds[3]) < switch, cut, mixed_up)
    return cut() if cutmix_alpha else mixed_up() if mixup_alpha else tuple(batch)


def mixup(batch, partners, share):
    """Two (images, labels) -> `share` of the first plus 1 - `share` of the second (arXiv 1710.09412)."""
    return tuple(share * mine + (1 - share) * other for mine, other in zip(batch, partners))


def cutmix(batch, partners, share, centre):
    """Two (images, labels) -> the first with a box of the second in it (arXiv 1905.04899).

    The box has 1 - `share` of the area and the image's aspect ratio. It is cut off at the image's border; the labels' share is
    that of the pixels that remain.

    Args:
        batch, partners: (b, h, w, c) images and (b, classes) labels.
        share: 0 to 1.
        centre: (y, x) of the box, int32.
    """
    (images, labels), (other_images, other_labels) = batch, partners
    size = tf.shape(images)[1:3]
    half = tf.cast(tf.cast(size, tf.float32) * tf.sqrt(1 - share), tf.int32) // 2
    first, last = tf.maximum(centre - half, 0), tf.minimum(centre + half, size)
    inside = _box(size, first, last - first)
    kept = 1 - tf.cast(tf.reduce_prod(last - first), tf.float32) / tf.cast(tf.reduce_prod(size), tf.float32)
    mixed = tf.ensure_shape(tf.where(inside, other_images, images), images.shape)
    return mixed, kept * labels + (1 - kept) * other_labels


def random_erasing(image, seed, probability, *, area=(0.02, 0.4), ratio=0.3, fill="noise"):
    """float (h, w, c), normalised -> the same: a box of it is replaced, with that probability (arXiv 1708.04896).

    Args:
        image: float32.
        seed: two integers.
        probability: 0 to 1.
        area: the least and largest share of the image; 0.02 and 0.4 in the paper, as the ratio.
        ratio: height / width of the box is uniform between this and its inverse.
        fill: "noise" for numbers of the normal distribution, or a number.
    """
    seeds = tf.random.split(seed, 3)

    def erased():
        size = tf.shape(image)[:2]
        pixels = tf.cast(size, tf.float32)
        draws = tf.random.stateless_uniform([ERASING_TRIES, 4], seeds[1])
        target = (area[0] + (area[1] - area[0]) * draws[:, 0]) * pixels[0] * pixels[1]
        aspect = ratio + (1 / ratio - ratio) * draws[:, 1]
        boxes = tf.cast(tf.round(tf.sqrt(tf.stack([target * aspect, target / aspect], -1))), tf.int32)
        chosen = tf.argmax(tf.reduce_all(boxes <= size, -1))  # the first that fits
        extent = tf.minimum(boxes[chosen], size)
        begin = tf.cast(draws[chosen, 2:] * tf.cast(size - extent + 1, tf.float32), tf.int32)
        if fill == "noise":
            noise = tf.random.stateless_normal(tf.concat([extent, tf.shape(image)[2:]], 0), seeds[2])
            end = size - extent - begin
            values = tf.pad(noise, [[begin[0], end[0]], [begin[1], end[1]], [0, 0]])
        else:
            values = tf.constant(fill, image.dtype)
        return tf.ensure_shape(tf.where(_box(size, begin, extent), values, image), image.shape)

    return tf.cond(tf.random.stateless_uniform([], seeds[0]) < probability, erased, lambda: image)


def smooth_labels(labels, amount):
    """(..., classes) -> the same: 1 - `amount` of the labels and `amount` spread evenly over all classes (arXiv 1512.00567).

    For losses without it; `keras.losses.CategoricalCrossentropy(label_smoothing=)` does the same.
    """
    return labels * (1 - amount) + amount / labels.shape[-1]


def shifted(batches, seed, start=0, shard=(0, 1)):
    """Moves every image of (b, h, w, c) batches by up to an eighth of its side, up or down and left or right.

    The distances are uniform, rounded to whole pixels (for 8 pixels: half of the images stay, a quarter moves either way). What
    moves in repeats the border. They are a function of `seed` and the example's place in the stream, whoever reads it.

    Args:
        batches: `tf.data.Dataset` of (images, labels); all batches must be full.
        seed: whole number.
        start: how many examples were already consumed, as in `pipeline.train_batches`.
        shard: (worker, workers), as there: `batches` are that worker's slices.
    """
    worker, workers = shard

    def shift(number, pair):
        images, labels = pair
        count, height, width = tf.unstack(tf.shape(images)[:3])
        reach = tf.cast([height, width], tf.float32) / 8
        first = start + number * tf.cast(count * workers, tf.int64)
        draws = tf.random.stateless_uniform([count * workers, 2], tf.stack([tf.constant(seed, tf.int64), first]), -1.0, 1.0)
        moves = tf.cast(tf.round(draws[worker * count : (worker + 1) * count] * reach), tf.int32)
        rows = tf.clip_by_value(tf.range(height) + moves[:, :1], 0, height - 1)
        columns = tf.clip_by_value(tf.range(width) + moves[:, 1:], 0, width - 1)
        moved = tf.gather(tf.gather(images, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
        return tf.ensure_shape(moved, images.shape), labels

    return batches.enumerate().map(shift, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(2)


def _box(size, begin, extent):
    """bool (h, w, 1), True inside the box."""
    inside = [(tf.range(size[i]) >= begin[i]) & (tf.range(size[i]) < begin[i] + extent[i]) for i in range(2)]
    return (inside[0][:, None] & inside[1])[..., None]


def _beta(alpha, seed):
    """One number of Beta(alpha, alpha), float32; 0 where both gamma numbers behind it vanish, as they may at small alpha."""
    first, second = tf.unstack(tf.random.stateless_gamma([2], seed, alpha, dtype=tf.float64))
    return tf.cast(tf.math.divide_no_nan(first, first + second), tf.float32)
