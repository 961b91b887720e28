"""`python -m export.hub` and `python -m export.collection`: what they say is so, archives, kills in between, and failures."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tarfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="modules run on TensorFlow")

tf = pytest.importorskip("tensorflow")

import keras_vit  # noqa: E402
from export import collection, common, hub  # noqa: E402
from keras_vit import errors, zoo  # noqa: E402
from keras_vit.checkpoints import fetch  # noqa: E402
from keras_vit.explain import cost  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
THREE = ("flexivit_mu_fe", "mixer_mu_fe", "vit_mu_fe")
PATTERN = "[fmv]*_mu_fe"


def written(capsys, *arguments):
    """The document that `export.hub` prints."""
    assert hub.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_module_is_written_packed_and_described(tmp_path, capsys):
    out = tmp_path / "vit_mu"
    said = written(capsys, "ViT_mu", "--weights=none", f"--out={out}", "--archive", "--publisher=me")
    assert said["path"] == str(out) and said["digest"] == keras_vit.hub.digest(out)
    assert 0 <= said["difference"] <= 1e-5 < said["largest"]
    assert said["bytes"] == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert said["archive"] == f"{out}.tar.gz" and said["archive_bytes"] == pathlib.Path(said["archive"]).stat().st_size
    assert said["images_per_second"] > 0 and said["keras_images_per_second"] > 0
    with tarfile.open(said["archive"]) as tar:
        members = tar.getmembers()
        tar.extractall(tmp_path / "unpacked", filter="data")
    names = [member.name for member in members]
    assert names == sorted(names) and {"saved_model.pb", "manifest.json", "variables", "variables/variables.index"} <= set(names)
    assert all(re.match(r"\w", name) for name in names)
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, 0, "", "")}
    assert keras_vit.hub.verify(tmp_path / "unpacked") == keras_vit.hub.verify(out)


def test_the_same_files_give_the_same_archive_and_strange_names_are_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "variables").mkdir(parents=True)
        for file in ("saved_model.pb", "variables/variables.index"):
            (tmp_path / name / file).write_bytes(file.encode() * 1000)
            os.utime(tmp_path / name / file, (1e9 * (name == "two"), 1e9))
    (tmp_path / "two" / "saved_model.pb").chmod(0o600)
    sums = [hub.archive(tmp_path / name, tmp_path / f"{name}.tar.gz") for name in ("one", "two")]
    assert sums[0] == sums[1] == fetch.sha256(tmp_path / "one.tar.gz") == fetch.sha256(tmp_path / "two.tar.gz")
    (tmp_path / "two" / "variables" / ".hidden").write_text("")
    with pytest.raises(errors.ExportError, match=r"begin with a letter, digit or underscore.*variables/\.hidden"):
        hub.archive(tmp_path / "two", tmp_path / "two.tar.gz")
    assert fetch.sha256(tmp_path / "two.tar.gz") == sums[0] and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "arguments",
    [("--task=feature_vector", "--input-range=minus1_1"), ("--task=tokens", "--image-size=any"), ("--classes=7", "--size=48")],
)
def test_other_forms_are_compared_with_the_same_part_of_the_model(arguments, tmp_path, capsys):
    said = written(capsys, "ViT_mu", "--weights=none", f"--out={tmp_path / 'module'}", *arguments)
    assert 0 <= said["difference"] <= 1e-5 < said["largest"]
    record = keras_vit.hub.verify(tmp_path / "module")
    shapes = {"feature_vector": [64], "tokens": [None, 64], "classification": [7]}
    assert record["shape"][-1] == shapes[record["task"]][-1] and record["size"] == [48 if "--size=48" in arguments else 32] * 2


def test_what_cannot_be_exported_is_one_message_and_writes_nothing(tmp_path, capsys):
    for arguments, match in (
        (["Mixer_mu", "--weights=none", "--image-size=any"], "ExportError: .*Mixer_mu.*image_size='fixed'"),
        (["ViT_mu"], "ArgumentError: ViT_mu: expected --weights"),
        (["ViT_mu", "--weights=none", "--dtype=float8"], "ExportError: .*float8"),
    ):
        assert hub.main([*arguments, f"--out={tmp_path / 'module'}"]) == 1
        assert re.search(match, capsys.readouterr().err, re.DOTALL), match
    assert not list(tmp_path.iterdir())


def test_collections_have_the_recommended_files_and_every_family_of_the_registry():
    recommended = {item.name: item for item in collection.items("recommended")}
    assert len(recommended) == 20
    for name, variant, weights, task in (
        ("vit_b16_classification", "ViT_B16", "augreg+imagenet2012", "classification"),
        ("vit_b16_fe", "ViT_B16", "augreg", "feature_vector"),
        ("vit_b8_classification", "ViT_B8", "augreg+imagenet2012-224", "classification"),
        ("r50_vit_l32_fe", "R50_ViT_L32", "augreg", "feature_vector"),
    ):
        assert recommended[name] == collection.Item(name, variant, weights, task)
    sources = {pathlib.Path(zoo.VARIANTS[item.variant].weights[item.weights].source).stem for item in recommended.values()}
    picks = keras_vit.augreg.RECOMMENDED.values()
    assert sources == {pick.filename for pick in picks} | {pick.file for pick in picks}
    everything = [item for name in collection.COLLECTIONS for item in collection.items(name)]
    assert len({item.name for item in everything}) == len(everything)
    names = {item.name for item in everything}
    assert {"mixer_b16_classification", "mixer_b16_fe", "mixer_b16_sam_fe", "r50_vit_b16_i21k_classification"} <= names
    assert {item.name for item in collection.items("mu")} == {
        f"{name.lower()}_{ending}"
        for name in keras_vit.list_models("*_mu*")
        for ending in ("classification", "fe")
        if zoo.VARIANTS[name].family.classifies
    }
    classifying = {name for name, family in zoo.FAMILIES.items() if family.classifies}
    assert {zoo.VARIANTS[item.variant].family.name for item in everything} == classifying
    for item in everything:  # the heads of the original imagenet21k files are zeros
        record = zoo.VARIANTS[item.variant].weights.get(item.weights)
        assert not record or "models/imagenet21k/" not in record.source or item.task == "feature_vector"


def command(out, *arguments):
    return [sys.executable, "-m", "export.collection", "--collection=mu", f"--out={out}", *arguments]


def killed(out, arguments, ready):
    """Starts a run and kills it, with the process that verifies, once `ready()` is true; False if it had ended before."""
    run = subprocess.Popen(
        command(out, *arguments), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while run.poll() is None and not ready():
        time.sleep(0.01)
    early = run.poll() is None
    if early:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return early


def finish(out, *arguments):
    return subprocess.run(command(out, *arguments), cwd=ROOT, capture_output=True, text=True, check=False)


def index(out):
    path = out / "index.json"
    return json.loads(path.read_text())["modules"] if path.exists() else {}


def state(out, name):
    """What changes if a module or its archive is written again."""
    files = [out / f"{name}.tar.gz", out / name, *sorted((out / name).rglob("*"))]
    return [(str(file), file.stat().st_ino, file.stat().st_mtime_ns) for file in files]


def check(out, names):
    """That a folder has these modules, their archives, index and card, all of which agree, and nothing else."""
    entries = index(out)
    assert sorted(entries) == sorted(names)
    there = {"index.json", "collection.md", ".lock", *names, *(f"{name}.tar.gz" for name in names)}
    assert {file.name for file in out.iterdir()} == there
    page = (out / "collection.md").read_text()
    assert page.startswith("# Collection keras-vit/vision-transformers/1\n")
    for name, entry in entries.items():
        record = keras_vit.hub.verify(out / name)
        assert entry["digest"] == keras_vit.hub.digest(out / name)
        assert entry["archive_sha256"] == fetch.sha256(out / entry["archive"])
        assert entry["task"] == record["task"] == ("feature_vector" if name.endswith("_fe") else "classification")
        assert entry["parameters"] == record["parameters"] and f"keras-vit/{name}/1" in page
        assert f"<!-- task: image-{entry['task'].replace('_', '-')} -->" in page
        assert (out / name / "tfhub.md").read_text().startswith("# Module keras-vit/") and (out / name / "README.md").is_file()
        with tarfile.open(out / entry["archive"]) as tar:
            packed = {member.name: tar.extractfile(member).read() for member in tar.getmembers() if member.isfile()}
        inside = {file.relative_to(out / name).as_posix(): file for file in (out / name).rglob("*") if file.is_file()}
        assert packed == {file: path.read_bytes() for file, path in inside.items()}


def test_a_killed_run_goes_on_and_a_damaged_archive_is_made_again(tmp_path, capsys):
    out = tmp_path / "mu"
    arguments = [f"--only={PATTERN}"]
    assert killed(out, arguments, lambda: len(index(out)) == 1 and any(out.glob(".mixer_mu_fe.new-*")))
    (first,) = index(out)
    before = state(out, first)
    assert first == THREE[0] and not (out / THREE[2]).exists()
    (out / f".{THREE[1]}.tar-left.gz").write_text("of a kill while packing")
    run = finish(out, *arguments)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == f"3 of 3 modules are in {out}, see index.json and collection.md\n"
    assert f"1/3 {first}: there already" in run.stderr and run.stderr.count("making it") == 2
    assert state(out, first) == before
    check(out, THREE)

    with keras.StatelessScope(initialize_variables=False):
        whole = cost.cost(keras_vit.ViT_mu(weights=None)).macs
    assert index(out)["vit_mu_fe"]["macs"] == whole - 64 * 1000  # without the classifier

    arguments = ["--collection=mu", f"--out={out}", f"--only={PATTERN}"]
    before = {name: state(out, name) for name in THREE}
    with open(out / "vit_mu_fe.tar.gz", "r+b") as file:
        file.seek(100)
        file.write(b"damage")
    assert collection.main(arguments) == 0
    assert "vit_mu_fe: its archive is another one than the index says; making it" in capsys.readouterr().err
    assert [state(out, name) == before[name] for name in THREE] == [True, True, False]
    check(out, THREE)
    after = {name: state(out, name) for name in THREE}
    assert collection.main(arguments) == 0
    assert {name: state(out, name) for name in THREE} == after
    assert capsys.readouterr().err.count("there already") == 3


def test_a_model_that_fails_is_named_and_the_others_are_made(tmp_path, capsys, monkeypatch):
    build = common.build

    def failing(name, *arguments, **options):
        if name == "Mixer_mu":
            raise errors.DownloadError("gs://bucket/mixer.npz: not there")
        return build(name, *arguments, **options)

    monkeypatch.setattr(common, "build", failing)
    arguments = ["--collection=mu", f"--out={tmp_path / 'mu'}", "--only=[mv]i*_mu_fe", "--publisher=me", "--name=toys"]
    assert collection.main(arguments) == 1
    said = capsys.readouterr()
    assert said.out.startswith("1 of 2 modules are in")
    assert said.err.endswith("failed: mixer_mu_fe: DownloadError: gs://bucket/mixer.npz: not there\n")
    assert list(index(tmp_path / "mu")) == ["vit_mu_fe"] and not (tmp_path / "mu" / "mixer_mu_fe").exists()
    assert (tmp_path / "mu" / "collection.md").read_text().startswith("# Collection me/toys/1\n")


def test_mistakes_of_a_collection_are_told(tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    assert collection.main(["--collection=mu", out, "--only=swin*"]) == 1
    assert re.search(r"--only=swin\*: expected a pattern.*vit_mu_fe", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        collection.main([out, "--publisher=Me & You"])
    assert "--publisher must be of lowercase letters" in capsys.readouterr().err
    assert collection.main(["--collection=mu", out, "--only=vit_mu_*", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["vit_mu_bv_classification", "vit_mu_bv_fe", "vit_mu_classification", "vit_mu_fe"]
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.json").write_text('{"modules": [1]}')
    assert collection.main(["--collection=mu", out, "--only=vit_mu_fe"]) == 1
    assert "expected the index of a collection" in capsys.readouterr().err


class Later:
    """Whether so many seconds have passed since a folder was first seen to have more than `had` modules."""

    def __init__(self, out, had, seconds):
        self.out, self.had, self.seconds, self.since = out, had, seconds, None

    def __call__(self):
        if self.since is None and len(index(self.out)) > self.had:
            self.since = time.monotonic()
        return self.since is not None and time.monotonic() > self.since + self.seconds


@pytest.mark.slow
def test_all_toys_are_made_through_kills_at_random_instants(tmp_path):
    out, rng, kills, done = tmp_path / "mu", random.Random(0), 0, {}
    while True:
        late = Later(out, len(done), rng.uniform(0, 20))
        if not killed(out, [], late):
            break
        kills += 1
        for name, before in done.items():
            assert state(out, name) == before
        done = {name: state(out, name) for name in index(out)}
        for name in done:
            keras_vit.hub.verify(out / name)
    names = [item.name for item in collection.items("mu")]
    assert finish(out).returncode == 0
    check(out, names)
    print(f"{len(names)} modules through {kills} kills")
    assert kills >= 3
