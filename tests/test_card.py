"""Model cards: what they say is so of the module they lie in, and what users write into them stays text."""

import json
import os
import re
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
from conftest import randomise

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="modules are written by TensorFlow")

tf = pytest.importorskip("tensorflow")

import keras_vit  # noqa: E402
from keras_vit.errors import ExportError  # noqa: E402
from keras_vit.explain.cost import cost  # noqa: E402
from keras_vit.hub import card, module, verify  # noqa: E402

MEASURED = {"dataset": "digits", "split": "test", "metric": "accuracy", "value": 0.9861, "images": 360}


def exported(folder, model, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_verify", lambda *_, **__: None)
        return module.export(model, folder, **options)


@pytest.fixture(scope="module")
def loaded_model(tmp_path_factory):
    """A model whose weights come from a file."""
    path = tmp_path_factory.mktemp("weights") / "imagenet21k+imagenet2012.npz"
    keras_vit.save_npz(randomise(keras_vit.ViT_mu(weights=None, classes=7)), path)
    model = keras_vit.ViT_mu(weights=str(path), input_shape=(48, 32, 3))
    model.get_layer("patches").trainable = False
    return model


@pytest.fixture(scope="module")
def path(loaded_model, tmp_path_factory):
    extra = {"evaluation": [MEASURED], "recipe": "--config=digits.py", "publisher": "us", "version": 3}
    return exported(tmp_path_factory.mktemp("modules") / "m", loaded_model, card=extra, image_size="any")


def test_a_card_says_what_is_so_of_its_module(path, loaded_model):
    said, loaded = card.read(path), tf.saved_model.load(str(path))
    assert said["module"] == "us/vit_mu_classification/3" and said["asset-path"] == "vit_mu_classification.tar.gz"
    assert said["task"] == "image-classification" and said["format"] == "saved_model_2"
    assert said["fine-tunable"] == str(bool(loaded.trainable_variables)).lower() == "true"
    numbers = [v for v in loaded.variables if v.dtype == tf.float32]
    assert said["parameters"] == f"{sum(int(tf.size(v)) for v in numbers):,}" == f"{loaded_model.count_params():,}"
    assert said["multiply-adds for one image"] == f"{cost(loaded_model).macs:,}"
    images = np.random.default_rng(0).random((2, 48, 32, 3), np.float32)
    assert said["output"] == f"logits, float32 (batch, {loaded(images).shape[1]})"
    assert said["input"] == "float32 (batch, height, width, 3), RGB, 0 to 1"
    smallest, largest = re.search(
        r"48 x 32 pixels or any from (\d+) x \1 to (192 x 128) in steps of \1 x \1", said["height x width"]
    ).groups()
    assert (smallest, largest) == ("8", "192 x 128")
    assert all(name in said["signatures"] for name in loaded.signatures)
    info, record = loaded_model.weights_info, verify(path)
    assert (said["source"], said["sha256"], said["layout"]) == (info["source"], info["sha256"], info["layout"])
    assert record["weights"]["sha256"] == info["sha256"] and set(card.FILES) < set(record["files"])
    assert "resampled to 6 x 4" in said["adapted"] and said["recipe"] == "--config=digits.py"
    assert said["dataset"] == "imagenet-ilsvrc-2012-cls"


def test_both_cards_carry_the_same_facts_and_the_numbers_that_were_measured(path):
    tfhub, hugging_face = ((path / name).read_text() for name in card.FILES)
    body = tfhub[tfhub.index("## Architecture") :]
    assert hugging_face.endswith(body)
    assert "| digits | test | accuracy | 0.9861 | 360 |  |" in body and "not commercial" in body
    front = dict(line.split(": ", 1) for line in hugging_face.split("---\n")[1].splitlines())
    front = {key: json.loads(value) for key, value in front.items()}
    assert front["library_name"] == "keras" and front["pipeline_tag"] == "image-classification"
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.9861}]
    assert front["license"] == "other"  # of a user's own file


def test_how_to_use_it_runs_as_it_stands(path):
    snippets = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.S)
    assert len(snippets) == 3
    code = "\n".join(snippets) + "\nassert outputs.shape == served.shape == (2, 7) and len(model.trainable_variables) > 5"
    done = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    verify(path)  # using it wrote nothing


def test_a_model_of_nobody_and_a_feature_vector_say_so(tmp_path):
    features = keras_vit.ViT_mu(weights=None, include_top=False, pooling="token")
    said = card.read(exported(tmp_path / "m", features, task="feature_vector"))
    assert said["module"] == "keras_vit/vit_mu_fe/1" and said["task"] == "image-feature-vector"
    assert said["source"].startswith("none") and said["licence"] == "not stated" and "license" not in said
    assert said["output"] == "feature_vector, float32 (batch, 64)" and said["height x width"] == "32 x 32 pixels"
    assert "None measured." in (tmp_path / "m" / "README.md").read_text()
    x = keras.Input((8, 8, 3))
    up = keras.layers.Conv2DTranspose(2, 2, name="up")(x)  # whose cost is not known
    other = keras.Model(x, keras.layers.Dense(2, name="head")(keras.layers.Flatten()(up)), name="theirs")
    said = card.read(exported(tmp_path / "n", other, card=True))
    assert said["family"] == "not of keras_vit" and "multiply-adds for one image" not in said
    exported(tmp_path / "o", other, card=False)
    assert not set(card.FILES) & set(os.listdir(tmp_path / "o"))


def test_what_users_write_stays_text(tmp_path):
    hostile = 'a --> <script>\n---\nlicense: mit | "quoted" \\'
    extra = {
        "dataset": hostile,
        "recipe": hostile,
        "publisher": hostile,
        "licence": hostile,
        "evaluation": [{**MEASURED, "source": hostile}],
    }
    path = exported(tmp_path / "m", keras_vit.ViT_mu(weights=None), card=extra)
    tfhub, hugging_face = ((path / name).read_text() for name in card.FILES)
    assert "<script" not in tfhub + hugging_face.split("---\n", 2)[2] and hugging_face.count("\n---\n") == 1
    comments = re.findall(r"^<!--.*$", tfhub, re.M)
    assert len(comments) == 7 and all(line.endswith(" -->") and line.count("-->") == 1 for line in comments)
    front = hugging_face.split("---\n")[1]
    assert json.loads(dict(line.split(": ", 1) for line in front.splitlines())["datasets"]) == [hostile]
    assert card.read(path)["recipe"].startswith("a --&gt; &lt;script&gt; --- license: mit | ")


@pytest.mark.parametrize(
    "extra, match",
    [
        ({"author": "me"}, "'author' to be one of dataset, .*got 'me'"),
        ({"version": "1"}, "'version' to be int, got '1'"),
        ({"evaluation": [{"metric": "accuracy", "value": 0.9}]}, "dicts with dataset, split, metric, value"),
        ({"evaluation": [{**MEASURED, "value": "0.9"}]}, "'value' to be Real, got '0.9'"),
    ],
)
def test_what_a_card_does_not_hold_is_refused_before_anything_is_written(extra, match, tmp_path):
    with pytest.raises(ExportError, match=match):
        module.export(keras_vit.ViT_mu(weights=None), tmp_path / "m", card=extra)
    assert os.listdir(tmp_path) == []
