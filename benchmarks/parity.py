"""Compares models and preprocessing with what the original implementations computed: `python -m benchmarks.parity DIR [DIR ...]`.

DIR is a case folder (checkpoint.npz or another of `CHECKPOINTS`, inputs.npz, expected.npz, meta.json) or any folder above some.
One line for each case; exits with 1 on any miss, on a final output that was not compared, on a family or option not known here,
and where there is no case.
The backend is Keras's own choice: `KERAS_BACKEND=jax python -m benchmarks.parity DIR`.
"""

import fnmatch
import importlib.util
import json
import pathlib
import re
import sys
import tempfile

import keras
import numpy as np

import keras_vit
from benchmarks import parity_objectives, parity_training
from keras_vit import zoo
from keras_vit.checkpoints import adapt, load
from keras_vit.checkpoints.files import open_file
from keras_vit.data.pixels import Pixels


class Unknown(Exception):
    """A case asks for something that this program does not know how to run."""


class Case:
    """One folder, what was compared in it, and the worst of it."""

    def __init__(self, folder):
        self.folder, self.meta = folder, json.loads((folder / "meta.json").read_text())
        self.family, self.name = self.meta["family"], self.meta["case"]
        self.rules, self.expected = self.meta.get("compare", {}), _arrays(folder / "expected.npz")
        self.compared, self.problems, self.worst = set(), [], (0.0, 0.0, 0.0)
        self.ties = 0
        self.noise = 1  # of the original's own intermediates, in multiples of the tolerance; final outputs have none

    @property
    def inputs(self):
        return _arrays(self.folder / "inputs.npz")

    def skipped(self, key):
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.rules.get("skip", ()))

    def share(self, rule, key):
        """A rule's number for an array; 0 where it has none."""
        value = self.rules.get(rule, 0)
        if isinstance(value, dict):
            return max((share for pattern, share in value.items() if fnmatch.fnmatchcase(key, pattern)), default=0)
        return value

    def compare(self, key, got, tolerance, slack=0):
        """Holds an array against `expected[key]`; `tolerance` is absolute.

        `slack` is what single numbers may be off beyond it; those that need it are left out and counted in `ties`.
        """
        expected, got = self.expected[key], np.asarray(got)
        self.compared.add(key)
        if got.shape != expected.shape:
            self.problems.append(f"{key}: shape {got.shape}, expected {expected.shape}")
            return
        error = np.abs(got.astype(np.float64) - expected)
        tolerance += self.share("relative_to_array_max", key) * np.abs(expected).max(initial=0)
        tied = (error > tolerance) & (error <= tolerance + slack)
        self.ties += int(tied.sum())
        error = np.where(tied, 0, error)
        if "levels" in self.rules:
            numerator, denominator = map(float, self.rules["levels"]["of"].split("/"))
            other = error > tolerance
            if other.mean() <= self.rules["levels"]["at_most_fraction"] and error.max() <= numerator / denominator + tolerance:
                error = error[~other]
        if 0 < self.share("fraction_equal", key) <= (error <= tolerance).mean():
            error = error[error <= tolerance]
        largest = float(error.max(initial=0)) if np.isfinite(got).all() else float("inf")
        if largest > tolerance:
            self.problems.append(f"{key}: error {largest:.2e} above {tolerance:.1e}")
        ratio = largest / tolerance if tolerance else largest
        self.worst = max(self.worst, (ratio, largest, tolerance))

    def compare_intermediate(self, key, got):
        """As `compare`, within the case's own tolerance for these, or the original's float noise, which grows with the values."""
        if "tolerance_intermediates" in self.meta:
            return self.compare(key, got, self.meta["tolerance_intermediates"])
        self.compare(key, got, self.noise * self.meta["tolerance"] * max(1, np.abs(self.expected[key]).max() / 4))


def _arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def flattened(config):
    """{"transformer.num_heads": ...} of a nested configuration."""
    flat = {}
    for key, value in config.items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat


def translated(config, options):
    """An original configuration in our words; `options` is {its key: ours, or None if it says nothing about the numbers}."""
    unknown = set(config) - set(options)
    if unknown:
        raise Unknown(f"options {sorted(unknown)}")
    return {ours: config[key] for key, ours in options.items() if ours and key in config}


