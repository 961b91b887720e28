"""Image-text retrieval, both ways: which captions an image finds among all, and which images a caption finds.

    found = retrieval(model.encode_image(images), model.encode_text(captions), image_of=[0, 0, 1, 1, 2])
    found.image_to_text.at[1], found.text_to_image.at[5]

The figures are those of google-research/big_vision (`evaluators/proj/image_text/image_text_retrieval.py`), ties excepted: there
the order of the files decides them, here they count against the model.
"""

import dataclasses

import numpy as np

from keras_vit import errors, zoo
from keras_vit.evaluation import classify

AT = (1, 5, 10)
SCORES = 2**24  # held at once, 64 MiB


@dataclasses.dataclass(frozen=True)
class Recall:
    """One direction.

    Attributes:
        queries: how many were asked for; those that have a right answer at all.
        candidates: how many each was looked for among.
        at: {k: share of the queries that have a right answer among the best k}.
        intervals: {k: (low, high)}, see `classify.wilson_interval`; narrower than the truth where captions share an image.
        median_rank: of the best right answer, 1 for the first place; None where half of the queries could not be asked.
        tied: how many queries have a wrong answer of exactly the score of their best right one.
    """

    queries: int
    candidates: int
    at: dict
    intervals: dict
    median_rank: float | None
    tied: int


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """What `retrieval` found.

    Attributes:
        image_to_text, text_to_image: a `Recall` each.
        images_without: images that no caption is of: wrong answers to captions, and asked for none.
        unreadable: images that are not there; they and their captions count as not found.
    """

    image_to_text: Recall
    text_to_image: Recall
    images_without: int
    unreadable: int


def retrieval(images, texts, image_of, at=AT, missing=()):
    """Recall at k between images and their captions, by the dot product of their embeddings.

    A query is found at k if fewer than k wrong answers score as high as its best right one or higher, so that equal embeddings,
    as of one caption under two images, are a tie that counts against the model. Memory beyond the embeddings is bounded.

    Args:
        images: (n, d) embeddings.
        texts: (m, d) embeddings.
        image_of: (m,) for each text the number of its image, from 0; an image may have several texts, or none.
        at: the numbers k, each above 0.
        missing: numbers of images that could not be read, whose embeddings do not count.

    Returns:
        A `Retrieval`.

    Raises:
        errors.ArgumentError: shapes or numbers that do not fit together.
        errors.NonFiniteError: an embedding is not finite.
        errors.DataError: all images are missing.
    """
    images, texts = (_embeddings(each, what) for each, what in ((images, "images"), (texts, "texts")))
    image_of, missing = _whole(image_of, "image_of", len(images)), _whole(missing, "missing", len(images))
    if images.shape[1:] != texts.shape[1:] or len(texts) != len(image_of):
        raise errors.ArgumentError(
            f"retrieval: expected images (n, d), texts (m, d) and image_of (m,), got {images.shape}, {texts.shape} and "
            f"{image_of.shape}; do both come from one model?"
        )
    at = tuple(at)
    if not at or not all(isinstance(k, (int, np.integer)) and not isinstance(k, bool) and k > 0 for k in at):
        raise errors.ArgumentError(f"retrieval: expected at to be whole numbers above 0, got {at}.")
    there = np.ones(len(images), bool)
    there[missing] = False
    if not there.any():
        raise errors.DataError(f"retrieval: none of the {len(images)} images could be read; check the files.")
    for what, rows in (("an image", images[there]), ("a text", texts)):
        if not np.isfinite(rows).all():
            raise errors.NonFiniteError(f"retrieval: the embedding of {what} is NaN or infinite; check weights and inputs.")
    numbers = np.arange(len(images))
    captioned = np.isin(numbers, image_of)
    shown, captions = numbers[there], there[image_of]
    to_text = _ranks(images[there & captioned], numbers[there & captioned], texts, image_of)
    to_image = _ranks(texts[captions], image_of[captions], images[there], shown)
    return Retrieval(
        _recall(*to_text, int(np.count_nonzero(captioned)), len(texts), at),
        _recall(*to_image, len(texts), len(shown), at),
        int(np.count_nonzero(~captioned)),
        int(np.count_nonzero(~there)),
    )


