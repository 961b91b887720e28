"""The command keras-vit, in this process; other processes only where the command starts them, and once as it is installed."""

import configparser
import io
import itertools
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from conftest import GOLDENS, randomise

import keras_vit
from keras_vit import console, errors, zoo
from keras_vit.checkpoints import fetch, files
from keras_vit.data import pipeline
from keras_vit.evaluation import classify, fewshot

ROOT = pathlib.Path(__file__).parents[1]
BFLOAT16 = GOLDENS / "bigvision_vit" / "gap_bf16_storage" / "checkpoint.npz"
SCANNED = GOLDENS / "bigvision_vit" / "map_scan_vitg_style" / "checkpoint.npz"
LAYOUTS = (
    "pre-linen", "linen", "scan", "params/linen-posemb-on-top", "opt/target/scan-posemb-in-encoder",
    "params/img/scan-inlined-map",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    for name in ("LOCK", "OFFLINE", "BASE_URL"):
        monkeypatch.delenv(f"KERAS_VIT_{name}", raising=False)
    monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys):
    """(exit status, stdout, stderr) of a command; stdout is parsed where it is JSON."""

    def run(*words):
        status = console.main(list(map(str, words)))
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\t" not in out + err
        assert err.count("\n") == (1 if err else 0)
        return status, json.loads(out) if "--json" in words and out else out, err

    return run


@pytest.fixture(scope="module")
def toy():
    options = dict(patch_size=8, width=16, depth=3, heads=2, mlp=24, classes=5, representation_size=12)
    return randomise(keras_vit.ViT(input_shape=(16, 24, 3), classifier="map", **options), seed=1)


@pytest.fixture(scope="module")
def mu():
    """ViT_mu on 48 x 48 pixels with 7 classes."""
    return randomise(keras_vit.ViT_mu(weights=None, input_shape=(48, 48, 3), classes=7), seed=2)


def raw(path):
    """{name: (dtype, shape, bytes)} of a file, and what it records beside them."""
    with np.load(path, allow_pickle=False) as file:
        return {name: (file[name].dtype, file[name].shape, file[name].tobytes()) for name in file}, files.Npz(path).metadata


def assert_nothing_written(folder, *expected):
    assert sorted(path.name for path in folder.iterdir() if path.name != "cache") == sorted(expected)


# --- list


def test_list_shows_every_variant_and_tag(run):
    status, document, _ = run("list", "--json")
    assert status == 0
    assert [each["name"] for each in document] == list(zoo.VARIANTS)
    assert {each["name"]: each["parameters"] for each in document} == {row.name: row.params for row in zoo.VARIANTS.values()}
    assert {each["name"]: each["macs"] for each in document} == {row.name: row.macs for row in zoo.VARIANTS.values()}
    _, text, _ = run("list")
    lines = text.splitlines()
    assert len(lines) == 1 + len(zoo.VARIANTS)
    line = next(line for line in lines if line.startswith("ViT_B16 "))
    assert (
        "ViT-B_16" in line and "86,567,656" in line and " 17.6 " in line and "imagenet21k (394 MiB)" in line and "gsam," in line
    )


@pytest.mark.parametrize("pattern, names", [("ViT_B?", ["ViT_B8"]), ("ViT-L_*", ["ViT_L16", "ViT_L32"])])
def test_list_takes_patterns_of_names_here_and_upstream(run, pattern, names):
    assert [each["name"] for each in run("list", pattern, "--json")[1]] == names


def test_a_name_that_matches_nothing_is_answered_with_the_nearest(run):
    status, out, err = run("list", "vit_b61")
    assert status == 1 and not out and "nearest: ViT_B16" in err


def test_a_terminal_gets_colours_and_names_are_shown_as_they_are(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "x.npz", **{"[red]name[/red]": np.ones(3, "float32")})
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert console.main(["inspect", str(tmp_path / "x.npz")]) == 0
    out = capsys.readouterr().out
    assert "\x1b[" in out and "[red]name[/red]" in out


# --- words


@pytest.mark.parametrize(
    "words", [["ViT_B16:sam"], ["ViT-B_16:sam"], ["ViT_B16 sam"], ["ViT_B16", "sam"], ["ViT-B_16", "sam"]], ids="/".join
)
def test_a_tag_is_spelled_with_a_colon_or_as_two_words_under_either_name(words):
    (word,) = console.parse(words)
    assert console.find(word) is zoo.VARIANTS["ViT_B16"].weights["sam"]


