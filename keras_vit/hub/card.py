"""Model cards of a module, in the formats of TF-Hub and Hugging Face, from one list of facts."""

import json
import re
import sys
from numbers import Real
from pathlib import Path

from keras_vit import zoo
from keras_vit.data.pixels import Pixels
from keras_vit.errors import ExportError

TFHUB, HUGGING_FACE = FILES = ("tfhub.md", "README.md")
# What a model does not know of itself: {key of `extra`: type}
EXTRA = {"dataset": str, "recipe": str, "evaluation": list, "publisher": str, "version": int, "licence": str}
MEASURED = {"dataset": str, "split": str, "metric": str, "value": Real, "images": int, "source": str}
_NEEDED = ("dataset", "split", "metric", "value")
_SUFFIX = {"classification": "classification", "feature_vector": "fe", "tokens": "tokens"}  # as of modules on tfhub.dev
_RANGES = {"unit": "0 to 1", "minus1_1": "-1 to 1"}
# Found in the address of a checkpoint: {text: dataset as TF-Hub calls it}
_DATASETS = {
    "imagenet2012": "imagenet-ilsvrc-2012-cls", "i1k": "imagenet-ilsvrc-2012-cls", "imagenet21k": "imagenet-21k",
    "i21k": "imagenet-21k",
}  # fmt: skip

_CAVEAT = (
    "ImageNet's images may be used for research and teaching that is not commercial, by the terms under which they are given out "
    "(https://image-net.org/download). Whether that binds weights trained on them is not settled; the licence named here is that "
    "of the weights' publisher and says nothing about the images."
)
_USES = {
    "TensorFlow": """import tensorflow as tf

module = tf.saved_model.load(".")  # this folder
images = tf.zeros({batch})  # RGB, {range}
outputs = module(images)  # {output}
served = module.signatures["serving_default"](images=images)["{key}"]
""",
    "tf_keras and tensorflow_hub": """import tensorflow_hub as hub
import tf_keras

layer = hub.KerasLayer(".", trainable=True)
model = tf_keras.Sequential([tf_keras.Input({shape}), layer])
model.compile("sgd", {tf_keras_loss})
""",
    "Keras 3": """import keras
from keras_vit.hub import HubLayer

model = keras.Sequential([keras.Input({shape}), HubLayer(".", trainable=True)])
model.compile("adam", {loss})
""",
}


def check(extra, where):
    """Raises ExportError, naming `where`, unless `extra` is a dict of what `EXTRA` and `MEASURED` allow."""

    def typed(values, allowed, of):
        for key, value in values.items():
            wanted = allowed.get(key)
            if wanted is None or not isinstance(value, wanted) or isinstance(value, bool):
                kind = wanted.__name__ if wanted else f"one of {', '.join(allowed)}"
                raise ExportError(f"{where}: {of}: expected {key!r} to be {kind}, got {value!r}. Correct it, or leave it out.")

    typed(extra, EXTRA, "card")
    for row in extra.get("evaluation", ()):
        if not isinstance(row, dict) or not set(_NEEDED) <= set(row):
            raise ExportError(
                f"{where}: card: expected 'evaluation' to hold dicts with {', '.join(_NEEDED)}, got {row!r}. Give measured "
                "numbers only, each with what it was measured on."
            )
        typed(row, MEASURED, "card: evaluation")


def write(folder, about, extra):
    """Writes both cards into the folder of a module.

    Args:
        folder: of the module.
        about: what is known of it: its manifest but for the files.
        extra: what the model does not know of itself, all optional: "dataset" that it was trained on, "recipe" (a configuration
            or command), "evaluation", a list of measured numbers ({"dataset", "split", "metric", "value"}, perhaps "images" and
            "source"), "publisher", "version" and "licence".
    """
    title = f"{extra.get('publisher', 'keras_vit')}/{name(about)}/{extra.get('version', 1)}"
    body = _body(about, extra)
    Path(folder, TFHUB).write_text(f"# Module {_plain(title)}\n\n{_summary(about)}\n\n{_comments(about, extra)}\n\n{body}")
    Path(folder, HUGGING_FACE).write_text(
        f"---\n{_front_matter(about, extra)}---\n\n# {_plain(title)}\n\n{_summary(about)}\n\n{body}"
    )


