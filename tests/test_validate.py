"""Validation of whole folders: what is broken counts and is named, a killed run goes on, and ImageNet's classes are all there."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import randomise

import keras_vit
from keras_vit import console, errors
from keras_vit.data import pipeline
from keras_vit.data.pixels import IMAGENET, Pixels
from keras_vit.evaluation import classify
from keras_vit.evaluation.validate import identity, validate

ROOT = pathlib.Path(__file__).parents[1]
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
BROKEN = {"bee/1.png": b"", "cat/0.png": b"no image", "gnu/5.png": None}  # None: cut off


def predict(images):
    """Scores that hang on the pixels alone, for images as `Pixels()` normalises them."""
    means = np.asarray(images, np.float64).mean(axis=(1, 2))
    return np.sin(np.outer(means.sum(axis=1), np.arange(1, len(CLASSES) + 1)) * 40) * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """7 classes of 6 images of 9 x 12, three of them broken."""
    root, rng = tmp_path_factory.mktemp("data") / "animals", np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for i in range(6):
            data = tf.io.encode_png(rng.integers(0, 256, (9, 12, 3), np.uint8)).numpy()
            broken = BROKEN.get(f"{name}/{i}.png", data)
            (root / name / f"{i}.png").write_bytes(data[:90] if broken is None else broken)
    return root


def opened(folder):
    return pipeline.open_source(folder, None, on_error="keep")


def run(folder, state=None, call=predict, **options):
    return validate(call, opened(folder), size=8, batch=4, state=state, every=8, from_logits=True, **options)


def figures(found):
    """All of an `Evaluation`, to the last bit; as text, in which NaN equals NaN."""
    values = dataclasses.asdict(found.evaluation).items()
    return {key: repr(value.tolist() if isinstance(value, np.ndarray) else value) for key, value in values}


def test_files_that_cannot_be_read_are_named_and_count_as_wrong(folder):  # [E7]
    found, source = run(folder), opened(folder)
    named = {pathlib.Path(path).relative_to(folder).as_posix(): why for path, why in found.unreadable}
    assert list(named) == list(BROKEN) and all(named.values())
    broken = [source.paths.index(path) for path, _ in found.unreadable]
    rest = np.setdiff1d(np.arange(42), broken)
    images = [pipeline.eval_image(pipeline.decode(tf.io.read_file(source.paths[i])), 8) for i in rest]
    whole = classify.evaluate_scores([(predict(np.stack(images)), rest // 6)], from_logits=True)
    evaluation = found.evaluation
    assert (evaluation.examples, evaluation.unreadable) == (42, 3) and found.images_per_second > 0
    assert evaluation.accuracy == whole.accuracy * 39 / 42 and evaluation.top5 == pytest.approx(whole.top5 * 39 / 42)
    assert evaluation.class_examples.tolist() == [6] * 7
    assert evaluation.class_accuracy == pytest.approx(whole.class_accuracy * whole.class_examples / 6)
    assert (evaluation.nll, evaluation.ece) == (pytest.approx(whole.nll), pytest.approx(whole.ece))
    assert [each[0] for each in evaluation.worst] == [rest[each[0]] for each in whole.worst]  # places in the folder


def test_a_killed_run_goes_on_to_the_figures_of_one_that_was_not(folder, tmp_path):  # [E7]
    state = tmp_path / "state.json"
    child = f"""
import os, signal
from test_validate import predict, run
calls = []
def until_killed(images):
    calls.append(len(images))
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(images)
run({str(folder)!r}, {str(state)!r}, until_killed)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", child], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    calls = []
    found, whole = run(folder, state, lambda images: calls.append(len(images)) or predict(images)), run(folder)
    assert 8 <= found.resumed <= 24 + len(BROKEN) and sum(calls) <= 42 - found.resumed
    assert figures(found) == figures(whole) and found.unreadable == whole.unreadable
    again = run(folder, state, lambda images: pytest.fail("a finished run reads nothing"))
    assert figures(again) == figures(whole) and (again.resumed, again.images_per_second) == (42, None)


def test_sets_of_labels_and_mistakes_survive_an_interruption(folder, tmp_path):
    sets = [[i // 6] if i % 3 else [] for i in range(42)]

    def stops(images, calls=[]):  # noqa: B006
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return predict(images)

    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "state.json", stops, sets=sets, worst=3)
    found = run(folder, tmp_path / "state.json", sets=sets, worst=3)
    assert found.resumed and figures(found) == figures(run(folder, sets=sets, worst=3))
    assert found.evaluation.real.examples == 28  # a broken image with a set is one of them


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(identity="another"), 'model was "", is "another"'),
        (dict(pixels=IMAGENET), "preprocessing was"),
        (dict(worst=3), "options was"),
    ],
)
def test_a_state_of_another_evaluation_is_refused_by_what_differs(folder, tmp_path, change, match):
    run(folder, tmp_path / "state.json")
    before = (tmp_path / "state.json").read_bytes()
    with pytest.raises(errors.DataError, match=match):
        run(folder, tmp_path / "state.json", **change)
    assert (tmp_path / "state.json").read_bytes() == before


