"""Grad-CAM (arXiv 1610.02391): where in an image a class's score comes from, for every family, on TensorFlow, JAX and PyTorch."""

import contextlib
import pathlib
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_vit import zoo
from keras_vit.checkpoints import files, load
from keras_vit.errors import ArgumentError, NonFiniteError

EXTRA_TOKENS = 2  # at most so many, a class and a distillation token, stand before those of the patches
STRENGTH = 0.65  # of the colours over an image, where a map is 1


class GradCAM(NamedTuple):
    """What `gradcam` found.

    Attributes:
        maps: (b, H, W) float32 of 0..1, of the images' size.
        classes: (b,) the classes that were explained.
        layer: whose output was weighted.
    """

    maps: np.ndarray
    classes: np.ndarray
    layer: str


class _Place(NamedTuple):
    """A layer whose output lies on a grid, the shape of that output, and the grid's."""

    name: str
    layer: object
    shape: tuple
    grid: tuple


def gradcam(model, images, classes=None, layer=None):
    """Where each image speaks for a class: a layer's output, its channels weighted by the mean gradient of the class's logit.

        maps, classes, layer = gradcam(model, keras_vit.preprocess_input(images, model))
        Image.fromarray(overlay(images[0], maps[0]))

    A map is `relu` of the weighted sum on the layer's grid, stretched over the image bilinearly and divided by its maximum; all 0
    where nothing speaks for the class. Class and distillation tokens have no place in it.

    Args:
        model: a functional classifier whose logits `zoo.logits` finds, as all of this package. No other thread may use it
            meanwhile.
        images: (b, H, W, 3) as the model takes them.
        classes: a number for all images or one for each; by default the class of the highest score.
        layer: whose output to take: a layer of the model, such as "stage_3_unit_9", or one inside a block, such as
            "block_11/attention_norm". By default the last block; where the logit sees only its class token, its first norm.

    Returns:
        A `GradCAM`.

    Raises:
        ArgumentError: no such layer, class or head; a head of zeros; or the logit does not depend on any patch of the layer.
        NonFiniteError: scores or gradients are not finite.
    """
    asked = f"gradcam({getattr(model, 'name', model)!r})"
    graph, places = _find(model, layer, asked)
    images = np.asarray(ops.convert_to_numpy(images), "float32")
    if images.shape[1:] != tuple(graph.inputs[0].shape[1:]) or not len(images):
        raise ArgumentError(
            f"{asked}: expected images of shape {('b', *graph.inputs[0].shape[1:])}, got {images.shape}; resize and preprocess "
            "them as the model takes them."
        )
    chosen = _choose(classes, len(images), graph.output.shape[-1], asked)
    logits, outputs, gradients = _backward(graph, places, images, chosen, asked)
    chosen = logits.argmax(-1) if chosen is None else chosen
    for place, output, gradient in zip(places, outputs, gradients):
        gradient = _on_grid(gradient, place)
        if not gradient.any():
            continue
        maps = np.einsum("bhwc,bc->bhw", _on_grid(output, place), gradient.mean((1, 2)))
        if not (np.isfinite(logits).all() and np.isfinite(maps).all()):
            raise NonFiniteError(f"{asked}: scores or gradients at {place.name!r} are not finite; check the images and weights.")
        return GradCAM(_unit(_stretched(np.maximum(maps, 0), images.shape[1:3])), chosen, place.name)
    raise ArgumentError(
        f"{asked}: no patch of {' or '.join(repr(place.name) for place in places)} has any influence on the scores of classes "
        f"{sorted(set(chosen.tolist()))}; pass layer= with an earlier one, such as the first norm of a block."
    )


