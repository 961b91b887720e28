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
_SUFFIX = {  # as of modules on tfhub.dev
    "classification": "classification", "feature_vector": "fe", "tokens": "tokens", "image_embedding": "image",
    "text_embedding": "text", "image_text": "image_text",
}  # fmt: skip
_GIVES = {
    "classification": "a classifier of images", "feature_vector": "a feature vector of images",
    "tokens": "token features of images", "image_embedding": "an embedding of images in one space with texts",
    "text_embedding": "an embedding of texts in one space with images",
    "image_text": "embeddings of images and texts in one space, and their likeness",
}  # fmt: skip
# What TF-Hub and Hugging Face call a task, where it is not that of features of images
_TASKS = {
    "classification": ("image-classification", "image-classification"),
    "text_embedding": ("text-embedding", "feature-extraction"),
    "image_text": ("image-others", "zero-shot-image-classification"),
}  # fmt: skip
_ONE = {"text_embedding": "text", "image_text": "image and one text"}
_FEATURES = ("image-feature-vector", "image-feature-extraction")
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
_USES_OF_TEXTS = {
    "text_embedding": """import tensorflow as tf

module = tf.saved_model.load(".")  # this folder
embeddings = module(tf.constant(["a photo of a cat", "a photo of a dog"]))  # or hub.KerasLayer(".")
""",
    "image_text": """import tensorflow as tf

module = tf.saved_model.load(".")  # this folder; or hub.KerasLayer(".")
images = tf.zeros({batch})  # RGB, {range}
found = module({{"images": images, "texts": tf.constant(["a photo of a cat", "a photo of a dog"])}})
shares = tf.nn.softmax(found["logits"])  # (images, texts)
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
    return f"{_plain(about['variant'] or about['model'])} as {_GIVES[about['task']]}, for inference and fine-tuning."


def _comments(about, extra):
    """The metadata of TF-Hub, `docs/writing_documentation.md` of tensorflow/docs."""
    task, _ = _TASKS.get(about["task"], _FEATURES)
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
        "pipeline_tag": _TASKS.get(about["task"], _FEATURES)[1],
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
    permitted = about["size"] and f"{_size(about['size'])} pixels" + (
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
            f"multiply-adds for one {_ONE.get(about['task'], 'image')}": f"{about['macs']:,}" if about["macs"] else None,
            "computes in": about["dtype"] or "the model's own type, float32 unless it says otherwise",
            "exported by": f"keras_vit {about['keras_vit']}",
        },
        "Input and output": {
            "images" if "text_length" in about else "input": about["size"]
            and f"float32 (batch, height, width, 3), RGB, {_RANGES[about['input_range']]}",
            "height x width": permitted,
            "texts": about.get("text_length")
            and f"strings (batch,), UTF-8, cut after {about['text_length']} tokens of the {about['vocabulary']['kind']} "
            f"vocabulary inside, of sha256 {about['vocabulary']['sha256']}",
            "output": f"image_embeddings, text_embeddings (n, {about['shape'][-1]}), logits (images, texts), float32"
            if about["task"] == "image_text"
            else f"{about['output']}, float32 ({', '.join(map(str, ('batch', *about['shape'])))})".replace("None", "n"),
            "meaning": {
                "classification": "logits; a softmax, or a sigmoid where classes do not exclude each other, gives scores",
                "feature_vector": "what the classifier reads, without dropout",
                "tokens": "the sequence after the last norm, a class token first where there is one",
                "image_embedding": "a vector of unit length; its product with that of a text says how alike they are",
                "text_embedding": "a vector of unit length; its product with that of an image says how alike they are",
                "image_text": "embeddings of unit length, and their products times the temperature; a softmax over texts gives "
                "shares for each image",
            }[about["task"]],
            "signatures": {
                "text_embedding": "serving_default (texts), tokens (tokens)",
                "image_text": "serving_default (images, texts), images (images), texts (texts)",
            }.get(
                about["task"],
                "serving_default (images), features (images), serving_bytes (image_bytes: JPEG, PNG, WebP, GIF or BMP files)",
            ),
            "preprocessing inside": f"(x - {mean}) / {std} on the 0..255 scale" if mean and about["size"] else None,
            "resize of images" if about["task"] == "image_text" else "resize of serving_bytes": Pixels.from_dict(pixels).describe(
                about["size"]
            )
            if pixels and about["size"]
            else None,
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
    if about["weights"].get("card"):
        parts.append(f"## What its publisher says\n\n{about['weights']['card']}\n")
    parts.append(f"## Evaluation\n\n{_evaluation(extra.get('evaluation'))}\n")
    if about["task"] in _USES_OF_TEXTS:
        size = about["size"] and (2, *about["size"], 3)
        uses = _USES_OF_TEXTS[about["task"]].format(batch=size, range=_RANGES[about["input_range"]])
        return "\n".join([*parts, f"## Use\n\n```python\n{uses}```\n"])
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