def expected_taps(case, table, prefix=""):
    """{key of expected.npz: what to tap} by [(pattern of keys after `prefix`, tap with {0}, {1} ... for its groups)]."""
    taps = {}
    for key in case.expected:
        for pattern, name in table:
            found = re.fullmatch(re.escape(prefix) + pattern, key)
            if found and not case.skipped(key):
                taps[key] = name.format(*(int(group) if group.isdigit() else group for group in found.groups()))
    return taps


def compare_taps(case, model, taps, outputs, images):
    """Runs images through a model and compares {key: what to tap}: the `outputs` strictly, what lies before them by its size."""
    wanted = {key: tap for key, tap in taps.items() if key in case.expected and not case.skipped(key)}
    graph = keras.Model(model.input, {key: zoo.tap(model, tap) if isinstance(tap, str) else tap for key, tap in wanted.items()})
    call = graph.predict_on_batch if keras.config.backend() == "jax" else graph  # JAX compiles op by op otherwise
    for key, got in call(images).items():
        got = keras.ops.convert_to_numpy(got)
        if key in outputs:
            case.compare(key, got, case.meta["tolerance"])
        else:
            case.compare_intermediate(key, got)


# What an original's file is called, its real one before the arrays of it
CHECKPOINTS = ("checkpoint.npz", "checkpoint.pth", "checkpoint.pth.tar", "checkpoint.pyth", "model.safetensors", "state_dict.npz")


def checkpoint(case):
    """The path of the original's file in a case."""
    return next(path for path in map(case.folder.joinpath, CHECKPOINTS) if path.exists())


def round_trip(case, model, checkpoint):
    """Loading and saving gives the checkpoint's keys and bits again."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, checkpoint.name)  # in the same format
        keras_vit.save_npz(model, path)
        first, again = open_file(checkpoint), open_file(path)
        if first.entries != again.entries:
            case.problems.append("save_npz wrote other keys, shapes or types")
        elif any(first.exact(key).tobytes() != again.exact(key).tobytes() for key in first.entries):
            case.problems.append("save_npz wrote other bits")


def load_and_write_back(case, model):
    """Loads a case's `checkpoint` into a model, and checks the `round_trip`."""
    file = checkpoint(case)
    keras_vit.load_weights(model, file)
    round_trip(case, model, file)


def as_tokens(grid):
    """(b, h, w, d) -> (b, h * w, d), as the originals in PyTorch have patches."""
    return keras.ops.reshape(grid, (-1, grid.shape[1] * grid.shape[2], grid.shape[3]))


def install(case, model):
    """Puts the arrays that `compare.install` names into the model."""
    names, ours = zoo.FAMILIES[model.family].layouts[model.weights_info["layout"]], load.named_weights(model)
    for original, key in case.rules.get("install", {}).items():
        ((name, transform, _),) = names.to_ours(original)
        value = load.to_numpy(ours[name]).copy()
        transform.place(case.expected[key], value)
        ours[name].assign(value)
        case.compared.add(key)


def compare_loaded(case, model, weights):
    """Compares weights as they were loaded, {key of expected.npz: our name}, and returns their keys."""
    ours = load.named_weights(model)
    for key, name in weights.items():
        case.compare(key, load.to_numpy(ours[name]), 1e-6)
    return list(weights)


# Every config key of the original's VisionTransformer -> ours
VIT_OPTIONS = {
    "hidden_size": "width", "patches.size": "patch_size", "classifier": "classifier",
    "representation_size": "representation_size", "transformer.num_layers": "depth", "transformer.num_heads": "heads",
    "transformer.mlp_dim": "mlp", "num_classes": "classes",
    "transformer.dropout_rate": None, "transformer.attention_dropout_rate": None, "model_name": None,
}  # fmt: skip


def build_vit(builder, options, image_shape, **more):
    """A random model of an original configuration, in our words."""
    pooling = {"token": "token", "gap": "avg"}.get(options["classifier"])
    top = options["classes"] is not None
    if not top and pooling is None and options["representation_size"] is not None:
        raise Unknown("a representation of every token without a head")
    return builder(top, None, input_shape=tuple(image_shape[1:]), pooling=pooling, **options, **more)


