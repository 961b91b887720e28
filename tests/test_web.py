"""The web page of a LiT: its JavaScript gives what Python gives, its folder is complete, and in Chromium it does what it says."""

import base64
import hashlib
import io
import json
import pathlib
import random
import re
import shutil
import subprocess
import tarfile
import unicodedata

import keras
import numpy as np
import pytest
from conftest import GOLDENS, randomise
from PIL import Image

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="the converters read TensorFlow's graphs")

pytest.importorskip("tensorflow")

import keras_vit  # noqa: E402
from benchmarks import web as browsers  # noqa: E402
from export import common, web  # noqa: E402
from keras_vit import errors, hub  # noqa: E402
from keras_vit.checkpoints import fetch  # noqa: E402
from keras_vit.data import pipeline, text  # noqa: E402
from keras_vit.data.pixels import IMAGENET, Pixels  # noqa: E402
from keras_vit.models import lit  # noqa: E402

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(
    NODE is None, reason="no node on the PATH, which runs the page's JavaScript here: apt-get install nodejs"
)
LABELS = ["a red circle", "a blue square", "two dogs on grass", "the number seven"]
STRANGE = [
    "", " ", "\t\n", "zebra zzz", "Caf\u00e9 \u2014 CAF\u00c9!", "\U0001f600 \U0001f468\u200d\U0001f469", "\u6c34 and \u706b",
    "a" * 300, "of " * 40,
]  # fmt: skip


WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "the", "photo", "of", "cat", "dog", "##s", "##ing", "run", "##n", "red", "##dish",
    ".", ",", "!", "-", "un", "##known", "cafe", "\u6c34",
]  # fmt: skip


def node(code, given):
    """What a module of JavaScript prints as JSON; it has `given` and, by `page(name)`, the page's modules."""
    start = f"""import fs from "node:fs";
const given = JSON.parse(fs.readFileSync(0)), page = (name) => import({json.dumps(web.PAGE.as_uri() + "/")} + name);
"""
    command = [NODE, "--experimental-default-type=module", "--no-warnings", "--input-type=module", "-e", start + code]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def texts(words, count, seed=0):
    """Strange texts, and random ones of words and of any characters."""
    rng = random.Random(seed)
    ranges = [(0x20, 0x2FF), (0x300, 0x1FFF), (0x2000, 0x2FFF), (0x3000, 0xD7FF), (0xF900, 0xFFFF), (0x1F300, 0x1FAFF)]
    made = [rng.choice([" ", "", "  "]).join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(count)]
    made += ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(6)) for _ in range(count)]
    return STRANGE + [each for each in made if all(unicodedata.category(char) != "Cn" for char in each)]


def rows(tokenizer, name, given):
    code = f"""const {{ {name}: Tokenizer }} = await page("{name.lower()}.js");
const tokenizer = new Tokenizer(given.record);
console.log(JSON.stringify(given.texts.map((text) => {{
  const {{ ids, cut, unknown }} = tokenizer.encode(text);
  return [[...ids], cut, unknown];
}})));"""
    return node(code, {"record": tokenizer.to_dict(), "texts": given})


@needs_node
@pytest.mark.parametrize("kind", ["toy", "without letters"])
def test_wordpiece_in_the_page_gives_the_tokens_of_python(kind):
    tokenizer = text.open_tokenizer(lit.WORDS) if kind == "toy" else text.WordPiece("\n".join(WORDS).encode(), length=12)
    words = [
        *LABELS[0].split(),
        "Photo",
        "unknownwords",
        "reddish",
        "running!",
        "caf\u00e9-cat",
        "\u00df",
        "\u0130",
        "\u01c4",
        "x\u0301",
        "\u00ad",
    ]
    given = texts(words, 1000)
    found = rows(tokenizer, "WordPiece", given)
    assert [row for row, _, _ in found] == tokenizer(given).tolist()
    ends = {text: (cut, unknown) for text, (_, cut, unknown) in zip(given, found)}
    assert ends["of " * 40][0] and not ends[""][0]
    assert ends["zebra zzz"][1] == (kind != "toy") and ends["\u6c34 and \u706b"][1]  # the toy has every letter


@needs_node
def test_each_character_folds_in_the_page_as_in_python():
    changed = {0x1171E}  # a mark without a place of its own until Unicode 15
    codes = [*range(0x3400), *range(0x3400, 0x20000, 7), *range(0x20000, 0x30000, 97), *range(0xE0000, 0xE0200)]
    codes = [code for code in codes if unicodedata.category(chr(code)) not in ("Cn", "Cs") and code not in changed]
    code = """const { fold, standsAlone } = await page("wordpiece.js");
console.log(JSON.stringify(given.map((code) => String.fromCodePoint(code)).map((each) => [fold(each), standsAlone(each)])));"""
    expected = [[text.fold(chr(each)), text.stands_alone(chr(each))] for each in codes]
    differing = [hex(code) for code, got, wanted in zip(codes, node(code, codes), expected) if got != wanted]
    assert not differing


