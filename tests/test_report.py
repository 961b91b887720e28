"""`report.md` and its pictures, for every kind of run."""

import ast
import concurrent.futures
import dataclasses
import math
import pathlib
import re
import subprocess

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from keras_vit.evaluation.classify import evaluate_scores
from keras_vit.training import report
from keras_vit.training.metrics import Metrics

CONFIG = ConfigDict(
    dict(dataset="digits", batch=64, seed=3, total_steps=60, grad_norm_clip=1.0, pp=dict(crop=8), names=("a", "b"))
)
ABOUT = report.About(
    config=CONFIG, model="ViT_mu", parameters=1_234_567, strategy="mirrored", devices=("CPU", "CPU"), precision="float32",
    command="python -m keras_vit.main --workdir=runs/digits", train_images=640, test_images=360,
)  # fmt: skip


def run(folder, steps=60, accuracy=True):
    folder.mkdir(exist_ok=True)
    with Metrics(folder / "metrics.jsonl") as written:
        for step in range(1, steps + 1):
            norm = math.inf if step == 5 else 3.0 / step
            written.write(step, loss=1 / step, lr=0.03, grad_norm=norm, seconds=2 + 0.05 * step)
            if accuracy and step % 20 == 0:
                written.write(step, accuracy_test=step / 100)
        if accuracy:
            written.write(steps, accuracy_train=0.987)
    return folder


def evaluation(confusion, **options):
    """Of predictions, each with probability 0.9, that have this confusion matrix."""
    confusion = np.asarray(confusion)
    labels, predicted = np.repeat(np.argwhere(confusion), confusion[confusion > 0], axis=0).T
    classes = len(confusion)
    scores = np.full((len(labels), classes), 0.1 / (classes - 1))
    scores[np.arange(len(labels)), predicted] = 0.9
    return evaluate_scores([(scores, labels)], **options)


def confused(classes, mistakes, right=10):
    """A confusion matrix with {(true, predicted): count} beside its diagonal."""
    confusion = right * np.eye(classes, dtype=int)
    for place, number in mistakes.items():
        confusion[place] = number
    return confusion


def images(count):
    return tuple(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8))


def pictures(text, folder):
    """{name: RGB image} of every picture that the text shows."""
    shown = dict(re.findall(r"!\[((?:\\.|[^\]\\])+)\]\((.+?)\)", text))
    assert len(shown) == text.count("![") and all(len(alt) > 20 for alt in shown)
    return {path: tf.io.decode_png((folder / path).read_bytes(), channels=3).numpy() for path in shown.values()}


def rows(text):
    """The cells of every line of a table."""
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]


def coloured(image, colour):
    """Share of the pixels that are clearly blue or orange."""
    red, blue = image[..., 0].astype(int), image[..., 2].astype(int)
    return np.mean(blue - red > 60 if colour == "blue" else red - blue > 60)


