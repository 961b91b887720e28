"""The registry: what every constructor promises, the rows that are its variants, and loading into what they built."""

import dataclasses
import difflib
import fnmatch
import functools
import inspect
import logging
import numbers
import os
import re
import warnings

import keras
import numpy as np

from keras_vit import errors
from keras_vit.checkpoints import augreg, fetch, files, load
from keras_vit.checkpoints.weights import Weights, head_activation
from keras_vit.data.pixels import Pixels

_log = logging.getLogger("keras_vit")

# Tags, without their resolution, that `weights="imagenet"` stands for, the first that a row has
IMAGENET = ("augreg+imagenet2012", "imagenet21k+imagenet2012", "imagenet21k+imagenet1k", "imagenet1k", "i1k")
HEADS = ("head", "head_distillation")  # the layers of a classifier; the second one reads DeiT's distillation token
FAMILIES = {}  # name -> Family
VARIANTS = {}  # name -> Variant


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family adds to the contract.

    Args:
        name: of the builder, as the models remember it.
        layouts: {layout: Names} of its original files, the commonest first.
        sizes: {our name: shape} of a file -> the builder's arguments that it tells; KeyError if it is no file of this family.
        adapters: (model, *, grid, resize_patches) -> adapters (see `checkpoints.adapt`), the declared lossy steps; grid is the
            file's (h, w), "square" or None, resize_patches whether another patch size is allowed.
        grid: model -> (h, w) of its position grid, recorded in files where it is not square; None without one.
        written: model -> the layout to write where it was loaded from none; by default the first.
        any_size: model -> ((h, w), (h, w)) of its smallest image and of the steps to larger ones, where its weights fit images of
            any size; None by default, and where they do not.
        pixels: the preprocessing of models whose weights come from no published file.
        classifies: whether its models give an image's scores of classes, or without top its features, as training, modules and
            benchmarks take them.
        pyramid: model -> {n: name of the layer that gives features 2**n times smaller than the image}; {} by default, and where
            all features are of one size.
    """

    name: str
    layouts: dict
    sizes: object
    adapters: object = lambda model, **options: ()
    grid: object = lambda model: None
    written: object = None
    any_size: object = lambda model: None
    pixels: Pixels = Pixels()
    classifies: bool = True
    pyramid: object = lambda model: {}

    def __post_init__(self):
        FAMILIES[self.name] = self


@keras.saving.register_keras_serializable("keras_vit")
class Model(keras.Model):
    """A functional `keras.Model` that remembers its family and where its weights came from, also through `.keras` files.

    Attributes:
        family: name of the builder.
        variant: name of the registered row, or the builder's.
        weights_info: dict: source, sha256, layout, resolution, classes, licence, card (of its publisher, in words of this
            package), preprocessing (see `Pixels`), include_preprocessing, adapted, ignored, reset (lists of text), stored (types
            of arrays that were no float32), constants (of arrays that were no weights, see `checkpoints.load.save`), zero_head.
    """

    _facts = {}  # replaced, never changed in place: a clone by Keras starts without any

    @property
    def family(self):
        return self._facts.get("family")

    @property
    def variant(self):
        return self._facts.get("variant")

    @property
    def weights_info(self):
        return self._facts.get("weights_info", {})

    def remember(self, **facts):
        """Replaces facts, which Keras must not track as state."""
        object.__setattr__(self, "_facts", {**self._facts, **facts})

    def compile(self, *args, **kwargs):
        """As in Keras; inside the scope of a `tf.distribute` strategy a model that was made outside moves into it.

        Raises:
            errors.ArgumentError: Keras cannot train under that strategy.
        """
        if keras.config.backend() == "tensorflow":
            check_strategy(self)
        super().compile(*args, **kwargs)
        if keras.config.backend() != "tensorflow":
            return
        strategy = self.distribute_strategy
        outside = [v for v in self.variables if not strategy.extended.variable_created_in_scope(v.value)]
        if outside:
            self._distribute_strategy = strategy  # Keras sets it where a model is made, and has no public way to do it later
            with strategy.scope():
                for variable in outside:
                    variable._initialize(load.to_numpy(variable))

    @functools.wraps(keras.Model.fit)
    def fit(self, *args, **kwargs):
        if keras.config.backend() == "tensorflow":
            check_strategy(self)
        return super().fit(*args, **kwargs)

    def make_train_function(self, force=False):
        build_optimizer(self)
        return super().make_train_function(force)

    def compile_from_config(self, config):
        """As in Keras, which leaves it out where `compile` is not its own."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def get_config(self):
        return {**super().get_config(), "keras_vit": self._facts}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        facts = config.pop("keras_vit", None) or {}
        model = super().from_config(config, custom_objects=custom_objects)
        model.remember(**facts)
        return model


