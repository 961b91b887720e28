"""The snippets of docs/hub.md run, in their order, on a toy in place of ViT_B16, and give what the page says."""

import base64
import importlib
import json
import os
import pathlib
import re
import runpy
import shlex

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
from conftest import MARKS, marked

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="modules run on TensorFlow")

tf = pytest.importorskip("tensorflow")
for needed in ("tf_keras", "apache_beam", "onnxruntime", "tf2onnx", "ai_edge_litert"):  # the extra `export`
    pytest.importorskip(needed)

import keras_vit  # noqa: E402
from export import common  # noqa: E402
from keras_vit.checkpoints import fetch  # noqa: E402

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "hub.md"
SMALL = {  # what the page says -> what is run
    "ViT_B16": "ViT_mu",
    "--weights=augreg+imagenet2012": "--weights=none",
    'weights="augreg+imagenet2012"': "weights=None",
    "384": "32",
    "steps_per_epoch=100": "steps_per_epoch=30",
    "block_1[01]/": "block_1/",
}


def commands(text):
    """[(module, arguments)] of the lines of a shell snippet, which are all `python -m ...`."""
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        python, dash_m, module, *arguments = shlex.split(line)
        assert (python, dash_m) == ("python", "-m"), line
        yield module, arguments


def run(folder):
    """Runs the page in a folder: what its Python snippets left, {name: value}."""
    kept = {}
    for number, (name, (language, text)) in enumerate(marked(PAGE, "snippet").items()):
        for said, done in SMALL.items():
            text = text.replace(said, done)
        if language == "bash":
            for module, arguments in commands(text):
                assert importlib.import_module(module).main(arguments) == 0, (name, arguments)
            continue
        file = folder / f"snippet_{number}.py"
        file.write_text(text)
        left = runpy.run_path(str(file), init_globals=kept)
        kept |= {key: value for key, value in left.items() if not key.startswith("__")}
        kept[f"body of {name}"] = left.get("body")
    return kept


def theirs(folder):
    """A module of plain TensorFlow, without a manifest."""
    root = tf.train.Checkpoint()
    root.w = tf.Variable(tf.ones((3, 4)))
    spec = tf.TensorSpec((None, 32, 32, 3))
    root.__call__ = tf.function(lambda x: tf.reduce_mean(x, (1, 2)) @ root.w, input_signature=[spec])
    root.variables = root.trainable_variables = [root.w]
    root.regularization_losses = []
    tf.saved_model.save(root, str(folder))


def prepared(folder):
    """Puts what the page's reader has into a folder: photographs, something else among them, and a module of others."""
    (folder / "photos").mkdir()
    for number, image in enumerate(common.real_images(4, (40, 56))):
        keras.utils.save_img(folder / "photos" / f"{number}.png", image, scale=False)
    keras.utils.save_img(folder / "photos" / "flower.jpg", common.real_images(2, (48, 64))[1], scale=False)
    (folder / "photos" / "notes.txt").write_text("no image")
    theirs(folder / "theirs")


def model():
    return common.build("ViT_mu", common.RANDOM)


def logits(images):
    return common.keras_predict(model())(images)


