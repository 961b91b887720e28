"""Compares models and preprocessing with what the original implementations computed: `python -m benchmarks.parity DIR [DIR ...]`.

DIR is a case folder (checkpoint.npz, inputs.npz, expected.npz, meta.json) or any folder above some. One line for each case; exits
with 1 on any miss, on a final output that was not compared, on a family or option not known here, and where there is no case.
The backend is Keras's own choice: `KERAS_BACKEND=jax python -m benchmarks.parity DIR`.
"""

import fnmatch
import json
import pathlib
import re
import sys
import tempfile

import keras
import numpy as np

import keras_vit
from keras_vit import zoo
from keras_vit.checkpoints import adapt, load
from keras_vit.checkpoints.files import Npz
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

    @property
    def inputs(self):
        return _arrays(self.folder / "inputs.npz")

    def skipped(self, key):
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.rules.get("skip", ()))

    def compare(self, key, got, tolerance):
        """Holds an array against `expected[key]`; `tolerance` is absolute."""
        expected, got = self.expected[key], np.asarray(got)
        self.compared.add(key)
        if got.shape != expected.shape:
            self.problems.append(f"{key}: shape {got.shape}, expected {expected.shape}")
            return
        error = np.abs(got.astype(np.float64) - expected)
        tolerance += self.rules.get("relative_to_array_max", 0) * np.abs(expected).max(initial=0)
        if "levels" in self.rules:
            numerator, denominator = map(float, self.rules["levels"]["of"].split("/"))
            other = error > tolerance
            if other.mean() <= self.rules["levels"]["at_most_fraction"] and error.max() <= numerator / denominator + tolerance:
                error = error[~other]
        if "fraction_equal" in self.rules and (error <= tolerance).mean() >= self.rules["fraction_equal"]:
            error = error[error <= tolerance]
        largest = float(error.max(initial=0)) if np.isfinite(got).all() else float("inf")
        if largest > tolerance:
            self.problems.append(f"{key}: error {largest:.2e} above {tolerance:.1e}")
        ratio = largest / tolerance if tolerance else largest
        self.worst = max(self.worst, (ratio, largest, tolerance))

    def compare_intermediate(self, key, got):
        """As `compare`, within the float noise of the original itself, which grows with the array's values."""
        self.compare(key, got, self.meta["tolerance"] * max(1, np.abs(self.expected[key]).max() / 4))


def _arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


# Every config key of the original's VisionTransformer -> ours; None: says nothing about the numbers at inference
_VIT_OPTIONS = {
    "hidden_size": "width", "patches.size": "patch_size", "classifier": "classifier",
    "representation_size": "representation_size", "transformer.num_layers": "depth", "transformer.num_heads": "heads",
    "transformer.mlp_dim": "mlp", "num_classes": "classes",
    "transformer.dropout_rate": None, "transformer.attention_dropout_rate": None, "model_name": None,
}  # fmt: skip


def _vit(config, image_shape):
    """A random keras_vit.ViT of an original configuration."""
    flat = {}
    for key, value in config.items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    unknown = set(flat) - set(_VIT_OPTIONS)
    if unknown:
        raise Unknown(f"options {sorted(unknown)}")
    options = {ours: flat[key] for key, ours in _VIT_OPTIONS.items() if ours and key in flat}
    pooling = {"token": "token", "gap": "avg"}.get(options["classifier"])
    top = options["classes"] is not None
    if not top and pooling is None and options["representation_size"] is not None:
        raise Unknown("a representation of every token without a head")
    return keras_vit.ViT(top, None, input_shape=tuple(image_shape[1:]), pooling=pooling, **options)


# Names in expected.npz -> what to tap
_VIT_TAPS = [
    (r"patch_embedding", "patches"), (r"embedded_with_pos", "tokens"), (r"encoder_norm", "encoder_norm"),
    (r"encoderblock_(\d+)", "block_{0}"), (r"encoderblock_(\d+)_attention_weights", "block_{0}/scores"),
    (r"encoderblock_(\d+)_LayerNorm_0", "block_{0}/attention_norm"), (r"encoderblock_(\d+)_LayerNorm_[12]", "block_{0}/mlp_norm"),
    (r"encoderblock_(\d+)_MultiHeadDotProductAttention_[01]", "block_{0}/attention"),
    (r"encoderblock_(\d+)_MlpBlock_[03]", "block_{0}/mlp"), (r"pre_logits_before_tanh", "pre_logits"),
]  # fmt: skip