def build_optimizer(model):
    """Makes the variables of a model's optimizer. On TensorFlow the first step would make them, and be traced once more then."""
    if keras.config.backend() == "tensorflow" and model.optimizer is not None and not model.optimizer.built:
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)


def check_strategy(model, own_loop=False):
    """Refuses a `tf.distribute` strategy, which holds where a model was made or around the call, that Keras cannot train under.

    Args:
        model: on TensorFlow.
        own_loop: whether the loop of `training` does it.

    Raises:
        errors.ArgumentError: parameter servers; several workers outside of that loop.
    """
    strategy = model.distribute_strategy
    kinds = {kind.__name__ for kind in type(strategy).__mro__}
    if kinds & {"ParameterServerStrategy", "ParameterServerStrategyV1", "ParameterServerStrategyV2"}:
        raise errors.ArgumentError(
            f"{model.name!r} under {type(strategy).__name__}: Keras 3 has no training with parameter servers (keras#18624); use "
            "python -m keras_vit.main --config.strategy=multi_worker."
        )
    if "CollectiveAllReduceStrategy" in kinds and strategy.num_replicas_in_sync > 1 and not own_loop:
        raise errors.ArgumentError(
            f"{model.name!r} under {type(strategy).__name__}: `fit` of Keras 3 fails there (keras#20585). Train with "
            "python -m keras_vit.main --config.strategy=multi_worker, or fit a keras_vit.training.step.Learner that is made in "
            "the scope of keras_vit.training.strategy.open_strategy('multi_worker'), on that place's batches(...)."
        )


def calls(model):
    """(layer, shape of its first input, keyword arguments that are no tensors) of each call of a layer in this model's graph."""
    functional = keras.Model(model.inputs, model.outputs)  # a Sequential has no nodes of its own
    for nodes in functional._nodes_by_depth.values():
        for node in nodes:
            if node.arguments.args:  # not an input
                given = {key: value for key, value in node.arguments.kwargs.items() if not keras.ops.is_tensor(value)}
                given = {k: v for k, v in given.items() if not isinstance(v, keras.KerasTensor) and v is not None}
                yield node.operation, keras.tree.flatten(node.arguments.args)[0].shape, given


def tap(model, name):
    """The KerasTensor of layer `name` in this model's graph; `"block_3/scores"` taps what lies inside a block.

    `layer.output` is the tensor of a layer's first call, which in a rewired model belongs to another graph; this is the node of
    `model`. Use: `keras.Model(model.inputs, tap(model, "block_3/scores"))`.
    """
    layer, _, inside = name.partition("/")
    nodes = [node for depth in model._nodes_by_depth.values() for node in depth if node.operation.name == layer]
    if len(nodes) != 1:
        names = [each.name for each in model.layers]
        near = difflib.get_close_matches(layer, names, 3)
        raise errors.ArgumentError(
            f"tap({model.name!r}, {name!r}): expected one call of a layer {layer!r} in this model, found {len(nodes)}; "
            f"nearest: {', '.join(near) or ', '.join(names)}."
        )
    if inside:
        return nodes[0].operation(*nodes[0].arguments.args, tap=inside)
    return nodes[0].output_tensors[0]


def tap_input(model, name):
    """The KerasTensor that layer `name` reads in this model's graph; see `tap`."""
    tap(model, name)  # there is one, and one only
    nodes = [node for depth in model._nodes_by_depth.values() for node in depth if node.operation.name == name]
    return nodes[0].input_tensors[0]


def logits(model):
    """The KerasTensor of a classifier's logits in this model's graph, None without a classifier; see `tap`.

    They are the output of layer `head`, or of `logits` where the model has several heads and that layer merges them.
    """
    names = {layer.name for layer in model.layers}
    name = "logits" if set(HEADS) <= names and "logits" in names else "head"
    return tap(model, name) if name in names else None