def test_every_block_of_the_page_is_run_or_says_why_not():
    text = PAGE.read_text()
    assert text.count("\n```") == 2 * len(MARKS.findall(text)), "a fenced block without <!-- snippet: ... --> above it"
    assert all(any(said in body for _, body in marked(PAGE, "snippet").values()) for said in SMALL)
    assert {reason for reason in marked(PAGE, "not run")} == {
        "needs docker", "needs the server above", "needs a Google Cloud project", "needs a Flink cluster",
    }  # fmt: skip
    for heading in re.findall(r"^## (.*)$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        assert f"- [{heading}](#{anchor})" in text


def modules_are_written_and_archived(done):
    folder, _ = done
    for name, output in (("vit_b16_classification", "logits"), ("vit_b16_fe", "feature_vector"), ("mine", "logits")):
        assert keras_vit.hub.verify(folder / "modules" / name)["output"] == output
    assert fetch.sha256(folder / "modules" / "vit_b16_fe.tar.gz")


def loading_gives_logits_blocks_and_answers_for_files(done):
    folder, kept = done
    expected = logits(kept["images"].numpy())
    np.testing.assert_allclose(kept["logits"], expected, rtol=0, atol=1e-5)
    assert set(kept["everything"]) == {"logits", "block_0", "block_1", "block_0_scores", "block_1_scores"}
    assert kept["answer"].shape == (1, 1000) and np.isfinite(kept["answer"]).all()


def tf_keras_and_keras_fine_tune_the_module(done):
    folder, kept = done
    assert (folder / "tuned" / "saved_model.pb").is_file()
    assert kept["history"].history["accuracy"][-1] > 0.2  # of ten classes, in 30 steps
    images = kept["images"]
    np.testing.assert_allclose(kept["again"](images), kept["tuned"](images), rtol=0, atol=1e-5)


def a_pattern_moves_the_block_it_names(done):
    _, kept = done
    assert {name.partition("/")[0] for name in kept["moving"]} == {"block_1", "encoder_norm"}
    free = [variable for variable in kept["partly"].trainable_variables if variable.shape != (64, 10) and variable.shape != (10,)]
    assert len(free) == len(kept["moving"])


def a_module_of_others_loads_by_its_digest(done):
    folder, kept = done
    assert kept["pinned"] == keras_vit.hub.digest(folder / "theirs")
    assert kept["layer"].digest == kept["pinned"] and len(kept["layer"].trainable_variables) == 1


def served(path, request):
    """What TensorFlow Serving answers to the text of a REST request in its row format (api_rest.md), of the module itself."""
    body = json.loads(request)
    signature = tf.saved_model.load(str(path)).signatures[body.get("signature_name", "serving_default")]
    ((name, spec),) = signature.structured_input_signature[1].items()

    def decoded(value):
        if isinstance(value, dict):
            assert set(value) == {"b64"}, "one input: an object is a binary value"
            return base64.b64decode(value["b64"], validate=True)
        return [decoded(each) for each in value] if isinstance(value, list) else value

    (output,) = signature(**{name: tf.constant(decoded(body["instances"]), spec.dtype)}).values()
    return json.loads(json.dumps({"predictions": output.numpy().tolist()}))


def request_bodies_for_tensorflow_serving_fit_the_signatures(done):
    folder, kept = done
    path = folder / "modules" / "vit_b16_classification"
    (answer,) = served(path, json.dumps(kept["body of serving, files"]))["predictions"]
    np.testing.assert_allclose(answer, kept["answer"][0], rtol=0, atol=1e-5)
    assert json.loads((folder / "request.json").read_text()) == kept["body of serving, pixels"]
    answers = served(path, (folder / "request.json").read_text())["predictions"]
    np.testing.assert_allclose(answers, logits(kept["images"].numpy()), rtol=0, atol=1e-5)


def litert_and_onnx_files_give_the_models_logits(done):
    folder, kept = done
    expected = logits(kept["images"].numpy())
    for name in ("litert_logits", "onnx_logits"):
        np.testing.assert_allclose(kept[name], expected, rtol=0, atol=1e-5)


def beam_answers_for_every_image_and_names_what_is_none(done):
    folder, kept = done
    lines = [json.loads(line) for file in (folder / "answers").glob("photos-*") for line in file.read_text().splitlines()]
    (bad,) = (json.loads(line) for file in (folder / "answers").glob("photos.bad-*") for line in file.read_text().splitlines())
    assert len(lines) == 5 and pathlib.Path(bad["path"]).name == "notes.txt"
    (flower,) = (line for line in lines if line["path"].endswith("flower.jpg"))
    assert flower["class"] == int(np.argmax(kept["answer"][0]))


def a_collection_has_an_index(done):
    folder, _ = done
    (entry,) = json.loads((folder / "modules" / "index.json").read_text())["modules"].values()
    assert entry["archive_sha256"] == fetch.sha256(folder / "modules" / entry["archive"])


def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    prepared(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path / "home"))
    done = tmp_path, run(tmp_path)
    modules_are_written_and_archived(done)
    loading_gives_logits_blocks_and_answers_for_files(done)
    tf_keras_and_keras_fine_tune_the_module(done)
    a_pattern_moves_the_block_it_names(done)
    a_module_of_others_loads_by_its_digest(done)
    request_bodies_for_tensorflow_serving_fit_the_signatures(done)
    litert_and_onnx_files_give_the_models_logits(done)
    beam_answers_for_every_image_and_names_what_is_none(done)
    a_collection_has_an_index(done)
