"""Images with captions: folders, lists, TFDS, classes in sentences; what is left out, refused, drawn, and the same again."""

import json

import numpy as np
import pytest
import tensorflow as tf

from keras_vit import errors
from keras_vit.data import pipeline
from keras_vit.data.captions import MAX_BYTES, open_captions

SAID = {"a.png": ["a red  circle", "something round"], "b.png": ["a blue square"], "deep/c.png": ["a red circle"]}


def picture(seed):
    return tf.io.encode_png(np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype("uint8")).numpy()


def write_images(folder, names=SAID):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(seed))
    return folder


@pytest.fixture
def beside(tmp_path):
    """A folder of images with their texts beside them."""
    write_images(tmp_path / "train")
    for name, texts in SAID.items():
        (tmp_path / "train" / name).with_suffix(".txt").write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def listed(tmp_path):
    """A folder of images with a `train.tsv` beside it and a `train2.jsonl`."""
    write_images(tmp_path)
    lines = [f"{name}\t{text}" for name, texts in SAID.items() for text in texts]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = [{"image": name, "caption": texts} for name, texts in SAID.items()]
    (tmp_path / "train2.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return tmp_path


def said(source):
    """Captions as `eval_batches` gives them."""
    return [text.decode() for _, texts in pipeline.eval_batches(source, size=8, batch=2) for text in texts.numpy()]


EXPECTED = ["a red circle\nsomething round", "a blue square", "a red circle"]


def test_a_folder_of_images_with_texts(beside):
    source = open_captions(beside, "train")
    assert said(source) == EXPECTED == list(source.captions)
    assert [path.removeprefix(f"{beside}/train/") for path in source.paths] == list(SAID)
    assert source.notes == ("1 of 3 captions belong to several images: 'a red circle'",)
    assert said(open_captions(beside / "train", None)) == EXPECTED


@pytest.mark.parametrize("split", ["train", "train2"])
def test_a_list_in_a_file(listed, split):
    assert said(open_captions(listed, split)) == EXPECTED


def test_a_list_is_a_data_set_by_itself(listed):
    assert said(open_captions(listed / "train.tsv", None)) == EXPECTED
    with pytest.raises(errors.DataError, match="has the split None, got split 'train'"):
        open_captions(listed / "train.tsv", "train")


def test_what_has_no_partner_is_left_out_counted_and_named(beside, listed):
    (beside / "train" / "lonely.txt").write_text("nothing to see")
    (beside / "train" / "silent.png").write_bytes(picture(9))
    (beside / "train" / "empty.png").write_bytes(picture(10))
    (beside / "train" / "empty.txt").write_text(" \n\n")
    with pytest.warns(UserWarning, match=r"2 image\(s\) without a caption are left out: .*empty.png; .*silent.png"):
        source = open_captions(beside / "train", None)
    assert said(source) == EXPECTED and "1 caption(s) without an image are left out" in source.notes[1]
    with open(listed / "train.tsv", "a") as file:
        file.write("gone.png\tno such image\n")
    with pytest.warns(UserWarning, match=r"1 caption\(s\) without an image are left out: gone.png"):
        assert said(open_captions(listed / "train.tsv", None)) == EXPECTED


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"../secret.png\tout", r"1 path\(s\) leave the folder .*: '../secret.png'"),
        (b"/etc/passwd\tout", "leave the folder"),
        (b"link.png\tout", "leave the folder"),
        (b"a\0.png\tout", "leave the folder"),
        (b"a.png a red circle", r"train.tsv, line 1: expected an image's path, a tab and a caption, got 'a.png a red circle'"),
        (b"a.png\tred\n\tblue", "line 2: expected an image's path, a tab"),
        (b"a.png\t\xff\xfe", "line 1: expected text in UTF-8, got byte 0xff"),
        (b"a.png\t" + b"x" * MAX_BYTES, "line 1: expected captions of at most 65,536 bytes, got more"),
        (b"", "nothing has both an image and a caption"),
        (b"gone.png\tx", r"nothing has both .*1 caption\(s\) without an image"),
    ],
)
def test_a_hostile_or_broken_list_is_refused(listed, tmp_path_factory, content, expected):
    secret = tmp_path_factory.mktemp("outside") / "secret.png"
    secret.write_bytes(picture(0))
    (listed / "link.png").symlink_to(secret)
    (listed / "train.tsv").write_bytes(content)
    with pytest.raises(errors.DataError, match=expected):
        open_captions(listed, "train")