def unigram(own=(), tidy=True, prefix=True):
    """A small `.model` file: letters and a few words, without rules for characters."""

    def field(number, content):
        assert len(content) < 2**14
        size = bytes([len(content)]) if len(content) < 128 else bytes([len(content) & 127 | 128, len(content) >> 7])
        return bytes([number << 3 | 2]) + size + content

    def piece(name, score, kind=1):
        return field(1, field(1, name.encode()) + b"\x15" + np.float32(score).tobytes() + bytes([3 << 3, kind]))

    words = ["\u2581photo", "\u2581of", "\u2581a", "ph", "oto", "\u2581", "\u2581red", "dog", "s", "\u2581dogs", "\u6c34"]
    pieces = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3), *(piece(name, -0.5, 4) for name in own)]
    pieces += [piece(name, -3.25 - 0.75 * i) for i, name in enumerate(words)]
    pieces += [piece(letter, -12.5 - i / 8) for i, letter in enumerate("abcdefghijklmnopqrtuvw")]
    normalizer = bytes([3 << 3, prefix, 4 << 3, tidy])
    return b"".join(pieces) + field(2, bytes([3 << 3, 1])) + field(3, normalizer)


@needs_node
@pytest.mark.parametrize("kind", ["golden", "pieces", "plain", "own", "untidy"])
def test_sentencepiece_in_the_page_gives_the_tokens_of_python(kind):
    made = {
        "golden": (GOLDENS / "preprocess" / "sentencepiece_tokens" / "sentencepiece.model").read_bytes,
        "pieces": (GOLDENS.parent / "texts" / "pieces.model").read_bytes,
        "plain": unigram,
        "own": lambda: unigram(own=["<mask>", "og"]),
        "untidy": lambda: unigram(tidy=False, prefix=False),
    }
    tokenizer = text.SentencePiece(made[kind]())
    words = [
        "photo",
        "of",
        "a",
        "red",
        "dogs",
        "<mask>",
        "</s>",
        "\uff26\uff55\uff4c\uff4c",
        "\ufb01ne",
        "\u2581",
        "\u3000",
        "e\u0301",
        "\ufeff",
        "\u00bd",
        "xyz",
    ]
    given = texts(words, 700)
    found = rows(tokenizer, "SentencePiece", given)
    assert [row for row, _, _ in found] == tokenizer(given).tolist()
    assert {text: cut for text, (_, cut, _) in zip(given, found)}["of " * 40]


