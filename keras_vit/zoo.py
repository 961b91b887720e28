"""The registry: what every constructor promises, the rows that are its variants, and loading into what they built."""

import dataclasses
import difflib
import fnmatch
import inspect
import logging
import numbers
import os
import warnings

import keras
import numpy as np

from keras_vit import errors
from keras_vit.checkpoints import augreg, fetch, files, load
from keras_vit.checkpoints.weights import Weights, head_activation
from keras_vit.data.pixels import Pixels

_log = logging.getLogger("keras_vit")

FAMILIES = {}  # name -> Family
VARIANTS = {}  # name -> Variant


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family adds to the contract.

    Args:
        name: of the builder, as the models remember it.
        layouts: {layout: Names} of its original files; the first is the one written by default.
        adapters: (model, file_grid) -> {our weight name: adapter}, the declared lossy steps.
        grid: model -> (h, w) of its position grid, recorded in files where it is not square.
    """

    name: str
    layouts: dict
    adapters: object
    grid: object

    def __post_init__(self):
        FAMILIES[self.name] = self


@keras.saving.register_keras_serializable("keras_vit")
class Model(keras.Model):
    """A functional `keras.Model` that remembers its family and where its weights came from, also through `.keras` files.

    Attributes:
        family: name of the builder.
        variant: name of the registered row, or the builder's.
        weights_info: dict: source, sha256, layout, resolution, classes, licence, preprocessing (see `Pixels`),
            include_preprocessing, adapted, ignored, reset (lists of text), zero_head.
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

    def get_config(self):
        return {**super().get_config(), "keras_vit": self._facts}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        facts = config.pop("keras_vit", None) or {}
        model = super().from_config(config, custom_objects=custom_objects)
        model.remember(**facts)
        return model


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