def zero_head(model):
    """Whether a model's classifier is still the zeroed one of its checkpoint, which gives all classes the same score."""
    heads = [layer for layer in model.layers if layer.name in HEADS]
    if not heads or not (getattr(model, "weights_info", None) or {}).get("zero_head"):
        return False
    return not any(np.any(load.to_numpy(head.kernel)) for head in heads)


def check_choices(name, **chosen):
    """Raises ArgumentError for the first keyword, an argument of the constructor `name`, whose (value, allowed) do not fit."""
    for argument, (value, allowed) in chosen.items():
        if value not in allowed:
            raise errors.ArgumentError(f"{name}: expected {argument} in {allowed}, got {value!r}.")


def _whole(number):
    """Whether an argument is a whole number above 0, Python's or numpy's."""
    return isinstance(number, numbers.Integral) and not isinstance(number, bool) and number > 0


class Contract:
    """The arguments that every constructor shares, resolved: where weights come from, what goes in, what comes out.

    A builder asks it for `images(...)`, wires its layers, ends with `top(...)` or not, and returns `model(...)`.
    """

    def __init__(
        self, family, include_top, weights, input_tensor, input_shape, classes, classifier_activation, include_preprocessing
    ):
        self.family, self.include_top = family, include_top
        self.input_tensor, self.input_shape, self.include_preprocessing = input_tensor, input_shape, include_preprocessing
        if classes is not None and not _whole(classes):
            raise errors.ArgumentError(f"{family.name}: classes must be a positive whole number or None, got {classes!r}.")
        if classifier_activation != "auto":
            try:
                keras.activations.get(classifier_activation)
            except ValueError as error:
                raise errors.ArgumentError(
                    f"{family.name}: classifier_activation must be 'auto', None or the name of a Keras activation, "
                    f"got {classifier_activation!r}."
                ) from error
        if weights is not None and not isinstance(weights, Weights):
            weights = find_weights(weights, family.name)
        self.record, self.archive, self.shapes, self.source = weights, None, {}, None
        if weights is not None:
            self.archive = weights.archive if isinstance(weights, _Headers) else _open(weights.source, weights.size)
            _, self.shapes, _ = _read_as(self.archive, family)
        in_file = self.stored("head/kernel")
        if include_top and weights is not None and in_file is None and classes is None:
            raise errors.ArgumentError(
                f"{weights.source}: has no classifier; pass classes=N for a new one, or include_top=False."
            )
        self.classes = int(classes or (in_file[-1] if in_file else 1000))
        self.keeps_head = include_top and in_file is not None and in_file[-1] == self.classes
        if classifier_activation == "auto":
            own = weights and (weights.activation or head_activation(self.classes))
            classifier_activation = own if self.keeps_head else "softmax"
        self.activation = classifier_activation

    def stored(self, name):
        """The shape under which the file to load holds our weight `name`, or None."""
        return self.shapes.get(name)

    @property
    def recorded_grid(self):
        """The (h, w) of positions that the file to load records, or None."""
        return _recorded_grid(self.archive) if self.archive else None

    def given(self, size, check):
        """The (b, H, W, 3) tensor to build on, as the caller gives it.

        Args:
            size: (H, W) of the input where the caller named no shape.
            check: (height, width) -> None, raises on a size that the family cannot take.
        """
        shape, tensor = self.input_shape, self.input_tensor
        if tensor is not None and not isinstance(tensor, keras.KerasTensor):
            raise errors.ArgumentError(
                f"{self.family.name}: input_tensor must be a symbolic Keras tensor such as keras.Input((224, 224, 3)), "
                f"got {type(tensor).__name__}; call the finished model on values instead."
            )
        if tensor is not None:
            if shape is not None and tuple(shape) != tuple(tensor.shape[1:]):
                raise errors.ArgumentError(
                    f"{self.family.name}: input_shape {tuple(shape)} does not fit input_tensor of shape {tensor.shape}; "
                    "leave one of them out."
                )
            shape = tensor.shape[1:]
        shape = (*size, 3) if shape is None else tuple(shape)
        if len(shape) != 3 or shape[2] != 3 or not all(map(_whole, shape)):
            raise errors.ArgumentError(
                f"{self.family.name}: input_shape must be (height, width, 3) in whole pixels, got {shape}; a model is made for "
                f"one size, so build one for each, for example {(*size, 3)}."
            )
        shape = tuple(map(int, shape))
        check(*shape[:2])
        self.size = shape[:2]
        self.source = keras.Input(shape, name="images") if tensor is None else tensor
        return self.source

    def images(self, size, check):
        """The same with values as the checkpoint was trained on."""
        x = self.given(size, check)
        if not self.include_preprocessing:
            return x
        mean, variance = self.pixels.mean, [deviation**2 for deviation in self.pixels.std]
        return keras.layers.Normalization(mean=mean, variance=variance, dtype="float32", name="preprocessing")(x)

    @property
    def pixels(self):
        return self.record.pixels if self.record and self.record.published else self.family.pixels

    def top(self, x, distillation=None):
        """(..., d) -> (..., classes): the classifier `head` in float32, zero-initialised, then its activation.

        With `distillation`, of the same shape, there is a second one, `head_distillation`, which reads that; `logits` is the mean
        of both.
        """
        tops = [
            keras.layers.Dense(self.classes, kernel_initializer="zeros", dtype="float32", name=name)(each)
            for name, each in zip(HEADS, (x, distillation)) if each is not None
        ]  # fmt: skip
        x = tops[0] if len(tops) == 1 else keras.layers.Average(dtype="float32", name="logits")(tops)
        if self.activation is None:
            return x
        return keras.layers.Activation(self.activation, dtype="float32", name="predictions")(x)

    def model(self, outputs, name, beside=()):
        """The finished model, with its weights loaded.

        Args:
            beside: its inputs besides the images.
        """
        sources = keras.utils.get_source_inputs(self.source)
        inputs = [*sources, *beside]
        return self.finish(Model(inputs if len(inputs) > 1 else inputs[0], outputs, name=name), name)

    def finish(self, model, name):
        """The model, a `Model` on what `given` gave, with its record, and its weights loaded."""
        outside = []
        if self.input_tensor is not None and self.source is not None:
            outside = [layer.name for layer in keras.Model(keras.utils.get_source_inputs(self.source), self.source).layers]
        info = dict(
            source=None, sha256=None, layout=None, resolution=None, classes=self.classes if self.include_top else None,
            licence=None, card=None, preprocessing=self.pixels.asdict(), include_preprocessing=bool(self.include_preprocessing),
            adapted=[], ignored=[], reset=[], stored={}, constants=None, zero_head=False,
        )  # fmt: skip
        model.remember(family=self.family.name, variant=name, outside=outside, weights_info=info)
        if self.record:
            self._load(model, name)
        return model

    def _load(self, model, name):
        record, has = self.record, {layer.name for layer in model.layers}
        read_by_heads = {*HEADS, "pre_logits", "map_head", "sequence_pool", "fc_norm", "auxiliary_conv", "auxiliary_head"}
        lacking = {ours.partition("/")[0] for ours in self.shapes} & read_by_heads - has
        options = dict(
            ignore=tuple(f"{layer}/*" for layer in sorted(lacking)),
            reset_head=self.include_top and not self.keeps_head,
            grid="square" if record.published else None,
        )
        if isinstance(record, _Headers):
            model.remember(plan=load.best_plan(**_wanted(model, self.archive, **options)))
            return
        load_weights(model, self.archive, **options)
        known = dict(source=record.source, resolution=record.resolution, licence=record.licence, card=record.card)
        model.remember(weights_info={**model.weights_info, **known})
        if self.include_top and not self.keeps_head:
            in_file = self.stored("head/kernel")
            _log.warning(
                "%s: the file's head of %s classes is replaced by a new one of %d, initialised with zeros; the rest is loaded.",
                name, in_file[-1] if in_file else "no", self.classes,
            )  # fmt: skip
        if model.weights_info["zero_head"]:
            augreg = next((call for call, tag, _ in _siblings(record) if tag == "augreg"), "")
            warnings.warn(
                f"{name}: the head of {record.source} is all zeros (its publisher cleared it; the file is for fine-tuning), so "
                f"all {self.classes} classes get the same score. Use classes=N to fine-tune, include_top=False for features"
                f"{', or ' + augreg + ' for a real 21k head' if augreg else ''}.",
                stacklevel=2,
            )
        if record.tuned and self.size != (record.resolution, record.resolution):
            warnings.warn(_resolution_warning(name, record, self.size), stacklevel=2)