PIXELS = {
    "google": Pixels(),
    "imagenet": IMAGENET,
    "bilinear": Pixels(antialias=True),
    "crop": Pixels(crop="center", crop_fraction=0.875),
    "unscaled": Pixels(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
}


@needs_node
@pytest.mark.parametrize("name", PIXELS)
def test_images_are_prepared_in_the_page_as_in_python(name):
    pixels, rng = PIXELS[name], np.random.default_rng(0)
    sizes = [((48, 61), (32, 32)), ((9, 7), (32, 24)), ((90, 33), (16, 32)), ((32, 32), (32, 32)), ((1, 1), (2, 3))]
    images = [rng.integers(0, 256, (*extent, 4), np.uint8) for extent, _ in sizes]
    code = """const { prepare } = await page("pixels.js");
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
console.log(JSON.stringify(given.map(([rgba, ...rest]) => [...prepare(bytes(rgba), ...rest)])));"""
    given = [(base64.b64encode(image).decode(), *extent, size, pixels.asdict()) for image, (extent, size) in zip(images, sizes)]
    for image, got, (_, size) in zip(images, node(code, given), sizes):
        expected = pipeline.eval_image(image[..., :3], size, pixels).numpy()
        levels = np.abs(np.reshape(got, expected.shape) - expected) * np.array(pixels.std)
        # Float32's own error; where levels are rounded, a sum may lie on either side of a half
        assert levels.max() < (1.01 if pixels.antialias else 2e-3) and np.mean(levels > 2e-3) < 0.03


@needs_node
def test_labels_and_scores_of_the_page():
    code = """const { parseLabels, probabilities, prompted } = await page("scores.js");
console.log(JSON.stringify({
  parsed: parseLabels(" a cat \\r\\n\\n a dog\\na cat\\n x", 2),
  prompted: [prompted("a {} or {}", "$& cat"), prompted("  ", "cat"), prompted("a photo", "cat")],
  softmax: probabilities([0.6, 0.8], [[1, 0], [0, 1]], { temperature: 1000, bias: null }),
  sigmoid: probabilities([0.6, 0.8], [[1, 0], [0, 1]], { temperature: 10, bias: -6 }),
}));"""
    found = node(code, None)
    assert found["parsed"] == {"labels": ["a cat", "a dog"], "left": 1}
    assert found["prompted"] == ["a $& cat or $& cat", "cat", None]
    np.testing.assert_allclose(found["softmax"], [np.exp(-200.0), 1.0], atol=1e-12)
    np.testing.assert_allclose(found["sigmoid"], [0.5, 1 / (1 + np.exp(-2.0))], rtol=1e-12)


# ---- The folder


@pytest.fixture(scope="module")
def model():
    """A LiT_mu of random weights whose answers differ a lot from picture to picture and from label to label."""
    made = randomise(keras_vit.LiT_mu(weights=None))
    made.temperature = 150.0
    return made


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """(path of onnxruntime-web's archive, whether it is the real one)."""
    folder = tmp_path_factory.mktemp("package")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_VIT_HOME", str(folder))
        try:
            return fetch.fetch(web.PACKAGE, web.PACKAGE_BYTES).path, True
        except errors.DownloadError:
            return archive(folder / "made.tgz"), False


def archive(path, **changed):
    """An archive like onnxruntime-web's, of a few bytes; `changed` are other contents, None for a link."""
    with tarfile.open(path, "w:gz") as tar:
        for name in {name for pair in web.MEMBERS.values() for name in pair}:
            content = changed.get(name, b"// nothing")
            info = tarfile.TarInfo(f"package/dist/{name}")
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
                continue
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def integrity(path):
    return base64.b64encode(hashlib.sha512(pathlib.Path(path).read_bytes()).digest()).decode()


@pytest.fixture(scope="module")
def folder(model, package, tmp_path_factory):
    path, real = package
    target = tmp_path_factory.mktemp("web") / "page"
    with pytest.MonkeyPatch.context() as patch:
        if not real:
            patch.setattr(web, "INTEGRITY", integrity(path))
        built = web.build(model, target, labels=LABELS, prompt="a photo of {}", samples="digits", package=path)
    assert built.path == target and built.digest == hub.digest(target) and built.difference < 1e-5
    assert built.dtype == "float32" and built.rounding == 0.0
    return target


@pytest.fixture(scope="module")
def rounded(model):
    """The model with its matrices and tables rounded to float16."""
    made = keras_vit.LiT_mu(weights=None)
    for ours, theirs in zip(made.weights, model.weights, strict=True):
        values = keras.ops.convert_to_numpy(theirs)
        ours.assign(values.astype("float16") if values.ndim > 1 else values)
    return made


@pytest.fixture(scope="module")
def small_folder(model, rounded, package, tmp_path_factory):
    """The page in float16."""
    path, real = package
    target = tmp_path_factory.mktemp("web16") / "page"
    before = model.get_weights()
    with pytest.MonkeyPatch.context() as patch:
        if not real:
            patch.setattr(web, "INTEGRITY", integrity(path))
        built = web.build(model, target, labels=LABELS, prompt="a photo of {}", samples="digits", dtype="float16", package=path)
    assert all(np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))
    assert built.dtype == "float16" and built.difference < 1e-5
    images = keras_vit.preprocess_input(common.real_images(common.BATCH, (32, 32)), model)
    least = np.abs(model.encode_image(images) - rounded.encode_image(images)).max()  # the text tower may be changed more
    assert 1e-4 < least <= built.rounding + 1e-6 and built.rounding < 0.05
    return target


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Options of `build` with which it does not convert anything."""

    def towers(towers, page, dtype):
        (page / "model").mkdir()
        for kind in towers:
            for name in web._files(kind):
                (page / name).write_bytes(dtype.encode())
        return 0.0, 0.0

    path = archive(tmp_path / "package.tgz")
    monkeypatch.setattr(web, "INTEGRITY", integrity(path))
    monkeypatch.setattr(web, "_write_towers", towers)
    return {"package": path}


def test_the_folder_holds_all_that_the_page_asks_for_and_says_what_it_is(folder, model):
    record = hub.verify(folder)  # every file has the bytes of the manifest
    about = json.loads((folder / "model.json").read_text())
    files = [*about["image"]["files"], *about["text"]["files"], about["tokenizer"], about["runtimes"]["wasm"]["program"]]
    for file in files:
        assert record["files"][file["path"]] == {"bytes": file["bytes"], "sha256": file["sha256"]}
    named = {about["runtimes"]["wasm"]["script"], *(sample["file"] for sample in about["samples"])}
    named |= {
        "licences/keras_vit.txt",
        "licences/onnxruntime.txt",
        "licences/onnxruntime-third-party.txt",
        "licences/samples.txt",
    }
    assert named <= set(record["files"]) and "webgpu" not in about["runtimes"] and len(about["samples"]) == 10
    assert about["temperature"] == pytest.approx(150.0) and about["bias"] is None and about["labels"] == LABELS
    assert "16 tokens" in " ".join(about["limits"]) and "research" in " ".join(about["limits"])
    page = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".html", ".js", ".css", ".svg"))
    foreign = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+", page)) - {
        "http://www.w3.org"
    }  # a name of XML's, not asked for
    assert not foreign and "__BUILD__" not in page and not re.search(r"\son\w+=|\sstyle=", (folder / "index.html").read_text())


def test_weights_in_float16_are_half_as_large_and_rounded_and_the_page_says_so(folder, small_folder, model, rounded):
    onnx = pytest.importorskip("onnx")
    hub.verify(small_folder)
    for kind in ("image", "text"):
        full, half = ((each / "model" / f"{kind}.weights").stat() for each in (folder, small_folder))
        assert half.st_size < 0.6 * full.st_size and half.st_mode == (small_folder / "model.json").stat().st_mode
        tower = getattr(rounded, f"{kind}_tower")
        expected = {variable.path: keras.ops.convert_to_numpy(variable) for variable in tower.weights}
        graph = onnx.load(small_folder / "model" / f"{kind}.onnx").graph
        found = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name in expected}
        assert {len(value.shape) > 1 for value in found.values()} == {True, False}
        for name, value in found.items():
            assert value.dtype == ("float16" if value.ndim > 1 else "float32"), name
            assert np.array_equal(value.astype("float32"), expected[name]), name
    about = json.loads((small_folder / "model.json").read_text())
    assert about["dtype"] == "float16" and "float16, which changes embeddings by up to" in about["facts"]["Stored in"]
    assert json.loads((small_folder / "manifest.json").read_text())["dtype"] == "float16"
    about = json.loads((folder / "model.json").read_text())
    assert about["dtype"] == about["facts"]["Stored in"] == "float32"


def test_a_weight_that_float16_lacks_is_named(quick, monkeypatch, tmp_path):
    monkeypatch.undo()  # towers are converted
    monkeypatch.setattr(web, "INTEGRITY", integrity(quick["package"]))
    made = keras_vit.LiT_mu(weights=None)
    weight = next(weight for weight in made.image_tower.weights if len(weight.shape) == 2)
    weight.assign(np.where(np.arange(weight.shape[1]) == 1, 7e4, weight.numpy()))
    with pytest.raises(errors.ExportError, match=f"float16 holds, up to 65,504, got 70000 in '{weight.path}'"):
        web.build(made, tmp_path / "page", dtype="float16", **quick)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package.tgz"]


def test_float16_is_taken_where_float32_is_too_large(model, quick, monkeypatch, tmp_path, capsys):
    largest = max(model.image_tower.count_params(), model.text_tower.count_params())
    for limit, asked, dtype in ((4, "auto", "float32"), (4, "float16", "float16"), (3.99, "auto", "float16")):
        monkeypatch.setattr(web, "LARGEST_TOWER", int(limit * largest))
        built = web.build(model, tmp_path / "page", dtype=asked, **quick)
        assert built.dtype == dtype and (built.path / "model" / "text.onnx").read_text() == dtype
        assert ("stored in float16" in capsys.readouterr().err) == (limit < 4)
    with pytest.raises(errors.ExportError, match="in float32. Store them in float16"):
        web.build(model, tmp_path / "page", dtype="float32", **quick)
    monkeypatch.setattr(web, "LARGEST_TOWER", largest)
    for asked in ("auto", "float32", "float16"):
        with pytest.raises(errors.ExportError, match="which a browser can hold, got .* Choose a smaller model"):
            web.build(model, tmp_path / "page", dtype=asked, **quick)
    assert hub.digest(tmp_path / "page") == built.digest


def test_a_page_is_replaced_in_one_step_or_left_as_it_was(model, quick, tmp_path):
    target = tmp_path / "out" / "page"
    first = web.build(model, target, labels=["one"], samples="digits", **quick)
    with pytest.raises(errors.ArgumentError, match="none-such"):
        web.build(model, target, labels=["two"], samples="none-such", **quick)
    assert hub.digest(target) == first.digest and [path.name for path in target.parent.iterdir()] == ["page"]
    second = web.build(model, target, labels=["two"], samples="digits", runtime="webgpu", random=True, **quick)
    about = json.loads((target / "model.json").read_text())
    assert about["labels"] == ["two"] and about["random"] and list(about["runtimes"]) == ["wasm", "webgpu"]
    assert second.digest != first.digest and [path.name for path in target.parent.iterdir()] == ["page"]


def test_another_folder_is_not_replaced(model, quick, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text('{"kind": "my own"}')
    for path in ("mine", "package.tgz"):
        with pytest.raises(errors.ArgumentError, match="expected a new or empty folder"):
            web.build(model, tmp_path / path, **quick)
    assert (tmp_path / "mine" / "manifest.json").read_text() == '{"kind": "my own"}'


def test_pictures_of_a_folder_become_samples_without_what_else_is_in_their_files(model, quick, tmp_path):
    (tmp_path / "pictures").mkdir()
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    Image.fromarray(common.real_images(1, (300, 600))[0]).resize((1200, 600)).save(tmp_path / "pictures" / "b <i>.jpg", exif=exif)
    Image.fromarray(common.real_images(1, 8)[0]).save(tmp_path / "pictures" / "a.png")
    web.build(model, tmp_path / "page", samples=tmp_path / "pictures", **quick)
    samples = json.loads((tmp_path / "page" / "model.json").read_text())["samples"]
    assert [sample["name"] for sample in samples] == ["a", "b <i>"]
    small, large = (tmp_path / "page" / sample["file"] for sample in samples)
    assert Image.open(small).size == (8, 8) and Image.open(large).size == (512, 256) and b"secret" not in large.read_bytes()


@pytest.mark.parametrize(
    "options,problem",
    [
        (dict(runtime="webgl"), "runtime must be one of"),
        (dict(prompt="a photo"), "a prompt with {}"),
        (dict(dtype="int8"), "dtype must be one of"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_next_step(model, quick, options, problem, tmp_path):
    with pytest.raises(errors.ArgumentError, match=problem):
        web.build(model, tmp_path / "page", **options, **quick)
    assert not (tmp_path / "page").exists()


def test_models_without_two_towers_and_a_tokenizer_are_refused(quick, tmp_path):
    for made in (keras_vit.ViT_mu(weights=None), keras_vit.LiT_mu(weights=None, towers="image")):
        with pytest.raises(errors.ArgumentError, match="a LiT with both towers and a tokenizer"):
            web.build(made, tmp_path / "page", **quick)


def test_a_runtime_of_other_content_is_refused(model, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(web, "INTEGRITY", "0" * 86)
    with pytest.raises(errors.IntegrityError, match=r"expected onnxruntime-web .* of sha512-0000"):
        web.build(model, tmp_path / "page", **quick)
    for content in (None, b"x" * 100):  # a link; more than is allowed
        path = archive(tmp_path / "other.tgz", **{web.MEMBERS["wasm"][1]: content})
        monkeypatch.setattr(web, "INTEGRITY", integrity(path))
        monkeypatch.setattr(web, "LARGEST_MEMBER", 50)
        with pytest.raises(errors.IntegrityError, match="to be a file of at most 50 bytes"):
            web.build(model, tmp_path / "page", package=path)
    assert not (tmp_path / "page").exists()


def test_the_command_builds_a_toy_with_random_weights_and_says_so(quick, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("a cat\n\n a dog \n")
    options = [f"--out={tmp_path / 'page'}", f"--labels={tmp_path / 'labels.txt'}", f"--package={quick['package']}", "--json"]
    assert web.main(["LiT_mu", *options]) == 0
    printed = capsys.readouterr()
    assert "all weights are random" in printed.err and json.loads(printed.out)["digest"] == hub.digest(tmp_path / "page")
    about = json.loads((tmp_path / "page" / "model.json").read_text())
    assert about["random"] and about["labels"] == ["a cat", "a dog"] and about["facts"]["Weights"] == "random"
    assert web.main(["LiT_mu", *options[:1], "--labels=,"]) == 1
    assert "ArgumentError: --labels=,: expected a text file" in capsys.readouterr().err


# ---- In Chromium


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright", reason="playwright, which drives the browser, is missing: pip install playwright")
    if browsers.chromium() is None:
        pytest.skip(f"none of {', '.join(browsers.BROWSERS)} is on the PATH: apt-get install chromium")
    with browsers.browsing("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream") as browser:
        yield browser


@pytest.fixture(scope="module")
def site(folder, package):
    if not package[1]:
        pytest.skip(f"{web.PACKAGE} cannot be reached, without which the page computes nothing")
    with browsers.serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def window(browser, site):
    """One page, which takes a while to open, for all tests; in `.asked` the URLs of all requests, `.errors` of its script."""
    context = browser.new_context(viewport=browsers.WIDE, permissions=["camera"])
    asked, errors_ = [], []
    context.on("request", lambda request: asked.append(request.url))
    context.on("weberror", lambda error: errors_.append(str(error.error)))
    page = browsers.opened(context, site.url)
    page.asked, page.errors = asked, errors_
    yield page
    context.close()


@pytest.fixture
def page(window):
    """The page as it is after it was opened."""
    typed(window, "\n".join(LABELS), "a photo of {}")
    window.locator("#samples button").first.click()
    window.locator("#samples button").first.and_(window.locator("[aria-pressed=true]")).wait_for()
    yield window
    assert window.errors == []


def typed(page, labels, prompt=None):
    """Puts text into the page's fields as if it had been pasted."""
    for name, value in (("labels", labels), ("prompt", prompt)):
        if value is not None:
            field = page.locator(f"#{name}")
            field.evaluate("(field, value) => { field.value = value; field.dispatchEvent(new Event('input')); }", value)