def read(folder):
    """What the card for TF-Hub in a module's folder says: {"module": its name, key of a comment or name of a fact: text}."""
    text = Path(folder, TFHUB).read_text()
    found = {"module": text.partition("\n")[0].removeprefix("# Module ")}
    found |= dict(re.findall(r"^<!-- ([\w-]+): (.*) -->$", text, re.M))
    overview = text.partition("\n## Evaluation\n")[0]
    return found | {key: value.replace("\\|", "|") for key, value in re.findall(r"^\| ([^|]+?) \| (.*) \|$", overview, re.M)}


def name(about):
    """The last part of a module's name, such as "vit_b16_fe"."""
    return f"{re.sub(r'[^a-z0-9]+', '_', about['model'].lower()).strip('_')}_{_SUFFIX[about['task']]}"


def _plain(text):
    """Text of a user on one line, without what Markdown, HTML comments and tables would take for their own."""
    return re.sub(r"\s+", " ", str(text)).replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|").strip()


def _licence(about, extra):
    return extra.get("licence") or about["weights"].get("licence")


def _dataset(about, extra):
    source = str(about["weights"].get("source"))
    found = [dataset for text, dataset in _DATASETS.items() if text in source]
    return extra.get("dataset") or (found[0] if found else None)


def _summary(about):
    gives = {"classification": "classifier", "feature_vector": "feature vector", "tokens": "token features"}[about["task"]]
    return f"{_plain(about['variant'] or about['model'])} as a {gives} of images, for inference and fine-tuning."


def _comments(about, extra):
    """The metadata of TF-Hub, `docs/writing_documentation.md` of tensorflow/docs."""
    task = "image-classification" if about["task"] == "classification" else "image-feature-vector"
    tunable = any(variable["trainable"] for variable in about["variables"])
    values = {
        "asset-path": f"{name(about)}.tar.gz", "task": task, "fine-tunable": str(tunable).lower(), "format": "saved_model_2",
        "dataset": _dataset(about, extra), "network-architecture": about["family"], "license": _licence(about, extra),
    }  # fmt: skip
    return "\n".join(f"<!-- {key}: {_plain(value)} -->" for key, value in values.items() if value)


def _front_matter(about, extra):
    """The YAML of a Hugging Face card; JSON strings are YAML strings."""
    licence = (_licence(about, extra) or "other").partition(",")[0].lower()  # the records say who states it, too
    known = re.fullmatch(r"[a-z0-9.-]+", licence)
    values = {
        "library_name": "keras", "license": licence if known else "other",
        **({} if known else {"license_name": licence}),
        "pipeline_tag": "image-classification" if about["task"] == "classification" else "image-feature-extraction",
        "tags": ["vision-transformer", "tf-hub", "saved-model"],
    }  # fmt: skip
    if _dataset(about, extra):
        values["datasets"] = [_dataset(about, extra)]
    if extra.get("evaluation"):
        results = [
            {
                "task": {"type": "image-classification"},
                "dataset": {"name": row["dataset"], "type": row["dataset"], "split": row["split"]},
                "metrics": [{"type": row["metric"], "value": row["value"]}],
            }
            for row in extra["evaluation"]
        ]
        values["model-index"] = [{"name": name(about), "results": results}]
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())


