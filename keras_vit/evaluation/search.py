"""Search of a folder of images by text: their embeddings are made once and kept, and every search compares all of them.

    found = index(model, "photos")
    hits = search(model, found, "two dogs on grass", top=12)
    sheet = contact_sheet(found, hits, "two dogs on grass")

An index is a folder of .npy files and `manifest.json`, which says what lies in them; the manifest is replaced last and in one
step, so that an interrupted run leaves what it had done, and the next one goes on from there.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
from typing import NamedTuple

import filelock
import keras
import numpy as np

from keras_vit import errors, zoo
from keras_vit.checkpoints import files
from keras_vit.evaluation import validate

EVERY = 256  # images between two writings
HIDDEN = ".keras_vit"  # the folder of the index inside that of the images
MANIFEST = "manifest.json"
TOP = 12
_FORMAT = 1
_log = logging.getLogger("keras_vit")


class Hit(NamedTuple):
    """An image that a search found: its name below the folder, and the cosine between its embedding and the text's."""

    name: str
    score: float


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """What `index` found in a folder.

    Attributes:
        folder: the folder.
        names: of its images, below it, "/" between folders, sorted.
        embeddings: (n, d) float32 of unit length, in that order.
        broken: [(name, reason)] of images that cannot be read; they are in no answer.
        others: how many files have no ending of an image (`pipeline.ENDINGS`); they are not looked into.
        added: how many images were embedded now; the others were known.
        removed: how many known ones are gone or were changed since.
        place: the folder of the index itself.
    """

    folder: pathlib.Path
    names: tuple
    embeddings: np.ndarray
    broken: list
    others: int
    added: int
    removed: int
    place: pathlib.Path


def index(model, folder, *, cache=None, batch=32, every=EVERY, progress=None):
    """Embeds the images of a folder and those below it, or what is new or changed among them since it was last done.

    An image is known again by its name, size and time of change. The index is that of the image tower, its weights and its
    preprocessing: another text tower on the same image tower uses it again, another image tower gets its own beside it.

    Args:
        model: with `image_tower` and `encode_image`, such as `keras_vit.LiT_B16B_2()`.
        folder: of JPEG, PNG or WebP files (by their endings); hidden entries are ignored, links to folders not followed.
        cache: where to keep the index; by default in a hidden folder inside `folder`.
        batch: images at once.
        every: images between two writings; an interruption loses at most so many.
        progress: None, or called with (images done, images to do) after each writing.

    Returns:
        An `Index`.

    Raises:
        errors.DataError: no such folder, or no image in it that can be read.
        errors.CacheError: the index cannot be read or written.
        errors.NonFiniteError: an embedding is NaN or infinite.
        errors.ArgumentError: the model has no image tower.
    """
    tower = _tower(model, "image_tower", "index")
    pixels, folder = zoo.pixels_of(model), pathlib.Path(folder).expanduser()
    found, others = _images(folder)
    about = dict(
        format=_FORMAT, model=validate.identity(tower), dtype=tower.dtype_policy.name, size=list(tower.input_shape[1:3]),
        preprocessing=pixels.asdict(), folder=None if cache is None else str(folder.resolve()),
    )  # fmt: skip
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    place = (folder / HIDDEN if cache is None else pathlib.Path(cache).expanduser()) / f"search-{digest[:16]}"
    store = _Store(place, about)
    added = removed = 0
    if store.differs(found):
        with _locked(place):
            store = _Store(place, about)  # as another process may have left it
            removed, todo = store.keep(found)
            added = len(todo)
            _embed(model, folder, todo, store, pixels, tower.input_shape[1:3], batch, every, progress)
            store.compact()
    names = sorted(store.rows)
    broken = [(name, why) for name, (_, why) in sorted(store.broken.items())]
    if not names:
        raise errors.DataError(f"{folder}: none of its {len(broken)} images can be read; {broken[0][0]}: {broken[0][1]}.")
    embeddings = np.stack([store.rows[name][1] for name in names])
    return Index(folder, tuple(names), embeddings, broken, others, added, removed, place)