def shown(page):
    """{label: probability} of the page's rows, in their order, once what was typed is encoded."""
    page.wait_for_timeout(50)
    page.locator("#results[aria-busy=false]").wait_for(state="attached")
    rows = page.locator("#results li").all()
    return {row.get_attribute("data-label"): float(row.get_attribute("data-value")) for row in rows}


def expected(model, image, prompts):
    """Probabilities by Python of an image, uint8 (h, w, 3)."""
    ready = pipeline.eval_image(image, model.image_tower.input_shape[1:3]).numpy()[None]
    logits = np.asarray(model.logits(model.encode_image(ready), model.encode_text(prompts)))[0].astype("float64")
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def check(page, model, image, labels=LABELS, prompt="a photo of {}"):
    wanted = dict(zip(labels, expected(model, image, [prompt.format(label) for label in labels])))
    found = shown(page)
    assert list(found) == sorted(wanted, key=wanted.get, reverse=True)
    np.testing.assert_allclose([found[label] for label in labels], [wanted[label] for label in labels], atol=1e-3)
    return found


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def choose(page, content, name="picture.png", kind="image/png"):
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})


def test_pictures_get_the_probabilities_of_python(page, model, folder):
    first = check(page, model, np.asarray(Image.open(folder / "samples" / "1.png").convert("RGB")))
    photograph = common.real_images(2, (233, 301))[1]
    choose(page, png(photograph))
    page.get_by_role("img", name="picture.png").wait_for()
    second = check(page, model, photograph)
    assert max(abs(first[label] - second[label]) for label in LABELS) > 0.05  # they depend on the picture
    assert max(second.values()) - min(second.values()) > 0.05


