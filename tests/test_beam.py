"""A folder of images through Apache Beam: the Keras model's own predictions, and bad files counted and named."""

import json
import os
import pathlib
import re
import shutil
import struct

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
from conftest import randomise

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="modules run on TensorFlow")

tf = pytest.importorskip("tensorflow")
beam = pytest.importorskip("apache_beam")

import keras_vit  # noqa: E402
from export import beam_predict, common, hub  # noqa: E402
from keras_vit.data import pipeline  # noqa: E402

CLASSES = 10
SIZES = ((32, 32), (48, 40), (17, 64))  # height, width


def images_into(folder, count):
    """Writes real images of several sizes, every other one a JPEG, into folders below `folder`: their paths."""
    paths, sets = [], [common.real_images(count // len(SIZES) + 1, size) for size in SIZES]
    for number in range(count):
        path = folder / f"part_{number % 3}" / f"{number:04}{('.png', '.jpg')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(path, sets[number % len(sets)][number // len(sets)], scale=False)
        paths.append(str(path))
    return paths


def bad_into(folder):
    """Writes files that are no images: {path: what its reason says}."""
    folder.mkdir(parents=True)
    png = tf.io.encode_png(np.zeros((40, 40, 3), np.uint8)).numpy()
    jpeg = tf.io.encode_jpeg(common.real_images(1, 64)[0]).numpy()
    huge = png[:16] + struct.pack(">II", 30_000, 30_000) + png[24:]
    contents = {
        "empty.jpg": (b"", "Input is empty|zero|Unknown image"),
        "text.jpg": (b"these are words", "Unknown image file format"),
        "short.png": (png[: len(png) // 2], "PNG"),
        "short.jpg": (jpeg[:200], "(?i)jpeg"),
        "huge.png": (huge, "more than 64,000,000 pixels"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {str(folder / name): reason for name, (_, reason) in contents.items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder of a module, the model that it was exported from)."""
    keras.utils.set_random_seed(0)
    model = randomise(keras_vit.ViT_mu(weights=None, classes=CLASSES))
    return keras_vit.hub.export(model, tmp_path_factory.mktemp("beam") / "module"), model


def lines(output, kind=""):
    files = pathlib.Path(output).parent.glob(f"{pathlib.Path(output).name}{kind}-*.jsonl")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def expected(model, paths):
    """The Keras model's probabilities for image files, by the pipeline's own preprocessing, (n, classes)."""
    size = tuple(model.input_shape[1:3])
    ready = [pipeline.eval_image(pipeline.decode(tf.constant(pathlib.Path(path).read_bytes())), size) for path in paths]
    return model.predict(np.stack(ready), verbose=0)


def check(found, model, paths):
    """That lines of JSON are what the Keras model says of these files."""
    scores = expected(model, paths)
    assert sorted(line["path"] for line in found) == sorted(paths)
    by_path = {line["path"]: line for line in found}
    for path, row in zip(paths, scores):
        line = by_path[path]
        assert line["class"] == int(np.argmax(row)) == line["top5"][0]["class"]
        assert [each["class"] for each in line["top5"]] == np.argsort(-row, kind="stable")[:5].tolist()
        np.testing.assert_allclose([each["score"] for each in line["top5"]], np.sort(row)[::-1][:5], rtol=0, atol=1e-5)
        assert line["score"] == line["top5"][0]["score"]


def test_predictions_are_those_of_the_keras_model_and_bad_files_are_named(exported, tmp_path, capsys):
    path, model = exported
    good = images_into(tmp_path / "photos [1]", 37)  # brackets, which patterns give a meaning
    bad = bad_into(tmp_path / "photos [1]" / "bad")
    odd = os.fsencode(tmp_path / "photos [1]") + b"/odd-\xff.png"  # a name that is no Unicode
    shutil.copy(good[0], odd)
    output = tmp_path / "out" / "photos"
    settings = [f"--module={path}", f"--images={tmp_path / 'photos [1]'}", f"--output={output}", "--batch-size=8"]
    assert beam_predict.main(settings) == 0
    check(lines(output), model, [*good, os.fsdecode(odd)])
    named = {line["path"]: line["reason"] for line in lines(output, ".bad")}
    assert set(named) == set(bad)
    for file, pattern in bad.items():
        assert re.search(pattern, named[file]), (file, named[file])
        assert "\n" not in named[file] and "{{" not in named[file] and len(named[file]) < 200
    assert capsys.readouterr().out == f"38 images in {output}-*.jsonl; 5 bad files in {output}.bad-*.jsonl\n"
    assert beam_predict.main(settings) == 1  # the output is there already
    assert "expected a new prefix" in capsys.readouterr().err and len(lines(output)) == 38


def test_a_pattern_chooses_files_and_names_are_added(exported, tmp_path):
    path, model = exported
    good = images_into(tmp_path, 12)
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {i}\n" for i in range(CLASSES)))
    settings = [f"--module={path}", f"--images={tmp_path}/part_*/*.png", f"--output={tmp_path / 'out'}", f"--names={names}"]
    assert beam_predict.main(settings) == 0
    found = lines(tmp_path / "out")
    check(found, model, [file for file in good if file.endswith(".png")])
    assert all(each["name"] == f"class {each['class']}" for line in found for each in line["top5"])
    assert lines(tmp_path / "out", ".bad") == []


def test_a_folder_without_one_image_is_an_error(exported, tmp_path, capsys):
    path, _ = exported
    bad_into(tmp_path / "photos")
    assert beam_predict.main([f"--module={path}", f"--images={tmp_path / 'photos'}", f"--output={tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().out.startswith("0 images") and len(lines(tmp_path / "out", ".bad")) == 5


def test_feature_vectors_are_those_of_the_keras_model(tmp_path):
    keras.utils.set_random_seed(0)
    model = randomise(keras_vit.ViT_mu(weights=None))
    path = keras_vit.hub.export(model, tmp_path / "module", task="feature_vector", card=False)
    good = images_into(tmp_path / "photos", 5)
    assert beam_predict.main([f"--module={path}", f"--images={tmp_path}/photos/", f"--output={tmp_path / 'out'}"]) == 0
    found = {line["path"]: line["feature_vector"] for line in lines(tmp_path / "out")}
    vectors = expected(hub.reference(model, "feature_vector"), good)
    np.testing.assert_allclose([found[file] for file in good], vectors, rtol=0, atol=1e-5)


def test_mistakes_are_told_before_anything_runs(exported, tmp_path, capsys):
    path, _ = exported
    images_into(tmp_path / "photos", 3)
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    altered = shutil.copytree(path, tmp_path / "altered")
    (altered / "saved_model.pb").write_bytes(b"another")
    for change, match in (
        ([f"--images={tmp_path / 'none'}"], "expected a folder or pattern of files, matches none"),
        ([f"--images={tmp_path}/photos/*.webp"], "matches none"),
        ([f"--names={tmp_path / 'names.txt'}"], "gives 10 numbers for classification, got names of 2 classes"),
        ([f"--module={altered}"], "saved_model.pb: expected"),
        ([f"--module={tmp_path / 'photos'}"], "expected a module with a manifest.json"),
        (["--runer=DataflowRunner"], "expected options of this command or of Apache Beam .*runer"),
        (["--batch-size=0"], "--batch-size must be at least 1, got 0"),
    ):
        settings = dict(
            word.split("=", 1) for word in [f"--module={path}", f"--images={tmp_path}/photos", f"--output={tmp_path}/out"]
        )
        settings |= dict(word.split("=", 1) for word in change)
        try:
            status = beam_predict.main([f"{key}={value}" for key, value in settings.items()])
        except SystemExit as error:
            status = error.code
        assert status != 0
        assert re.search(match, capsys.readouterr().err), change
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_thousand_images(exported, tmp_path):
    path, model = exported
    good = images_into(tmp_path / "photos", 1000)
    bad = bad_into(tmp_path / "photos" / "bad")
    assert beam_predict.main([f"--module={path}", f"--images={tmp_path / 'photos'}", f"--output={tmp_path / 'out'}"]) == 0
    check(lines(tmp_path / "out"), model, good)
    assert {line["path"] for line in lines(tmp_path / "out", ".bad")} == set(bad)
    print(f"{len(good)} images and {len(bad)} bad files: {len(lines(tmp_path / 'out'))} predictions, {len(bad)} named")