def zero_head(model):
    """Whether a model's classifier is still the zeroed one of its checkpoint, which gives all classes the same score."""
    heads = [layer for layer in model.layers if layer.name == "head"]
    if not heads or not (getattr(model, "weights_info", None) or {}).get("zero_head"):
        return False
    return not np.any(load.to_numpy(heads[0].kernel))


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
        self.record, self.archive = weights, None
        if weights is not None:
            self.archive = files.Npz(fetch.fetch(weights.source, weights.size).path)
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
        for names in self.family.layouts.values() if self.archive else ():
            for original, transform in names.to_original(name):
                if original in self.archive.entries and transform.of == 1:
                    return self.archive.entries[original][0]
        return None

    @property
    def recorded_grid(self):
        """The (h, w) of positions that the file to load records, or None."""
        return _recorded_grid(self.archive) if self.archive else None

    def images(self, size, check):
        """The (b, H, W, 3) tensor to build on, values as the checkpoint was trained on.

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
                f"{self.family.name}: input_shape must be (height, width, 3) in whole pixels, got {shape}; positions are learned "
                f"for one size, so build a model for each, for example {(*size, 3)}."
            )
        shape = tuple(map(int, shape))
        check(*shape[:2])
        self.size = shape[:2]
        self.source = keras.Input(shape, name="images") if tensor is None else tensor
        if not self.include_preprocessing:
            return self.source
        mean, variance = self.pixels.mean, [deviation**2 for deviation in self.pixels.std]
        return keras.layers.Normalization(mean=mean, variance=variance, dtype="float32", name="preprocessing")(self.source)

    @property
    def pixels(self):
        return self.record.pixels if self.record else Pixels()

    def top(self, x):
        """(..., d) -> (..., classes): the classifier `head` in float32, zero-initialised, then its activation."""
        x = keras.layers.Dense(self.classes, kernel_initializer="zeros", dtype="float32", name="head")(x)
        if self.activation is None:
            return x
        return keras.layers.Activation(self.activation, dtype="float32", name="predictions")(x)

    def model(self, outputs, name):
        """The finished model, with its weights loaded."""
        sources = keras.utils.get_source_inputs(self.source)
        model = Model(sources if len(sources) > 1 else sources[0], outputs, name=name)
        outside = [] if self.input_tensor is None else [layer.name for layer in keras.Model(sources, self.source).layers]
        info = dict(
            source=None, sha256=None, layout=None, resolution=None, classes=self.classes if self.include_top else None,
            licence=None, preprocessing=self.pixels.asdict(), include_preprocessing=bool(self.include_preprocessing),
            adapted=[], ignored=[], reset=[], zero_head=False,
        )  # fmt: skip
        model.remember(family=self.family.name, variant=name, outside=outside, weights_info=info)
        if self.record:
            self._load(model, name)
        return model

    def _load(self, model, name):
        record, has = self.record, {layer.name for layer in model.layers}
        lacking = [layer for layer in ("head", "pre_logits") if self.stored(f"{layer}/kernel") and layer not in has]
        load_weights(
            model,
            self.archive,
            ignore=tuple(f"{layer}/*" for layer in lacking),
            reset_head=self.include_top and not self.keeps_head,
            grid="square" if record.published else None,
        )
        known = dict(source=record.source, resolution=record.resolution, licence=record.licence)
        model.remember(weights_info={**model.weights_info, **known})
        if self.include_top and not self.keeps_head:
            in_file = self.stored("head/kernel")
            _log.warning(
                "%s: the file's head of %s classes is replaced by a new one of %d, initialised with zeros; the rest is loaded.",
                name, in_file[-1] if in_file else "no", self.classes,
            )  # fmt: skip
        if model.weights_info["zero_head"]:
            warnings.warn(
                f"{name}: the head of {record.source} is all zeros (its publisher cleared it; the file is for fine-tuning), so "
                f"all {self.classes} classes get the same score. Use weights='augreg' for a real 21k head, classes=N to "
                "fine-tune, or include_top=False for features.",
                stacklevel=2,
            )
        if record.tuned and self.size != (record.resolution, record.resolution):
            warnings.warn(
                f"{name}: {record.source} was fine-tuned at {record.resolution} x {record.resolution} and is used at "
                f"{self.size[0]} x {self.size[1]}; without fine-tuning at that size accuracy drops.",
                stacklevel=2,
            )


def _ours(model, asked):
    """The family and the weights of a model that this package built."""
    if not isinstance(model, Model) or model.family not in FAMILIES:
        raise errors.ArgumentError(
            f"{asked}: expected a model built by keras_vit, got {type(model).__name__} {getattr(model, 'name', '')!r}; "
            "pass the keras_vit model itself, also where it is nested: outer.get_layer(name)."
        )
    return FAMILIES[model.family], load.named_weights(model, skip=model._facts["outside"])


def load_weights(model, path, *, ignore=(), reset_head=False, grid=None):
    """Fills a model from an original checkpoint file, in any layout of its family; all of it or nothing.

    Positions are resampled where the file's grid is another than the model's. `model.weights_info` says what was done.

    Args:
        model: built by this package.
        path: `.npz` file: a path, `gs://` or `https://` URL, or an open `checkpoints.files.Npz`.
        ignore: patterns of our weight names to drop from the file on purpose, such as `("pre_logits/*",)`.
        reset_head: set the classifier to zero instead of loading it.
        grid: (h, w) of the file's position grid where it is neither square nor recorded; `"square"` insists on a square.

    Raises:
        errors.CheckpointMismatchError: names, shapes or values do not fit; lists all; the model is unchanged.
        errors.CheckpointFormatError: not an intact file; the model is unchanged.
    """
    family, weights = _ours(model, "load_weights")
    archive = path if isinstance(path, files.Npz) else files.Npz(fetch.fetch(path).path)
    head = [name for name in weights if name.startswith("head/")]
    if reset_head and not head:
        raise errors.ArgumentError(f"load_weights: {model.name!r} has no head to reset; leave reset_head out.")
    grid = _recorded_grid(archive) or grid
    done = load.load(
        weights,
        archive,
        family.layouts,
        adapters=family.adapters(model, grid),
        ignore=tuple(ignore),
        reset=head if reset_head else (),
        what=f"{model.variant} ({model.name!r})",
    )
    zero = bool(head) and not reset_head and not np.any(load.to_numpy(weights["head/kernel"]))
    info = {**model.weights_info, **done, "source": str(archive.path), "sha256": fetch.sha256(archive.path), "zero_head": zero}
    model.remember(weights_info=info)


def _recorded_grid(archive):
    grid = archive.metadata.get("grid")
    if grid is None:
        return None
    if not (isinstance(grid, list) and len(grid) == 2 and all(_whole(side) for side in grid)):
        raise errors.CheckpointFormatError(f"{archive.path}: its record of a position grid is {grid!r}, expected [h, w].")
    return tuple(grid)


def save_npz(model, path, layout=None):
    """Writes a model's weights in an original layout; exactly the file's keys and bits again where nothing was adapted.

    A position grid that is not square is recorded in the archive's comment, since the arrays do not say it.

    Args:
        model: built by this package.
        path: file to write; replaced in one step.
        layout: a layout of the family; by default the one the weights were read from, else the family's first.
    """
    family, weights = _ours(model, "save_npz")
    layout = layout or model.weights_info["layout"] or next(iter(family.layouts))
    if layout not in family.layouts:
        raise errors.ArgumentError(f"save_npz: layout must be one of {', '.join(family.layouts)}, got {layout!r}.")
    grid = family.grid(model)
    load.save(weights, path, family.layouts[layout], {"grid": list(grid)} if grid[0] != grid[1] else None)


def preprocess_input(x, model=None):
    """Brings images into the range a model was trained on; no resizing.

    Args:
        x: uint8 or float, values 0..255, (..., H, W, 3).
        model: built by this package; None means [-1, 1], the range of every checkpoint of google-research/vision_transformer.

    Returns:
        float32 of the same shape; unchanged values where the model rescales itself (`include_preprocessing=True`).
    """
    info = model.weights_info if model is not None else {}
    if info.get("include_preprocessing"):
        return Pixels(mean=(0.0,) * 3, std=(1.0,) * 3).normalize(x)
    return (Pixels.from_dict(info["preprocessing"]) if info else Pixels()).normalize(x)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the registry.

    Args:
        name, builder: what it is called and the family's function.
        params: exact parameter count with 1,000 classes at the default resolution.
        arguments: the builder's keywords.
        weights: {tag: Weights}.
        upstream: names it has elsewhere.
        resolution: side of the input with `weights=None`.
        build: the public function.
    """

    name: str
    builder: object
    params: int
    arguments: dict
    weights: dict
    upstream: tuple
    resolution: int
    build: object = None

    def imagenet(self, side):
        """The tag of its ImageNet-1k classifier nearest to a resolution, AugReg's before the original's; None if it has none."""
        for stem in ("augreg+imagenet2012", "imagenet21k+imagenet2012"):
            tags = [tag for tag in self.weights if tag.removesuffix("-224") == stem]
            if tags:
                return min(tags, key=lambda tag: abs(self.weights[tag].resolution - side))
        return None

    def tags(self):
        return [*(["imagenet"] if self.imagenet(224) else []), *self.weights]


