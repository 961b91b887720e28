"""What comes from outside is refused before it can run: hostile files by every door, with everything watched that Python runs.

The names in brackets are the rows of the list of faults that these tests are made from.
"""

import configparser
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import h5py
import keras
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="SavedModels are written and read by TensorFlow")

tf = pytest.importorskip("tensorflow")

import keras_vit  # noqa: E402
from export import common  # noqa: E402
from keras_vit import console, errors, zoo  # noqa: E402
from keras_vit.hub import HubLayer, digest  # noqa: E402

ROOT = Path(__file__).parents[1]
TOY = dict(patch_size=4, width=8, depth=1, heads=1, mlp=8, input_shape=(8, 8, 3), classes=2)


class Bomb:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (self.sentinel, "w")


def changed(source, target, change):
    """A copy of a .keras file whose configuration was changed as JSON."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                change(config)
                content = json.dumps(config)
            new.writestr(name, content)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder of hostile files, the path that each of them tries to write, a SavedModel that does)."""
    folder = tmp_path_factory.mktemp("corpus")
    sentinel, good = str(folder / "it_ran"), folder / "good.keras"

    class Writer(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3))])
        def __call__(self, x):
            with tf.control_dependencies([tf.io.write_file(sentinel, "ran")]):
                return tf.reduce_mean(x, axis=(1, 2))

    writer = Writer()
    tf.saved_model.save(writer, str(folder / "writer"), signatures={"serving_default": writer.__call__})
    keras_vit.ViT(weights=None, **TOY).save(good)
    image = keras.Input((8, 8, 3))
    run = keras.layers.Lambda(lambda x: (open(sentinel, "w"), x)[1], output_shape=(8, 8, 3))  # noqa: SIM115
    keras.Model(image, run(image)).save(folder / "lambda.keras")
    graph = keras.layers.TFSMLayer(str(folder / "writer"), call_endpoint="serving_default")
    keras.Model(image, graph(image)).save(folder / "graph.keras")

    def gadget(module, name, config):
        def change(found):
            layer = next(each for each in found["config"]["layers"] if each["config"]["name"] == "head")
            layer["config"]["kernel_initializer"] = {
                "module": module, "class_name": name, "config": config, "registered_name": None,
            }  # fmt: skip

        return change

    code = f"open({sentinel!r}, 'w')"
    changed(good, folder / "system.keras", gadget("os", "system", {"command": f"touch {sentinel}"}))
    changed(good, folder / "exec.keras", gadget("builtins", "exec", {"source": code}))
    changed(good, folder / "function.keras", gadget("builtins", "function", "exec"))
    changed(good, folder / "foreign.keras", lambda found: found.update(module="os", class_name="system", registered_name=None))
    with h5py.File(folder / "external.weights.h5", "w") as file:
        file["layers/head/vars/0"] = h5py.ExternalLink("/etc/hostname", "/")
        file.create_dataset("storage", (8,), "u1", external=[("/etc/hostname", 0, 8)])
    (folder / "pickle.npz").write_bytes(pickle.dumps(Bomb(sentinel)))
    (folder / "pickle.pkl").write_bytes(pickle.dumps(Bomb(sentinel)))
    np.savez(folder / "member.npz", **{"head/kernel": np.array([Bomb(sentinel)], dtype=object)})
    for name in ("member.pth", "member.pth.tar", "member.safetensors"):
        with zipfile.ZipFile(folder / name, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps({"head.weight": Bomb(sentinel)}, 2))
    (folder / "legacy.pth").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(Bomb(sentinel), 2))
    with tarfile.open(folder / "links.npz", "w:gz") as file:
        link = tarfile.TarInfo("it_ran")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        file.addfile(link)
        outside = tarfile.TarInfo("../it_ran")
        file.addfile(outside, io.BytesIO())
    Path(sentinel).unlink(missing_ok=True)  # what is written here has run here
    for name in list(folder.glob("*.keras")):
        shutil.copy(name, folder / f"{name.stem}_keras.npz")  # under the name of a checkpoint
    return folder, Path(sentinel), folder / "writer"