def test_a_page_in_float16_gives_the_probabilities_of_python(browser, rounded, small_folder, package):
    if not package[1]:
        pytest.skip(f"{web.PACKAGE} cannot be reached, without which the page computes nothing")
    context = browser.new_context()
    with browsers.serving(small_folder) as server:
        page = browsers.opened(context, server.url)
        page.get_by_text("float16, which changes embeddings by up to").wait_for(state="attached")
        check(page, rounded, np.asarray(Image.open(small_folder / "samples" / "1.png").convert("RGB")))
        photograph = common.real_images(1, (233, 301))[0]
        choose(page, png(photograph))
        page.get_by_role("img", name="picture.png").wait_for()
        check(page, rounded, photograph)
    context.close()


def test_a_jpeg_a_gray_and_a_transparent_picture_are_read_as_they_are_seen(page, model):
    photograph = common.real_images(1, (120, 160))[0]
    file = io.BytesIO()
    Image.fromarray(photograph).save(file, "jpeg", quality=95)
    choose(page, file.getvalue(), "photo.jpg", "image/jpeg")
    page.get_by_role("img", name="photo.jpg").wait_for()
    image = np.asarray(Image.open(file))
    wanted = expected(model, image, [f"a photo of {label}" for label in LABELS])
    np.testing.assert_allclose([shown(page)[label] for label in LABELS], wanted, atol=0.02)  # decoders differ by a level or two
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.fromarray(photograph).save(file, "png", exif=exif)
    choose(page, file.getvalue(), "turned.png")
    page.get_by_role("img", name="turned.png").wait_for()
    check(page, model, np.rot90(photograph, -1))
    gray = photograph[..., :1].repeat(3, -1)
    choose(page, png(gray[..., 0]), "gray.png")
    page.get_by_role("img", name="gray.png").wait_for()
    check(page, model, gray)
    glass = np.concatenate([photograph, np.zeros((120, 160, 1), np.uint8)], -1)
    glass[:60, :, 3] = 255
    choose(page, png(glass), "glass.png")
    page.get_by_role("img", name="glass.png").wait_for()
    check(page, model, np.where(glass[..., 3:] > 0, photograph, 255))