def _facts(about, extra):
    """{heading: {name: value}}; a fact that is not known is left out, but for those whose absence matters."""
    weights, row = about["weights"], zoo.VARIANTS.get(about["variant"])
    pixels = weights.get("preprocessing") or {}
    mean, std = pixels.get("mean"), pixels.get("std")
    sizes = about["sizes"]
    permitted = f"{_size(about['size'])} pixels" + (
        f" or any from {_size(sizes['smallest'])} to {_size(sizes['largest'])} in steps of {_size(sizes['step'])}"
        if sizes
        else ""
    )
    settings = ", ".join(f"{key}={value!r}" for key, value in row.arguments.items()) if row else None
    paper = sys.modules[row.builder.__module__].__doc__.partition("\n")[0] if row else None
    return {
        "Architecture": {
            "family": about["family"] or "not of keras_vit", "variant": about["variant"], "settings": settings,
            "described as": paper,
            "parameters": f"{about['parameters']:,}",
            "multiply-adds for one image": f"{about['macs']:,}" if about["macs"] else None,
            "computes in": about["dtype"] or "the model's own type, float32 unless it says otherwise",
            "exported by": f"keras_vit {about['keras_vit']}",
        },
        "Input and output": {
            "input": f"float32 (batch, height, width, 3), RGB, {_RANGES[about['input_range']]}",
            "height x width": permitted,
            "output": f"{about['output']}, float32 ({', '.join(map(str, ('batch', *about['shape'])))})".replace("None", "n"),
            "meaning": {
                "classification": "logits; a softmax, or a sigmoid where classes do not exclude each other, gives scores",
                "feature_vector": "what the classifier reads, without dropout",
                "tokens": "the sequence after the last norm, a class token first where there is one",
            }[about["task"]],
            "signatures": "serving_default (images), features (images), serving_bytes (image_bytes: JPEG, PNG, WebP, GIF or "
            "BMP files)",
            "preprocessing inside": f"(x - {mean}) / {std} on the 0..255 scale" if mean else None,
            "resize of serving_bytes": Pixels.from_dict(pixels).describe(about["size"]) if pixels else None,
        },
        "Weights": {
            "source": weights.get("source") or "none: these weights come from no checkpoint file",
            "sha256": weights.get("sha256"), "layout": weights.get("layout"),
            "adapted": "; ".join(weights.get("adapted") or ()) or None,
            "head reset": ", ".join(weights.get("reset") or ()) or None,
            "dataset": _dataset(about, extra) or "not recorded", "recipe": extra.get("recipe"),
            "licence": _licence(about, extra) or "not stated",
        },
    }  # fmt: skip


def _body(about, extra):
    parts = []
    for heading, facts in _facts(about, extra).items():
        rows = "\n".join(f"| {key} | {_plain(value)} |" for key, value in facts.items() if value is not None)
        parts.append(f"## {heading}\n\n| | |\n|---|---|\n{rows}\n")
    if "imagenet" in str(_dataset(about, extra)).lower():
        parts.append(f"{_CAVEAT}\n")
    parts.append(f"## Evaluation\n\n{_evaluation(extra.get('evaluation'))}\n")
    fill = dict(
        batch=(2, *about["size"], 3), shape=(*about["size"], 3), range=_RANGES[about["input_range"]], key=about["output"],
        output=f"{('batch', *about['shape'])}".replace("'", "").replace("None", "n"),
        loss='"mse"', tf_keras_loss='"mse"',
    )  # fmt: skip
    if about["task"] == "classification":
        fill["loss"] = "keras.losses.CategoricalCrossentropy(from_logits=True)"
        fill["tf_keras_loss"] = f"tf_{fill['loss']}"
    uses = "\n".join(f"### {where}\n\n```python\n{code.format(**fill)}```\n" for where, code in _USES.items())
    return "\n".join([*parts, f"## Use\n\n{uses}"])


def _evaluation(rows):
    if not rows:
        return "None measured."
    lines = [[row.get(key, "") for key in MEASURED] for row in rows]
    table = "\n".join(f"| {' | '.join(_plain(value) for value in line)} |" for line in lines)
    return f"| {' | '.join(MEASURED)} |\n|{'---|' * len(MEASURED)}\n{table}"


def _size(pair):
    return f"{pair[0]} x {pair[1]}"