@pytest.mark.parametrize(
    "line", ['{"image": "a.png"}', '{"image": 1, "caption": "x"}', '{"image": "a.png", "caption": [1]}', "[]", "{", '["image"]']
)
def test_a_line_that_is_no_record_is_refused(listed, line):
    (listed / "train2.jsonl").write_text(line)
    with pytest.raises(errors.DataError, match=r'train2.jsonl, line 1: expected {"image": "PATH", "caption": "TEXT"'):
        open_captions(listed, "train2")


def test_a_text_that_is_too_long_or_no_utf8_is_refused(beside):
    text = beside / "train" / "a.txt"
    text.write_bytes(b"x" * (MAX_BYTES + 1))
    with pytest.raises(errors.DataError, match="a.txt: expected captions of at most 65,536 bytes"):
        open_captions(beside, "train")
    text.write_bytes(b"\xe9")
    with pytest.raises(errors.DataError, match="a.txt: expected text in UTF-8, got byte 0xe9"):
        open_captions(beside, "train")


def test_a_split_that_is_not_there_or_there_twice_is_refused(listed):
    with pytest.raises(errors.DataError, match="has nothing for the split 'other'; expected one of .*other.tsv"):
        open_captions(listed, "other")
    with pytest.raises(errors.DataError, match="for the split '../x'"):
        open_captions(listed / "deep", "../x")
    (listed / "train").mkdir()
    with pytest.raises(errors.DataError, match=r"has .*train.tsv; .*train for the split"):
        open_captions(listed, "train")


def test_images_that_are_none_are_refused_or_left_out(beside):
    (beside / "train" / "b.png").write_bytes(b"GIF89a")
    with pytest.raises(errors.DataError, match="b.png .not a JPEG, PNG or WebP"):
        open_captions(beside, "train")
    with pytest.warns(UserWarning, match="1 of 3 examples .* are left out"):
        source = open_captions(beside, "train", on_error="skip", limit=0.5)
    assert said(source) == [EXPECTED[0], EXPECTED[2]] and "b.png" in source.skipped[0][0]


def drawn(source, seed=0, start=0, batches=8, **options):
    data = pipeline.train_batches(source, size=8, batch=3, seed=seed, augment=False, start=start, **options)
    return [[text.decode() for text in texts.numpy()] for _, texts in data.take(batches)]


def test_each_epoch_draws_one_of_an_images_captions(beside):
    source = open_captions(beside, "train")
    epochs = drawn(source, batches=30)
    for epoch in epochs:
        assert sorted(epoch)[:1] == ["a blue square"] and set(epoch) <= {text for each in EXPECTED for text in each.split("\n")}
    several = sum("something round" in epoch for epoch in epochs)
    assert 5 < several < 25
    assert drawn(source, batches=30) == epochs != drawn(source, seed=1, batches=30)
    assert drawn(source, start=15, batches=25) == epochs[5:]
    parts = [drawn(source, batches=4, shard=(worker, 3)) for worker in range(3)]
    assert [sum(step, []) for step in zip(*parts)] == epochs[:4]


def test_embeddings_stand_in_the_place_of_images(beside):
    source, table = open_captions(beside, "train"), np.arange(6, dtype="float32").reshape(3, 2)
    plain = pipeline.train_batches(source, size=8, batch=3, augment=False)
    images = [image for image, _ in pipeline.eval_batches(source, size=8, batch=3)][0].numpy()
    given = pipeline.train_batches(source, size=8, batch=3, augment=False, embeddings=table)
    for (x, texts), (rows, again) in zip(plain.take(4), given.take(4)):
        numbers = [int(np.argmin(np.abs(images - each).sum((1, 2, 3)))) for each in x.numpy()]
        np.testing.assert_array_equal(rows, table[numbers])
        np.testing.assert_array_equal(texts, again)
    with pytest.raises(errors.ArgumentError, match="embeddings of images cannot be augmented"):
        pipeline.train_batches(source, size=8, batch=3, embeddings=table)