def _find(model, layer, asked):
    """(the model as far as its logits, the `_Place`s to look at, the best first)."""
    if not getattr(model, "inputs", None):
        raise ArgumentError(f"{asked}: expected a functional keras.Model, got {type(model).__name__}.")
    whole = keras.Model(model.inputs, model.outputs, name=model.name)  # a Sequential has no nodes of its own
    logits = zoo.logits(whole)
    if logits is None:
        raise ArgumentError(
            f"{asked}: has no layer 'head', whose output are the scores of the classes; build it with include_top=True."
        )
    kernels = [each.kernel for each in whole.layers if each.name in zoo.HEADS and hasattr(each, "kernel")]
    if len(logits.shape) != 2:
        raise ArgumentError(f"{asked}: expected a head of (b, classes), got {logits.shape}; it must read one vector an image.")
    if kernels and not any(load.to_numpy(kernel).any() for kernel in kernels):
        raise ArgumentError(
            f"{asked}: its head is all zeros and prefers no class. Use weights with a trained head, or fine-tune it first."
        )
    graph = keras.Model(model.inputs, logits, name=model.name)
    shapes = _output_shapes(graph)
    if layer is not None:
        places = [_place(graph, shapes, layer)]
        if places[0].grid is None:
            raise ArgumentError(
                f"{asked}: layer {layer!r} gives {places[0].shape}, expected (b, h, w, c), or the tokens of such a layer before "
                f"it; for example {_names(shapes)}."
            )
        return graph, places
    blocks = [name for name in shapes if hasattr(graph.get_layer(name), "TAPS")]
    names = [name for name in blocks or shapes if _grid(shapes, name, shapes[name])][-1:]
    names += [f"{name}/{tap}" for name in names for tap in getattr(graph.get_layer(name), "TAPS", ())[:1]]
    places = [place for place in (_place(graph, shapes, name) for name in names) if place.grid]
    if not places:
        raise ArgumentError(f"{asked}: no layer has an output of shape (b, h, w, c), or the tokens of one; pass layer=.")
    return graph, places


def _output_shapes(graph):
    """{name: shape} of the outputs of all layers that are called once, in the order of the graph."""
    called = [layer.name for layer, *_ in zoo.calls(graph)]
    once = [layer.name for layer in graph.layers if called.count(layer.name) == 1]
    return {name: tuple(zoo.tap(graph, name).shape) for name in once}


def _names(shapes):
    return ", ".join([name for name, shape in shapes.items() if _grid(shapes, name, shape)][-3:])


def _grid(shapes, name, shape):
    """(h, w) of an output of layer `name`: its own, or of the nearest grid before it that has as many places as it has tokens."""
    if len(shape) == 4:
        return shape[1:3]
    before = list(shapes)[: list(shapes).index(name)]
    for grid in (shapes[each][1:3] for each in reversed(before) if len(shapes[each]) == 4):
        if len(shape) == 3 and 0 <= shape[1] - grid[0] * grid[1] <= EXTRA_TOKENS:
            return grid
    return None


def _place(graph, shapes, name):
    """The `_Place` of a name; its grid is None where its output has none."""
    outside, _, inside = name.partition("/")
    output = zoo.tap(graph, outside)
    layer = graph.get_layer(outside)
    if inside:
        known = [tap for tap in getattr(layer, "TAPS", ()) if isinstance(getattr(layer, tap, None), keras.layers.Layer)]
        if inside not in known:
            raise ArgumentError(
                f"gradcam({graph.name!r}): expected a layer inside {outside!r} ({', '.join(known) or 'it has none'}), got "
                f"{inside!r}."
            )
        layer, output = getattr(layer, inside), zoo.tap(graph, name)
    shape = tuple(output.shape) if isinstance(output, keras.KerasTensor) else ()
    return _Place(name, layer, shape, _grid(shapes, outside, shape) if outside in shapes else None)


def _choose(classes, count, total, asked):
    """(b,) class numbers, or None for the best."""
    if classes is None:
        return None
    chosen = np.asarray(classes)
    if chosen.dtype.kind not in "iu" or chosen.shape not in ((), (count,)) or chosen.min() < 0 or chosen.max() >= total:
        raise ArgumentError(
            f"{asked}: expected classes to be a whole number of 0..{total - 1}, or a list of {count}, one for each image; got "
            f"{classes!r}."
        )
    return np.broadcast_to(chosen, (count,))


@contextlib.contextmanager
def _shifted(places, shifts, outputs):
    """Inside, `shifts` are added to the outputs of the places, which `outputs` gets; `layer.call` is covered, then uncovered."""

    def covered(call, place, shift):
        def run(*args, **kwargs):
            if place.name in outputs:
                raise ArgumentError(f"gradcam: layer {place.name!r} runs more than once for an image; choose another one.")
            outputs[place.name] = call(*args, **kwargs)
            return outputs[place.name] + ops.cast(shift, outputs[place.name].dtype)

        return run

    try:
        for place, shift in zip(places, shifts):
            place.layer.call = covered(place.layer.call, place, shift)
        yield
    finally:
        for place in places:
            vars(place.layer).pop("call", None)


