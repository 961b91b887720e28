"""Search of a folder of images: what is found, what is embedded again and what is not, and what an interruption leaves."""

import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
from PIL import Image

from keras_vit import errors
from keras_vit.evaluation import search as module
from keras_vit.evaluation.search import contact_sheet, index, search

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}


class Pair:
    """Images and texts of colours: an embedding is the mean colour, 0 to 1, of unit length."""

    name = "pair"

    def __init__(self, scale=1.0):
        inputs = keras.Input((8, 8, 3))
        mean = keras.layers.GlobalAveragePooling2D()(inputs)
        first = keras.initializers.Constant(np.eye(3) * scale / 2)
        outputs = keras.layers.Dense(3, kernel_initializer=first, bias_initializer=keras.initializers.Constant(0.5))(mean)
        self.image_tower = keras.Model(inputs, outputs, name="image_tower")
        self.seen = 0

    def encode_image(self, images, batch_size=32):
        self.seen += len(images)
        return self.unit(self.image_tower.predict_on_batch(images))

    def encode_text(self, texts, batch_size=64):
        return self.unit([COLORS[text] for text in texts])

    @staticmethod
    def unit(rows):
        rows = np.asarray(rows, "float32")
        return rows / (np.linalg.norm(rows, axis=-1, keepdims=True) + 1e-8)


@pytest.fixture(scope="module")
def pair():
    return Pair()


