"""Texts -> tokens, as LiT's authors make them, in Python and as TensorFlow operations alone.

Both tokenizers are read from the file that is published beside the weights, and from nothing else: the WordPiece vocabulary of
BERT (`.txt`) and the unigram model of SentencePiece (`.model`, arXiv 1808.06226). Neither needs `tensorflow_text`, whose
`BertTokenizer` and `SentencepieceTokenizer` the original (google-research/vision_transformer, vit_jax/preprocess.py) calls.
"""

import array
import base64
import functools
import hashlib
import math
import numbers
import pathlib
import re
import string
import struct
import unicodedata

import numpy as np

from keras_vit import errors
from keras_vit.checkpoints import fetch

LENGTH = 16  # tokens, of all published LiT models
MAX_BYTES = 2**24  # of a vocabulary file; those of BERT have 0.2 MB, of SentencePiece 0.3 to 5 MB
MAX_CHARACTERS, MAX_PIECE = 2**21, 128  # of all pieces or words, and of one piece
_MAX_NODES, _MAX_RULE = 2**20, 256  # of a normaliser's rules, and bytes in one; nmt_nfkc has 262,842 and 33
_WORD_BYTES = 100  # of UTF-8, above which WordPiece does not look into a word
_UNKNOWN_PENALTY = 10.0  # of an unknown character below the worst piece, in log probability
_NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED = range(1, 6)  # kinds of pieces of SentencePiece; 6 is a byte
SPACE = "\u2581"  # how it marks a space
# Characters of which each is a word: the blocks of CJK ideographs that BERT names (tensorflow_text, bert_tokenizer.py)
_CHINESE = [
    range(first, last + 1)
    for first, last in (
        (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
        (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
    )
]  # fmt: skip
# Unicode's Default_Ignorable_Code_Point, which NFKC_Casefold drops
_IGNORED = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff"
    "\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_CHANGED = [*range(0x30000), *range(0xE0000, 0xE1000)]  # beyond these, no character is folded or stands alone


def open_tokenizer(source, *, length=LENGTH, sha256=None):
    """The tokenizer of a vocabulary file, which is fetched, checked and locked like weights are.

    Args:
        source: a path or a `gs://`, `hf://` or `https://` URL. A name that ends in ".txt" is a `WordPiece` vocabulary, one that
            ends in ".model" a `SentencePiece` model.
        length: tokens that each text is cut or filled up to.
        sha256: of the file, in hexadecimal; another file is refused.

    Returns:
        A `WordPiece` or `SentencePiece`.

    Raises:
        errors.ArgumentError: an argument is not usable.
        errors.DownloadError, errors.IntegrityError, errors.CacheError: see `keras_vit.checkpoints.fetch.fetch`.
        errors.CheckpointFormatError: the file holds no vocabulary of that kind.
    """
    path = str(source)
    suffix = pathlib.PurePosixPath(path.partition("@")[0] if path.startswith("hf://") else path).suffix.lower()
    made = {".txt": WordPiece, ".model": SentencePiece}.get(suffix)
    if made is None:
        raise errors.ArgumentError(
            f"{source}: expected a name that ends in .txt (a WordPiece vocabulary) or .model (SentencePiece), got {suffix!r}; "
            "rename the file, or make the tokenizer itself: WordPiece(bytes) or SentencePiece(bytes)."
        )
    path = fetch.fetch(source).path
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise errors.CacheError(f"{path}: cannot be read ({error.strerror or error}); check its permissions.") from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise errors.IntegrityError(
            f"{source}: expected a vocabulary of sha256 {sha256}, got {found}; not used. Take that published with the weights."
        )
    return made(data, length=length, name=str(source))


def from_dict(record):
    """The tokenizer whose `to_dict()` is `record`.

    Raises:
        errors.ArgumentError: it is no such record.
        errors.CheckpointFormatError: its vocabulary is not well-formed.
    """
    try:
        kind, length, vocabulary = (record[key] for key in ("kind", "length", "vocabulary"))
        made = {each.kind: each for each in (WordPiece, SentencePiece)}[kind]
        data = made._bytes(vocabulary)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise errors.ArgumentError(
            f"tokenizer: expected a record made by to_dict(), with kind, length and vocabulary, got {str(record)[:80]!r} "
            f"({type(error).__name__}: {error}); open the vocabulary file instead."
        ) from error
    return made(data, length=length)


class Tokenizer:
    """What both kinds have in common. `tokenizer(texts)` gives tokens (n, length) int32, numpy; n is 1 for a str.

    Attributes:
        kind: "wordpiece" or "sentencepiece".
        length: tokens of each text.
        vocabulary_size: how many tokens there are; they are numbered from 0.
        sha256: of the vocabulary file.
    """

    kind = None

    def __init__(self, data, *, length=LENGTH, name="vocabulary"):
        if not isinstance(data, bytes):
            raise errors.ArgumentError(f"{name}: expected the bytes of a file, got {type(data).__name__}; see open_tokenizer.")
        if not isinstance(length, numbers.Integral) or isinstance(length, bool) or not 2 <= length <= 2**16:
            raise errors.ArgumentError(f"length: expected a whole number of tokens from 2 to {2**16}, got {length!r}.")
        if len(data) > MAX_BYTES:
            raise _malformed(name, f"at most {MAX_BYTES:,} bytes", "more")
        self.length, self.sha256, self._data = int(length), hashlib.sha256(data).hexdigest(), data
        self._read(name)

    def __call__(self, texts):
        """Tokens of a str or a list of str: (n, length) int32.

        Raises:
            errors.ArgumentError: something else is among them, or half a surrogate pair, which no text holds.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list | tuple | np.ndarray) or getattr(texts, "ndim", 1) != 1:
            raise errors.ArgumentError(f"texts: expected a str or a list of str, got {type(texts).__name__}.")
        found = np.full((len(texts), self.length), self._filler, np.int32)
        for i, text in enumerate(texts):
            tokens = self._tokens(_checked(text, i))[: self.length]
            found[i, : len(tokens)] = tokens
        return self._closed(found)

    def in_graph(self, texts):
        """The same of a TensorFlow string tensor (n,) in UTF-8: an int32 tensor (n, length), made by TensorFlow operations alone.

        Fit for `tf.data` and for a SavedModel: the tables lie in the graph. Bytes that are no UTF-8 count as U+FFFD.
        """
        return self._graph(texts, self.length)

    def to_dict(self):
        """What JSON can hold, and `from_dict` makes this tokenizer of; the vocabulary is in it."""
        return {"kind": self.kind, "length": self.length, "vocabulary": self._text(self._data)}


class WordPiece(Tokenizer):
    """BERT's: words in lower case without accents, each split into the longest pieces of the vocabulary.

    [CLS] comes first, no [SEP] last; a text is cut to `length` tokens or filled up with zeros. Text is brought to Unicode's
    NFKC_Casefold, then to NFD, and marks above and below letters (Mn) are dropped; control and format characters separate words
    like spaces do; punctuation (P, and ASCII's symbols) and Chinese characters are words of their own. Of a word with a part that
    the vocabulary lacks, or of more than 100 bytes in UTF-8, all that is left is one [UNK].

    Args:
        data: bytes of the vocabulary file, UTF-8: one word on each line, "##" before those that continue a word, [PAD] first.
        length: tokens that each text is cut or filled up to, [CLS] included.
        name: what errors call the file.

    Raises:
        errors.ArgumentError, errors.CheckpointFormatError.
    """

    kind = "wordpiece"
    _filler = 0

    @staticmethod
    def _bytes(text):
        return text.encode()

    @staticmethod
    def _text(data):
        return data.decode()

    def _read(self, name):
        try:
            lines = self._data.decode().split("\n")
        except UnicodeDecodeError as error:
            raise _malformed(name, "text in UTF-8", f"byte {error.start} that is none") from error
        if sum(map(len, lines)) > MAX_CHARACTERS:
            raise _malformed(name, f"words of at most {MAX_CHARACTERS:,} characters in all", "more")
        words = [line.removesuffix("\r") for line in (lines[:-1] if not lines[-1] else lines)]
        self._ids = {}
        for number, word in enumerate(words):
            if not word or self._ids.setdefault(word, number) != number:
                problem = f"{word!r} again, which line {self._ids[word] + 1} has" if word else "nothing"
                raise _malformed(name, "another word on each line", f"{problem} on line {number + 1}")
        missing = [word for word in ("[PAD]", "[UNK]", "[CLS]") if word not in self._ids]
        if missing or self._ids["[PAD]"] != 0:
            problem = f"without {', '.join(missing)}" if missing else f"with [PAD] on line {self._ids['[PAD]'] + 1}"
            raise _malformed(name, "[PAD] on the first line, and [UNK] and [CLS]", f"{len(words):,} words {problem}")
        self.vocabulary_size, self._longest = len(words), max(map(len, words))
        self._first, self._unknown = self._ids["[CLS]"], self._ids["[UNK]"]

    def _closed(self, tokens):
        return tokens

    def _tokens(self, text):
        found = [self._first]
        for word in _words(text.translate(_FOLDS)):
            found += self._pieces(word)
            if len(found) >= self.length:
                break
        return found

    def _pieces(self, word):
        if len(word.encode()) > _WORD_BYTES:
            return [self._unknown]
        found, start = [], 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                piece = self._ids.get(f"##{word[start:end]}" if start else word[start:end])
                if piece is not None:
                    found.append(piece)
                    start = end
                    break
            else:
                return [self._unknown]
        return found

    @functools.cached_property
    def _graph(self):
        from keras_vit.data.textgraph import WordPieceGraph

        pieces = {word: number for word, number in self._ids.items() if len(word) <= len("##") + _WORD_BYTES}
        folds = {char: folded for char in map(chr, _CHANGED) if (folded := fold(char)) != char}
        alone = [code for code in _CHANGED if stands_alone(chr(code))]
        return WordPieceGraph(pieces, folds, alone, self._first, self._unknown, _WORD_BYTES)


class SentencePiece(Tokenizer):
    """The most probable split of a text into the pieces of a unigram model, with a sticky `</s>`.

    `</s>` ends each text and fills it up to `length` tokens; a longer text is cut so that the last token is `</s>` all the same.
    Text is normalised as the model says, by the rules in it.

    Args:
        data: bytes of the `.model` file, a `ModelProto` of google/sentencepiece (src/sentencepiece_model.proto).
        length: tokens that each text is cut or filled up to, `</s>` included.
        name: what errors call the file.

    Raises:
        errors.ArgumentError.
        errors.CheckpointFormatError: the file is malformed, is of another algorithm than unigram, falls back to bytes, or marks
            spaces at the end of words.
    """

    kind = "sentencepiece"

    @staticmethod
    def _bytes(text):
        return base64.b64decode(text, validate=True)

    @staticmethod
    def _text(data):
        return base64.b64encode(data).decode()

    def _read(self, name):
        try:
            self._parse(_message(self._data))
        except (ValueError, TypeError, struct.error) as error:
            raise _malformed(name, "a unigram model of SentencePiece", str(error)) from error

    def _parse(self, model):
        trainer, normalizer = (_message(b"".join(_blob(part) for part in model.get(field, ()))) for field in (2, 3))
        for message, field, default, meaning in (
            (trainer, 3, 1, "of another algorithm than unigram"),
            (trainer, 24, 0, "that marks spaces at the end of words"),
            (trainer, 35, 0, "that falls back to bytes"),
            (normalizer, 5, 1, "that does not mark spaces"),
        ):
            if message.get(field, [default])[-1] != default:
                raise ValueError(f"a model {meaning}, which is not supported")
        self._prefix, self._tidy = (bool(normalizer.get(field, [1])[-1]) for field in (3, 4))
        pieces = [_message(_blob(piece)) for piece in model.get(1, ())]
        names = [_blob(piece.get(1, [b""])[-1]).decode() for piece in pieces]
        kinds = [piece.get(3, [1])[-1] for piece in pieces]
        scores = np.array([struct.unpack("<f", _blob(piece.get(2, [bytes(4)])[-1]))[0] for piece in pieces], np.float32)
        if sum(map(len, names)) > MAX_CHARACTERS:
            raise ValueError(f"pieces of more than {MAX_CHARACTERS:,} characters in all")
        if len(set(names)) < len(names) or not all(0 < len(piece) <= MAX_PIECE for piece in names):
            raise ValueError(f"pieces that are there twice, empty, or longer than {MAX_PIECE} characters")
        if kinds.count(_UNKNOWN) != 1 or _NORMAL not in kinds or max(kinds) > _UNUSED:
            raise ValueError(f"{kinds.count(_UNKNOWN)} unknown and {kinds.count(_NORMAL)} normal pieces among {len(pieces)}")
        if not np.isfinite(scores).all():
            raise ValueError("scores that are not finite")
        if "</s>" not in names or kinds[names.index("</s>")] != _CONTROL:
            raise ValueError("no control piece </s>")
        self.vocabulary_size, self._filler, self._unknown = len(names), names.index("</s>"), kinds.index(_UNKNOWN)
        normal = scores[np.array(kinds) == _NORMAL]
        self._unknown_score = np.float32(normal.min() - np.float32(_UNKNOWN_PENALTY))
        # A user's own symbol is worth more than whatever else could stand in its place
        best = max(normal.max(), np.finfo(np.float32).tiny)
        own = {piece for piece, kind in zip(names, kinds) if kind == _OWN}
        if any(" " in piece for piece in own):
            raise ValueError("a user-defined symbol with a space in it, which is not supported")
        self._scores = scores.astype(np.float64)
        for number, piece in enumerate(names):
            if piece in own:
                self._scores[number] = float(np.float32(len(piece.encode())) * best) - 0.1
        self._scores = self._scores.tolist()
        self._ids = {piece: number for number, (piece, kind) in enumerate(zip(names, kinds)) if kind in (_NORMAL, _OWN)}
        self._starts = {piece[:end]: -1 for piece in self._ids for end in range(1, len(piece))} | self._ids
        self._rules, self._own = _charsmap(_blob(normalizer.get(2, [b""])[-1])), own
        self._reach = {}  # the longest rule or own symbol by its first character
        for key in (*self._rules, *own):
            self._reach[key[0]] = max(self._reach.get(key[0], 0), len(key))

    def _closed(self, tokens):
        tokens[:, -1] = self._filler
        return tokens

    @functools.cached_property
    def _graph(self):
        from keras_vit.data.textgraph import UnigramGraph

        return UnigramGraph(
            self._ids, self._scores, self._unknown, self._unknown_score, self._filler, self._rules, self._own, self._prefix,
            self._tidy,
        )  # fmt: skip

    def _tokens(self, text):
        text = self._normalized(text)
        # best[i] is the log probability of the best split of text[:i], steps[i] the length of its last piece. Of equal splits the
        # one found first stays, and sums are rounded to float32, or not, where the original does it (EncodeOptimized in its
        # unigram_model.cc), since rounding decides between the many ways to split a long run of one character.
        best, steps = array.array("f", [-math.inf] * (len(text) + 1)), [0] * (len(text) + 1)
        best[0] = 0.0
        for i in range(len(text)):
            for step in range(1, len(text) - i + 1):
                piece = self._starts.get(text[i : i + step])
                if piece is not None and piece >= 0:
                    score = self._scores[piece] + best[i]
                    if score > best[i + step]:
                        best[i + step], steps[i + step] = score, step
                elif step == 1:
                    score = float(np.float32(self._unknown_score + np.float32(best[i])))
                    if score > best[i + 1]:
                        best[i + 1], steps[i + 1] = score, 1
                if piece is None:
                    break
        found, end = [], len(text)
        while end:
            piece = self._ids.get(text[end - steps[end] : end], self._unknown)
            if not (piece == self._unknown and found and found[-1] == self._unknown):
                found.append(piece)
            end -= steps[end]
        return found[::-1]

    def _normalized(self, text):
        """Text by the model's rules, the longest that fits at each place, then its spaces marked."""
        if not text:
            return text
        parts, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._reach.get(text[start], 0)), start, -1)
            end = next((end for end in ends if text[start:end] in self._own), None)
            if end is None:
                end = next((end for end in ends if text[start:end] in self._rules), start + 1)
                parts.append(self._rules.get(text[start:end], text[start:end]))
            else:
                parts.append(text[start:end])
            start = end
        text = "".join(parts)
        if self._tidy:
            text = re.sub(" {2,}", " ", text.lstrip(" "))
        text = (SPACE if self._prefix else "") + text.replace(" ", SPACE)
        return text.rstrip(SPACE) if self._tidy else text


def fold(char):
    """A character as BERT's vocabulary in lower case has it: NFKC_Casefold, then NFD without marks (Mn); controls are spaces.

    Unicode's database is that of this Python (3.11 has version 14).
    """
    folded, before = _IGNORED.sub("", char), None
    while folded != before:
        before = folded
        folded = _IGNORED.sub("", unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", folded).casefold()))
    letters = (each for each in unicodedata.normalize("NFD", folded) if unicodedata.category(each) != "Mn")
    return "".join(" " if unicodedata.category(each) in ("Cc", "Cf") else each for each in letters)


def stands_alone(char):
    """Whether a character is a word of its own: punctuation, symbols of ASCII, and Chinese characters."""
    return unicodedata.category(char)[0] == "P" or char in string.punctuation or any(ord(char) in each for each in _CHINESE)


def _words(text):
    """The words of a folded text, one after the other."""
    for part in text.split(" "):
        start = 0
        for i, char in enumerate(part):
            if stands_alone(char):
                if start < i:
                    yield part[start:i]
                yield char
                start = i + 1
        if start < len(part):
            yield part[start:]


class _Folds(dict):
    """{code point: its `fold`}, made as they are asked for."""

    def __missing__(self, code):
        return self.setdefault(code, fold(chr(code)))


_FOLDS = _Folds()


def _checked(text, i):
    if not isinstance(text, str):
        raise errors.ArgumentError(f"texts: expected str, got {type(text).__name__} at {i}; decode or convert it first.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise errors.ArgumentError(
            f"texts: expected Unicode text, got half a surrogate pair, {text[error.start]!r}, at character {error.start} of text "
            f"{i}; decode the text anew with errors='replace'."
        ) from error
    return text


def _malformed(name, expected, got):
    return errors.CheckpointFormatError(
        f"{name}: expected {expected}, got {got}; nothing of it was used. Take the file published with the weights."
    )


def _message(data):
    """{field: [value]} of a message of protocol buffers; a value is an int, or the bytes of another message, text or number."""
    found, place = {}, 0

    def varint():
        nonlocal place
        value = 0
        for shift in range(0, 70, 7):
            if place >= len(data):
                raise ValueError("a number that is cut off")
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number of more than 10 bytes")

    while place < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            value = varint()
        elif kind in (1, 2, 5):
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            value = data[place : place + size]
            place += size
            if len(value) < size:
                raise ValueError(f"{len(value)} bytes where {size} should follow")
        else:
            raise ValueError(f"a field of kind {kind}")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _blob(value):
    if not isinstance(value, bytes):
        raise ValueError("a number in the place of bytes")
    return value


def _charsmap(data):
    """{text: what it becomes} of the rules of a normaliser: a double array (darts-clone), and texts that end in a zero byte."""
    if not data:
        return {}
    (size,) = struct.unpack_from("<I", data)
    texts = data[4 + size :]
    if size % 4 or not 4 <= size < len(data) - 4 or texts[-1]:
        raise ValueError("rules of the normaliser that are cut off")
    units = np.frombuffer(data, "<u4", size // 4, offset=4).astype(np.int64)
    bases = (np.arange(len(units)) ^ ((units >> 10) << ((units & 512) >> 6))).tolist()
    children = {}  # by base: (label, node); an edge leads from a node to its base, exclusive or with a label
    for node in np.flatnonzero((units & 0x80000000 == 0) & (units & 255 > 0)).tolist():
        label = int(units[node] & 255)
        children.setdefault(node ^ label, []).append((label, node))
    units, rules, nodes = units.tolist(), {}, [(0, b"")]
    for node, key in nodes:  # which grows meanwhile
        if units[node] >> 8 & 1:
            begin = units[bases[node]] & 0x7FFFFFFF if bases[node] < len(units) else len(texts)
            end = texts.find(0, begin, begin + _MAX_RULE)
            if end < 0:
                raise ValueError("rules of the normaliser that lead outside")
            rules[key.decode()] = texts[begin:end].decode()
        nodes += [(child, key + bytes([label])) for label, child in children.get(bases[node], ())]
        if len(nodes) > _MAX_NODES or len(key) > _MAX_RULE:
            raise ValueError(f"rules of the normaliser with more than {_MAX_NODES:,} nodes, or {_MAX_RULE} bytes in one")
    if any("  " in text for text in rules.values()) or "" in rules:
        raise ValueError("rules of the normaliser that make several spaces of one text, which is not supported")
    return rules
