"""Tokenizers: equal to those of the originals, in Python and in a graph; files and texts that are not fit are refused."""

import json
import pathlib
import random

import numpy as np
import pytest
import tensorflow as tf

from keras_vit import errors
from keras_vit.data import text

FILES = pathlib.Path(__file__).parent / "texts"
GOLDENS = pathlib.Path(__file__).parent / "goldens" / "preprocess"
GOLDEN_MODEL = GOLDENS / "sentencepiece_tokens" / "sentencepiece.model"
EXPECTED = json.loads((FILES / "expected.json").read_text())
SOURCES = {"words.txt": FILES / "words.txt", "pieces.model": FILES / "pieces.model", "sentencepiece.model": GOLDEN_MODEL}
# Blocks of Unicode in which normalisation, word borders or pieces differ
BLOCKS = [
    (0x20, 0x7E), (0x61, 0x7A), (0x61, 0x7A), (0xA0, 0x17F), (0x300, 0x345), (0x370, 0x45F), (0x590, 0x6FF), (0x900, 0x97F),
    (0x1100, 0x11FF), (0x2000, 0x206F), (0x2100, 0x218B), (0x3000, 0x30FF), (0x3200, 0x33FF), (0x4E00, 0x4EFF), (0xAC00, 0xACFF),
    (0xFB00, 0xFB4F), (0xFE00, 0xFE6F), (0xFF01, 0xFFEE), (0x1F300, 0x1F64F), (0x20000, 0x20100), (0xE0020, 0xE007F), (1, 0x1F),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers():
    return {name: text.open_tokenizer(path) for name, path in SOURCES.items()}


@pytest.fixture(scope="module")
def graphs(tokenizers):
    spec = [tf.TensorSpec([None], tf.string)]
    return {name: tf.function(each.in_graph, input_signature=spec, autograph=False) for name, each in tokenizers.items()}


def varied(count, seed):
    chance, words = random.Random(seed), ["a", "photo", "of", "the", "dogs,", "two", "shiba", "<img>", "maltese-cross"]
    for _ in range(count):
        parts = []
        for _ in range(chance.randint(0, 9)):
            first, last = chance.choice(BLOCKS)
            strange = "".join(chr(chance.randint(first, last)) for _ in range(chance.randint(1, 4)))
            parts.append(chance.choice([chance.choice(words), strange, strange, "o" * chance.randint(1, 120), "é" * 51]))
        yield chance.choice(["", " ", "  "]).join(parts)


@pytest.mark.parametrize("name", SOURCES)
def test_tokens_are_those_of_tensorflow_text(name, tokenizers, graphs):
    got = tokenizers[name](EXPECTED["texts"])
    assert got.dtype == np.int32 and got.shape == (len(EXPECTED["texts"]), 16)
    np.testing.assert_array_equal(got, EXPECTED["tokens"][name])
    np.testing.assert_array_equal(graphs[name](EXPECTED["texts"]), EXPECTED["tokens"][name])


@pytest.mark.parametrize("name", SOURCES)
def test_a_graph_gives_the_same_tokens_as_python(name, tokenizers, graphs):
    texts = [*varied(400, 1), "", " ", "\n\t\0", "\u200b", "a" * 3000]
    np.testing.assert_array_equal(graphs[name](texts), tokenizers[name](texts))
    assert graphs[name]([]).shape == (0, 16) and tokenizers[name]([]).shape == (0, 16)


def test_goldens():
    for case, path in (("bert_tokens", None), ("sentencepiece_tokens", GOLDEN_MODEL)):
        meta = json.loads((GOLDENS / case / "meta.json").read_text())
        data = path.read_bytes() if path else "\n".join(meta["vocab"]).encode()
        tokenizer = (text.SentencePiece if path else text.WordPiece)(data, length=meta["max_len"])
        expected = np.load(GOLDENS / case / "expected.npz")["tokens"]
        np.testing.assert_array_equal(tokenizer(meta["texts"]), expected)


def test_tokens_are_cut_and_filled_up(tokenizers):
    words = tokenizers["words.txt"]
    assert words("a a").tolist() == [[words("")[0, 0], *words("a a")[0, 1:3], *[0] * 13]]
    pieces, end = tokenizers["pieces.model"], int(tokenizers["pieces.model"]("")[0, 0])
    assert pieces("")[0].tolist() == [end] * 16
    assert pieces("a b c " * 9)[0, -1] == end and end not in pieces("a b c " * 9)[0, :-1]
    short = text.SentencePiece(SOURCES["pieces.model"].read_bytes(), length=4)
    assert short("a b c " * 9)[0].tolist() == [*pieces("a b c " * 9)[0, :3], end]


def test_accents_case_and_width_are_folded_and_long_words_unknown(tokenizers):
    words = tokenizers["words.txt"]
    for other in ("A PHOTO", "á phötö", "ａ\u3000ｐｈｏｔｏ", "a\u200b \u00adphoto\ufeff", "a\tphoto\n"):
        assert words(other).tolist() == words("a photo").tolist()
    unknown = words("\u2603\u2603")[0, 1]
    assert unknown not in words("o" * 100) and words("o" * 101)[0, 1:3].tolist() == [unknown, 0]
    assert words("é" * 51)[0, 1:].tolist() == words("e" * 51)[0, 1:].tolist()


@pytest.mark.parametrize("name", SOURCES)
def test_a_record_in_json_makes_the_tokenizer_again(name, tokenizers):
    one = tokenizers[name]
    other = text.from_dict(json.loads(json.dumps(one.to_dict())))
    assert (other.kind, other.length, other.sha256, other.vocabulary_size) == (
        one.kind, one.length, one.sha256, one.vocabulary_size,
    )  # fmt: skip
    np.testing.assert_array_equal(other(EXPECTED["texts"][:9]), one(EXPECTED["texts"][:9]))


@pytest.mark.parametrize("name", ["words.txt", "pieces.model"])
def test_a_saved_module_takes_strings_and_needs_nothing_else(name, tokenizers, graphs, tmp_path):
    root = tf.__internal__.tracking.AutoTrackable()
    root.tokens = graphs[name]
    tf.saved_model.save(root, str(tmp_path / "module"), signatures={"serving_default": graphs[name]})
    assert not list((tmp_path / "module" / "assets").glob("*"))
    loaded = tf.saved_model.load(str(tmp_path / "module"))
    np.testing.assert_array_equal(loaded.tokens(EXPECTED["texts"]), EXPECTED["tokens"][name])
    # No operation keeps state: there is no table, file or Python function
    graph = graphs[name].get_concrete_function().graph
    stateful = {op.type for op in graph.get_operations() if op.op_def is not None and op.op_def.is_stateful}
    assert stateful <= {"Assert"}


def test_a_pipeline_takes_texts(tokenizers):
    texts = tf.data.Dataset.from_tensor_slices(EXPECTED["texts"]).batch(32).map(tokenizers["words.txt"].in_graph)
    np.testing.assert_array_equal(np.concatenate(list(texts.as_numpy_iterator())), EXPECTED["tokens"]["words.txt"])


@pytest.mark.parametrize(
    "texts, message",
    [
        (["a", 3], "expected str, got int at 1"),
        (b"a", "a str or a list of str, got bytes"),
        ([b"a"], "expected str, got bytes at 0"),
        (None, "a str or a list of str, got NoneType"),
        ([["a"]], "expected str, got list at 0"),
        (["a", "b\ud800"], r"half a surrogate pair, '\\ud800', at character 1 of text 1"),
    ],
)
def test_other_than_texts_is_refused(texts, message, tokenizers):
    for tokenizer in tokenizers.values():
        with pytest.raises(errors.ArgumentError, match=message):
            tokenizer(texts)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"[PAD]\n[UNK]\n[CLS]\n\xff\n", "text in UTF-8, got byte 18 that is none"),
        (b"[PAD]\n[UNK]\n[CLS]\na\nb\na\n", "'a' again, which line 4 has on line 6"),
        (b"[PAD]\n[UNK]\n\n[CLS]\n", "got nothing on line 3"),
        (b"[PAD]\n[UNK]\na\n", r"3 words without \[CLS\]"),
        (b"[UNK]\n[PAD]\n[CLS]\n", r"with \[PAD\] on line 2"),
        (b"", r"without \[PAD\], \[UNK\], \[CLS\]"),
        (b"[PAD]\n[UNK]\n[CLS]\n" + b"a" * text.MAX_CHARACTERS, "characters in all, got more"),
    ],
)
def test_vocabularies_that_are_not_fit_are_refused(data, message):
    with pytest.raises(errors.CheckpointFormatError, match=message):
        text.WordPiece(data)