def test_report_says_what_was_run_and_what_came_out(tmp_path):
    result = evaluation(confused(10, {(8, 1): 3, (2, 3): 1}), sets=[range(10)] * 104)
    names = tuple(f"digit {i}" for i in range(10))
    about = dataclasses.replace(ABOUT, class_names=names, evaluation=result, mistakes=images(2), resumed=(20, 40))
    path = report.write(run(tmp_path), about)
    assert path == tmp_path / "report.md"
    text = path.read_text()
    assert text.startswith(
        "# ViT_mu on digits\n\n**Test accuracy 96.15%** (95% Wilson interval 90.53% to 98.49%, n = 104) after 60 steps in 0:05;"
    )
    for line in (
        "| model | ViT_mu, 1,234,567 parameters |", "| data | digits: 640 training images, 360 test images, 10 classes |",
        "| steps | 60 of 64 images (6 epochs) |", "| speed | 1,280 images/s (median step 50 ms) |", "| devices | 2 x CPU |",
        "| resumed | after steps 20, 40 |", "| strategy | mirrored |", "| precision | float32 |", "| seed | 3 |",
        "| top-5 accuracy | 96.15% |", "| negative log-likelihood | 0.2744 |", "| expected calibration error | 6.15% |",
        "| accuracy against sets of labels (ReaL) | 100.00% (95% Wilson interval 96.44% to 100.00%, n = 104) |",
        "| `accuracy_train` | 0.9870 |",
        "| backend | ", "```bash\npython -m keras_vit.main --workdir=runs/digits\n```", '  "dataset": "digits",\n', '"crop": 8',
        "most often digit 8 is taken for digit 1 (3 of 13)", "| 30 | digit 2 | digit 3 | 90.0% |",
    ):  # fmt: skip
        assert line in text, line
    shown = pictures(text, tmp_path)
    assert list(shown) == ["report/curves.png", "report/confusion.png", "report/mistakes.png"]
    for name, image in shown.items():
        assert 300 < image.shape[1] < 1600 and 200 < image.shape[0] < 1600, name
        assert 0.01 < np.mean(image.min(-1) < 200) < 0.9 and (image[:3] > 250).all(), name  # drawn, within its margin
    assert sorted(each.name for each in tmp_path.iterdir()) == ["metrics.jsonl", "report", "report.md"]


def test_mistakes_are_orange_and_a_perfect_model_has_none(tmp_path):
    for name, mistakes in (("perfect", {}), ("wrong", {(0, 1): 5})):
        about = dataclasses.replace(ABOUT, evaluation=evaluation(confused(4, mistakes)))
        text = report.write(run(tmp_path / name), about).read_text()
        image = pictures(text, tmp_path / name)["report/confusion.png"]
        assert coloured(image, "blue") > 0.1
        assert (coloured(image, "orange") > 0.01) == (name == "wrong")
        assert ("no mistakes" in text) == (name == "perfect")


def test_the_contact_sheet_shows_the_images_themselves(tmp_path):
    shades = tuple(np.full((5, 9, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200)))
    result = evaluation(confused(4, {(0, 1): 1, (1, 2): 1, (2, 3): 1}))
    about = dataclasses.replace(ABOUT, evaluation=result, mistakes=shades)
    sheet = pictures(report.write(run(tmp_path), about).read_text(), tmp_path)["report/mistakes.png"]
    centers = [np.mean(np.argwhere((sheet == shade[0, 0]).all(-1)), axis=0)[1] for shade in shades]
    assert centers == sorted(centers) and all(np.mean((sheet == shade[0, 0]).all(-1)) > 0.05 for shade in shades)


def test_a_run_of_one_step_without_evaluation_has_a_report(tmp_path):
    text = report.write(run(tmp_path, steps=1, accuracy=False), ABOUT).read_text()
    assert "**Not evaluated** after 1 of 60 steps in 0:02; training loss 1 at the last step." in text
    assert list(pictures(text, tmp_path)) == ["report/curves.png"]
    assert "speed" not in text and "resumed" not in text


def test_without_a_final_evaluation_the_last_accuracy_stands_with_its_step(tmp_path):
    assert "**Test accuracy 60.00%** at step 60 after 60 steps" in report.write(run(tmp_path), ABOUT).read_text()


def test_a_run_that_made_no_step_has_a_report(tmp_path):
    text = report.write(run(tmp_path, steps=0), ABOUT).read_text()
    assert "**Not evaluated**; no step was made." in text and "![" not in text


ODD = ("a|b", "two\nlines", "犬", "$\\frac{$", "*_`<b>`_*", "[x](y)", "\udcff\u202e", "émeu", " ", "n" * 300)