def _backward(graph, places, images, classes, asked):
    """(logits, [outputs], [gradients of the sum of the classes' logits at those]), numpy."""
    images = ops.convert_to_tensor(images)

    def score(shifts):
        outputs = {}
        with _shifted(places, shifts, outputs):
            logits = ops.cast(graph(images, training=False), "float32")
        chosen = ops.argmax(logits, -1) if classes is None else ops.convert_to_tensor(classes, "int32")
        total = ops.sum(logits * ops.one_hot(chosen, logits.shape[-1]))
        return total, (logits, [outputs[place.name] for place in places])

    shifts = [ops.zeros((len(images), *place.shape[1:]), "float32") for place in places]
    (logits, outputs), gradients = _differentiate(score, shifts, graph.variables, asked)
    outputs, gradients = ([ops.convert_to_numpy(ops.cast(x, "float32")) for x in each] for each in (outputs, gradients))
    return ops.convert_to_numpy(logits), outputs, gradients


def _differentiate(function, at, variables, asked):
    """(what `function`, which reads variables, gives beside its value, its gradients at the list `at`)."""
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(at)
            value, beside = function(at)
        return beside, tape.gradient(value, at)
    if backend == "jax":
        import jax

        def stateless(at, values):  # else the compiled program would hold the weights as constants
            with keras.StatelessScope(state_mapping=zip(variables, values)):
                return function(at)

        gradients, beside = jax.jit(jax.grad(stateless, has_aux=True))(at, [each.value for each in variables])
        return beside, gradients
    if backend == "torch":
        import torch

        at = [each.requires_grad_() for each in at]
        value, beside = function(at)
        return beside, torch.autograd.grad(value, at)
    raise ArgumentError(f"{asked}: the backend {backend!r} has no gradients; set KERAS_BACKEND to tensorflow, jax or torch.")


def _on_grid(values, place):
    """(b, n, d) or (b, h, w, c) -> (b, h, w, c) float32; tokens before those of the patches are left out."""
    h, w = place.grid
    if len(place.shape) == 4:
        return values
    return values[:, place.shape[1] - h * w :].reshape(len(values), h, w, -1)


def _unit(maps):
    """Each map divided by its maximum, where that is not 0."""
    largest = maps.max((1, 2), keepdims=True)
    return maps / np.where(largest > 0, largest, 1)


def _stretched(maps, size):
    """(b, h, w) -> (b, H, W) float32: bilinear; a value stands for the middle of its cell."""
    for axis, side in enumerate(size, 1):
        old = maps.shape[axis]
        at = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
        hats = np.maximum(1 - np.abs(at[:, None] - np.arange(old)), 0)
        maps = np.moveaxis(np.tensordot(hats, maps, (1, axis)), 0, axis)
    return maps.astype("float32")


def overlay(image, heat):
    """(H, W, 3) uint8: an image with a map in colour over it, the clearer the larger its values.

    Args:
        image: (H, W, 3), values 0..255.
        heat: (h, w), values 0..1, as `gradcam` gives them; stretched over the image.
    """
    from matplotlib import colormaps

    image, heat = np.asarray(image), np.asarray(heat)
    if image.ndim != 3 or image.shape[2] != 3 or heat.ndim != 2:
        raise ArgumentError(f"overlay: expected an image (H, W, 3) and one map (h, w), got {image.shape} and {heat.shape}.")
    heat = np.clip(_stretched(heat[None], image.shape[:2])[0], 0, 1)[..., None]
    colours = colormaps["turbo"](heat[..., 0])[..., :3] * 255
    mixed = image + STRENGTH * heat * (colours - image)
    return np.clip(np.round(mixed), 0, 255).astype("uint8")


def check_png(path):
    """Raises ArgumentError unless `save_png` can write there."""
    path = pathlib.Path(path)
    if path.suffix.lower() != ".png":
        raise ArgumentError(f"{path}: expected a file that ends in .png, the format that is written.")
    if not path.parent.is_dir():
        raise ArgumentError(f"{path}: expected a file in a folder that exists; make {path.parent} first.")


def save_png(path, image):
    """Writes an (H, W, 3) uint8 image; an existing file is replaced in one step."""
    from matplotlib.image import imsave

    check_png(path)
    with files.replacing(path) as temporary:
        imsave(temporary, image, format="png")