def evaluate(model, source, *, batch=32):
    """`retrieval` of a data set of images with captions.

    Args:
        model: with `image_tower`, `encode_image` and `encode_text`.
        source: of `keras_vit.data.captions.open_captions`, with captions themselves, not sentences of classes.
        batch: images at once, and texts.

    Returns:
        (a `Retrieval`, [(file, reason)] of images that cannot be read).

    Raises:
        errors.DataError: no image can be read; a file could not be read, and a moment later it could.
        tf.errors.OpError: an example of a TFDS data set cannot be read; see `pipeline.raise_unreadable`.
    """
    from keras_vit.data import pipeline  # imports TensorFlow

    size, pixels = model.image_tower.input_shape[1:3], zoo.pixels_of(model)
    rows, said = {}, dict(enumerate(each.split("\n") for each in source.captions))
    for numbers, images, texts in pipeline.numbered_batches(source, size=size, batch=batch, pixels=pixels).as_numpy_iterator():
        rows |= zip(numbers.tolist(), model.encode_image(images, batch_size=batch))
        said |= {number: text.decode().split("\n") for number, text in zip(numbers.tolist(), texts)}
    missing = [number for number in said if number not in rows]
    broken = pipeline.why_broken([source.paths[number] for number in missing]) if missing else []
    if not rows:
        raise errors.DataError(f"{source.dataset}: none of its {len(said)} images can be read; check its split and the files.")
    images = np.zeros((len(said), len(next(iter(rows.values())))), np.float32)
    images[list(rows)] = list(rows.values())
    image_of = [number for number, texts in sorted(said.items()) for _ in texts]
    unique = list(dict.fromkeys(text for texts in said.values() for text in texts))  # the same words are embedded once
    place = {text: at for at, text in enumerate(unique)}
    texts = model.encode_text(unique, batch_size=batch)[[place[text] for _, texts in sorted(said.items()) for text in texts]]
    return retrieval(images, texts, image_of, missing=missing), broken


def _embeddings(rows, what):
    rows = np.asarray(rows)
    if rows.ndim != 2 or not len(rows) or rows.dtype.kind != "f":
        raise errors.ArgumentError(
            f"retrieval: expected {what} as embeddings (rows, d) of floats, at least one, got {rows.dtype} of shape {rows.shape}."
        )
    return rows.astype(np.float32, copy=False)


def _whole(values, what, below):
    values = np.asarray(values)
    if values.size == 0:
        return np.zeros(0, np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= below:
        raise errors.ArgumentError(
            f"retrieval: expected {what} to be numbers of images, 0 to {below - 1}, got {values.dtype} of shape {values.shape}"
            f"{f', {values.min()} to {values.max()}' if values.dtype.kind in 'iu' else ''}."
        )
    return values.astype(np.int64)


def _ranks(queries, groups, candidates, candidate_groups):
    """(wrong answers before or beside the best right one, whether one is beside it), of each query; right is of the same group.

    Equal candidates are scored once: in a product of matrices they might differ in the last bit by where they stand.
    """
    candidates, place = np.unique(candidates, axis=0, return_inverse=True)
    place, step = place.reshape(-1), max(1, SCORES // len(candidate_groups))
    ranks, tied = np.zeros(len(queries), np.int64), np.zeros(len(queries), bool)
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        scores = (queries[rows] @ candidates.T)[:, place]
        right = groups[rows, None] == candidate_groups
        best = np.max(scores, axis=1, where=right, initial=-np.inf)[:, None]
        ranks[rows] = np.sum((scores >= best) & ~right, axis=1)
        tied[rows] = np.any((scores == best) & ~right, axis=1)
    return ranks, tied


def _recall(ranks, tied, queries, candidates, at):
    """A `Recall`; queries beyond the ranks were not found."""
    found = {k: int(np.sum(ranks < k)) for k in at}
    median = np.median([*(ranks + 1.0), *[np.inf] * (queries - len(ranks))])
    return Recall(
        queries=queries,
        candidates=candidates,
        at={k: count / queries for k, count in found.items()},
        intervals={k: classify.wilson_interval(count, queries) for k, count in found.items()},
        median_rank=float(median) if np.isfinite(median) else None,
        tied=int(tied.sum()),
    )