def _siblings(record):
    """[(call, tag, Weights)] of all weights of the rows that have this record."""
    rows = [row for row in VARIANTS.values() if record in row.weights.values()]
    return [(f"{row.name}(weights={tag!r})", tag, weights) for row in rows for tag, weights in row.weights.items()]


def _resolution_warning(name, record, size):
    fits = [
        call for call, _, other in _siblings(record)
        if other.classes == record.classes and (other.resolution, other.resolution) == size
    ]  # fmt: skip
    return (
        f"{name}: {record.source} was fine-tuned at {record.resolution} x {record.resolution} and is used at {size[0]} x "
        f"{size[1]}. Without fine-tuning at that size accuracy drops: from 384 to 224 by 9.5 points of ImageNet top-1 "
        f"(google-research/vision_transformer#6). {'Made for it: ' + ', '.join(fits) if fits else 'Fine-tune it there'}."
    )


def builder(function):
    """Marks the function of a family that builds its models; where weights are loaded, none are drawn before."""

    @functools.wraps(function)
    def build(*args, **kwargs):
        if inspect.signature(function).bind(*args, **kwargs).arguments.get("weights") is None:
            return function(*args, **kwargs)
        with load.without_first_values():
            return function(*args, **kwargs)

    return build


def _open(source, size=None):
    """The opened `files.Reader` of a source."""
    fetched = fetch.fetch(source, size)
    archive = files.open_file(fetched.path)
    if fetched.sha256:
        archive.sha256 = fetched.sha256
    else:
        archive.hash_meanwhile()
    return archive