def _vit(config, image_shape, **more):
    return build_vit(keras_vit.ViT, translated(flattened(config), VIT_OPTIONS), image_shape, **more)


# Names in expected.npz -> what to tap
VIT_TAPS = [
    (r"patch_embedding", "patches"), (r"embedded_with_pos", "tokens"), (r"encoder_norm", "encoder_norm"),
    (r"encoderblock_(\d+)", "block_{0}"), (r"encoderblock_(\d+)_attention_weights", "block_{0}/scores"),
    (r"encoderblock_(\d+)_LayerNorm_0", "block_{0}/attention_norm"), (r"encoderblock_(\d+)_LayerNorm_[12]", "block_{0}/mlp_norm"),
    (r"encoderblock_(\d+)_MultiHeadDotProductAttention_[01]", "block_{0}/attention"),
    (r"encoderblock_(\d+)_MlpBlock_[03]", "block_{0}/mlp"), (r"pre_logits_before_tanh", "pre_logits"),
]  # fmt: skip


def compare_vit(case, model, table=VIT_TAPS):
    """Runs the case's images through a loaded ViT or hybrid and compares the final outputs and all that lies before them."""
    names = {layer.name for layer in model.layers}
    before_head = ("pre_logits_tanh", "mean_tokens", "class_token", "encoder_norm")
    taps = {"pre_logits": next(name for name in before_head if name in names)}
    outputs = case.rules.get("outputs", ["logits"])
    taps |= {name: "head" if "head" in names else taps["pre_logits"] for name in outputs}
    compare_taps(case, model, taps | expected_taps(case, table), outputs, case.inputs["images"])
    return outputs


def run_vit(case, build=_vit, table=VIT_TAPS):
    model = build(case.meta["config"], case.meta["image_shape"])
    if "checkpoint_config" in case.meta:
        return _run_resized(case, model, table)
    checkpoint = case.folder / "checkpoint.npz"
    keras_vit.load_weights(model, checkpoint)
    round_trip(case, model, checkpoint)
    return compare_vit(case, model, table)


def _run_resized(case, model, table):
    """A checkpoint of another resolution, loaded as the original's `load_pretrained` does: with a new head."""
    ignore = ("pre_logits/*",) if case.meta["config"]["representation_size"] is None else ()
    keras_vit.load_weights(model, case.folder / "checkpoint.npz", ignore=ignore, reset_head=True)
    loaded = {"pos_embedding": "tokens/positions", "loaded_head_kernel": "head/kernel", "loaded_head_bias": "head/bias"}
    compare_loaded(case, model, loaded)
    install(case, model)
    return compare_vit(case, model, table) + list(loaded)


def run_vit_resize(case):
    if "items" in case.meta:  # positions alone
        for item in case.meta["items"]:
            resample = adapt.Positions((item["grid_to"],) * 2, item["has_class_token"], file_grid=(item["grid_from"],) * 2)
            table = {resample.TABLE: case.inputs[item["name"]]}
            case.compare(item["name"], resample(table)[resample.TABLE], case.meta["tolerance"])
        return list(case.expected)
    return run_vit(case)


def run_texts(case):
    """Tokens, by Python and by TensorFlow's operations."""
    from keras_vit.data import text

    if "vocab" in case.meta:
        tokenizer = text.WordPiece("\n".join(case.meta["vocab"]).encode(), length=case.meta["max_len"])
    else:
        tokenizer = text.open_tokenizer(case.folder / "sentencepiece.model", length=case.meta["max_len"])
    for tokens in (tokenizer(case.meta["texts"]), tokenizer.in_graph(case.meta["texts"]).numpy()):
        case.compare("tokens", tokens, 0)
    return list(case.expected)