def field(number, value):
    """A field of protocol buffers, in bytes."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + np.float32(value).tobytes()
    return bytes([number << 3 | 2, len(value) & 127 | 128, len(value) >> 7]) + value


def model(pieces=(), trainer=b"", normalizer=b""):
    known = [("<unk>", 0.0, 2), ("</s>", 0.0, 3), ("a", -1.0, 1), *pieces]
    made = b"".join(field(1, field(1, piece.encode()) + field(2, score) + field(3, kind)) for piece, score, kind in known)
    return made + field(2, trainer) + field(3, normalizer)


def test_a_model_made_by_hand_is_read():
    tokenizer = text.SentencePiece(model([("\u2581a", -1.5, 1), ("aa", -3.0, 1), ("b", -1.0, 5)]), length=8)
    assert tokenizer.vocabulary_size == 6
    assert tokenizer("aa b")[0].tolist() == [3, 2, 0, 1, 1, 1, 1, 1]  # an unused piece is unknown, and so is its space: one token


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "0 unknown and 0 normal pieces"),
        (b"not a model", "a unigram model of SentencePiece"),
        (model(trainer=field(3, 2)), "of another algorithm than unigram"),
        (model(trainer=b"\x98\x02\x01"), "falls back to bytes"),
        (model(trainer=b"\xc0\x01\x01"), "marks spaces at the end"),
        (model(normalizer=field(5, 0)), "does not mark spaces"),
        (model([("a", -2.0, 1)]), "there twice"),
        (model([("", -2.0, 1)]), "empty"),
        (model([("b" * 129, -2.0, 1)]), "longer than 128"),
        (model([("<0x00>", -2.0, 6)]), "normal pieces"),
        (model([("b", float("nan"), 1)]), "not finite"),
        (model([("a b", -1.0, 4)]), "symbol with a space"),
        (model().replace(b"</s>", b"</t>"), "no control piece </s>"),
        (model(normalizer=field(2, b"\xff\xff\xff\xff" + bytes(40))), "cut off"),
        (model(normalizer=field(2, b"\x08\0\0\0" + b"\1\0\0\0" * 2 + b"a\0")), "more than .* nodes|a unigram model"),
    ],
)
def test_models_that_are_not_fit_are_refused(data, message):
    with pytest.raises(errors.CheckpointFormatError, match=message):
        text.SentencePiece(data)


def test_damaged_models_are_refused_or_read_and_never_anything_else():
    data, chance, refused = SOURCES["pieces.model"].read_bytes(), random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(data[: chance.choice([len(data), chance.randrange(len(data))])])
        for _ in range(chance.randint(0, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            text.SentencePiece(bytes(damaged))("a photo")
        except errors.CheckpointFormatError:
            refused += 1
    assert 100 < refused < 200
    whole = GOLDEN_MODEL.read_bytes()
    with pytest.raises(errors.CheckpointFormatError, match="bytes where"):
        text.SentencePiece(whole[: len(whole) // 2])


def test_a_file_is_fetched_checked_and_locked(tmp_path, monkeypatch):
    data = SOURCES["words.txt"].read_bytes()
    (tmp_path / "mirror" / "lit").mkdir(parents=True)
    (tmp_path / "mirror" / "lit" / "words.txt").write_bytes(data)
    monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KERAS_VIT_LOCK", str(tmp_path / "lock"))
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(tmp_path / "mirror"))
    one = text.open_tokenizer("gs://lit/words.txt")
    assert json.loads((tmp_path / "lock").read_text())["gs://lit/words.txt"]["sha256"] == one.sha256
    assert text.open_tokenizer("gs://lit/words.txt", sha256=one.sha256.upper()).sha256 == one.sha256
    with pytest.raises(errors.IntegrityError, match=f"expected a vocabulary of sha256 {'0' * 64}, got {one.sha256}"):
        text.open_tokenizer(SOURCES["words.txt"], sha256="0" * 64)
    (tmp_path / "mirror" / "lit" / "words.txt").write_bytes(data + b"more\n")
    with pytest.raises(errors.IntegrityError, match="recorded for gs://lit/words.txt"):
        text.open_tokenizer("gs://lit/words.txt")


def test_other_files_and_arguments_are_refused(tmp_path):
    with pytest.raises(errors.ArgumentError, match=r"ends in .txt .* or .model .*, got '.json'"):
        text.open_tokenizer(tmp_path / "words.json")
    with pytest.raises(errors.ArgumentError, match="expected a file, found nothing"):
        text.open_tokenizer(tmp_path / "words.txt")
    (tmp_path / "words.txt").write_bytes(bytes(text.MAX_BYTES + 1))
    with pytest.raises(errors.CheckpointFormatError, match="at most 16,777,216 bytes, got more"):
        text.open_tokenizer(tmp_path / "words.txt")
    for length in (1, 2.0, True, None):
        with pytest.raises(errors.ArgumentError, match="length: expected a whole number"):
            text.open_tokenizer(SOURCES["words.txt"], length=length)
    with pytest.raises(errors.ArgumentError, match="expected the bytes of a file, got str"):
        text.WordPiece("[PAD]")
    good = text.open_tokenizer(SOURCES["words.txt"]).to_dict()
    for record in ({}, None, {**good, "kind": "bpe"}, {**good, "vocabulary": 3}, {**good, "kind": "sentencepiece"}):
        with pytest.raises(errors.ArgumentError, match="expected a record made by to_dict"):
            text.from_dict(record)