def find_weights(weights, name, variant=None, side=224):
    """The `Weights` record that a constructor's `weights` argument means: a tag, an AugReg file name, a path or a URL."""
    tags = variant.weights if variant else {}
    if isinstance(weights, str):
        tag = variant.imagenet(side) if variant and weights == "imagenet" else weights
        if tag in tags:
            return tags[tag]
    if isinstance(weights, os.PathLike) or (isinstance(weights, str) and (weights.endswith(".npz") or "/" in weights)):
        return Weights(os.fspath(weights), classes=None, activation=None, licence=None, resolution=None, published=False)
    if isinstance(weights, str) and augreg.parse(weights):
        return augreg.weights(weights)
    known = ", ".join(map(repr, variant.tags() if variant else ())) or "none by name"
    raise errors.ArgumentError(
        f"{name}: weights must be None, a tag it has ({known}), an AugReg file name, a path or a URL of an .npz file, "
        f"got {weights!r}."
    )


def variant(name, builder, *, params, weights=None, upstream=(), resolution=224, **arguments):
    """Registers a row and returns its constructor, a function with the builder's signature and this row's defaults."""
    shared = inspect.signature(builder)
    defaults = {"name": name, "weights": "imagenet", **arguments}
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
    row = Variant(name, builder, params, arguments, weights or {}, tuple(upstream), resolution, build)
    build.__doc__ = _docstring(row)
    VARIANTS[name] = row
    return build


def _docstring(row):
    table = "\n".join(f"        {tag!r}: {record.source}" for tag, record in row.weights.items()) or "        none published"
    settings = ", ".join(f"{key}={value!r}" for key, value in row.arguments.items())
    shared = inspect.getdoc(row.builder).partition("\n")[2]
    return f"{row.name}: {settings}; {row.params:,} parameters with 1,000 classes.\n\n    weights (tag: file):\n{table}\n{shared}"


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
    """Builds a variant by its name here (`"ViT_B16"`) or upstream (`"ViT-B_16"`); keywords go to its constructor."""
    return _row(name).build(**kwargs)