def paint(path, color, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    paint(root / "a.png", COLORS["red"])
    paint(root / "b.PNG", COLORS["green"])
    paint(root / "deep" / "er" / "犬\n'<b>.png", COLORS["blue"])
    paint(root / "deep" / "z.png", COLORS["blue"])
    paint(root / "grey.jpg", COLORS["grey"], size=(9, 40))
    paint(root / ".hidden" / "no.png", COLORS["blue"])
    (root / "notes.txt").write_text("no image")
    return root


def names(hits):
    return [hit.name for hit in hits]


def test_images_are_found_by_text_the_best_first_and_ties_by_name(pair, folder):
    found = index(pair, folder)
    assert found.names == ("a.png", "b.PNG", "deep/er/犬\n'<b>.png", "deep/z.png", "grey.jpg") and found.others == 1
    hits = search(pair, found, "blue", top=3)
    assert names(hits) == ["deep/er/犬\n'<b>.png", "deep/z.png", "grey.jpg"]
    assert [hit.score for hit in hits] == pytest.approx([1, 1, 3**-0.5], abs=1e-6)
    assert names(search(pair, found, "red", top=100)) == ["a.png", "grey.jpg", "b.PNG", *found.names[2:4]]


def test_only_what_is_new_or_changed_is_embedded_again(pair, folder):
    first = index(pair, folder)
    before = {path: path.stat().st_mtime_ns for path in first.place.iterdir()}
    pair.seen = 0
    again = index(pair, folder)
    assert (first.added, again.added, again.removed, pair.seen) == (5, 0, 0, 0)
    assert before == {path: path.stat().st_mtime_ns for path in again.place.iterdir()}
    np.testing.assert_array_equal(first.embeddings, again.embeddings)
    paint(folder / "a.png", COLORS["green"], size=(13, 9))
    os.utime(folder / "b.PNG", ns=(1, 1))
    (folder / "deep" / "z.png").unlink()
    paint(folder / "new.webp", COLORS["red"])
    third = index(pair, folder)
    assert (third.added, third.removed, pair.seen) == (3, 3, 3)
    assert names(search(pair, third, "red", top=1)) == ["new.webp"]
    assert names(search(pair, third, "green", top=2)) == ["a.png", "b.PNG"] and "deep/z.png" not in third.names
    np.testing.assert_allclose(third.embeddings, index(Pair(), folder, cache=folder.parent / "cache").embeddings, atol=1e-6)


def test_broken_images_are_named_and_not_tried_again_until_they_change(pair, folder):
    (folder / "a.png").write_bytes((folder / "b.PNG").read_bytes()[:40])
    (folder / "empty.jpg").touch()
    (folder / "link.png").symlink_to("nowhere")
    found = index(pair, folder)
    assert [name for name, _ in found.broken] == ["a.png", "empty.jpg", "link.png"] and all(why for _, why in found.broken)
    assert "a.png" not in found.names and len(found.names) == 4
    pair.seen = 0
    again = index(pair, folder)
    assert again.broken == found.broken and (again.added, pair.seen) == (0, 0)
    paint(folder / "a.png", COLORS["red"])
    (folder / "b.PNG").write_bytes(b"\x89PNG broken now")
    mended = index(pair, folder)
    assert [name for name, _ in mended.broken] == ["b.PNG", "empty.jpg", "link.png"] and "a.png" in mended.names
    assert "b.PNG" not in mended.names and pair.seen == 1


@pytest.mark.parametrize("leftover", [False, True])
def test_an_interrupted_index_goes_on_where_it_was(folder, monkeypatch, leftover):
    for i in range(20):
        paint(folder / "many" / f"{i:02}.png", (10 * i, 200, 5))
    (folder / "many" / "07.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    pair, calls = Pair(), []

    def stops(images, batch_size):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(len(images))
        return Pair.encode_image(pair, images)

    monkeypatch.setattr(pair, "encode_image", stops)
    with pytest.raises(KeyboardInterrupt):
        index(pair, folder, batch=4, every=8)
    (place,) = (folder / ".keras_vit").iterdir()
    if leftover:  # a killed process cannot tidy up: a file of rows that no manifest names, and half of a manifest
        (place / "0123456789abcdef.npy").write_bytes(b"half")
        (place / ".manifest-x1.json").write_text("{")
    monkeypatch.undo()
    pair.seen, told = 0, []
    found = index(pair, folder, batch=4, every=8, progress=lambda *each: told.append(each))
    assert sum(calls) == 16 and 8 <= found.added <= 17 and pair.seen < 24 - 8
    assert told[-1] == (found.added, found.added) and [each[0] for each in told] == sorted(each[0] for each in told)
    whole = index(Pair(), folder, cache=folder.parent / "cache")
    assert found.names == whole.names and [name for name, _ in found.broken] == [name for name, _ in whole.broken]
    np.testing.assert_allclose(found.embeddings, whole.embeddings, atol=1e-6)
    assert sorted(path.suffix for path in place.iterdir()) == ["", ".json", ".npy"]  # one part, the lock and the manifest


def test_another_image_tower_or_folder_has_its_own_index(pair, folder, tmp_path):
    paint(tmp_path / "others" / "a.png", COLORS["grey"])
    places = [index(model, folder, cache=tmp_path / "cache").place for model in (pair, Pair(scale=0.5), pair)]
    places.append(index(pair, tmp_path / "others", cache=tmp_path / "cache").place)
    assert len(set(places)) == 3 and places[0] == places[2] and not (folder / ".keras_vit").exists()
    moved = folder.rename(tmp_path / "moved")
    index(pair, moved)
    assert index(pair, moved.rename(tmp_path / "moved again")).added == 0  # the index inside goes with its folder


def pickled(place, record):
    part = place / record["parts"][0]["file"]
    np.save(part, np.array([{}] * 5, object), allow_pickle=True)


def altered(place, record):
    part = place / record["parts"][0]["file"]
    part.write_bytes(part.read_bytes()[:-1] + b"\7")


def outside(place, record):
    (place / record["parts"][0]["file"]).rename(place.parent / "rows.npy")
    record["parts"][0]["file"] = "../rows.npy"


@pytest.mark.parametrize(
    "damage",
    [
        pickled,
        altered,
        outside,
        lambda place, record: (place / record["parts"][0]["file"]).unlink(),
        lambda place, record: record["parts"][0]["images"].pop(),
        lambda place, record: record.pop("broken"),
        lambda place, record: record["about"].update(model="another"),
        lambda place, record: record.update(parts=7),
    ],
)
def test_a_damaged_or_foreign_index_is_refused_and_left_alone(pair, folder, damage):
    place = index(pair, folder).place
    record = json.loads((place / "manifest.json").read_text())
    damage(place, record)
    (place / "manifest.json").write_text(json.dumps(record))
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(errors.CacheError, match=r"manifest.json: expected the index .*Delete .*search-"):
        index(pair, folder)
    assert sorted(path.name for path in place.iterdir()) == before


def test_what_cannot_be_indexed_says_so(pair, folder, tmp_path):
    with pytest.raises(errors.DataError, match=r"none: cannot be listed \(No such file"):
        index(pair, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.DataError, match="found none and 0 other files"):
        index(pair, tmp_path / "empty")
    (tmp_path / "empty" / "x.png").write_bytes(b"no")
    with pytest.raises(errors.DataError, match="none of its 1 images can be read; x.png: "):
        index(pair, tmp_path / "empty")
    with pytest.raises(errors.ArgumentError, match="expected a model of images and texts.*without image_tower"):
        index(pair.image_tower, folder)
    (folder / ".keras_vit").write_text("in the way")
    with pytest.raises(errors.CacheError, match="cannot be written there.*--cache"):
        index(pair, folder)
    bad = Pair(scale=float("nan"))
    with pytest.raises(errors.NonFiniteError, match=r"a.png: its embedding is NaN"):
        index(bad, folder, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "text, top, match", [("  ", 3, "got '  '"), (["red"], 3, "got"), ("red", 0, "top"), ("red", True, "top")]
)
def test_what_cannot_be_searched_says_so(pair, folder, text, top, match):
    with pytest.raises(errors.ArgumentError, match=match):
        search(pair, index(pair, folder), text, top)


def test_the_sheet_shows_the_images_in_order_with_any_name(pair, folder):
    found = index(pair, folder)
    hits = search(pair, found, "blue", top=5)
    sheet = contact_sheet(found, hits, "blue " * 200 + "犬\n", columns=2, side=64)
    rows, cell = 3, 64 + 40
    assert sheet.dtype == np.uint8 and sheet.shape == (2 * 12 + 20 + rows * (cell + 12), 12 + 2 * (64 + 12), 3)
    centers = [(2 * 12 + 20 + i // 2 * (cell + 12) + 32, 12 + i % 2 * 76 + 32) for i in range(5)]
    shown = [tuple(int(each) for each in sheet[center]) for center in centers]
    assert shown[:2] == [COLORS["blue"]] * 2 and {*shown[3:]} == {COLORS["red"], COLORS["green"]}
    assert np.abs(np.subtract(shown[2], COLORS["grey"])).max() <= 2  # a JPEG
    (folder / "deep" / "z.png").unlink()
    gone = contact_sheet(found, hits, "blue", columns=2, side=64)
    assert tuple(gone[centers[1]]) != COLORS["blue"] and tuple(gone[centers[0]]) == COLORS["blue"]
    assert (gone != contact_sheet(found, hits[:1] * 5, "blue", columns=2, side=64)).any()


def test_the_manifest_holds_names_of_any_bytes(pair, tmp_path):
    paint(tmp_path / "red.png", COLORS["red"])
    strange = os.fsdecode(b"\xff.png")
    pathlib.Path(tmp_path / "red.png").rename(tmp_path / strange)
    assert index(pair, tmp_path).names == index(pair, tmp_path).names == (strange,)
    contact_sheet(index(pair, tmp_path), [module.Hit(strange, 1.0)], strange)