def run_preprocess(case):
    from keras_vit.data import ops, pipeline

    if "texts" in case.meta:
        return run_texts(case)
    if all(set(item) == {"name", "size"} for item in case.meta["items"]):
        for item in case.meta["items"]:
            image = pipeline.eval_image(case.inputs[item["name"]], item["size"], Pixels())
            case.compare(item["name"], image, case.meta["tolerance"])
    elif all(set(item) == {"name", "size", "crop"} for item in case.meta["items"]):  # LiT's
        for item in case.meta["items"]:
            pixels = Pixels(crop="cover" if item["crop"] else "squash", whole=True)
            image = pipeline.eval_image(case.inputs[item["name"]], item["size"], pixels)
            case.compare(item["name"], image, case.meta["tolerance"])
    elif all("begin_y" in item for item in case.meta["items"]):
        for item in case.meta["items"]:
            box = tuple(item[side] for side in ("begin_y", "begin_x", "height", "width"))
            image = pipeline.train_image(case.inputs[item["name"]], item["size"], Pixels(), box=box, flip=item["flip"])
            case.compare(item["name"], image, case.meta["tolerance"])
    elif all("spec" in item for item in case.meta["items"]):
        for item in case.meta["items"]:
            features = ops.preprocess(item["spec"])({"image": case.inputs[item["name"]]})
            case.compare(item["name"], features["image"], case.meta["tolerance"])
    else:
        raise Unknown("preprocessing of this kind")
    for key in case.expected:
        label = re.fullmatch(r"onehot_label_(\d+)_of_(\d+)", key)
        if label:
            case.compare(key, pipeline.one_hot(int(label[1]), int(label[2])), case.meta["tolerance"])
    return list(case.expected)


def run_randaug(case):
    from keras_vit.data import augment

    for name, arguments in case.meta["config"]["arguments"].items():
        for magnitude, expected in arguments.items():
            got = list(augment.OPERATIONS[name][1](int(magnitude)))
            if got != expected:
                case.problems.append(f"{name} at magnitude {magnitude}: arguments {got}, expected {expected}")
    for key in case.expected:  # Rotate/m10-/photo
        name, at, image = key.split("/")
        operation, arguments = augment.OPERATIONS[name]
        values = arguments(int(at[1:-1]))
        if at.endswith("-"):
            values = [-value for value in values]
        case.compare(key, operation(case.inputs[image], *values), case.meta["tolerance"])
    return list(case.expected)


# Every option of big_vision's ViT -> ours; dropout is off, and the rest says where numbers come from or how they are computed
BIG_VISION_OPTIONS = {
    "patch_size": "patch_size", "width": "width", "depth": "depth", "mlp_dim": "mlp", "num_heads": "heads", "posemb": "positions",
    "pool_type": "classifier", "rep_size": "representation_size", "num_classes": "classes", "dropout": None,
    "head_zeroinit": None, "scan": None, "remat_policy": None,
}  # fmt: skip
POOL_TYPES = {"gap": "gap", "tok": "token", "map": "map", "none": "unpooled"}


def big_vision_options(config, known=BIG_VISION_OPTIONS):
    """Our builder's arguments of a configuration of big_vision."""
    default = dict(patch_size=16, width=768, depth=12, mlp=None, heads=12, positions="learn", classifier="gap", classes=None)
    options = {**default, "representation_size": False, **translated(config, known)}
    if options["classifier"] not in POOL_TYPES:
        raise Unknown(f"pool_type {options['classifier']!r}")
    rep = options["representation_size"]
    options["representation_size"] = options["width"] if rep is True else rep or None
    options["mlp"] = options["mlp"] or 4 * options["width"]
    options["classifier"] = POOL_TYPES[options["classifier"]]
    options["positions"] = {"learn": "learned"}.get(options["positions"], options["positions"])
    return options


def build_big_vision(builder, options, image_shape, **more):
    """A random model of `big_vision_options` for images of a shape (b, H, W, 3)."""
    top = options["classes"] is not None
    pooling = {"unpooled": None, "gap": "avg"}.get(options["classifier"], options["classifier"])
    if not top and pooling is None and options["representation_size"]:
        raise Unknown("a representation of every token without a head")
    return builder(top, None, input_shape=tuple(image_shape[1:]), pooling=None if top else pooling, **options, **more)


