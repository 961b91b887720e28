"""Images and what is said of them on tf.data: a folder, a list in a file, a TFDS data set, or classes put into sentences.

    train = open_captions("flickr", "train")
    batches = pipeline.train_batches(train, size=224, batch=256)  # of (images, texts)

The `Source` of such examples is one of `data.pipeline`'s: same order, same augmentation, same going on. An image may have several
captions: each time it is its turn in `train_batches`, one of them is drawn; `eval_batches` gives all, one a line.
"""

import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import tensorflow as tf

from keras_vit.data import pipeline
from keras_vit.errors import ArgumentError, DataError

MAX_BYTES = 2**16  # of a caption file, and of a line of a list
LISTS = (".tsv", ".jsonl")
DRAW = 4  # of the random numbers of an example; see `pipeline`
_KEYS = {"image": ("image", "file_name"), "caption": ("caption", "captions", "text")}  # of a line of JSON


@dataclass(frozen=True, eq=False)
class Captioned(pipeline.Source):
    """What `open_captions` returns: a `pipeline.Source` whose labels are texts. `class_names` is empty unless they name classes.

    Attributes:
        notes: sentences for a log: what has no caption or no image, what is said of several images.
        sentences: of classes, a tuple of the sentences of each; else empty.
        captions: one string for each example, its captions one a line; empty where TFDS has them.
    """

    notes: tuple = field(default=(), repr=False)
    sentences: tuple = field(default=(), repr=False)
    captions: tuple = field(default=(), repr=False)

    def drawn(self, label, key):
        found = tf.strings.split(label, "\n")
        place = tf.random.stateless_uniform([], pipeline.fold_in(key, DRAW), 0, tf.size(found), tf.int32)
        return found[place]

    def encoded(self, labels):
        return labels

    def fingerprint(self):
        """As of any source; captions count as the names of files do."""
        found = super().fingerprint()
        said = [text for texts in self.sentences for text in texts] or self.captions
        whole = "\0".join([found["examples"], *said])
        return {**found, "examples": hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()}


@dataclass(frozen=True, eq=False)
class _Indexed(Captioned, pipeline.Indexed):
    pass


@dataclass(frozen=True, eq=False)
class _Stream(Captioned, pipeline.Stream):
    pass


def open_captions(
    dataset, split, *, text=None, prompts=(), class_names=None, data_dir=None, manual_dir=None, on_error="raise", limit=0.01
):
    """Finds one split of a data set of images with captions, and checks what can be checked without decoding an image.

    Args:
        dataset: one of
            - a folder. With a split it holds `SPLIT.tsv`, `SPLIT.jsonl` or a folder `SPLIT`; with split None it is that folder.
              In a folder of images, at any depth, `a.jpg` has its captions in `a.txt`, one a line. A line of a TSV is an image's
              path, a tab and a caption; of JSONL {"image": path, "caption": text or list of texts} ("file_name" and "text" will
              do). Paths start at the list's folder and stay in it. An image on several lines has several captions. Text is
              UTF-8; runs of white space are one space.
            - such a `.tsv` or `.jsonl` file, with split None.
            - a TFDS name such as "coco_captions", with features "image" and `text`.
            - with `prompts`, whatever `pipeline.open_source` takes: the class of an image becomes what is said of it.
        split: see there.
        text: where TFDS has the captions: the name of a feature of strings, with "/" between it and what it lies in, such as
            "captions/text".
        prompts: sentences with {} for the name of a class, such as ("a photo of a {}",).
        class_names: names for those sentences in place of the data set's own, in its order; None for those.
        data_dir, manual_dir, on_error, limit: of `pipeline.open_source`; "skip" leaves out what has no caption in TFDS too.

    Returns:
        A `Captioned` source. Images without captions and captions without images are left out, counted and named in one warning
        and in `notes`, like captions of several images.

    Raises:
        DataError: nothing has both an image and a caption; a path leaves the folder; a text is no UTF-8 or longer than 64 KiB; an
            image is none by its first bytes; a line of a list is none; and as `pipeline.open_source`.
        ArgumentError: a prompt without {}, other class names than classes, options that exclude each other.
    """
    dataset, split = os.fspath(dataset), None if split is None else str(split)
    if on_error not in ("raise", "skip"):
        raise ArgumentError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
    if prompts:
        source = pipeline.open_source(dataset, split, data_dir=data_dir, manual_dir=manual_dir, on_error=on_error, limit=limit)
        return _of_classes(source, tuple(prompts), class_names)
    if class_names:
        raise ArgumentError("class_names are for sentences: pass prompts=, such as ('a photo of a {}',).")
    limit = limit if on_error == "skip" else None
    path = os.path.expanduser(dataset)
    if os.path.isfile(path):
        if not path.endswith(LISTS) or split is not None:
            raise DataError(
                f"{path}: a list of captions ends in {' or '.join(LISTS)} and has the split None, got split {split!r}."
            )
        return _opened(path, None, os.path.dirname(path) or ".", _listed_pairs(path), limit)
    if os.path.isdir(path):
        return _open_folder(path, split, limit)
    return _open_tfds(dataset, split, text, data_dir, manual_dir, limit)