def test_words_that_are_files_or_other_variants_are_not_taken_for_tags():
    words = ["ViT_B16", "ViT_L16:sam", "ViT_B16", "x.npz", "ViT_B16", "gs://a/b.npz"]
    assert console.parse(words) == words
    assert console.find("ViT_B16") is zoo.find_weights("imagenet", "ViT_B16", zoo.VARIANTS["ViT_B16"])
    assert console.find("gs://a/b.npz").source == "gs://a/b.npz"


@pytest.mark.parametrize(
    "word, match", [("ViT_B61:sam", "nearest: ViT_B16:sam"), ("ViT_B16:smn", "'gsam'"), ("odd", "expected a")]
)
def test_a_word_that_means_no_file_is_refused_with_what_there_is(run, word, match):
    status, out, err = run("inspect", word)
    assert status == 1 and not out and match in err


# --- inspect


def test_inspect_tells_what_a_file_is_and_which_variants_take_it(run, mu, tmp_path):
    keras_vit.save_npz(mu, tmp_path / "x.npz", layout="params/linen")
    status, told, _ = run("inspect", tmp_path / "x.npz", "--json")
    assert status == 0
    assert (told["family"], told["layout"], told["classes"]) == ("ViT", "params/linen", 7)
    assert told["parameters"] == mu.count_params() and told["size"] == (tmp_path / "x.npz").stat().st_size
    assert told["sha256"] == fetch.sha256(tmp_path / "x.npz")
    assert told["arguments"]["width"] == 64 and told["activation"] == "softmax" and told["zero_head"] is False
    assert told["variants"]["ViT_mu"]["adapted"] == ["tokens/positions: grid 6 x 6 resampled to 4 x 4"]
    assert {each["name"]: tuple(each["shape"]) for each in told["arrays"]} == {
        name: shape for name, (shape, _) in files.Npz(tmp_path / "x.npz").entries.items()
    }
    text, every = run("inspect", tmp_path / "x.npz")[1], run("inspect", tmp_path / "x.npz", "--arrays")[1]
    assert "params/Transformer/encoderblock_{i}/LayerNorm_0/scale" in text and "encoderblock_1" not in text
    assert "encoderblock_1/LayerNorm_0/scale" in every and "{i}" not in every


def test_what_inspect_says_of_a_variant_is_what_loading_does(mu, tmp_path):
    keras_vit.save_npz(mu, tmp_path / "x.npz")
    keras_vit.save_npz(randomise(keras_vit.ViT_mu(weights=None, include_top=False)), tmp_path / "headless.npz")
    for name, options in (("x.npz", {}), ("headless.npz", {"include_top": False})):
        archive = files.Npz(tmp_path / name)
        loaded = keras_vit.ViT_mu(weights=tmp_path / name, input_shape=(32, 32, 3), **options).weights_info
        told = zoo.explain(archive, zoo.VARIANTS["ViT_mu"])
        assert told == {"problems": {}, **{key: loaded[key] for key in ("layout", "adapted", "ignored")}}
        assert zoo.explain(archive, zoo.VARIANTS["ViT_mu_bv"])["problems"]
        with pytest.raises(errors.CheckpointMismatchError):
            keras_vit.ViT_mu_bv(weights=tmp_path / name, **options)


def test_a_file_with_a_name_too_many_resembles_a_layout_and_fits_no_variant(run, mu, tmp_path):
    keras_vit.save_npz(mu, tmp_path / "x.npz")
    arrays = dict(np.load(tmp_path / "x.npz"))
    del arrays["head/bias"]
    np.savez(tmp_path / "x.npz", **arrays, surplus=np.ones(3, "float32"))
    told = run("inspect", tmp_path / "x.npz", "--json")[1]
    assert told["layout"] is None and told["resembles"] == "pre-linen" and told["unknown"] == ["surplus"]
    problems = told["variants"]["ViT_mu"]["problems"]
    assert problems["names in the file that no rule claims"] == ["surplus"] and len(problems) == 2
    text = run("inspect", tmp_path / "x.npz")[1]
    assert "resembles pre-linen, which has no surplus" in text
    line = next(line for line in text.splitlines() if line.startswith("ViT_mu "))
    assert line.split()[1] == "no" and "does not fill (1): head/bias (expected head/bias)" in line