def _read_as(archive, family):
    """(layout, {our name: shape of the array}, names that no rule claims) of the layout that claims most of a file."""
    best = None
    for layout, names in family.layouts.items():
        shapes, unknown = {}, []
        for original, (shape, _) in archive.entries.items():
            claims = names.to_ours(original, min(shape[0], load.MAX_LAYERS) if shape else 1)
            if not claims and not names.is_beside(original) and not names.constant(original):
                unknown.append(original)
            for ours, transform, layer in claims:
                if not transform.index:
                    shapes[ours] = transform.weight_shape(shape if layer is None else shape[1:])
        if best is None or len(unknown) < len(best[2]):
            best = layout, shapes, unknown
        if not unknown:
            break
    return best


@dataclasses.dataclass(frozen=True)
class _Headers(Weights):
    """The weights of a constructor that plans what it would do with an open file, and loads nothing."""

    archive: object = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a file is, by its names and shapes: see `identify`.

    Attributes:
        family: name of the (first) family whose layout claims most of it; layout: that layout.
        arguments: its builder's, as far as the shapes tell; {} if they tell nothing.
        variants: names of the registered rows that the shapes fit, of any family that claims as much.
        classes: outputs of its classifier, None without one.
        unknown: names that no rule of the layout claims.
    """

    family: str
    layout: str
    arguments: dict
    variants: tuple
    classes: int | None
    unknown: tuple


def identify(archive):
    """The `Reading` of an open `files.Reader`, from its headers alone."""
    readings = []
    for family in FAMILIES.values():
        layout, shapes, unknown = _read_as(archive, family)
        beside = sum(map(family.layouts[layout].is_beside, archive.entries))
        try:
            arguments = family.sizes(shapes)
        except (KeyError, IndexError, ValueError, TypeError):  # the shapes are those of something else
            arguments = {}
        rows = [row.name for row in VARIANTS.values() if row.family is family and arguments and row.fits(arguments)]
        classes = shapes["head/kernel"][-1] if shapes.get("head/kernel") else None
        misses = len(unknown) + (not arguments), beside
        readings.append((misses, Reading(family.name, layout, arguments, tuple(rows), classes, tuple(unknown))))
    least = min(misses for misses, _ in readings)
    first, *others = (reading for misses, reading in readings if misses == least)
    return dataclasses.replace(first, variants=sum((other.variants for other in others), first.variants))


def _family(model, asked):
    """The family of a model that this package built."""
    if not isinstance(model, Model) or model.family not in FAMILIES:
        raise errors.ArgumentError(
            f"{asked}: expected a model built by keras_vit, got {type(model).__name__} {getattr(model, 'name', '')!r}; "
            "pass the keras_vit model itself, also where it is nested: outer.get_layer(name)."
        )
    return FAMILIES[model.family]


def _weights(model):
    """{our name: variable} of a model that this package built."""
    found = load.named_weights(model, skip=model._facts["outside"])
    return {model._facts.get("under", "") + name: weight for name, weight in found.items()}


def _wanted(model, archive, *, ignore=(), reset_head=False, grid=None, resize_patches=False):
    """What `load.load` and `load.best_plan` take, for the arguments of `load_weights`."""
    family, weights = FAMILIES[model.family], _weights(model)
    head = [name for name in weights if name.partition("/")[0] in (*HEADS, "auxiliary_head")]
    if reset_head and not head:
        raise errors.ArgumentError(f"load_weights: {model.name!r} has no head to reset; leave reset_head out.")
    adapters = family.adapters(model, grid=_recorded_grid(archive) or grid, resize_patches=resize_patches)
    reset = head if reset_head else ()
    return dict(weights=weights, archive=archive, layouts=family.layouts, adapters=adapters, ignore=tuple(ignore), reset=reset)


def load_weights(model, path, *, ignore=(), reset_head=False, grid=None, resize_patches=False):
    """Fills a model from an original checkpoint file, in any layout of its family; all of it or nothing.

    Positions are resampled where the file's grid is another than the model's. `model.weights_info` says what was done.

    Args:
        model: built by this package.
        path: file of any format of `checkpoints.files`: a path, a `gs://`, `hf://` or `https://` URL, or an open
            `checkpoints.files.Reader`.
        ignore: patterns of our weight names to drop from the file on purpose, such as `("pre_logits/*",)`.
        reset_head: set the classifier to zero instead of loading it.
        grid: (h, w) of the file's position grid where it is neither square nor recorded; `"square"` insists on a square.
        resize_patches: whether to resample the patch embedding of another patch size, by PI-resize (FlexiViT, arXiv 2212.08013).

    Raises:
        errors.CheckpointMismatchError: names or shapes do not fit; lists all; the model is unchanged.
        errors.CheckpointFormatError: not an intact file, or values that are not finite; the model is unchanged.
    """
    _family(model, "load_weights")  # before a file is fetched
    archive = path if isinstance(path, files.Reader) else _open(path)
    wanted = _wanted(model, archive, ignore=ignore, reset_head=reset_head, grid=grid, resize_patches=resize_patches)
    try:
        done = load.load(**wanted, grid=_recorded_grid(archive), what=f"{model.variant} ({model.name!r})")
    except errors.CheckpointMismatchError as error:
        raise errors.CheckpointMismatchError(f"{error}\n{_resembles(identify(archive))}") from error
    zero = "head/kernel" in done.pop("zeros")
    info = {**model.weights_info, **done, "source": str(archive.path), "sha256": archive.sha256, "zero_head": zero}
    model.remember(weights_info=info)


def _resembles(reading):
    if not reading.arguments:
        return "It resembles no file of a family known here: " + ", ".join(FAMILIES) + "."
    settings = ", ".join(f"{key}={value!r}" for key, value in reading.arguments.items())
    return (
        f"By its names it is of family {reading.family}, layout {reading.layout!r}, with {settings}; classes: {reading.classes}. "
        f"Variants of this size: {', '.join(reading.variants) or 'none registered'}."
    )


def _recorded_grid(archive):
    grid = archive.metadata.get("grid")
    if grid is None:
        return None
    if not (isinstance(grid, list) and len(grid) == 2 and all(_whole(side) for side in grid)):
        raise errors.CheckpointFormatError(f"{archive.path}: its record of a position grid is {grid!r}, expected [h, w].")
    return tuple(grid)


def save_npz(model, path, layout=None):
    """Writes a model's weights in an original layout; exactly the file's keys and bits again where nothing was adapted.

    The format is that of the path's ending: .npz, .safetensors or, as PyTorch writes them, .pth, .pt, .pth.tar and .pyth. A
    position grid that is not square is recorded beside the arrays, which do not say it. Arrays that were read from a narrower
    type, such as bfloat16, are written in it again as long as it holds their values exactly.

    Args:
        model: built by this package.
        path: file to write; replaced in one step.
        layout: a layout of the family; by default the one the weights were read from, else the family's first.
    """
    family = _family(model, "save_npz")
    info = model.weights_info
    layout = layout or info["layout"] or (family.written(model) if family.written else next(iter(family.layouts)))
    if layout not in family.layouts:
        raise errors.ArgumentError(f"save_npz: layout must be one of {', '.join(family.layouts)}, got {layout!r}.")
    grid = family.grid(model)
    grid = grid if grid and grid[0] != grid[1] else None
    own = {key: info.get(key) for key in ("stored", "constants")} if layout == info["layout"] else {}
    load.save(_weights(model), path, family.layouts[layout], grid and {"grid": list(grid)}, grid=grid, **own)


def pixels_of(model, default=Pixels()):  # noqa: B008 - frozen
    """The `Pixels` that a model's images want, by its record; values 0..255 where it rescales itself; `default` without one."""
    info = getattr(model, "weights_info", None) or {}
    pixels = Pixels.from_dict(info["preprocessing"]) if "preprocessing" in info else default
    return dataclasses.replace(pixels, mean=(0.0,) * 3, std=(1.0,) * 3) if info.get("include_preprocessing") else pixels