def texts(source, batch):
    """The captions of `pipeline.eval_batches`, without the images: batches of (texts, texts)."""
    data = source.ordered().map(lambda _, example: source.read(example)[1])  # whose image is then not even opened
    return data.batch(batch).map(lambda said: (said, said)).prefetch(2)


# ---------------------------------------------------------------- classes


def _of_classes(source, prompts, class_names):
    names = tuple(source.class_names if class_names is None else class_names)
    if len(names) != source.num_classes:
        raise ArgumentError(
            f"{source.dataset}: expected the names of {source.num_classes} classes, got {len(names)}: {pipeline.listed(names)}."
        )
    wrong = [prompt for prompt in prompts if prompt.count("{}") != 1]
    if wrong:
        raise ArgumentError(
            f"prompts: each must have one {{}} in the place of the name, got {pipeline.listed(map(repr, wrong))}."
        )
    sentences = tuple(tuple(_plain(prompt.replace("{}", name)) for prompt in prompts) for name in names)
    if len(set(sentences)) < len(names):
        raise ArgumentError(f"class_names: each class needs a name of its own, got {pipeline.listed(names)}.")
    table = tf.constant(["\n".join(each) for each in sentences])

    def read(example):
        content, label = source.read(example)
        return content, tf.gather(table, label)

    kept = {name: getattr(source, name) for name in source.__dataclass_fields__}
    kind = _Indexed if isinstance(source, pipeline.Indexed) else _Stream
    return kind(**{**kept, "read": read, "sentences": sentences})


# ---------------------------------------------------------------- files


def _open_folder(root, split, limit):
    if split is None:
        return _opened(root, None, root, _beside(root), limit)
    lists = [os.path.join(root, split + ending) for ending in LISTS]
    folder = os.path.join(root, split)
    found = [path for path in lists if os.path.isfile(path)] + [folder] * os.path.isdir(folder)
    if not _inside(folder, root) or len(found) != 1:
        raise DataError(
            f"{root} has {'nothing' if not found else pipeline.listed(found)} for the split {split!r}; expected one of "
            f"{', '.join(lists)} or a folder {folder} of images and texts. Name another split, or add or remove one of them."
        )
    return _opened(root, split, root, _beside(folder) if found == [folder] else _listed_pairs(found[0]), limit)


def _beside(folder):
    """[(image, captions)] of a folder's files, with None for the image or () for the captions where there is none."""
    images, texts = {}, {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for name in sorted(names):
            stem, ending = os.path.splitext(os.path.join(parent, name))
            if not name.startswith("."):
                if ending.lower() in pipeline.ENDINGS:
                    images.setdefault(stem, []).append(stem + ending)
                elif ending.lower() == ".txt":
                    texts[stem] = stem + ending
    with ThreadPoolExecutor(16) as pool:  # opening a file waits on the disk or the network
        said = dict(zip(texts, pool.map(_read_text, texts.values())))
    pairs = [(image, said.get(stem, ())) for stem, same in images.items() for image in same]
    return pairs, [path for stem, path in texts.items() if stem not in images]


def _read_text(path):
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    return _captions(_text(content, path).split("\n"))


def _text(content, where):
    if len(content) > MAX_BYTES:
        raise DataError(f"{where}: expected captions of at most {MAX_BYTES:,} bytes, got more. Shorten or remove it.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected text in UTF-8, got byte {content[error.start]:#04x}. Convert it.") from error


def _plain(text):
    return " ".join(text.replace("\0", " ").split())


def _captions(texts):
    return tuple(dict.fromkeys(text for text in map(_plain, texts) if text))


def _listed_pairs(path):
    """As `_beside`, of the lines of a TSV or JSONL file."""
    root, parse = os.path.dirname(path) or ".", _of_json if path.endswith(".jsonl") else _of_tsv
    said = {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES + 1), b""), 1):
                where = f"{path}, line {number}"
                line = _text(line, where).rstrip("\r\n")
                if not line.strip():
                    continue
                name, texts = parse(line, where)
                said.setdefault(name, []).extend(texts)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    pairs, missing, outside = [], [], []
    for name, texts in said.items():
        image = os.path.join(root, name)
        if "\0" in name or not _inside(image, root):
            outside.append(name)
        elif os.path.isfile(image):
            pairs.append((image, _captions(texts)))
        else:
            missing.append(name)
    if outside:
        raise DataError(
            f"{path}: {len(outside)} path(s) leave the folder {root}: {pipeline.listed(map(repr, outside))}. Images of a list "
            "lie beside or below it: move them, or write their paths from there."
        )
    return pairs, missing


def _inside(path, root):
    root = os.path.realpath(root)
    return "\0" not in path and os.path.commonpath([root, os.path.realpath(path)]) == root


def _of_tsv(line, where):
    name, tab, caption = line.partition("\t")
    if not tab or not name:
        raise DataError(f"{where}: expected an image's path, a tab and a caption, got {line[:80]!r}.")
    return name, [caption]


