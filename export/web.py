"""Writes a LiT as a web page: a picture and typed labels in, how likely each is out, all computed in the reader's browser.

    python -m export.web LiT_mu --out=demo [--labels=labels.txt] [--prompt='a photo of a {}'] [--samples=FOLDER]
    python -m http.server --directory=demo --bind=127.0.0.1

The folder holds all that the page needs, the two towers as ONNX files, the vocabulary, ONNX Runtime Web, its licence, and
manifest.json with the sha256 of each file; any server of plain files will do. The page asks no other host for anything, and after
a first visit it also works without its server. The towers are compared with the Keras model before the folder takes its place in
one step. --dtype says how weights are stored; arithmetic is in float32 in each:

    float32   as they are
    float16   matrices and tables halved, and with them the download
    auto      float32 where a browser can hold them, else float16

ONNX Runtime Web is fetched once from the npm registry, by the sha512 that is written here, into the cache of keras_vit. Needs
`pip install -e '.[export]'` and the TensorFlow backend.
"""

import base64
import hashlib
import importlib.util
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from PIL import Image

import keras_vit
from export import common, onnx
from keras_vit import errors, zoo
from keras_vit.checkpoints import fetch

PAGE = Path(__file__).with_name("web_page")
TEMPLATED = "sw.js"  # the file of the page that names the build
FORMAT = "keras_vit web page"
VERSION = "1.30.0"  # of onnxruntime-web
PACKAGE = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
PACKAGE_BYTES = 33_106_585
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # sha512, as npm has it
MEMBERS = {  # execution provider -> its script and its program in the package
    "wasm": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
LARGEST_MEMBER = 2**26  # bytes
RUNTIMES = ("auto", "wasm", "webgpu")
DTYPES = {"float32": 4, "float16": 2}  # -> bytes of a weight
HEAVY = 2**24  # bytes of both towers from which "auto" takes WebGPU along, whose program is 27 MB
LARGEST_TOWER = 2**30  # bytes as stored; a browser's WebAssembly has 4 GB of memory, and needs more than the weights
SAMPLES, SAMPLE_SIDE = 12, 512  # pictures of a folder that are taken, and the longest side they get
PHOTOGRAPHS, DIGITS = "photographs", "digits"
LABELS = ("a flower", "a temple", "a cat", "a street at night", "handwritten digits")
PROMPT = "a photo of {}"
LIMITS = (
    "It only compares the labels that it is given. Where none of them fits, one of them is still the likeliest: add labels for "
    "what else there may be.",
    "It reads {length} tokens of a label, about that many short words, and nothing that follows them.",
    "It counts badly, hardly reads writing, and mistakes left for right and “no dogs” for dogs.",
    "It knows what its training pictures and captions showed. Those of the published models are from the web, mostly in English, "
    "with the mistakes and prejudices of people: expect more errors about persons, places and customs that are rare there.",
    "Do not use it to judge people, to tell who or of what group somebody is, or where an error does harm. The authors of LiT "
    "made their models for research; any other use is outside what they tested.",
)


class Built(NamedTuple):
    """A page that was written.

    Its folder, the digest of its files, what its weights are stored in, the towers' largest difference from the Keras model with
    its weights rounded alike, and how much that rounding changes the embeddings, 0.0 in float32.
    """

    path: Path
    digest: str
    dtype: str
    difference: float
    rounding: float


def build(
    model, path, *, labels=LABELS, prompt=PROMPT, samples=PHOTOGRAPHS, runtime="auto", dtype="auto", random=False, package=None
):  # fmt: skip
    """Writes the page of a LiT into a folder.

    Args:
        model: a LiT of both towers, with a tokenizer.
        path: the folder; a new or empty one, or an earlier page, which is replaced in one step.
        labels: str, what stands in the page's text area at first.
        prompt: the sentence around each at first, with {} for the label; "" for none.
        samples: pictures to choose from: "photographs" (scikit-learn's two), "digits" (one of each, of the test split), or a
            folder, of which the first 12 images by name are taken.
        runtime: "wasm"; "webgpu", which takes WebGPU along for browsers that have it; "auto" for that where the towers are large.
        dtype: what weights are stored in, "float32" or "float16"; "auto" for the former where a tower's then fit. Arithmetic is
            in float32.
        random: whether the weights are random, which the page then says.
        package: path of onnxruntime-web's .tgz, if it is not to be fetched; must be the same file.

    Raises:
        errors.ArgumentError: the model is no LiT of two towers with a tokenizer, or another argument is not usable.
        errors.ExportError: a tower cannot be converted, is too large, has weights that float16 lacks, or its file does not give
            its outputs.
        errors.DownloadError, errors.IntegrityError: the runtime could not be had. In all cases `path` is as it was.
    """
    common.need_tensorflow("export.web")
    from keras_vit.hub import manifest, module  # imports TensorFlow

    if runtime not in RUNTIMES:
        raise errors.ArgumentError(f"export.web: runtime must be one of {RUNTIMES}, got {runtime!r}.")
    if dtype not in ("auto", *DTYPES):
        raise errors.ArgumentError(f"export.web: dtype must be one of {('auto', *DTYPES)}, got {dtype!r}.")
    if prompt and "{}" not in prompt:
        raise errors.ArgumentError(f"export.web: expected a prompt with {{}} for the label, got {prompt!r}; or '' for none.")
    record = _tokenizer(model)
    target = _target(path)
    towers = {kind: getattr(model, f"{kind}_tower") for kind in ("image", "text")}
    dtype = _dtype(dtype, towers.values())
    size = sum(4 * tower.count_params() for tower in towers.values())
    providers = ("wasm", "webgpu") if runtime == "webgpu" or (runtime == "auto" and size > HEAVY) else ("wasm",)
    tarball = _package(package)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = module.staging_folder(target)
    try:
        page = staging / "page"
        shutil.copytree(PAGE, page)
        difference, rounding = _write_towers(towers, page, dtype)
        (page / "model" / "vocabulary.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        _unpack(tarball, providers, page)
        _write_licences(page)
        shown = _write_samples(samples, page)
        about = {
            **_about(model, random, dtype, rounding),
            "labels": list(labels), "prompt": prompt, "samples": shown, "random": bool(random),
            "image": {
                "input": "images", "output": "image_embeddings", "files": _entries(page, "image"),
                "size": list(towers["image"].input_shape[1:3]), "pixels": zoo.pixels_of(model).asdict(),
            },
            "text": {"input": "tokens", "output": "text_embeddings", "files": _entries(page, "text")},
            "tokenizer": _entry(page, "model/vocabulary.json"),
            "runtimes": {
                provider: {"script": f"runtime/{_script(script)}", "program": _entry(page, f"runtime/{program}")}
                for provider, (script, program) in MEMBERS.items() if provider in providers
            },
        }  # fmt: skip
        (page / "model.json").write_text(json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        digest = manifest.digest(page)
        worker = page / TEMPLATED
        worker.write_text(worker.read_text(encoding="utf-8").replace("__BUILD__", digest), encoding="utf-8")
        manifest.write(
            page,
            {
                "kind": FORMAT,
                "keras_vit": keras_vit.__version__,
                "model": model.name,
                "dtype": dtype,
                "onnxruntime-web": VERSION,
            },
        )
        module.place(page, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Built(target, manifest.digest(target), dtype, difference, rounding)


def _tokenizer(model):
    """The record of a model's tokenizer; ArgumentError where the model is none that a page can be made of."""
    missing = [name for name in ("image_tower", "text_tower", "tokenizer") if getattr(model, name, None) is None]
    if missing:
        raise errors.ArgumentError(
            f"export.web: expected a LiT with both towers and a tokenizer, got {model.name!r} without {', '.join(missing)}. "
            "Build keras_vit.LiT_mu or the like with towers='both', and vocabulary= where its weights bring none."
        )
    return model.tokenizer.to_dict()


def _target(path):
    target = Path(path).expanduser().resolve()
    entries = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else ["(a file)"] if target.exists() else []
    if entries and not _is_page(target):
        raise errors.ArgumentError(
            f"--out={path}: expected a new or empty folder, or an earlier page, since it is replaced; got {entries[:5]}. Choose "
            "another path, or move these away."
        )
    return target


def _is_page(folder):
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["kind"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _dtype(asked, towers):
    """What the weights of both towers are stored in."""
    largest = max(towers, key=lambda tower: tower.count_params())
    fitting = [dtype for dtype, size in DTYPES.items() if size * largest.count_params() <= LARGEST_TOWER]
    dtype = asked if asked != "auto" else (fitting or ["float16"])[0]
    if dtype not in fitting:
        raise errors.ExportError(
            f"export.web: expected towers of at most {LARGEST_TOWER:,} bytes, which a browser can hold, got "
            f"{DTYPES[dtype] * largest.count_params():,} of {largest.name!r} in {dtype}. "
            + ("Store them in float16: --dtype=float16." if fitting else "Choose a smaller model.")
        )
    if dtype == "float16" and asked == "auto":
        common.say(
            f"export.web: {largest.name!r} has {4 * largest.count_params():,} bytes in float32, of which a browser can hold "
            f"{LARGEST_TOWER:,}; weights are stored in float16."
        )
    return dtype


def _write_towers(towers, page, dtype):
    """Writes model/image.onnx and model/text.onnx, and their weights beside; returns (`difference`, `rounding`) of `Built`."""
    import tensorflow as tf

    (page / "model").mkdir()
    image, text = towers["image"], towers["text"]
    size, (_, length) = image.input_shape[1:], text.input_shape
    rng = np.random.default_rng(0)
    words = text.get_layer("embedding").vocabulary_size
    probes = {
        "image": keras_vit.preprocess_input(common.real_images(common.BATCH, size[:2]), image),
        "text": rng.integers(1, words, (common.BATCH, length), np.int32),
    }
    probes["text"][::2, length // 2 :] = 0  # short ones too
    specs = {
        "image": tf.TensorSpec((None, *size), tf.float32, "images"),
        "text": tf.TensorSpec((None, length), tf.int32, "tokens"),
    }
    found = [_write_tower(kind, towers[kind], specs[kind], probes[kind], page / _files(kind)[0], dtype) for kind in towers]
    return tuple(max(column) for column in zip(*found))


def _write_tower(kind, tower, spec, probe, path, dtype):
    import tensorflow as tf

    halves = onnx.halved(tower) if dtype == "float16" else {}

    def call(given):
        return {f"{kind}_embeddings": tf.cast(tower(given, training=False), tf.float32)}

    def check(predict):
        exact = tower.predict_on_batch(probe)
        expected = _rounded(tower, halves)(probe) if halves else exact
        difference = max(float(np.max(np.abs(predict(probe[:n]) - expected[:n]))) for n in (1, len(probe)))
        if not difference <= common.TOLERANCE:
            raise errors.ExportError(
                f"export.web of {tower.name!r}: expected embeddings within {common.TOLERANCE:.0e} of the Keras model's, got a "
                f"difference of {difference:.1e}. Look for nan weights; nothing was written."
            )
        return difference, float(np.max(np.abs(expected - exact)))

    function = tf.function(call, input_signature=[spec], autograph=False)
    return onnx.convert_function(function, tower, path, check, halves=halves, weights=path.parents[1] / _files(kind)[1])


def _rounded(tower, halves):
    """The `predict` of a tower whose weights are those that `onnx.halved` returned."""
    values = [(v, keras.ops.convert_to_tensor(halves[v.path], v.dtype)) for v in tower.weights if v.path in halves]

    def predict(probe):
        with keras.StatelessScope(state_mapping=values):
            return keras.ops.convert_to_numpy(tower(probe, training=False))

    return predict


def _files(kind):
    """Of a tower: its graph and its weights. In one file the runtime would copy the weights more often."""
    return f"model/{kind}.onnx", f"model/{kind}.weights"


def _entries(page, kind):
    return [_entry(page, name) for name in _files(kind)]


def _entry(page, name):
    return {"path": name, "bytes": (page / name).stat().st_size, "sha256": fetch.sha256(page / name)}


def _package(given):
    """The path of onnxruntime-web's archive, checked."""
    path = fetch.fetch(given or PACKAGE, None if given else PACKAGE_BYTES).path
    with open(path, "rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if found != INTEGRITY:
        raise errors.IntegrityError(
            f"{path}: expected onnxruntime-web {VERSION} of sha512-{INTEGRITY[:12]}..., got sha512-{found[:12]}...; remove the "
            f"file, then run it again, or give a copy of {PACKAGE}."
        )
    return path


def _script(name):
    return name.replace(".mjs", ".js")  # which every server knows to be JavaScript


def _unpack(tarball, providers, page):
    """Copies the programs of these execution providers, each by its name, into runtime/."""
    (page / "runtime").mkdir()
    with tarfile.open(tarball, "r:gz") as archive:
        for name in (name for provider in providers for name in MEMBERS[provider]):
            member = archive.getmember(f"package/dist/{name}")
            if not member.isreg() or member.size > LARGEST_MEMBER:
                raise errors.IntegrityError(
                    f"{tarball}: expected {name} to be a file of at most {LARGEST_MEMBER:,} bytes, got {member.size:,}."
                )
            with archive.extractfile(member) as source, open(page / "runtime" / _script(name), "wb") as copy:
                shutil.copyfileobj(source, copy)


def _write_licences(page):
    """This package's licence, and those of ONNX Runtime, which its Python package has and its npm package lacks."""
    folder = page / "licences"
    folder.mkdir()
    shutil.copyfile(PAGE.parents[1] / "LICENSE", folder / "keras_vit.txt")
    runtime = Path(importlib.util.find_spec("onnxruntime").origin).parent
    for name, ours in (("LICENSE", "onnxruntime.txt"), ("ThirdPartyNotices.txt", "onnxruntime-third-party.txt")):
        if not (runtime / name).is_file():
            raise errors.ExportError(f"export.web: expected {runtime / name}, found nothing; install onnxruntime from PyPI.")
        shutil.copyfile(runtime / name, folder / ours)


def _write_samples(samples, page):
    """Writes samples/*.png; returns [{"file", "name"}]."""
    (page / "samples").mkdir()
    shown = []
    for name, image in _samples(samples, page / "licences"):
        picture = Image.fromarray(image)
        picture.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE), Image.Resampling.LANCZOS)
        file = f"samples/{len(shown) + 1}.png"
        picture.save(page / file, optimize=True)
        shown.append({"file": file, "name": name})
    return shown


def _samples(samples, licences):
    """Yields (what it is called, uint8 (h, w, 3))."""
    from keras_vit.data import pipeline  # imports TensorFlow

    if samples == PHOTOGRAPHS:
        import sklearn.datasets

        found = sklearn.datasets.load_sample_images()
        (licences / "samples.txt").write_text(found.DESCR, encoding="utf-8")
        yield from ((Path(name).stem, image) for name, image in zip(found.filenames, found.images))
    elif samples == DIGITS:
        source = pipeline.open_source(DIGITS, "test")
        (licences / "samples.txt").write_text(
            "Samples: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,\n"
            "https://doi.org/10.24432/C50P49, CC BY 4.0; here as scikit-learn brings them, brightened to 0..255.\n",
            encoding="utf-8",
        )
        found = {}
        for index in range(source.num_examples):
            image, label = source.read(index)
            found.setdefault(int(label), image.numpy())
        yield from ((f"handwritten digit {label}", found[label]) for label in sorted(found))
    else:
        folder = Path(samples).expanduser()
        paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in pipeline.ENDINGS)[:SAMPLES]
        if not paths:
            raise errors.ArgumentError(
                f"--samples={samples}: expected {PHOTOGRAPHS!r}, {DIGITS!r}, or a folder with images of "
                f"{', '.join(pipeline.ENDINGS)}, found none; check the path."
            )
        yield from ((path.stem, pipeline.read_image(path)) for path in paths)


def _about(model, random, dtype, rounding):
    """What the page says of a model."""
    info, tower = model.weights_info, model.image_tower
    size = tuple(tower.input_shape[1:3])
    facts = {
        "Model": f"{model.name}, keras_vit {keras_vit.__version__}",
        "Weights": "random" if random else info.get("source") or "trained by whoever built this page",
        "Licence of the weights": None if random else info.get("licence"),
        "Parameters": f"{model.image_tower.count_params():,} for pictures, {model.text_tower.count_params():,} for text",
        "Stored in": f"float16, which changes embeddings by up to {rounding:.0e}; computed in float32" if rounding else dtype,
        "A picture is seen": zoo.pixels_of(model).describe(size),
        "Method": "LiT: Zero-Shot Transfer with Locked-image text Tuning, arXiv 2111.07991",
        "Software": f"ONNX Runtime Web {VERSION}; its licence is in the folder licences",
    }
    return {
        "name": model.name,
        "dtype": dtype,
        "temperature": model.temperature,
        "bias": model.bias,
        "limits": [limit.format(length=model.tokenizer.length) for limit in LIMITS],
        "facts": {name: value for name, value in facts.items() if value},
    }


def _labels(given):
    """--labels as a list: the lines of a text file, or words between commas."""
    if given is None:
        return list(LABELS)
    try:
        found = Path(given).read_text(encoding="utf-8").splitlines() if Path(given).is_file() else given.split(",")
    except UnicodeDecodeError as error:
        raise errors.ArgumentError(f"--labels={given}: expected a text file in UTF-8, got {error}.") from error
    found = [label.strip() for label in found if label.strip()]
    if not found:
        raise errors.ArgumentError(f"--labels={given}: expected a text file with one a line, or labels between commas, got none.")
    return found


@common.command
def main(argv=None):
    parser = common.parser(__doc__, "model", "--weights", "--out", "--size", "--json")
    parser.add_argument("--vocabulary", help="path or URL of the text tower's; default: that of the weights")
    parser.add_argument("--labels", help="a text file, one a line, or labels between commas; what the page begins with")
    parser.add_argument("--prompt", default=PROMPT, help="the sentence around a label, '' for none (default: %(default)s)")
    parser.add_argument(
        "--samples", default=PHOTOGRAPHS, help=f"'{PHOTOGRAPHS}', '{DIGITS}' or a folder of images (default: %(default)s)"
    )
    parser.add_argument("--runtime", choices=RUNTIMES, default="auto", help="what the page computes with (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto",
        help="what weights are stored in; arithmetic is in float32 (default: %(default)s, float32 where that can be held)",
    )  # fmt: skip
    parser.add_argument("--package", help=f"a copy of {PACKAGE}")
    options = parser.parse_args(argv)
    common.need_tensorflow("export.web")
    stored = options.model.endswith(".keras")
    if not stored and options.weights is None and not keras_vit.list_weights(options.model):
        options.weights = common.RANDOM
    model = common.build(options.model, options.weights, input_shape=common.shape_of(options.size), vocabulary=options.vocabulary)
    built = build(
        model, options.out, labels=_labels(options.labels), prompt=options.prompt, samples=options.samples,
        runtime=options.runtime, dtype=options.dtype, random=options.weights == common.RANDOM, package=options.package,
    )  # fmt: skip
    common.report(
        built.path, model, weights=options.weights, dtype=built.dtype, difference=built.difference,
        rounding=built.rounding if built.dtype == "float16" else None, digest=built.digest,
        serve=f"python -m http.server --directory={options.out} --bind=127.0.0.1", as_json=options.json,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