def test_a_layout_of_nobody_is_told_with_its_arrays(run, tmp_path):
    np.savez(tmp_path / "x.npz", **{f"blocks.{i}.weight": np.ones((4, 2), "float16") for i in range(12)})
    status, text, _ = run("inspect", tmp_path / "x.npz")
    assert status == 0 and "unknown; none of ViT" in text
    assert any(line.split() == ["blocks.{i}.weight", "12", "4", "x", "2", "float16"] for line in text.splitlines())
    assert run("inspect", tmp_path / "x.npz", "--json")[1]["family"] is None


def test_a_zeroed_classifier_is_seen(run, tmp_path):
    keras_vit.save_npz(keras_vit.ViT_mu(weights=None), tmp_path / "x.npz")
    assert run("inspect", tmp_path / "x.npz", "--json")[1]["zero_head"] is True
    assert "all zeros" in run("inspect", tmp_path / "x.npz")[1]


def test_what_is_known_of_a_published_file_is_told(run, mu, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(tmp_path))
    target = tmp_path / "vit_models" / "gsam" / "ViT-B_16.npz"
    target.parent.mkdir(parents=True)
    keras_vit.save_npz(mu, target)
    told = run("inspect", "ViT_B16:gsam", "--json")[1]
    assert told["source"] == "gs://vit_models/gsam/ViT-B_16.npz" and told["path"] == str(target)
    assert told["preprocessing"]["mean"] == [127.5] * 3 and told["licence"].startswith("Apache-2.0")


def npz(*members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in members:
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=True)
    return buffer.getvalue()


class Harm:
    def __reduce__(self):
        return (open, ("/tmp/keras_vit_console_was_harmed", "w"))