HOSTILE = ("lambda.keras", "graph.keras", "system.keras", "exec.keras", "function.keras", "foreign.keras")


def test_what_the_files_try_does_run_where_it_is_let(corpus):
    """So that the tests below would see it."""
    folder, sentinel, writer = corpus
    with np.load(folder / "member.npz", allow_pickle=True) as file:
        file["head/kernel"]
    assert sentinel.exists()
    sentinel.unlink()
    model = keras.saving.load_model(folder / "lambda.keras", safe_mode=False)
    model(np.zeros((1, 8, 8, 3)))
    assert sentinel.exists()
    sentinel.unlink()
    tf.saved_model.load(str(writer))(tf.zeros((1, 8, 8, 3)))
    assert sentinel.exists()
    sentinel.unlink()
    assert common.build(str(folder / "good.keras")).count_params() == keras_vit.ViT(weights=None, **TOY).count_params()


@pytest.mark.parametrize("name", HOSTILE)
def test_models_that_carry_code_are_refused(name, corpus):  # [S2]
    folder, sentinel, _ = corpus
    with pytest.raises(errors.ArgumentError, match=f"{name}: expected"):
        common.build(str(folder / name))
    with pytest.raises(errors.ArgumentError, match=f"{name}: expected"):
        console._model(str(folder / name))
    assert not sentinel.exists()


def test_files_that_are_no_checkpoints_are_refused_whatever_they_are(corpus):  # [S1] [S2]
    folder, sentinel, _ = corpus
    model = keras_vit.ViT(weights=None, **TOY)
    before = [weight.numpy() for weight in model.weights]
    files = sorted(path for path in folder.iterdir() if path.is_file())
    assert len(files) > 15
    for path in files:
        with pytest.raises((errors.CheckpointFormatError, errors.CheckpointMismatchError, errors.ArgumentError)):
            keras_vit.load_weights(model, path)
        with pytest.raises((errors.CheckpointFormatError, errors.CheckpointMismatchError, errors.ArgumentError)):
            keras_vit.ViT(weights=str(path), **TOY)
    assert not sentinel.exists()
    assert all(np.array_equal(a, b) for a, b in zip(before, model.weights))


def test_a_module_is_not_loaded_unless_its_digest_is_named(corpus, tmp_path):  # [S3]
    folder, sentinel, writer = corpus
    for handle in (writer, f"file://{writer}", "https://tfhub.dev/us/writer/1"):
        with pytest.raises(errors.UntrustedArtifactError, match="digest="):
            HubLayer(handle)
    pinned = digest(writer)
    with pytest.raises(errors.IntegrityError, match="expected a module of digest 0000"):
        HubLayer(writer, digest="0" * 64)
    other = shutil.copytree(writer, tmp_path / "other")
    with open(other / "saved_model.pb", "ab") as file:
        file.write(b"\0")
    with pytest.raises(errors.IntegrityError, match=f"expected a module of digest {pinned}"):
        HubLayer(other, digest=pinned)
    assert not sentinel.exists()
    HubLayer(writer, digest=pinned)(np.zeros((1, 8, 8, 3), np.float32))  # whoever names it has looked at it
    assert sentinel.exists()
    sentinel.unlink()