def preprocess_input(x, model=None):
    """Brings images into the range a model was trained on; no resizing.

    Args:
        x: uint8 or float, values 0..255, (..., H, W, 3).
        model: built by this package; None means [-1, 1], the range of every checkpoint of google-research/vision_transformer.

    Returns:
        float32 of the same shape; unchanged values where the model rescales itself (`include_preprocessing=True`).
    """
    return pixels_of(model).normalize(x)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the registry.

    Args:
        name, builder: what it is called and the family's function.
        params, macs: exact counts of parameters, and of multiply-adds for one image (see `explain.cost`), with 1,000 classes at
            the default resolution.
        arguments: the builder's keywords.
        weights: {tag: Weights}.
        upstream: {name it has elsewhere: the tag that name stands for, or None}.
        resolution: side of the input with `weights=None`.
        build: the public function.
    """

    name: str
    builder: object
    params: int
    macs: int
    arguments: dict
    weights: dict
    upstream: dict
    resolution: int
    build: object = None

    @property
    def family(self):
        return FAMILIES[self.builder.__name__]

    def takes(self, argument):
        """Whether its constructor has an argument of that name."""
        return argument in inspect.signature(self.builder).parameters

    def fits(self, arguments):
        """Whether a model of these arguments of the builder is one of this row, as far as they go."""
        return all(self.arguments.get(key, value) == value for key, value in arguments.items())

    def imagenet(self, side):
        """The tag of its ImageNet-1k classifier nearest to a resolution, the first kind of `IMAGENET`; None if it has none."""
        for stem in IMAGENET:
            tags = [tag for tag in self.weights if re.sub(r"-\d+$", "", tag) == stem]
            if tags:
                return min(tags, key=lambda tag: abs(self.weights[tag].resolution - side))
        return None

    def tags(self):
        return [*(["imagenet"] if self.imagenet(224) else []), *self.weights]


def find_weights(weights, name, variant=None, side=224):
    """The `Weights` record that a constructor's `weights` means: a tag, an AugReg file name, a path, a URL or timm/MODEL.TAG."""
    tags = variant.weights if variant else {}
    if isinstance(weights, str):
        tag = variant.imagenet(side) if variant and weights == "imagenet" else weights
        if tag in tags:
            return tags[tag]
    if isinstance(weights, str) and re.fullmatch(r"timm/[\w-]+(\.[\w-]+)?", weights) and not os.path.exists(weights):
        weights = f"hf://{weights}/model.safetensors"
    if isinstance(weights, os.PathLike) or (isinstance(weights, str) and (files.ending(weights) or "/" in weights)):
        return Weights(os.fspath(weights), classes=None, activation=None, licence=None, resolution=None, published=False)
    if isinstance(weights, str) and augreg.parse(weights):
        return augreg.weights(weights)
    known = ", ".join(map(repr, variant.tags() if variant else ())) or "none by name"
    raise errors.ArgumentError(
        f"{name}: weights must be None, a tag it has ({known}), an AugReg file name, timm/MODEL.TAG, or a path or "
        f"URL of a file ({', '.join(files.ENDINGS)}), got {weights!r}."
    )