def test_typed_labels_change_the_result(page, model, folder):
    image = np.asarray(Image.open(folder / "samples" / "1.png").convert("RGB"))
    labels = [*LABELS, "a yellow star", "a photo", "caf\u00e9 \u6c34 \U0001f600", "small " * 30]
    typed(page, "\n".join([*labels, "", "  a photo  "]))
    check(page, model, image, [label.strip() for label in labels])
    notes = page.locator("#results li").all_inner_texts()
    assert sum("vocabulary" in note for note in notes) == 1 and sum("too long" in note for note in notes) == 1
    page.get_by_label("Sentence around each label").fill("{} in a cropped picture of {}")
    found = shown(page)
    prompts = [f"{label.strip()} in a cropped picture of {label.strip()}" for label in labels]
    np.testing.assert_allclose([found[label.strip()] for label in labels], expected(model, image, prompts), atol=1e-3)
    page.get_by_label("Sentence around each label").fill("a photo")
    page.get_by_text("has no place for the label").wait_for()
    check(page, model, image, [label.strip() for label in labels], "{}")
    page.get_by_label("What it may show, one a line").fill("")
    page.get_by_text("Type a label to begin.").wait_for()
    assert shown(page) == {}


def test_ten_thousand_labels_and_markup_do_no_harm(page):
    markup = "<img src=x onerror=alert(1)>"
    typed(page, "\n".join([markup, *(f"label {i}" for i in range(10_000))]))
    page.get_by_text("Only the first 1,000 are used; 9,001 more are left out.").wait_for()
    page.get_by_text("988 less likely ones are not shown.").wait_for()
    assert len(shown(page)) == 12
    page.get_by_label("What it may show, one a line").fill(markup)
    assert shown(page) == {markup: 1.0} and page.locator("#results img").count() == 0