def _compare_vit(case, model):
    """Runs the case's images through a loaded model and compares the final outputs and all that lies before them."""
    names = {layer.name for layer in model.layers}
    before_head = ("pre_logits_tanh", "mean_tokens", "class_token", "encoder_norm")
    taps = {"pre_logits": next(name for name in before_head if name in names)}
    outputs = case.rules.get("outputs", ["logits"])
    taps |= {name: "head" if "head" in names else taps["pre_logits"] for name in outputs}
    for key in case.expected:
        for pattern, name in _VIT_TAPS:
            found = re.fullmatch(pattern, key)
            if found and not case.skipped(key):
                taps[key] = name.format(*found.groups())
    graph = keras.Model(model.input, {key: zoo.tap(model, name) for key, name in taps.items() if key in case.expected})
    call = graph.predict_on_batch if keras.config.backend() == "jax" else graph  # JAX compiles op by op otherwise
    for key, got in call(case.inputs["images"]).items():
        got = keras.ops.convert_to_numpy(got)
        if key in outputs:
            case.compare(key, got, case.meta["tolerance"])
        else:
            case.compare_intermediate(key, got)
    return outputs


def _round_trip(case, model, checkpoint):
    """Loading and saving gives the checkpoint's keys and bits again."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "again.npz")
        keras_vit.save_npz(model, path)
        first, again = Npz(checkpoint), Npz(path)
        if set(first.entries) != set(again.entries):
            case.problems.append("save_npz wrote other keys")
        elif any(first.read(key).tobytes() != again.read(key).tobytes() for key in first.entries):
            case.problems.append("save_npz wrote other bits")


def run_vit(case):
    model = _vit(case.meta["config"], case.meta["image_shape"])
    checkpoint = case.folder / "checkpoint.npz"
    keras_vit.load_weights(model, checkpoint)
    _round_trip(case, model, checkpoint)
    return _compare_vit(case, model)


def run_vit_resize(case):
    if "items" in case.meta:  # positions alone
        for item in case.meta["items"]:
            grid = (item["grid_to"],) * 2
            resample = adapt.Positions(item["name"], grid, item["has_class_token"], (item["grid_from"],) * 2)
            case.compare(item["name"], resample(case.inputs[item["name"]]), case.meta["tolerance"])
        return list(case.expected)
    model = _vit(case.meta["config"], case.meta["image_shape"])
    ignore = ("pre_logits/*",) if case.meta["config"]["representation_size"] is None else ()
    keras_vit.load_weights(model, case.folder / "checkpoint.npz", ignore=ignore, reset_head=True)
    weights = {"pos_embedding": model.get_layer("tokens").positions}
    weights |= {f"loaded_head_{leaf}": getattr(model.get_layer("head"), leaf) for leaf in ("kernel", "bias")}
    for key, weight in weights.items():
        case.compare(key, load.to_numpy(weight), 1e-6)
    names, ours = zoo.FAMILIES[model.family].layouts[model.weights_info["layout"]], load.named_weights(model)
    for original, key in case.rules.get("install", {}).items():
        ((name, transform),) = names.to_ours(original)
        value = load.to_numpy(ours[name]).copy()
        transform.place(case.expected[key], value)
        ours[name].assign(value)
        case.compared.add(key)
    return _compare_vit(case, model) + list(weights)


def run_preprocess(case):
    from keras_vit.data import ops, pipeline

    if all(set(item) == {"name", "size"} for item in case.meta["items"]):
        for item in case.meta["items"]:
            image = pipeline.eval_image(case.inputs[item["name"]], item["size"], Pixels())
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


RUNNERS = {"vit": run_vit, "vit_resize": run_vit_resize, "preprocess": run_preprocess}


def run(folder):
    """Runs one case and prints its line; returns whether all is well."""
    try:
        case = Case(folder)
    except (OSError, ValueError, KeyError) as error:
        print(f"{folder}  MISS not a case: {type(error).__name__}: {error}")
        return False
    try:
        if case.family not in RUNNERS:
            raise Unknown(f"family {case.family!r}")
        for missed in set(RUNNERS[case.family](case)) - case.compared:
            if not case.skipped(missed):
                case.problems.append(f"{missed}: a final output that was not compared")
    except Unknown as error:
        case.problems.append(f"not known here: {error}")
    except Exception as error:  # noqa: BLE001 - a case that cannot be run is a miss, and the others still run
        case.problems.append(f"{type(error).__name__}: {error}")
    _, error, tolerance = case.worst
    counts = f"{len(case.compared)}/{len(case.expected)}"
    verdict = "ok" if not case.problems else "MISS " + "; ".join(case.problems[:4])
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
    sys.exit(main(sys.argv[1:]))