def variant(name, builder, *, params, macs, weights=None, upstream=(), resolution=224, default="imagenet", **arguments):
    """Registers a row and returns its constructor, a function with the builder's signature and this row's defaults.

    Args:
        default: the constructor's `weights`; for the others see `Variant`.
    """
    shared = inspect.signature(builder)
    defaults = {"name": name, "weights": default, **arguments}
    parameters = [p.replace(default=defaults[p.name]) if p.name in defaults else p for p in shared.parameters.values()]
    signature = shared.replace(parameters=parameters)

    def build(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}() {error}; its arguments are {', '.join(signature.parameters)}.") from None
        bound.apply_defaults()
        values = bound.arguments
        if values["weights"] is not None and not isinstance(values["weights"], Weights):
            shape = values["input_shape"] or (getattr(values["input_tensor"], "shape", None) or (None,))[1:]
            side = shape[0] if shape and isinstance(shape[0], int) else 224
            values["weights"] = find_weights(values["weights"], name, VARIANTS[name], side)
        if values["weights"] is None and values["input_shape"] is None and values["input_tensor"] is None:
            values["input_shape"] = (resolution, resolution, 3)
        return builder(*bound.args, **bound.kwargs)

    build.__name__ = build.__qualname__ = name
    build.__module__, build.__signature__ = builder.__module__, signature
    upstream = upstream if isinstance(upstream, dict) else dict.fromkeys(upstream)
    row = Variant(name, builder, params, macs, arguments, weights or {}, upstream, resolution, build)
    build.__doc__ = _docstring(row)
    VARIANTS[name] = row
    return build