@pytest.mark.parametrize("change", [lambda record: "{", lambda record: [], lambda record: record | {"counts": {}}])
def test_a_file_that_is_no_state_is_refused(folder, tmp_path, change):
    run(folder, tmp_path / "state.json")
    changed = change(json.loads((tmp_path / "state.json").read_text()))
    (tmp_path / "state.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(errors.DataError, match=r"state.json: expected the state of an evaluation.*Remove it"):
        run(folder, tmp_path / "state.json")


def test_a_file_that_can_be_read_after_all_is_not_counted_as_broken(folder):
    with pytest.raises(errors.DataError, match=r"0.png could not be read, and a moment later it could"):
        pipeline.why_unreadable(opened(folder), [0])


def test_a_folder_without_a_readable_image_has_no_accuracy(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "1.png").write_bytes(b"no image")
    with pytest.raises(errors.DataError, match="none of the 2 examples can be read"):
        run(tmp_path / "d")


def test_models_are_told_apart_by_their_weights():
    model = randomise(keras_vit.ViT_mu(weights=None, classes=3), seed=1)
    before = identity(model)
    assert identity(keras.models.clone_model(model)) != before == identity(model)


# --- the classes of ImageNet


def test_a_missing_class_of_imagenet_is_named():
    ids = classify.imagenet_ids()
    assert len(ids) == len(set(ids)) == 1000 and ids == sorted(ids) and (ids[0], ids[-1]) == ("n01440764", "n15075141")
    classify.check_classes(ids, 1000, "val")
    classify.check_classes(["ant", "bee"], 2, "bugs")
    classify.check_classes([f"{i:04}" for i in range(1000)], 1000, "a data set of another kind")
    with pytest.raises(errors.DataError, match=r"val: .*got 999; 1 missing: n01443537\. .*restore"):
        classify.check_classes(ids[:1] + ids[2:], 1000, "val")
    with pytest.raises(errors.DataError, match=r"1 missing: n15075141; 1 unknown: n00000001\."):
        classify.check_classes(["n00000001", *ids[:-1]], 1000, "val")


# --- the command


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "seven.keras"
    model = randomise(keras_vit.ViT_mu(weights=None, classes=7, input_shape=(16, 16, 3)), seed=3)
    pixels = dataclasses.replace(IMAGENET, mean=Pixels().mean, std=Pixels().std)
    model.remember(weights_info=model.weights_info | {"preprocessing": pixels.asdict()})
    model.save(path)
    return path


def command(capsys, *words):
    status = console.main(["validate", *map(str, words)])
    out, err = capsys.readouterr()
    return status, json.loads(out) if "--json" in words and out else out, err


def test_validate_tells_accuracy_speed_and_broken_files_of_a_folder_cut_as_the_model_wants_it(folder, seven, capsys, tmp_path):
    state = tmp_path / "state.json"
    status, told, _ = command(capsys, seven, folder, "--batch=8", f"--resume={state}", "--json")
    model = keras.saving.load_model(seven)
    pixels = Pixels.from_dict(model.weights_info["preprocessing"])
    found = validate(model.predict_on_batch, opened(folder), size=(16, 16), batch=8, pixels=pixels)
    assert status == 0 and (told["examples"], told["classes"]) == (42, 7)
    assert (told["top1"], told["top5"]) == (found.evaluation.accuracy, found.evaluation.top5)
    assert told["nll"] == pytest.approx(found.evaluation.nll) and told["images_per_second"] > 0
    assert [pathlib.Path(each["file"]).relative_to(folder).as_posix() for each in told["unreadable"]] == list(BROKEN)
    status, text, _ = command(capsys, seven, folder, "--batch=8", f"--resume={state}")
    assert status == 0 and "the shorter side to 18, then the central 16 x 16" in text and "had 42 of the images" in text
    assert "3, counted as wrong" in text and "bee/1.png (zero" not in text and "bee/1.png (" in text


def test_validate_finds_the_folder_of_classes(folder, tmp_path):
    (tmp_path / "ILSVRC").mkdir()
    (tmp_path / "ILSVRC" / "train").symlink_to(folder)
    (tmp_path / "ILSVRC" / "val").symlink_to(folder)
    root = str(tmp_path / "ILSVRC")
    assert console._folder(root) == console._folder(f"{root}/val/") == console._folder(f"{root}:val") == (root, "val")
    assert console._folder(str(folder)) == (str(folder), None)


def test_validate_refuses_what_is_no_imagenet(folder, seven, capsys, tmp_path):
    keras_vit.save_npz(randomise(keras_vit.ViT_mu(weights=None, classes=1000)), tmp_path / "thousand.npz")
    for name in ("n01440764", "n01443537"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "1.png").write_bytes((folder / "ant" / "0.png").read_bytes())
    for words, match in (
        ((f"ViT_mu:{tmp_path / 'thousand.npz'}", tmp_path / "val"), "got 2; 998 missing: n01484850, "),
        ((seven, tmp_path / "val"), "has 2 classes"),
        ((seven, tmp_path / "none"), "none: expected a folder of <class>/<image>"),
        ((seven, tmp_path / "val" / "n01440764"), "has no class folder"),
    ):
        status, out, err = command(capsys, *words)
        assert status == 1 and not out and match in err