def _of_json(line, where):
    try:
        record = json.loads(line)
        name, said = (next(record[key] for key in keys if key in record) for keys in _KEYS.values())
        said = said if isinstance(said, list) else [said]
        if not name or not all(isinstance(text, str) for text in (name, *said)):
            raise TypeError
    except (ValueError, TypeError, AttributeError, StopIteration, RuntimeError, RecursionError) as error:
        raise DataError(
            f'{where}: expected {{"image": "PATH", "caption": "TEXT" or ["TEXT", ...]}}, got {line[:80]!r}.'
        ) from error
    return name, said


def _opened(dataset, split, root, found, limit):
    pairs, alone = found
    silent = [image for image, texts in pairs if not texts]
    pairs = [(image, texts) for image, texts in pairs if texts]
    notes = []
    if silent:
        notes.append(f"{len(silent)} image(s) without a caption are left out: {pipeline.listed(silent)}")
    if alone:
        notes.append(f"{len(alone)} caption(s) without an image are left out: {pipeline.listed(alone)}")
    if not pairs:
        raise DataError(
            f"{dataset} ({split}): nothing has both an image and a caption{''.join('; ' + note for note in notes)}. Expected "
            "a.jpg with a.txt beside it, or a list of paths and captions."
        )
    if notes:
        warnings.warn("; ".join(notes), stacklevel=4)
    with ThreadPoolExecutor(16) as pool:
        heads = list(pool.map(pipeline.first_bytes, [image for image, _ in pairs]))
    bad = [(image, why) for (image, _), (why, _) in zip(pairs, heads) if why]
    if bad and limit is None:
        raise pipeline.unreadable(bad)

    def opened(kept, skipped=()):
        paths, captions = zip(*(pairs[index] for index in kept))
        files, texts = tf.constant([os.fsencode(path) for path in paths]), tuple("\n".join(each) for each in captions)
        said = tf.constant(texts)
        return _Indexed(
            dataset, split, (), len(paths), paths, skipped, "captions",
            read=lambda index: (tf.io.read_file(tf.gather(files, index)), tf.gather(said, index)),
            all_jpeg=all(heads[index][1] for index in kept), notes=(*notes, *_repeated(texts)), captions=texts,
        )  # fmt: skip

    source = opened(range(len(pairs)))
    if limit is None:
        return source
    faults, _ = pipeline.faults_of(source)
    skipped = pipeline.left_out(source, faults, len(pairs), limit)
    gone = {index for index, _, _ in faults}
    return opened([index for index in range(len(pairs)) if index not in gone], skipped)


def _repeated(texts):
    seen, several = set(), set()
    for each in texts:
        for text in each.split("\n"):
            (several if text in seen else seen).add(text)
    if several:
        yield f"{len(several)} of {len(seen)} captions belong to several images: {pipeline.listed(map(repr, sorted(several)))}"


# ---------------------------------------------------------------- TFDS


def _open_tfds(dataset, split, text, data_dir, manual_dir, limit):
    if not text:
        raise ArgumentError(
            f"{dataset!r} is no folder and no list of captions; for TFDS pass text=, the feature that has them, such as "
            "'captions/text', and for classes prompts=."
        )
    parts = text.split("/")

    def wanted(features, tfds):
        image, place = dict(features.items()).get("image"), features
        for part in parts:
            place = dict(place.items()).get(part) if isinstance(place, tfds.features.FeaturesDict) else None
            while isinstance(place, tfds.features.Sequence):
                place = place.feature
        texts = isinstance(place, tfds.features.Tensor) and place.tf_dtype == tf.string
        if not isinstance(image, tfds.features.Image) or not texts:
            raise DataError(f"{dataset!r} of TFDS must have an image 'image' and texts {text!r}, its features are {features}.")
        spec = True
        for part in reversed(parts):
            spec = {part: spec}
        return {"image": True, **spec}

    def pair(example):
        image, found = example["image"], example
        for part in parts:
            found = found[part]
        found = found.flat_values if isinstance(found, tf.RaggedTensor) else tf.reshape(found, [-1])
        found = tf.strings.strip(tf.strings.regex_replace(found, r"[\s\x00]+", " "))
        return image, tf.strings.reduce_join(tf.boolean_mask(found, found != ""), separator="\n")

    def read(example):
        image, said = example
        message = f"an example of {dataset} ({split}) {pipeline.SILENT}; on_error='skip' leaves such out"
        return image, pipeline.checked(said, said != "", message)

    found, _ = pipeline.open_tfds(dataset, split, data_dir, manual_dir, wanted)
    found["origin"] += f" {text}"
    examples = found.pop("examples").map(pair)
    source = _Stream(dataset, split, (), read=read, examples=examples, **found)
    if limit is None:
        return source
    silent = [
        (int(index), f"example {index}", "no caption") for index, (_, said) in source.ordered().as_numpy_iterator() if not said
    ]
    kept = pipeline.without_faults(replace(source, read=lambda example: example), limit, silent)
    notes = (f"{len(silent)} image(s) without a caption are left out",) if silent else ()
    return replace(kept, read=read, notes=notes)