def test_other_captions_are_other_data(beside):
    source = open_captions(beside, "train")
    open_captions(beside, "train").check(source.fingerprint())
    (beside / "train" / "b.txt").write_text("a green square")
    with pytest.raises(errors.DataError, match="is not the data of before"):
        open_captions(beside, "train").check(source.fingerprint())


def test_classes_become_sentences():
    source = open_captions("digits", "test", prompts=("a photo of the digit {}", "{}!"), class_names=list("abcdefghij"))
    plain = pipeline.open_source("digits", "test")
    labels = [int(label) for _, y in pipeline.eval_batches(plain, size=8, batch=64) for label in np.argmax(y, -1)]
    assert said(source) == [f"a photo of the digit {'abcdefghij'[label]}\n{'abcdefghij'[label]}!" for label in labels]
    assert source.sentences[3] == ("a photo of the digit d", "d!") and source.num_classes == 10
    assert source.fingerprint() != open_captions("digits", "test", prompts=("{}",)).fingerprint()


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(prompts=("a photo",)), r"each must have one \{\} in the place of the name, got 'a photo'"),
        (dict(prompts=("{}",), class_names=("one", "two")), "expected the names of 10 classes, got 2: one; two"),
        (dict(prompts=("{}",), class_names=("one",) * 10), "each class needs a name of its own"),
        (dict(class_names=("one",)), "class_names are for sentences: pass prompts="),
        (dict(), "'digits' is no folder and no list of captions; for TFDS pass text="),
        (dict(on_error="keep"), "on_error must be 'raise' or 'skip'"),
    ],
)
def test_sentences_that_cannot_be_made_are_refused(options, expected):
    with pytest.raises(errors.ArgumentError, match=expected):
        open_captions("digits", "train", **options)


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory):
    """A TFDS data set of 4 images, one of them without a caption."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class KerasVitCaptions(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            texts = tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64})
            features = {"image": tfds.features.Image(shape=(8, 8, 3)), "captions": texts, "title": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, texts in enumerate([*map(list, SAID.values()), []]):
                image = np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype("uint8")
                said = [{"text": text, "id": i} for text in texts]
                yield i, {"image": image, "captions": said, "title": f"title\n{i}"}

    folder = str(tmp_path_factory.mktemp("tfds"))
    KerasVitCaptions(data_dir=folder).download_and_prepare()
    return "keras_vit_captions", folder


def test_texts_of_tfds(tiny_tfds):
    name, folder = tiny_tfds
    titles = open_captions(name, "train", text="title", data_dir=folder)
    assert sorted(said(titles)) == [f"title {i}" for i in range(4)] and titles.num_examples == 4
    assert sorted(text for epoch in drawn(titles, batches=4) for text in epoch) == sorted(said(titles) * 3)
    for text in ("nothing", "captions/id", "captions"):
        with pytest.raises(errors.DataError, match=f"must have an image 'image' and texts '{text}'"):
            open_captions(name, "train", text=text, data_dir=folder)


def test_examples_of_tfds_without_captions_are_refused_or_left_out(tiny_tfds):
    name, folder = tiny_tfds
    source = open_captions(name, "train", text="captions/text", data_dir=folder)
    with pytest.raises(
        errors.DataError, match="an example of keras_vit_captions .train. has no caption; on_error=.*leaves such out"
    ):
        pipeline.probe(pipeline.eval_batches(source, size=8, batch=4), source)
    with pytest.warns(UserWarning, match="1 of 4 examples .* are left out: example . .no caption."):
        source = open_captions(name, "train", text="captions/text", data_dir=folder, on_error="skip", limit=0.3)
    assert sorted(said(source)) == sorted(EXPECTED) and source.num_examples == 3
    assert source.notes == ("1 image(s) without a caption are left out",)