def _docstring(row):
    table = "\n".join(f"        {tag!r}: {record.source}" for tag, record in row.weights.items()) or "        none published"
    settings = ", ".join(f"{key}={value!r}" for key, value in row.arguments.items())
    shared = inspect.getdoc(row.builder).partition("\n")[2]
    counts = f"{row.params:,} parameters and {row.macs:,} multiply-adds with 1,000 classes"
    return f"{row.name}: {settings}; {counts}.\n\n    weights (tag: file):\n{table}\n{shared}"


def explain(archive, row):
    """What a row's constructor would do with an open `files.Reader` at the row's resolution, from names and shapes alone.

    No weight is made and no array read, so that it costs little at any size.

    Returns:
        dict(layout, adapted, ignored, problems): adapted and ignored are lists of text, problems such lists under headings; the
        file fits where there are none.
    """
    _, shapes, _ = _read_as(archive, row.family)
    headers = _Headers(str(archive.path), None, None, licence=None, resolution=None, published=False, archive=archive)
    options = {"include_top": False} if "head/kernel" not in shapes and row.takes("include_top") else {}
    with keras.StatelessScope(initialize_variables=False):
        try:
            model = row.build(weights=headers, input_shape=(row.resolution, row.resolution, 3), **options)
        except errors.KerasViTError as error:
            return dict(layout=None, adapted=[], ignored=[], problems={"the constructor refuses it": [str(error)]})
    plan = model._facts["plan"]
    adapted = [does for _, does in plan.adapted.values() if does]
    return dict(layout=plan.layout, adapted=adapted, ignored=plan.ignored, problems=plan.problems)


def list_models(pattern="*"):
    """Names of the registered variants that match a pattern such as `"ViT_*16"`."""
    return sorted(fnmatch.filter(VARIANTS, pattern))


def _row(name):
    for row in VARIANTS.values():
        if name in (row.name, *row.upstream):
            return row
    known = [spelling for row in VARIANTS.values() for spelling in (row.name, *row.upstream)]
    near = difflib.get_close_matches(str(name), known, 3) or list_models()
    raise errors.ArgumentError(f"{name!r} is no registered model; nearest: {', '.join(near)}. See keras_vit.list_models().")


def list_weights(name):
    """Tags that the constructor `name` takes as `weights`; `"imagenet"` is the alias of its ImageNet-1k classifier."""
    return _row(name).tags()


def create_model(name, **kwargs):
    """Builds a variant by its name here (`"ViT_B16"`) or upstream (`"ViT-B_16"`); keywords go to its constructor.

    An upstream name that stands for one file (`"deit_base_patch16_384"`) means that file, and its resolution with `weights=None`.
    """
    row = _row(name)
    tag = row.upstream.get(name)
    if tag and not {"input_shape", "input_tensor"} & kwargs.keys():
        kwargs["input_shape"] = (row.weights[tag].resolution,) * 2 + (3,)
    return row.build(**({"weights": tag} if tag else {}) | kwargs)