def test_a_file_that_is_no_picture_is_refused_and_the_last_result_stays(page):
    before = shown(page)
    choose(page, b"no picture", "letter.png")
    page.get_by_role("alert").get_by_text("letter.png is no picture that this browser can read").wait_for()
    assert shown(page) == before
    page.locator("#samples button").nth(3).click()
    page.get_by_role("alert").wait_for(state="hidden")


def test_no_request_leaves_the_origin_and_none_could(page, site):
    page.get_by_text("Ready, also without a network.").wait_for()
    assert len(page.asked) > 20 and all(url.startswith((site.url, f"blob:{site.url}")) for url in page.asked)
    with browsers.serving(web.PAGE) as other:
        for realm in (page, page.workers[0]):
            refused = realm.evaluate(
                "url => fetch(url, { mode: 'no-cors' }).then(() => 'sent', (error) => error.name)", other.url
            )
            assert refused == "TypeError"
        loaded = "url => new Promise((end) => { const i = new Image(); i.onload = i.onerror = (e) => end(e.type); i.src = url; })"
        assert page.evaluate(loaded, f"{other.url}icon.svg") == "error"
        assert other.asked == []


def test_the_page_works_when_its_server_is_gone(browser, model, folder, package):
    if not package[1]:
        pytest.skip(f"{web.PACKAGE} cannot be reached, without which the page computes nothing")
    context = browser.new_context()
    with browsers.serving(folder) as server:
        page = browsers.opened(context, server.url)
        page.get_by_text("Ready, also without a network.").wait_for()
    again = browsers.opened(context, server.url)
    photograph = common.real_images(1, (64, 48))[0]
    choose(again, png(photograph))
    again.get_by_role("img", name="picture.png").wait_for()
    check(again, model, photograph)
    again.locator("#samples button").nth(9).click()  # one that was not looked at before
    again.get_by_role("img", name="handwritten digit 9").first.wait_for()
    context.close()


def test_a_damaged_or_missing_file_is_named(browser, folder, package, tmp_path):
    if not package[1]:
        pytest.skip(f"{web.PACKAGE} cannot be reached, without which the page computes nothing")
    shutil.copytree(folder, tmp_path / "page")
    path = tmp_path / "page" / "model" / "text.weights"
    content = path.read_bytes()
    with browsers.serving(tmp_path / "page") as server:
        for change, problem in (
            (lambda: path.write_bytes(content[:-9] + b"different"), "model/text.weights is not the file that was built"),
            (lambda: path.write_bytes(content[:999]), "model/text.weights breaks off after 999 of"),
            (path.unlink, "model/text.weights cannot be read: the server says 404"),
        ):
            change()
            context = browser.new_context()
            page = context.new_page()
            page.goto(server.url)
            page.get_by_text(f"The model cannot be loaded: {problem}").wait_for()
            context.close()