def test_class_names_with_any_letters_keep_the_tables_and_pictures_whole(tmp_path):
    result = evaluation(confused(len(ODD), {(i, i - 1): 1 for i in range(len(ODD))}))
    about = dataclasses.replace(ABOUT, class_names=ODD, evaluation=result, mistakes=images(10))
    text = report.write(run(tmp_path), about).read_text(encoding="utf-8")
    assert {len(cells) for cells in rows(text)} == {2, 4}
    assert "| a\\|b |" in text and "| two lines |" in text and "\\<b\\>" in text and "\\[x\\](y)" in text and "\u202e" not in text
    assert text.count("In the picture class 2 is 犬.") == 2
    assert len(pictures(text, tmp_path)) == 3


def test_of_many_classes_the_most_confused_pairs_are_a_table(tmp_path):
    few = dataclasses.replace(ABOUT, evaluation=evaluation(confused(3, {(0, 1): 1})), mistakes=images(1))
    report.write(run(tmp_path), few)
    mistakes = {(i, 999 - i): i for i in range(1, 31)}
    about = dataclasses.replace(ABOUT, evaluation=evaluation(confused(1000, mistakes, right=2)))
    text = report.write(run(tmp_path), about).read_text()
    table = text.split("The 20 most confused pairs of 1,000 classes:\n\n")[1].split("\n\n")[0]
    assert [[cell.strip() for cell in cells] for cells in rows(table)[2:4]] == [
        ["30", "969", "30", "93.8%"],
        ["29", "970", "29", "93.5%"],
    ]
    assert len(rows(table)) == 22
    assert len(rows(text.split("## Worst mistakes")[1].split("##")[0])) == 2 + report.MISTAKES
    assert "| data | digits: 640 training images, 360 test images, 1,000 classes |" in text
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["curves.png"]  # those of the report before are gone


def test_a_report_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    about = dataclasses.replace(ABOUT, evaluation=evaluation(confused(3, {})))
    before = report.write(run(tmp_path), about).read_bytes()
    curves = (tmp_path / "report/curves.png").read_bytes()

    def fail(*arguments):
        raise RuntimeError("drawing")

    run(tmp_path, steps=30)
    files = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(report, "_draw_confusion", fail)
    with pytest.raises(RuntimeError, match="drawing"):
        report.write(tmp_path, about)
    assert (tmp_path / "report.md").read_bytes() == before and (tmp_path / "report/curves.png").read_bytes() == curves
    assert sorted(tmp_path.rglob("*")) == files


def test_reports_are_written_in_threads_and_the_same_twice(tmp_path):
    about = dataclasses.replace(ABOUT, evaluation=evaluation(confused(3, {(0, 1): 1})), mistakes=images(1))
    folders = [run(tmp_path / str(i)) for i in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda folder: report.write(folder, about), folders))
    assert len({path.read_bytes() for path in paths}) == 1
    for name in report.PICTURES:
        assert len({(folder / "report" / name).read_bytes() for folder in folders}) == 1


def test_matplotlib_is_imported_by_drawing_alone_and_without_its_global_state():
    tree = ast.parse(pathlib.Path(report.__file__).read_text())
    inner = {id(node) for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) for node in ast.walk(each)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("matplotlib")]
    assert found and all(id(node) in inner for node in found)
    assert "pyplot" not in {name for node in found for name in (*node.module.split("."), *(alias.name for alias in node.names))}


def test_a_fence_outlasts_the_backticks_inside(tmp_path):
    about = dataclasses.replace(ABOUT, command="echo ```` `x`")
    assert "`````bash\necho ```` `x`\n`````" in report.write(run(tmp_path, steps=1), about).read_text()


def test_the_commit_is_that_of_the_packages_own_repository(tmp_path, monkeypatch):
    (tmp_path / "keras_vit/training").mkdir(parents=True)
    (tmp_path / "keras_vit/version.py").write_text("")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "keras_vit/training/report.py"))
    git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e"]
    assert report.commit() is None
    subprocess.run([*git, "init", "-q"], check=True)
    assert report.commit() is None  # installed below a repository, not part of it
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", report.commit())
    (tmp_path / "keras_vit/version.py").write_text("1")
    assert report.commit().endswith(", with uncommitted changes")