# Names in expected.npz -> what to tap
BIG_VISION_TAPS = [
    (r"stem", "patches"), (r"encoded", "encoder_norm"), (r"encoder_block(\d+)", "block_{0}"),
    (r"encoder_block(\d+)_\+mlp", "block_{0}"), (r"encoder_block(\d+)_sa", "block_{0}/attention"),
    (r"encoder_block(\d+)_mlp", "block_{0}/mlp"),
    (r"attention_weights/Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_0", "block_{0}/scores"),
    (r"attention_weights/MAPHead_0/MultiHeadDotProductAttention_0", "map_head/scores"),
]  # fmt: skip


def compare_big_vision(case, model, images, prefix=""):
    """Runs images through a loaded model with big_vision's wiring and compares all that the original returns."""
    layers = {layer.name: layer for layer in model.layers}
    taps = expected_taps(case, BIG_VISION_TAPS, prefix)
    tokens = zoo.tap(model, "tokens")
    taps[f"{prefix}with_posemb"] = tokens[:, 1:] if layers["tokens"].class_token else tokens
    for key in case.expected:
        added = re.fullmatch(re.escape(prefix) + r"encoder_block(\d+)_\+sa", key)
        if added:
            block = f"block_{int(added[1])}"
            before = zoo.tap(model, f"block_{int(added[1]) - 1}" if int(added[1]) else "dropout")
            taps[key] = before + zoo.tap(model, f"{block}/attention")
    pooled = next((name for name in ("map_head", "mean_tokens", "class_token") if name in layers), "encoder_norm")
    taps[f"{prefix}head_input"] = pooled
    taps[f"{prefix}pre_logits"] = "pre_logits_tanh" if "pre_logits_tanh" in layers else pooled
    taps |= {prefix + key: tensor for key, tensor in tokens_2d(model, layers).items()}
    outputs = [f"{prefix}pre_logits"]
    if "head" in layers:
        taps[f"{prefix}logits"] = "head"
        outputs = [f"{prefix}{key}" for key in ("logits", "logits_2d")]
    compare_taps(case, model, taps, outputs, images)
    return outputs


def tokens_2d(model, layers):
    """Representation and logits of every patch, on their grid (b, h, w, n): the layers after the encoder, called again."""
    x = zoo.tap(model, "encoder_norm")
    x = x[:, 1:] if layers["tokens"].class_token else x
    grid = layers["patches"].output.shape[1:3]
    found = {}
    for name in ("pre_logits", "pre_logits_tanh"):
        x = layers[name](x) if name in layers else x
    found["pre_logits_2d"] = keras.ops.reshape(x, (-1, *grid, x.shape[-1]))
    if "head" in layers:
        x = layers["head"](x)
        found["logits_2d"] = keras.ops.reshape(x, (-1, *grid, x.shape[-1]))
    return found


def run_bigvision_vit(case):
    model = build_big_vision(keras_vit.ViT, big_vision_options(case.meta["config"]), case.meta["image_shape"], style="big_vision")
    dont_load = case.meta.get("dont_load", [])
    if set(dont_load) - {"head/.*"}:
        raise Unknown(f"dont_load {dont_load}")
    checkpoint = case.folder / "checkpoint.npz"
    keras_vit.load_weights(model, checkpoint, reset_head=bool(dont_load))
    if not model.weights_info["adapted"] and not dont_load:
        round_trip(case, model, checkpoint)
    install(case, model)
    loaded = {
        "loaded_pos_embedding": "tokens/positions", "loaded_cls": "tokens/cls", "loaded_head_kernel": "head/kernel",
        "loaded_head_bias": "head/bias",
    }  # fmt: skip
    outputs = compare_loaded(case, model, {key: name for key, name in loaded.items() if key in case.expected})
    return outputs + compare_big_vision(case, model, case.inputs["images"])


# Every config key of the original's MlpMixer -> ours
MIXER_OPTIONS = {
    "hidden_dim": "width", "patches.size": "patch_size", "num_blocks": "depth", "tokens_mlp_dim": "tokens_mlp",
    "channels_mlp_dim": "channels_mlp", "num_classes": "classes", "model_name": None,
}  # fmt: skip
MIXER_TAPS = [
    (r"stem", "patches"), (r"pre_head_layer_norm", "encoder_norm"), (r"pooled", "mean_tokens"),
    (r"MixerBlock_(\d+)", "block_{0}"), (r"MixerBlock_(\d+)_LayerNorm_0", "block_{0}/token_norm"),
    (r"MixerBlock_(\d+)_LayerNorm_1", "block_{0}/channel_norm"),
    (r"MixerBlock_(\d+)_(token|channel)_mixing", "block_{0}/{1}_mixing"),
]  # fmt: skip