WATCHED = """
import pickle, sys
import keras, keras_vit
from keras_vit import errors
from keras_vit.hub import HubLayer, verify

WATCHED = {  # not "compile": ast.literal_eval reads the headers of arrays by it, and runs nothing
    "pickle.find_class", "marshal.load", "marshal.loads", "exec", "os.system", "os.exec", "os.fork", "os.posix_spawn",
    "subprocess.Popen", "shutil.unpack_archive", "tarfile.open", "ctypes.dlopen", "socket.connect", "import",
}
seen, watching = [], False

def hook(event, arguments):
    if watching and event in WATCHED:
        seen.append((event, str(arguments)[:120]))

sys.addaudithook(hook)
good, module, writer, *hostile = sys.argv[1:]

def doors():
    model = keras_vit.ViT(weights=good, patch_size=4, width=8, depth=1, heads=1, mlp=8, input_shape=(8, 8, 3), classes=2)
    verify(module)
    for path in hostile:
        try:
            keras_vit.load_weights(model, path)
        except errors.KerasViTError:
            continue
        raise SystemExit(f"{path} was loaded")
    for handle in (writer, "https://tfhub.dev/us/writer/1"):
        try:
            HubLayer(handle)
        except errors.UntrustedArtifactError:
            continue
        raise SystemExit(f"{handle} was loaded")

doors()  # which imports what is imported late
watching = True
pickle.loads(pickle.dumps(len))
assert [event for event, _ in seen] == ["pickle.find_class"], seen
seen.clear()
doors()
assert not seen, seen
"""


def test_no_door_runs_what_comes_through_it(corpus, tmp_path):  # [S1]
    folder, sentinel, writer = corpus
    model = keras_vit.ViT(weights=None, **TOY)
    keras_vit.save_npz(model, tmp_path / "good.npz")
    module = keras_vit.hub.export(model, tmp_path / "module")
    hostile = [path for path in folder.iterdir() if path.is_file()]
    command = [sys.executable, "-c", WATCHED, tmp_path / "good.npz", module, writer, *hostile]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not sentinel.exists()


def test_what_the_tests_install_is_pinned_to_the_bit():  # [S5]
    text = (ROOT / ".ci" / "constraints.txt").read_text()
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)(?: ; .*?)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M)
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(pins) == len(lines) > 80
    named = {re.sub("[-_.]+", "-", name).lower() for name, _, _ in pins}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = f"{setup['options']['install_requires']}\n{setup['options.extras_require']['test']}".split("\n")
    wanted = [re.match("[A-Za-z0-9_.-]+", line)[0].lower().replace("_", "-") for line in wanted if line.strip()]
    assert set(wanted) <= named
    assert "keras>=3.15.1" in setup["options"]["install_requires"].replace(" ", "")
    assert "--require-hashes -r .ci/constraints.txt" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_a_wheel_is_the_same_every_time(tmp_path):  # [S5]
    found = []
    for turn in ("one", "other"):
        source = tmp_path / turn / "source"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "runs", "goldens"))
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / turn, source]
        subprocess.run(list(map(str, command)), check=True, env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"})
        (wheel,) = (tmp_path / turn).glob("*.whl")
        found.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert found[0] == found[1]


PLACES = (
    "gs://(vit_models|mixer_models|gresearch|big_vision)", "hf://(microsoft|timm)", "https://github.com/addf400/files/releases",
    "https://github.com/SHI-Labs/Compact-Transformers", "https://shi-labs.com/projects/cct", "https://dl.fbaipublicfiles.com/deit",
    "https://github.com/sail-sg/poolformer/releases",
)  # fmt: skip


def test_every_published_file_has_a_known_place_and_a_size_where_one_is_published():  # [S6]
    """No sha256 of them is published: that of the first download is recorded and demanded ever after (rows D3 and D18)."""
    rows = [(row.name, tag, record) for row in zoo.VARIANTS.values() for tag, record in row.weights.items()]
    assert len(rows) > 100
    for name, tag, record in rows:
        place = rf"({'|'.join(PLACES)})/[\w./+-]+\.(npz|pth(\.tar|\.zip)?|bin|safetensors)"
        assert re.fullmatch(place, record.source), (name, tag)
        assert record.licence and (record.size is None or record.size > 2**20), (name, tag)
    assert sum(record.size is not None for *_, record in rows) > 30
