"""The snippets of docs/lit.md run, in their order, on the toy LiT_mu in place of LiT_B16B_2, and give what the page says."""

import json
import os
import pathlib
import re
import shlex
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
from conftest import MARKS, marked, randomise
from PIL import Image
from sklearn.datasets import load_sample_image

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="modules run on TensorFlow")

import keras_vit  # noqa: E402
from keras_vit import console  # noqa: E402

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "lit.md"
SMALL = {  # what the page says -> what is run
    "LiT_B16B_2()": 'LiT_mu(weights="mu.npz")',
    "LiT_B16B_2": "LiT_mu:mu.npz",
    "224": "32",
}
DIGITS = "zero one two three four five six seven eight nine"


def prepared(folder):
    """Puts what the page's reader has into a folder: photographs, a folder of classes, names, and weights for the toy."""
    model = randomise(keras_vit.LiT_mu(weights=None), seed=1)
    keras_vit.save_npz(model, folder / "mu.npz")
    (folder / "photos").mkdir()
    for name in ("flower", "china"):
        image = Image.fromarray(load_sample_image(f"{name}.jpg"))
        image.save(folder / "photos" / f"{name}.jpg")
        for i in range(3):
            path = folder / "animals" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.crop((100 * i, 0, 100 * i + 200, 200)).save(path)
    lines = [{"image": "flower.jpg", "caption": ["a red flower", "a dahlia"]}, {"image": "china.jpg", "caption": "a temple"}]
    (folder / "photos" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "digits.txt").write_text("\n".join(DIGITS.split()))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, what the Python snippets left and what the commands printed) after the whole page."""
    folder, kept = tmp_path_factory.mktemp("page"), {}
    before = pathlib.Path.cwd()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "zero_shot: .* the same text")  # the toy's vocabulary is small
        patch.setenv("KERAS_VIT_HOME", str(folder / "home"))
        prepared(folder)
        os.chdir(folder)
        try:
            for name, (language, text) in marked(PAGE, "snippet").items():
                for said, run in SMALL.items():
                    text = text.replace(said, run)
                if language == "python":
                    exec(text, kept)  # noqa: S102 - this repository's own page
                    continue
                for number, line in enumerate(text.splitlines()):
                    program, *arguments = shlex.split(line)
                    assert program == "keras-vit" and console.main(arguments) == 0, (name, line)
                    kept[f"{name} {number}"] = line
        finally:
            os.chdir(before)
    return folder, kept


def test_every_block_of_the_page_is_run_or_says_why_not():
    text = PAGE.read_text()
    assert text.count("\n```") == 2 * len(MARKS.findall(text)), "a fenced block without <!-- snippet: ... --> above it"
    assert all(any(said in body for _, body in marked(PAGE, "snippet").values()) for said in SMALL)
    assert set(marked(PAGE, "not run")) == {"tests/test_hub_texts.py does it"}
    for heading in re.findall(r"^## (.*)$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        assert f"- [{heading}](#{anchor})" in text


def test_embeddings_and_classifiers_are_as_the_page_says(done):
    folder, kept = done
    for name in ("image_embeddings", "text_embeddings"):
        assert kept[name].shape == (2, 64) and kept[name].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(kept[name], axis=1), 1, atol=1e-5)
    assert kept["scores"].shape == (2, 2)
    assert [len(each) for each in kept["best"]] == [1, 1] and kept["best"][0][0][1] in ("flower", "temple", "fire truck")
    assert keras.saving.load_model(folder / "three.keras").weights_info["class_names"] == ["flower", "temple", "fire truck"]
    assert kept["by_label"].output_shape == (None, 2) and kept["published"].output_shape == (None, 37)
    assert kept["in_words"].weights_info["prompts"] == ["a photo of the digit {}", "the number {}"]
    assert keras_vit.hub.verify(folder / "modules" / "animals")["output"] == "logits"
    assert json.loads((folder / "animals.json").read_text())["counts"]["examples"] == 6


def test_retrieval_and_search_are_as_the_page_says(done):
    folder, kept = done
    assert kept["found"].image_to_text.queries == kept["found"].text_to_image.queries == 2
    assert {hit.name for hit in kept["hits"]} == {"flower.jpg", "china.jpg"} and kept["index"].added == 0
    assert kept["sheet"].ndim == 3 and (folder / "flowers.png").is_file()
    assert [path.name for path in (folder / "photos").iterdir() if path.name.startswith(".")] == [".keras_vit"]