def run_mixer(case):
    options = translated(flattened(case.meta["config"]), MIXER_OPTIONS)
    classes = options.pop("classes") or None  # the original takes 0 for no head
    shape = tuple(case.meta["image_shape"][1:])
    model = keras_vit.Mixer(classes is not None, None, input_shape=shape, pooling="avg", classes=classes, **options)
    keras_vit.load_weights(model, case.folder / "checkpoint.npz")
    round_trip(case, model, case.folder / "checkpoint.npz")
    outputs = case.rules.get("outputs", ["logits"])
    taps = {name: "head" if classes else "mean_tokens" for name in outputs}
    compare_taps(case, model, taps | expected_taps(case, MIXER_TAPS), outputs, case.inputs["images"])
    return outputs


HYBRID_OPTIONS = VIT_OPTIONS | {"resnet.num_layers": "stages", "resnet.width_factor": "width_factor"}


def run_hybrid(case):
    def build(config, image_shape):
        return build_vit(keras_vit.Hybrid, translated(flattened(config), HYBRID_OPTIONS), image_shape)

    stages = case.meta["config"]["resnet"]["num_layers"]
    # Float noise adds up over units: after eight, exact (float64) arithmetic is 1.8 tolerances off the original's intermediates
    case.noise = max(1, sum(stages) / 3)
    ends = [(rf"resnet_block{s}", f"stage_{s}_unit_{units}") for s, units in enumerate(stages, 1)]
    units = (r"resnet_block(\d+)_unit(\d+)", "stage_{0}_unit_{1}")
    return run_vit(case, build, [*VIT_TAPS, (r"((?:conv|gn)_root)", "{0}"), units, *ends])


FLEXIVIT_OPTIONS = {**BIG_VISION_OPTIONS, "patch_size": "stored_patch_size", "posemb_size": "stored_grid"}


def run_flexivit(case):
    if "items" in case.meta:
        return _run_flexivit_resizing(case)
    checkpoint, tolerance, outputs = case.folder / "checkpoint.npz", case.meta["tolerance"], []
    options = big_vision_options(case.meta["config"], FLEXIVIT_OPTIONS)
    del options["representation_size"], options["patch_size"]  # has none; each run names its own
    for item in case.meta["runs"]:
        name, patch_size = item["name"], tuple(item["patch_size"])
        images = case.inputs[name]
        model = build_big_vision(keras_vit.FlexiViT, options, images.shape, patch_size=patch_size)
        keras_vit.load_weights(model, checkpoint)
        round_trip(case, model, checkpoint)
        kernel = keras.ops.convert_to_numpy(model.get_layer("patches").kernel_at(patch_size))
        case.compare(f"{name}/patch_kernel", kernel, tolerance)
        outputs += compare_big_vision(case, model, images, f"{name}/") + [f"{name}/patch_kernel"]
    plain = {key: value for key, value in options.items() if key not in ("stored_patch_size", "stored_grid")}
    for item in case.meta.get("fixed_size_loads", []):
        name, images = item["name"], case.inputs[item["name"]]
        plain |= dict(patch_size=tuple(item["patch_size"]), representation_size=None)
        model = build_big_vision(keras_vit.ViT, plain, images.shape, style="big_vision")
        keras_vit.load_weights(model, checkpoint, resize_patches=True)
        loaded = {"patch_kernel": "patches/kernel", "pos_embedding": "tokens/positions"}
        for key, weight in loaded.items():
            case.compare(f"{name}/{key}", load.to_numpy(load.named_weights(model)[weight]), tolerance)
        compare_taps(case, model, {f"{name}/logits": "head"}, [f"{name}/logits"], images)
        outputs += [f"{name}/{key}" for key in (*loaded, "logits")]
    return outputs