def search(model, found, text, top=TOP, *, once=False):
    """The images that fit a text best, the best first; equal ones by name.

    Args:
        model: the one of the index; with `encode_text`.
        found: of `index`.
        text: what to look for.
        top: how many, above 0.
        once: whether no other search will follow: TensorFlow then runs the text tower without compiling it first, which would
            take longer than one text.

    Returns:
        [`Hit`], fewer than `top` where there are not as many images.
    """
    check_text(text)
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise errors.ArgumentError(f"search: expected top to be a whole number above 0, got {top!r}.")
    if once and keras.config.backend() == "tensorflow" and model.tokenizer is not None:
        (embedding,) = keras.ops.convert_to_numpy(model.text_tower(model.tokenizer([text]), training=False))
    else:
        (embedding,) = np.asarray(model.encode_text([text]), np.float32)
    if embedding.shape != found.embeddings.shape[1:] or not np.isfinite(embedding).all():
        raise errors.ArgumentError(
            f"search: expected a finite embedding of {found.embeddings.shape[1]} numbers for the text, got shape "
            f"{embedding.shape}; use the model that the index was made with."
        )
    scores = found.embeddings @ embedding
    return [Hit(found.names[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top]]


def check_text(text):
    """Raises ArgumentError for what is no text to look for."""
    if not isinstance(text, str) or not text.strip():
        raise errors.ArgumentError(f"search: expected a text to look for, got {text!r}.")


def _tower(model, name, asked):
    tower = getattr(model, name, None)
    if not isinstance(tower, keras.Model):
        raise errors.ArgumentError(
            f"{asked}: expected a model of images and texts, such as keras_vit.LiT_B16B_2(), got "
            f"{type(model).__name__} {getattr(model, 'name', model)!r} without {name}."
        )
    return tower


# --- the folder


def _images(folder):
    """({name: (size, time of change in ns)}, number of other files) of a folder; -1 and -1 where they cannot be had."""
    from keras_vit.data import pipeline  # imports TensorFlow

    def complain(error):
        raise errors.DataError(f"{error.filename}: cannot be listed ({error.strerror}); check the name and its permissions.")

    found, others = {}, 0
    for root, folders, entries in os.walk(folder, onerror=complain):
        folders[:] = sorted(each for each in folders if not each.startswith(".") and each != "__MACOSX")
        for entry in entries:
            if entry.startswith("."):
                continue
            if not entry.lower().endswith(pipeline.ENDINGS):
                others += 1
                continue
            path = os.path.join(root, entry)
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            try:
                stat = os.stat(path)
                found[name] = (stat.st_size, stat.st_mtime_ns)
            except OSError:  # a link to nowhere, or gone by now; reading it will say so
                found[name] = (-1, -1)
    if not found:
        raise errors.DataError(f"{folder}: expected images ({', '.join(pipeline.ENDINGS)}), found none and {others} other files.")
    return found, others


def _embed(model, folder, todo, store, pixels, size, batch, every, progress):
    """Brings the images of `todo`, {name: stamp}, into the store, or what is wrong with them."""
    from keras_vit.data import pipeline

    names, done, pending = list(todo), 0, {}

    def save(upto):
        """Writes what is known of the images before that number."""
        nonlocal done, pending
        gone = [name for name in names[done:upto] if name not in pending]
        reasons = pipeline.why_broken([os.path.join(folder, name) for name in gone]) if gone else []
        store.add({name: (todo[name], row) for name, row in pending.items()})
        store.broken |= {name: (todo[name], why) for name, (_, why) in zip(gone, reasons)}
        store.save()
        done, pending = upto, {}
        if progress:
            progress(done, len(names))

    if not names:
        return
    source = pipeline.open_files([os.path.join(folder, name) for name in names])
    for numbers, images, _ in pipeline.numbered_batches(source, size=size, batch=batch, pixels=pixels).as_numpy_iterator():
        rows = np.asarray(model.encode_image(images, batch_size=batch), np.float32)
        for number, row in zip(numbers, rows):
            if not np.isfinite(row).all():
                raise errors.NonFiniteError(
                    f"{os.path.join(folder, names[number])}: its embedding is NaN or infinite; check the model's weights."
                )
            pending[names[number]] = row
        if numbers[-1] + 1 - done >= every:
            save(numbers[-1] + 1)
    if done < len(names):
        save(len(names))


# --- the files of an index


def _locked(place):
    """A context in which no other process writes the index."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(place / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            _log.warning("%s: another process is at work on this index; waiting for it", place)
            lock.acquire()
    except OSError as error:
        raise errors.CacheError(
            f"{place}: the index cannot be written there ({error.strerror}); name a folder for it by cache= or --cache."
        ) from error
    return lock


class _Store:
    """The index in a folder: rows {name: (stamp, vector)} and broken {name: (stamp, reason)}, where a stamp is (size, time).

    What is on disk: parts [(file, sha256, [[name, size, time]])] in the order of writing; of a name that is in several the last
    one counts. A part is never changed.
    """

    def __init__(self, place, about):
        self.place, self.about, self.parts, self.rows, self.broken, self.width = place, about, [], {}, {}, None
        try:
            record = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(MANIFEST, error) from error
        try:
            if record["about"] != about:
                raise ValueError("it is the index of another model or folder")
            self.broken = {str(name): ((int(size), int(time)), str(why)) for name, size, time, why in record["broken"]}
            for part in record["parts"]:
                self._read(part)
        except (KeyError, TypeError, ValueError, AttributeError, OSError, EOFError) as error:
            raise self._damaged(MANIFEST, error) from error
        for name, (stamp, _) in self.broken.items():
            if name in self.rows and self.rows[name][0] != stamp:
                del self.rows[name]  # it could be read before it was changed

    def _damaged(self, file, error):
        return errors.CacheError(
            f"{self.place / file}: expected the index that was written there, got another ({type(error).__name__}: {error}). "
            f"Delete {self.place} to have it made anew."
        )

    def _read(self, part):
        file, digest, images = part["file"], part["sha256"], part["images"]
        if not re.fullmatch(r"[0-9a-f]{16}\.npy", file):
            raise ValueError(f"{file!r} is no name of its files")
        rows = np.load(self.place / file, mmap_mode="r", allow_pickle=False)
        width = rows.shape[-1] if self.width is None else self.width
        if rows.dtype != np.float32 or rows.shape != (len(images), width) or not rows.flags.c_contiguous:
            raise ValueError(f"{file} holds {rows.dtype} of shape {rows.shape}, expected float32 of {(len(images), width)}")
        rows = np.array(rows)
        if hashlib.sha256(rows.data).hexdigest() != digest:
            raise ValueError(f"{file} has other content than was written")
        self.width = width
        self.parts.append((file, digest, images))
        self.rows |= {str(name): ((int(size), int(time)), row) for (name, size, time), row in zip(images, rows)}

    def differs(self, found):
        """Whether the index is not exactly that of `found`, {name: stamp}, in one part."""
        known = {name: stamp for name, (stamp, _) in (self.rows | self.broken).items()}
        return known != found or len(self.parts) > 1

    def keep(self, found):
        """Forgets what is not in `found`. Returns how many, and {name: stamp} of what is not known yet."""
        before = len(self.rows) + len(self.broken)
        for known in (self.rows, self.broken):
            for name in [name for name, (stamp, _) in known.items() if found.get(name) != stamp]:
                del known[name]
        todo = {name: stamp for name, stamp in sorted(found.items()) if name not in self.rows and name not in self.broken}
        return before - len(self.rows) - len(self.broken), todo

    def add(self, rows):
        """Writes rows, {name: (stamp, vector)}, as one part more."""
        if not rows:
            return
        array = np.stack([row for _, row in rows.values()])
        digest = hashlib.sha256(array.data).hexdigest()
        file = f"{hashlib.sha256(repr(list(rows)).encode() + digest.encode()).hexdigest()[:16]}.npy"
        with self._writing(file) as temporary, open(temporary, "wb") as stream:
            np.save(stream, array, allow_pickle=False)
        self.parts.append((file, digest, [[name, *stamp] for name, (stamp, _) in rows.items()]))
        self.rows |= rows

    def save(self):
        """Writes the manifest, then removes the files that it does not name."""
        record = dict(
            about=self.about, parts=[dict(file=file, sha256=digest, images=images) for file, digest, images in self.parts],
            broken=[[name, *stamp, why] for name, (stamp, why) in self.broken.items()],
        )  # fmt: skip
        with self._writing(MANIFEST) as temporary:
            pathlib.Path(temporary).write_text(json.dumps(record), encoding="utf-8")
        named = {MANIFEST, *(file for file, *_ in self.parts)}
        for path in self.place.iterdir():
            if path.suffix in (".npy", ".json") and path.name not in named:  # also what a killed run left half-written
                path.unlink(missing_ok=True)

    def compact(self):
        """Writes all rows as one part."""
        rows, self.parts = dict(sorted(self.rows.items())), []
        self.add(rows)
        self.save()

    @contextlib.contextmanager
    def _writing(self, file):
        try:
            with files.replacing(self.place / file) as temporary:
                yield temporary
        except OSError as error:
            raise errors.CacheError(f"{self.place}: the index cannot be written there ({error.strerror}).") from error


# --- the contact sheet

_MARGIN, _LINE = 12, 20  # pixels
_LETTERS = 500  # of a line, from its end
_PAPER, _INK, _PALE = (255, 255, 255), (20, 20, 20), (232, 232, 232)


def contact_sheet(found, hits, title, *, columns=4, side=224):
    """A picture of the images that a search found, in the order of their scores, with score and name below each.

    Images are shown whole, as they are stored: EXIF orientation is ignored here as it is for the model. Where a line is too long
    its beginning is left out; what is not printable or not of Latin-1 is written as Python escapes it, "\\u72ac".

    Args:
        found: of `index`.
        hits: of `search`, one or more.
        title: the line on top, such as the text that was looked for.
        columns: images side by side.
        side: pixels of the square that each has.

    Returns:
        (H, W, 3) uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    from keras_vit.data import pipeline

    font = ImageFont.load_default(size=14)
    columns, cell = min(columns, len(hits)), side + 2 * _LINE
    rows = -(-len(hits) // columns)
    width = _MARGIN + columns * (side + _MARGIN)
    sheet = Image.new("RGB", (width, 2 * _MARGIN + _LINE + rows * (cell + _MARGIN)), _PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(x, y, text, room):
        text = "".join(each if each.isprintable() and ord(each) < 256 else ascii(each)[1:-1] for each in text[-_LETTERS:])
        cut = text
        while draw.textlength(cut, font) > room and text:
            text = text[1:]
            cut = f"...{text}"
        draw.text((x, y), cut, _INK, font)

    write(_MARGIN, _MARGIN, title, width - 2 * _MARGIN)
    for number, hit in enumerate(hits):
        x = _MARGIN + number % columns * (side + _MARGIN)
        y = 2 * _MARGIN + _LINE + number // columns * (cell + _MARGIN)
        draw.rectangle((x, y, x + side - 1, y + side - 1), _PALE)
        try:
            image = Image.fromarray(pipeline.read_image(os.path.join(found.folder, hit.name)))
        except errors.DataError:
            write(x + 8, y + side // 2, "cannot be read any more", side - 16)
        else:
            scale = side / max(image.size)
            image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
            sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))
        write(x, y + side, f"{number + 1}   {hit.score:.3f}", side)
        write(x, y + side + _LINE, hit.name, side)
    return np.asarray(sheet)