def test_all_can_be_done_by_keyboard_and_has_a_name(page):
    order = []
    page.evaluate("document.querySelector('a, button, input, textarea, [tabindex]').focus()")
    while "prompt" not in order[1:]:
        order.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.textContent || document.activeElement.firstChild.alt"
            )
        )
        page.keyboard.press("Tab")
        assert len(order) < 20
    digits = [f"handwritten digit {i}" for i in range(10)]
    assert order == ["Skip to the labels", "choose", "camera", *digits, "labels", "prompt"]
    before = shown(page)
    page.get_by_role("button", name="handwritten digit 5").focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.get_by_role("button", name="handwritten digit 5", pressed=True).wait_for()
    assert shown(page) != before
    best, second, *_ = shown(page)
    spoken = page.locator("#said[role=status]").get_by_text(f"Most likely: {best},")
    spoken.wait_for(state="attached")
    assert second in spoken.inner_text()
    assert page.get_by_role("list", name="How likely").get_by_role("listitem").count() == len(LABELS)
    for kind, name in (("button", "Choose a picture"), ("textbox", "What it may show, one a line"), ("group", "Sample pictures")):
        assert page.get_by_role(kind, name=name).count() == 1
    assert page.locator("h1").count() == 1 and page.locator("html[lang=en]").count() == 1


def test_the_page_fits_a_phone_and_moves_nothing_where_motion_is_unwanted(browser, site):
    context = browser.new_context(viewport=dict(width=320, height=640), reduced_motion="reduce")
    page = browsers.opened(context, site.url)
    page.get_by_label("What it may show, one a line").fill("W" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    assert page.evaluate("getComputedStyle(document.querySelector('.bar')).transitionProperty") == "none"
    found = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found[scheme] = least_contrast(page)
    assert min(found.values()) >= 4.5 and found["light"] != found["dark"]  # WCAG 2.2, success criterion 1.4.3
    context.close()


def least_contrast(page):
    """Of the texts' colours and of those behind them, bars too."""
    pairs = page.evaluate("""() => {
      const shown = [...document.querySelectorAll("h1, h2, p, label, button, textarea, li, dd, small, .name, .value")];
      const behind = (each) => {
        for (let at = each; at; at = at.parentElement) {
          const color = getComputedStyle(at).backgroundColor;
          if (color !== "rgba(0, 0, 0, 0)") return color;
        }
      };
      const bar = getComputedStyle(document.querySelector(".bar")).backgroundColor;
      const visible = shown.filter((each) => each.getClientRects().length && each.textContent.trim());
      const onBars = [...document.querySelectorAll(".name, .value")].map((each) => [getComputedStyle(each).color, bar]);
      return [...visible.map((each) => [getComputedStyle(each).color, behind(each)]), ...onBars];
    }""")
    assert len(pairs) > 20

    def luminance(color):
        values = np.array([float(part) for part in re.findall(r"[\d.]+", color)[:3]]) / 255
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    lights = [sorted(map(luminance, pair)) for pair in pairs]
    return min((high + 0.05) / (low + 0.05) for low, high in lights)


def test_the_camera_is_looked_through_until_it_is_stopped(page):
    page.get_by_role("button", name="Use the camera").click()
    stop = page.get_by_role("button", name="Stop the camera", pressed=True)
    stop.wait_for()
    before = shown(page)
    page.wait_for_function("() => document.getElementById('video').currentTime > 1")
    assert shown(page) != before  # the picture of Chromium's false camera moves
    stop.click()
    page.get_by_role("img", name="Picture of the camera").wait_for()
    assert page.locator("video").is_hidden()
    still = shown(page)
    page.wait_for_timeout(300)
    assert shown(page) == still


@pytest.mark.slow
@pytest.mark.parametrize("dtype", web.DTYPES)
def test_webgpu_gives_the_probabilities_of_python_and_may_be_missing(browser, model, rounded, package, dtype, tmp_path):
    if not package[1]:
        pytest.skip(f"{web.PACKAGE} cannot be reached, without which the page computes nothing")
    options = dict(labels=LABELS, samples="digits", runtime="webgpu", dtype=dtype, package=package[0])
    web.build(model, tmp_path / "page", **options)
    image = np.asarray(Image.open(tmp_path / "page" / "samples" / "1.png").convert("RGB"))
    software = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
    with browsers.serving(tmp_path / "page") as server, browsers.launch(browser.browser_type, *software) as other:
        for each, runs_on in ((other, "the graphics processor, by WebGPU"), (browser, "the processor, by WebAssembly")):
            page = browsers.opened(each.new_context(), server.url)
            page.get_by_text(runs_on).wait_for()
            check(page, rounded if dtype == "float16" else model, image)