@pytest.mark.parametrize(
    "data, match",
    [
        (BFLOAT16.read_bytes()[:3000], "damaged, cut short"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML or XML page"),
        (pickle.dumps(Harm()), "pickle, which is never opened"),
        (npz(("a", np.array([Harm()], dtype=object))), "pickled Python objects"),
        (npz(("\x1b[2Ja", np.ones(3, "float32"))), "not an array by its name"),
        (npz(("a", np.array(["x"]))), "plain numbers"),
    ],
    ids=["cut short", "html", "pickle", "pickled member", "escape code", "strings"],
)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_file_that_is_none_is_said_to_be_what_it_looks_like_and_does_no_harm(run, tmp_path, command, data, match):
    (tmp_path / "x.npz").write_bytes(data)
    status, out, err = run(command, tmp_path / "x.npz", *([tmp_path / "y.npz"] if command == "convert" else []))
    assert status == 1 and not out and match in err and str(tmp_path / "x.npz") in err
    assert not pathlib.Path("/tmp/keras_vit_console_was_harmed").exists()
    assert_nothing_written(tmp_path, "x.npz")


# --- fetch


def test_fetch_gives_path_size_and_hash_of_each_and_says_what_failed(run, mu, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(tmp_path / "mirror"))
    path = tmp_path / "mirror" / "vit_models" / "gsam" / "ViT-B_16.npz"
    path.parent.mkdir(parents=True)
    keras_vit.save_npz(mu, path)
    status, out, err = run("fetch", "ViT_B16", "gsam", "ViT_B16:sam", "gs://vit_models/gsam/ViT-B_16.npz", "--json")
    assert status == 1 and "vit_models/sam/ViT-B_16.npz" in err
    each = dict(source="gs://vit_models/gsam/ViT-B_16.npz", path=str(path), size=path.stat().st_size, sha256=fetch.sha256(path))
    assert out == [each, each]
    status, out, _ = run("fetch", "ViT_B16:gsam")
    assert status == 0 and out.splitlines()[1].split() == [str(path), str(each["size"]), each["sha256"]]


def test_force_is_passed_on(run, tmp_path, monkeypatch):
    (tmp_path / "x.npz").write_bytes(b"x")
    asked = []

    def had(source, size=None, *, force=False):
        asked.append((source, force))
        return fetch.Fetched(tmp_path / "x.npz", "0" * 64)

    monkeypatch.setattr(fetch, "fetch", had)
    assert run("fetch", "ViT_B16:sam")[0] == run("fetch", "--force", "ViT_B16:sam")[0] == 0
    assert asked == [("gs://vit_models/sam/ViT-B_16.npz", False), ("gs://vit_models/sam/ViT-B_16.npz", True)]


# --- convert


def test_every_layout_becomes_every_other_as_the_model_itself_writes_it(run, toy, tmp_path):
    expected = {}
    for layout in LAYOUTS:
        path = tmp_path / f"{LAYOUTS.index(layout)}.npz"
        keras_vit.save_npz(toy, path, layout=layout)
        expected[layout] = path, raw(path)
    for (_, (path, _)), (layout, (_, wanted)) in itertools.product(expected.items(), repeat=2):
        status, told, _ = run("convert", path, tmp_path / "out.npz", f"--layout={layout}", "--json")
        assert status == 0 and told["layout"] == layout and told["left_out"] == []
        assert told["sha256"] == fetch.sha256(tmp_path / "out.npz")
        assert raw(tmp_path / "out.npz") == wanted
    assert wanted[1] == {"grid": [2, 3]}


@pytest.mark.parametrize(
    "golden, there, back",
    [(SCANNED, "linen", "params/scan-posemb-on-top"), (BFLOAT16, "scan", "params/linen-posemb-on-top")],
    ids=["stack", "bfloat16"],
)
def test_a_file_goes_to_another_layout_and_back_with_its_bits_and_types(run, tmp_path, golden, there, back):
    assert run("convert", golden, tmp_path / "x.npz", "--layout", there)[0] == 0
    assert raw(tmp_path / "x.npz")[0].keys() != raw(golden)[0].keys()
    assert run("convert", tmp_path / "x.npz", tmp_path / "y.npz", "--layout", back)[0] == 0
    assert raw(tmp_path / "y.npz") == raw(golden)
    stored = {dtype.str for dtype, *_ in raw(tmp_path / "x.npz")[0].values()}
    assert stored == ({"<f4", "|V2"} if golden is BFLOAT16 else {"<f4"})


def test_a_file_goes_through_every_format_in_its_own_layout_with_its_bits_and_comes_back(run, tmp_path):
    path = BFLOAT16
    for name in ("a.pth", "b.safetensors", "c.pth.tar", "d.npz"):
        status, told, _ = run("convert", path, tmp_path / name, "--json")
        assert status == 0 and told["layout"] == told["read_as"] == "params/linen-posemb-on-top" and told["left_out"] == []
        path = tmp_path / name
        status, told, _ = run("inspect", path, "--json")
        assert status == 0 and told["family"] == "ViT" and told["layout"] == "params/linen-posemb-on-top"
        assert told["sha256"] == fetch.sha256(path)
    with np.load(BFLOAT16) as file:
        expected = {name: (file[name].dtype, file[name].shape, file[name].tobytes()) for name in file}
    with np.load(path) as file:
        assert {name: (file[name].dtype, file[name].shape, file[name].tobytes()) for name in file} == expected


def test_the_format_of_a_file_of_no_known_family_can_be_changed_and_its_integers_stay(run, tmp_path):
    arrays = {"model/net.weight": np.ones((2, 3), "f2"), "model/net.steps": np.array(7)}
    files.write(tmp_path / "x.pth", arrays)
    status, told, _ = run("convert", tmp_path / "x.pth", tmp_path / "y.safetensors", "--json")
    assert status == 0 and told["family"] is told["layout"] is told["read_as"] is None
    archive = files.open_file(tmp_path / "y.safetensors")
    assert {name: archive.exact(name).tolist() for name in archive.entries} == {n: a.tolist() for n, a in arrays.items()}
    assert "unknown" in run("convert", tmp_path / "x.pth", tmp_path / "y.safetensors")[1]
    status, _, err = run("convert", tmp_path / "x.pth", tmp_path / "y.pth")
    assert status == 1 and "model/net.weight: the file's layout has no such array" in err


def test_layers_of_several_types_are_stacked_as_float32(run, toy, tmp_path):
    keras_vit.save_npz(toy, tmp_path / "x.npz", layout="linen")
    arrays, name = dict(np.load(tmp_path / "x.npz")), "Transformer/encoderblock_{}/LayerNorm_0/scale"
    arrays[name.format(1)] = arrays[name.format(1)].astype("float16")
    arrays["head/kernel"] = arrays["head/kernel"].astype(">f8")
    np.savez(tmp_path / "y.npz", **arrays)
    assert run("convert", tmp_path / "y.npz", tmp_path / "z.npz", "--layout=scan")[0] == 0
    with np.load(tmp_path / "z.npz") as file:
        stack, head = file["Transformer/encoderblock/LayerNorm_0/scale"], file["head/kernel"]
    assert stack.dtype == "float32" and head.dtype == ">f8"
    np.testing.assert_array_equal(stack, [arrays[name.format(i)].astype("float32") for i in range(3)])
    np.testing.assert_array_equal(head, arrays["head/kernel"])


def test_what_lies_beside_a_checkpoint_is_left_out_and_told(run, toy, tmp_path):
    keras_vit.save_npz(toy, tmp_path / "x.npz", layout="opt/target/linen")
    np.savez(tmp_path / "y.npz", **np.load(tmp_path / "x.npz"), **{"opt/state/step": np.array(7)})
    status, told, _ = run("convert", tmp_path / "y.npz", tmp_path / "z.npz", "--json")
    assert status == 0 and told["left_out"] == ["opt/state/step"] and told["layout"] == "pre-linen"


def surplus(arrays):
    arrays["surplus"] = np.ones(3, "float32")


def gap(arrays):
    for name in [name for name in arrays if "encoderblock_1/" in name]:
        del arrays[name]


def uneven(arrays):
    arrays["Transformer/encoderblock_1/LayerNorm_0/scale"] = np.ones(3, "float32")


def whole_numbers(arrays):
    arrays["head/bias"] = np.arange(5)


@pytest.mark.parametrize(
    "change, match",
    [
        (surplus, "surplus: "),
        (gap, r"encoderblock/.*layers 0 to 2.*got \[0, 2\]"),
        (uneven, "one shape"),
        (whole_numbers, "head/bias"),
    ],
)
def test_what_another_layout_cannot_hold_is_refused_by_name_and_nothing_written(run, toy, tmp_path, change, match):
    keras_vit.save_npz(toy, tmp_path / "x.npz", layout="linen")
    arrays = dict(np.load(tmp_path / "x.npz"))
    change(arrays)
    np.savez(tmp_path / "x.npz", **arrays)
    (tmp_path / "y.npz").write_bytes(b"as it was")
    status, out, err = run("convert", tmp_path / "x.npz", tmp_path / "y.npz", "--layout=scan")
    assert status == 1 and not out
    assert re.search(match, err)
    assert (tmp_path / "y.npz").read_bytes() == b"as it was"
    assert_nothing_written(tmp_path, "x.npz", "y.npz")


def test_damage_found_while_writing_leaves_the_old_file(run, toy, tmp_path):
    keras_vit.save_npz(toy, tmp_path / "x.npz")
    data = bytearray((tmp_path / "x.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        data[archive.getinfo("embedding/kernel.npy").header_offset + 5000] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    (tmp_path / "y.npz").write_bytes(b"as it was")
    status, _, err = run("convert", tmp_path / "x.npz", tmp_path / "y.npz", "--layout=linen")
    assert status == 1 and "BadZipFile" in err
    assert (tmp_path / "y.npz").read_bytes() == b"as it was"
    assert_nothing_written(tmp_path, "x.npz", "y.npz")


@pytest.mark.parametrize(
    "options, match",
    [
        (["y.npz", "--layout=linn"], "nearest: linen"),
        (["y.npz", "--variant=ViT_mu_bv"], "does not fit ViT_mu_bv"),
        (["y.npz", "--variant=ViT_nu"], "nearest: ViT_mu"),
        (["y.h5"], "ends in .npz, .safetensors, .pth"),
        (["no/folder/y.npz"], "folder does not exist"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(run, mu, tmp_path, options, match):
    keras_vit.save_npz(mu, tmp_path / "x.npz")
    status, out, err = run("convert", tmp_path / "x.npz", tmp_path / options[0], *options[1:])
    assert status == 1 and not out and match in err
    assert_nothing_written(tmp_path, "x.npz")
    assert run("convert", tmp_path / "x.npz", tmp_path / "y.npz", "--variant=ViT_mu")[0] == 0


# --- evaluate, fewshot


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A .keras file of a ViT for the digits, random but for its kind of weights, and an .npz of a zeroed one."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("trained")
    options = dict(input_shape=(8, 8, 3), patch_size=4, width=8, depth=1, heads=1, mlp=8, classes=10)
    randomise(keras_vit.ViT(**options)).save(folder / "digits.keras")
    keras_vit.save_npz(keras_vit.ViT_mu(weights=None, input_shape=(16, 16, 3), classes=10), folder / "zeros.npz")
    return folder


def digits(split):
    source = pipeline.open_source("digits", split)
    return pipeline.eval_batches(source, size=8, batch=64)


def test_evaluate_tells_what_the_evaluation_finds(run, trained):
    status, told, _ = run("evaluate", trained / "digits.keras", "digits:test", "--json")
    found = classify.evaluate(keras.saving.load_model(trained / "digits.keras"), digits("test"))
    assert status == 0 and (told["examples"], told["classes"], told["resolution"]) == (360, 10, [8, 8])
    assert (told["top1"], told["top5"], told["interval"]) == (found.accuracy, found.top5, list(found.interval))
    assert (told["nll"], told["ece"]) == (pytest.approx(found.nll, rel=1e-5), pytest.approx(found.ece, rel=1e-5))
    assert [each["accuracy"] for each in told["per_class"]] == found.class_accuracy.tolist() and told["images_per_second"] > 0
    assert [tuple(each.values())[:3] for each in told["worst"]] == [each[:3] for each in found.worst[:8]]
    assert (told["split"], told["real"], told["preprocessing"]["mean"]) == ("test", None, [127.5] * 3)
    text = run("evaluate", trained / "digits.keras", "digits", "--batch=100")[1]
    assert f"{found.accuracy:.2%} (" in text and "95% Wilson" in text and "img" not in text and "images/s" in text
    worst = text[text.index("worst classes") :].splitlines()[1:]
    shares = [float(line.split()[1].rstrip("%")) for line in worst]
    assert len(worst) == 5 and shares == sorted(shares)
    assert shares[0] == pytest.approx(100 * found.class_accuracy.min(), abs=0.05)


def test_evaluate_compares_with_the_reassessed_labels_by_file_name(run, trained, tmp_path):
    for name, number in (("ant", 7), ("ant", 3), ("bee", 9)):
        file = tmp_path / "bugs" / "val" / name / f"ILSVRC2012_val_{number:08}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(file, np.full((8, 8, 3), 20.0 * number), scale=False)
    model = randomise(keras_vit.ViT(input_shape=(8, 8, 3), patch_size=4, width=8, depth=1, heads=1, mlp=8, classes=2))
    model.save(tmp_path / "bugs.keras")
    source = pipeline.open_source(tmp_path / "bugs", "val")
    best = [int(np.argmax(model.predict_on_batch(x.numpy()))) for x, _ in pipeline.eval_batches(source, size=8, batch=1)]
    lists = [[]] * 50_000
    lists[2], lists[6], lists[8] = [best[0]], [1 - best[1]], []  # of 3, 7 and 9, the order of the folder
    (tmp_path / "real.json").write_text(json.dumps(lists))
    words = "evaluate", tmp_path / "bugs.keras", f"{tmp_path / 'bugs'}:val", "--real", tmp_path / "real.json"
    assert run(*words, "--json")[1]["real"] == dict(examples=2, accuracy=0.5, interval=list(classify.wilson_interval(1, 2)))
    assert re.search("ReaL +50.00%.* of 2 images", run(*words)[1])


@pytest.mark.parametrize(
    "word, expected",
    [
        ("digits", ("digits", "test")),
        ("cifar10:train[:5%]", ("cifar10", "train[:5%]")),
        ("imagenet2012:5.1.0", ("imagenet2012:5.1.0", "test")),
        ("imagenet2012:5.1.0:validation", ("imagenet2012:5.1.0", "validation")),
        ("my/flowers:val-2", ("my/flowers", "val-2")),
    ],
)
def test_a_split_is_named_after_a_colon(word, expected):
    assert console._split(word) == expected


@pytest.mark.parametrize(
    "words, match",
    [
        (["{}/digits.keras", "digits:valid"], "has the splits 'train' and 'test'"),
        (["{}/digits.keras", "digits", "--real=x.json"], "x.json: cannot be read"),
        (["{}/none.keras", "digits"], "expected a model stored by Keras"),
        (["ViT_mmu", "digits"], "nearest: ViT_mu"),
        (["ViT_mu:{}/zeros.npz", "digits"], "all zeros.* see keras-vit fewshot"),
        (["ViT_mu:{}/seven.npz", "digits"], "digits has 10 classes .*seven.npz has 7"),
        (["{}/features.keras", "digits"], "ends in logits, a softmax or a sigmoid"),
    ],
)
def test_evaluate_refuses_what_it_cannot_evaluate(run, trained, words, match):
    if "seven" in words[0]:
        keras_vit.save_npz(keras_vit.ViT_mu(weights=None, input_shape=(16, 16, 3), classes=7), trained / "seven.npz")
    if "features" in words[0]:
        keras_vit.ViT_mu(weights=None, include_top=False, input_shape=(16, 16, 3)).save(trained / "features.keras")
    status, out, err = run("evaluate", *(word.format(trained) for word in words))
    assert status == 1 and not out and re.search(match, err)


def test_fewshot_tells_what_is_learned_from_the_features_of_any_head(run, trained):
    status, told, _ = run("fewshot", trained / "digits.keras", "digits", "--shots=1,5", "--l2=1,1024", "--seeds=2", "--json")
    model = keras.saving.load_model(trained / "digits.keras")
    taken = [each for split in ("train", "test") for each in fewshot.features(model, digits(split))]
    rows = fewshot.fewshot(*taken, shots=(1, 5), l2=(1, 1024), seeds=(0, 1))
    assert status == 0 and (told["features"], told["train_examples"], told["examples"]) == (8, 1437, 360)
    assert [(row["shots"], row["l2"]) for row in told["rows"]] == [(1, 1), (1, 1024), (5, 1), (5, 1024)]
    np.testing.assert_allclose([row["accuracy"] for row in told["rows"]], [row.accuracy for row in rows], atol=0.01)
    status, text, _ = run("fewshot", f"ViT_mu:{trained / 'zeros.npz'}", "digits", "--shots=5", "--test=train")
    lines = text.splitlines()
    assert status == 0 and lines[-2].split()[:3] == ["shots", "l2", "top-1"] and lines[-1].split()[:2] == ["5", "1024"]
    assert 10 < float(lines[-1].split()[2].rstrip("%")) < 100


# --- explain


@pytest.fixture(scope="module")
def flower(mu, tmp_path_factory):
    """A folder of a classifier, one of zeros, and a photograph."""
    folder = tmp_path_factory.mktemp("flower")
    mu.save(folder / "mu.keras")
    keras_vit.ViT_mu(weights=None, classes=7).save(folder / "zeros.keras")
    keras_vit.ViT_mu(weights=None, include_top=False).save(folder / "features.keras")
    photograph = np.random.default_rng(0).integers(0, 256, (40, 60, 3))
    keras.utils.save_img(folder / "flower.png", photograph, scale=False)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    return folder


def test_gradcam_writes_the_image_that_the_model_sees_and_tells_the_best_classes(run, mu, flower, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, told, _ = run("explain", "gradcam", flower / "mu.keras", flower / "flower.png", "--class=3", "--json")
    assert status == 0 and told["path"] == "flower-gradcam.png" and told["class"] == 3 and told["layer"].startswith("block_1")
    seen = keras.utils.img_to_array(keras.utils.load_img(told["path"]))
    image = pipeline.eval_image(pipeline.read_image(flower / "flower.png"), (48, 48)).numpy()
    assert seen.shape == (48, 48, 3) and 0 < np.abs(seen - 127.5 * (image + 1)).mean() < 100
    scores = mu.predict_on_batch(image[None])[0]
    best = np.argsort(-scores)[:5]
    assert [each["class"] for each in told["predictions"]] == best.tolist()
    np.testing.assert_allclose([each["score"] for each in told["predictions"]], scores[best], atol=1e-6)
    status, text, _ = run("explain", "gradcam", flower / "mu.keras", flower / "flower.png", "--layer=block_0", "--out=x.png")
    lines = [line.split() for line in text.splitlines()]
    assert status == 0 and ["class", str(best[0])] in lines and ["layer", "block_0"] in lines
    assert_nothing_written(tmp_path, "flower-gradcam.png", "x.png")


@pytest.mark.parametrize(
    "words, match",
    [
        (["zeros.keras", "flower.png"], "head is all zeros"),
        (["features.keras", "flower.png"], "include_top=True"),
        (["mu.keras", "broken.jpg"], "broken.jpg .*Replace or remove"),
        (["mu.keras", "none.png"], "none.png .No such file"),
        (["mu.keras", "flower.png", "--layer=blok_1"], "nearest: block_1"),
        (["mu.keras", "flower.png", "--class=7"], r"whole number of 0\.\.6"),
        (["mu.keras", "flower.png", "--out=x.jpg"], "ends in .png"),
        (["mu.kera", "flower.png"], "expected VARIANT"),
    ],
)
def test_gradcam_refuses_what_it_cannot_explain_and_writes_nothing(run, flower, tmp_path, monkeypatch, words, match):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("explain", "gradcam", flower / words[0], flower / words[1], *words[2:])
    assert status == 1 and not out and re.search(match, err)
    assert_nothing_written(tmp_path)


# --- doctor


def test_doctor_trains_on_every_backend_and_reports_the_one_that_cannot(run, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text('raise ImportError("no libcudart;\\x1b[2J\\thelp")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("KERAS_VIT_BASE_URL", "https://me:secret@mirror/x")
    status, told, _ = run("doctor", "--json")
    assert status == 1
    for backend in ("tensorflow", "jax"):
        each = told["backends"][backend]
        assert each["problem"] is None and each["devices"] and each["forward"] > 0 and each["step"] > 0
    assert "no libcudart; [2J help" in told["backends"]["torch"]["problem"]
    assert told["versions"]["keras"] and told["versions"]["tensorflow"] and told["keras_vit"] == keras_vit.__version__
    assert told["environment"]["KERAS_VIT_BASE_URL"] == "https://***@mirror/x"
    assert told["cache"]["folder"] == str(tmp_path / "cache") and told["cache"]["free"] > 0 and told["cache"]["files"] == 0


def test_a_backend_that_does_not_answer_fails_within_the_time_out(run, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time; time.sleep(100)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, text, _ = run("doctor", "--backend=torch", "--timeout=0.5")
    assert status == 1
    assert text.splitlines()[-1].split() == ["torch", "no", "no", "answer", "within", "0.5", "s"]


# --- the command line


@pytest.mark.parametrize(
    "words",
    [
        [], ["bogus"], ["inspect"], ["convert", "x.npz"], ["list", "--bogus"], ["doctor", "--backend=mxnet"],
        ["fewshot", "x.keras", "digits", "--shots=5,x"], ["fewshot", "x.keras", "digits", "--l2=0"],
        ["evaluate", "x.keras", "digits", "--batch=1,2"],
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2_and_says_how(words, capsys):
    with pytest.raises(SystemExit) as raised:
        console.main(words)
    assert raised.value.code == 2 and "usage: keras-vit" in capsys.readouterr().err


def test_the_help_names_every_layout(capsys):
    with pytest.raises(SystemExit) as raised:
        console.main(["convert", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert raised.value.code == 0 and all(f"Layouts of {name}: " in text for name in zoo.FAMILIES)


def test_the_installed_command_runs_under_a_backend_that_needs_nothing(mu, tmp_path):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, value = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    keras_vit.save_npz(mu, tmp_path / "x.npz")
    script = f"import sys; from importlib.metadata import EntryPoint; sys.exit(EntryPoint({name!r}, {value!r}, 'x').load()())"
    command, environment = [sys.executable, "-c", script], {**os.environ, "KERAS_BACKEND": "numpy"}
    done = subprocess.run(
        [*command, "inspect", tmp_path / "x.npz", "--json"], capture_output=True, text=True, env=environment, check=False
    )
    assert name == "keras-vit" and done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["variants"]["ViT_mu"]["problems"] == {}