def _run_flexivit_resizing(case):
    """Patch kernels alone, or tables of positions alone as the model and as `load` resize them."""
    for item in case.meta["items"]:
        name, x = item["name"], case.inputs[item["name"]]
        if "new_hw" in item:
            case.compare(name, adapt.resample_patches(x, item["new_hw"]), case.meta["tolerance"])
            continue
        grid, sides = x.reshape(*item["grid_from"], -1), (item["grid_from"], item["grid_to"])
        resized = {
            "model_linear": np.einsum("yh,xw,hwd->yxd", *map(adapt.antialiased, *sides), grid),
            "load_zoom": adapt.resample_grid(grid, item["grid_to"]),
        }
        for key, table in ((f"{how}/{name}", table) for how, table in resized.items()):
            if key in case.expected:
                case.compare(key, table.reshape(1, -1, x.shape[-1]), case.meta["tolerance"])
    return list(case.expected)


def run_train(case):
    return parity_training.run_train(case, lambda config, shape: _vit(config, shape, classifier_activation=None))


def run_sam_gsam(case):
    return parity_training.run_sam_gsam(case, _big_vision_logits)


def run_adafactor(case):
    return parity_training.run_adafactor(case, _big_vision_logits)


def _big_vision_logits(config, shape):
    options = big_vision_options(config)
    return build_big_vision(keras_vit.ViT, options, shape, style="big_vision", classifier_activation=None)


RUNNERS = {
    "vit": run_vit,
    "vit_resize": run_vit_resize,
    "bigvision_vit": run_bigvision_vit,
    "preprocess": run_preprocess,
    "randaug": run_randaug,
    "mixer": run_mixer,
    "hybrid": run_hybrid,
    "flexivit": run_flexivit,
    "train": run_train,
    "sam_gsam": run_sam_gsam,
    "adafactor": run_adafactor,
    "deit_loss": parity_objectives.run_deit_loss,
}


def runner(family):
    """What runs a case of a family: one of `RUNNERS`, else `run_FAMILY` of the file benchmarks/parity_FAMILY.py."""
    if family in RUNNERS:
        return RUNNERS[family]
    module = f"benchmarks.parity_{family}"
    if not re.fullmatch("[a-z0-9_]+", family) or importlib.util.find_spec(module) is None:
        raise Unknown(f"family {family!r}")
    return getattr(importlib.import_module(module), f"run_{family}")


def run(folder):
    """Runs one case and prints its line; returns whether all is well."""
    try:
        case = Case(folder)
    except (OSError, ValueError, KeyError) as error:
        print(f"{folder}  MISS not a case: {type(error).__name__}: {error}")
        return False
    try:
        for missed in set(runner(case.family)(case)) - case.compared:
            if not case.skipped(missed):
                case.problems.append(f"{missed}: a final output that was not compared")
    except Unknown as error:
        case.problems.append(f"not known here: {error}")
    except Exception as error:  # noqa: BLE001 - a case that cannot be run is a miss, and the others still run
        case.problems.append(f"{type(error).__name__}: {error}")
    _, error, tolerance = case.worst
    counts = f"{len(case.compared)}/{len(case.expected)}"
    verdict = "ok" if not case.problems else "MISS " + "; ".join(case.problems[:4])
    if case.ties:
        verdict += f", but for {case.ties} numbers that hang on a bfloat16 halfway between two"
    print(f"{case.family:<12} {case.name:<24} {counts:>7} arrays  max error {error:.2e}  tolerance {tolerance:.1e}  {verdict}")
    return not case.problems


def main(argv):
    if not argv:
        print(__doc__)
        return 2
    results = []
    for root in map(pathlib.Path, argv):
        folders = sorted(path.parent for path in root.rglob("meta.json"))
        if not folders:
            print(f"{root}: no case found (a folder with meta.json)")
        results += [run(folder) for folder in folders] or [False]
    print(f"{keras.config.backend()}: {sum(results)} of {len(results)} cases ok")
    return 0 if all(results) else 1


if __name__ == "__main__":
    from benchmarks import parity  # by its own name, under which the families' files know it

    sys.exit(parity.main(sys.argv[1:]))
