"""The tokenizers of `text` as TensorFlow operations: whole batches at once, all tables as constants of the graph.

A batch of texts is one vector of code points beside the `splits` at which rows begin and end, int32, as in a ragged tensor. What
Python does character by character is done for all places at once: the longest entry of a table at each place, then which places
are reached by going from one to the next.
"""

import numpy as np
import tensorflow as tf

from keras_vit.data.text import SPACE

_CODES = 2**21  # above every code point


class Trie:
    """{text: number} as sorted edges, to be walked by binary search.

    Args:
        entries: dict of texts that are not empty, and numbers from 0.
    """

    def __init__(self, entries):
        self._edges, values = {}, [-1]
        for text, number in entries.items():
            state = 0
            for char in text:
                state = self._edges.setdefault(state * _CODES + ord(char), len(values))
                if state == len(values):
                    values.append(-1)
            values[state] = number
        self._keys = np.array(sorted(self._edges), np.int64)
        self._states = np.array([self._edges[key] for key in self._keys.tolist()], np.int32)
        self._values, self._depth = np.array(values, np.int32), max(map(len, entries), default=0)

    def state(self, text):
        """Where a text leads from the root; -1 where no entry begins with it."""
        state = 0
        for char in text:
            state = self._edges.get(state * _CODES + ord(char), -1) if state >= 0 else -1
        return state

    def matches(self, codes, ends, state=0):
        """For each length from 1, the numbers (n,) of the entries that lie at each place; -1 where none does.

        Args:
            codes: code points (n,).
            ends: for each place, that at which its match must have ended.
            state: where to begin, for all places or each.
        """
        keys, states, values = map(tf.constant, (self._keys, self._states, self._values))  # once in a graph
        places, last, found = tf.range(tf.size(codes)), tf.size(codes) - 1, []
        state = tf.zeros_like(codes) + state
        for step in range(self._depth):
            key = tf.cast(state, tf.int64) * _CODES + tf.cast(tf.gather(codes, tf.minimum(places + step, last)), tf.int64)
            edge = tf.minimum(tf.searchsorted(keys, key), len(self._keys) - 1)
            met = (places + step < ends) & (tf.gather(keys, edge) == key)
            state = tf.where(met, tf.gather(states, edge), -1)
            found.append(tf.where(met, tf.gather(values, tf.maximum(state, 0)), -1))
        return found

    def longest(self, codes, ends, state=0):
        """Length and number of the longest entry at each place, each (n,): 0 and -1 where none lies."""
        length, number = tf.zeros_like(codes), tf.zeros_like(codes) - 1
        for step, found in enumerate(self.matches(codes, ends, state)):
            length, number = tf.where(found >= 0, step + 1, length), tf.where(found >= 0, found, number)
        return length, number


class Rules:
    """What texts become, {text: other}: at each place the longest that fits; `kept` are those that come first and stay.

    Args:
        rules: dict of str.
        kept: texts that no rule touches.
    """

    def __init__(self, rules, kept=()):
        others = [[ord(char) for char in other] for other in rules.values()]
        self._trie = Trie({text: number for number, text in enumerate(rules)})
        self._kept = Trie({text: 0 for text in kept})
        self._counts = np.array([*map(len, others), 0], np.int32)  # not empty where there is no rule
        self._begins = np.cumsum([0, *self._counts[:-1]], dtype=np.int32)
        self._others = np.array([code for other in others for code in other], np.int32)

    def __call__(self, codes, splits):
        """codes, splits -> codes, splits."""
        places, ends = tf.range(tf.size(codes)), tf.gather(splits, _rows(splits) + 1)
        length, number = self._trie.longest(codes, ends)
        begin = tf.where(length > 0, tf.gather(self._begins, tf.maximum(number, 0)), len(self._others) + places)
        count = tf.where(length > 0, tf.gather(self._counts, tf.maximum(number, 0)), 1)
        kept, _ = self._kept.longest(codes, ends)
        begin, count = tf.where(kept > 0, len(self._others) + places, begin), tf.where(kept > 0, kept, count)
        step = tf.where(kept > 0, kept, tf.maximum(length, 1))
        count = tf.where(_reached(_row_begins(codes, splits), places + step), count, 0)
        codes = tf.gather(tf.concat([self._others, codes], 0), tf.ragged.range(begin, begin + count).values)
        return codes, tf.gather(tf.concat([[0], tf.cumsum(count)], 0), splits)


class WordPieceGraph:
    """`text.WordPiece` of string tensors.

    Args:
        pieces: {word: number}.
        folds: {character: what it becomes}.
        alone: code points of the characters that are words, sorted.
        first, unknown: tokens.
        word_bytes: of the longest word that is looked into.
    """

    def __init__(self, pieces, folds, alone, first, unknown, word_bytes):
        self._pieces, self._folds = Trie(pieces), Rules(folds)
        self._first, self._unknown, self._word_bytes = first, unknown, word_bytes
        gaps = np.flatnonzero(np.diff(alone) > 1)
        begins, ends = np.array(alone)[[0, *(gaps + 1)]], np.array(alone)[[*gaps, -1]] + 1
        self._alone = np.stack([begins, ends], 1).reshape(-1).astype(np.int32)  # where a range begins, where it ends, ...

    def __call__(self, texts, length):
        """(b,) string -> (b, length) int32."""
        codes, splits = self._folds(*_decoded(texts))
        size, texts = tf.size(codes), tf.size(splits) - 1
        # Which characters begin a word; of each, which word it is of and where that ends
        space = codes == ord(" ")
        alone = tf.searchsorted(self._alone, codes, side="right") % 2 == 1
        after = tf.concat([[True], space | alone], 0)[:-1]
        begins = ~space & (after | alone | _row_begins(codes, splits))
        words = tf.maximum(tf.cumsum(tf.cast(begins, tf.int32)) - 1, 0)

        def of_word(most, values):
            found = most(tf.where(space, 0, values), words, size + 1)
            return tf.gather(found, words)

        ends = of_word(tf.math.unsorted_segment_max, tf.range(1, size + 1))
        octets = sum(tf.cast(codes >= least, tf.int32) for least in (0, 0x80, 0x800, 0x10000))  # in UTF-8
        octets = of_word(tf.math.unsorted_segment_sum, octets)
        # The longest piece at each character, and the characters to which those from the first of a word lead
        state = tf.where(begins, 0, self._pieces.state("##"))
        step, piece = self._pieces.longest(codes, tf.where(space, 0, ends), state)
        reached = _reached(begins, tf.where(step > 0, tf.range(size) + step, size)) & ~space
        stuck = of_word(tf.math.unsorted_segment_max, tf.cast(reached & (step == 0), tf.int32))
        unknown = (stuck > 0) | (octets > self._word_bytes)
        tokens = _padded(tf.where(unknown, self._unknown, piece), splits, tf.where(unknown, begins, reached), length - 1, 0)
        return tf.concat([tf.fill([texts, 1], self._first), tokens], 1)


class UnigramGraph:
    """`text.SentencePiece` of string tensors.

    Args:
        pieces: {text: number}.
        scores: of all numbers, log probabilities; unknown_score: that of an unknown character.
        unknown, end: tokens.
        rules, own: of the normaliser: {text: what it becomes}, and the texts that it leaves as they are.
        prefix: whether a text begins with the mark of a space. tidy: whether spaces at its ends, and all but one between, go.
    """

    def __init__(self, pieces, scores, unknown, unknown_score, end, rules, own, prefix, tidy):
        self._pieces, self._scores, self._rules = Trie(pieces), np.array(scores, np.float64), Rules(rules, own)
        self._unknown, self._unknown_score, self._end, self._prefix, self._tidy = unknown, unknown_score, end, prefix, tidy

    def __call__(self, texts, length):
        """(b,) string -> (b, length) int32."""
        codes, splits = _decoded(texts)
        codes, splits = self._spaced(*self._rules(codes, splits), splits[1:] > splits[:-1])
        pieces = tf.stack(self._pieces.matches(codes, tf.gather(splits, _rows(splits) + 1)), 1)  # (n, longest)
        pieces = tf.concat([pieces, tf.fill([1, pieces.shape[1]], -1)], 0)  # the last for places behind the end of a row
        b, n = tf.size(splits) - 1, tf.reduce_max(tf.concat([splits[1:] - splits[:-1], [1]], 0))
        steps = self._best(pieces, splits, n)
        # Back from the end of each text, over b * (n + 1) places between characters
        before = tf.range(1, n + 1) - steps
        jump = tf.concat([tf.zeros([b, 1], tf.int32), before], 1) + tf.range(b)[:, None] * (n + 1)
        ends = tf.range(n + 1) == (splits[1:] - splits[:-1])[:, None]
        reached = tf.reshape(_reached(tf.reshape(ends, [-1]), tf.reshape(jump, [-1])), [b, n + 1])[:, 1:]
        row = tf.cast(tf.where(reached)[:, 0], tf.int32)
        begin = tf.boolean_mask(before, reached) + tf.gather(splits, row)
        tokens = tf.gather_nd(pieces, tf.stack([begin, tf.boolean_mask(steps, reached) - 1], 1))
        tokens = tf.where(tokens < 0, self._unknown, tokens)
        again = (tokens[1:] == self._unknown) & (tokens[:-1] == self._unknown) & (row[1:] == row[:-1])
        splits = tf.searchsorted(row, tf.range(b + 1))
        keep = tf.concat([tf.ones_like(row[:1], tf.bool), ~again], 0)
        tokens = _padded(tokens, splits, keep, length - 1, self._end)
        return tf.concat([tokens, tf.fill([b, 1], self._end)], 1)

    def _spaced(self, codes, splits, filled):
        """With spaces marked; `filled` says which texts had something in them."""
        if self._tidy:
            after = tf.concat([[True], codes == ord(" ")], 0)[:-1] | _row_begins(codes, splits)
            codes, splits = _kept(codes, splits, ~(after & (codes == ord(" "))))
        codes = tf.where(codes == ord(" "), ord(SPACE), codes)
        if self._prefix:
            marks = tf.RaggedTensor.from_row_lengths(
                tf.fill([tf.reduce_sum(tf.cast(filled, tf.int32))], ord(SPACE)), tf.cast(filled, tf.int32), validate=False
            )
            both = tf.concat([marks, tf.RaggedTensor.from_row_splits(codes, splits, validate=False)], 1)
            codes, splits = both.values, both.row_splits
        if self._tidy:
            rows, places = _rows(splits), tf.range(tf.size(codes))
            ends = tf.math.unsorted_segment_max(tf.where(codes == ord(SPACE), 0, places + 1), rows, tf.size(splits) - 1)
            codes, splits = _kept(codes, splits, places < tf.gather(ends, rows))
        return codes, splits

    def _best(self, pieces, splits, n):
        """(b, n): of the best split of each text up to each of its characters, the length of the last piece."""
        b, longest = tf.size(splits) - 1, pieces.shape[1]
        least = tf.fill([b, 1], np.float32(-np.inf))

        def advance(i, now, best, steps, found):
            """`now` (b,) is the score up to character i; `best`, `steps` (b, longest) up to those after it, as far as known."""
            here = splits[:-1] + i
            here = tf.gather(pieces, tf.where(here < splits[1:], here, splits[-1]))
            score = tf.gather(self._scores, tf.maximum(here, 0)) + tf.cast(now, tf.float64)[:, None]
            better = (here >= 0) & (score > tf.cast(best, tf.float64))
            best = tf.where(better, tf.cast(score, tf.float32), best)
            steps = tf.where(better, tf.range(1, longest + 1), steps)
            alone = now + self._unknown_score
            better = (here[:, 0] < 0) & (alone > best[:, 0])
            now = tf.where(better, alone, best[:, 0])
            found = found.write(i, tf.where(better, 1, steps[:, 0]))
            return i + 1, now, tf.concat([best[:, 1:], least], 1), tf.concat([steps[:, 1:], tf.ones_like(steps[:, :1])], 1), found

        start = (0, tf.zeros([b]), tf.tile(least, [1, longest]), tf.ones([b, longest], tf.int32))
        found = tf.TensorArray(tf.int32, n, element_shape=[None])
        *_, found = tf.while_loop(lambda i, *_: i < n, advance, (*start, found))
        return tf.transpose(found.stack())


def _decoded(texts):
    """(b,) string -> codes, splits."""
    found = tf.strings.unicode_decode(tf.ensure_shape(tf.convert_to_tensor(texts, tf.string), [None]), "UTF-8", errors="replace")
    return found.values, tf.cast(found.row_splits, tf.int32)


def _rows(splits):
    """The row of each place."""
    return tf.repeat(tf.range(tf.size(splits) - 1), splits[1:] - splits[:-1])


def _row_begins(codes, splits):
    """Which places are the first of their row."""
    return tf.scatter_nd(splits[:-1, None], tf.ones_like(splits[:-1]), [tf.size(codes) + 1])[:-1] > 0


def _kept(codes, splits, keep):
    """Codes and splits of the places that are kept."""
    return tf.boolean_mask(codes, keep), tf.gather(tf.concat([[0], tf.cumsum(tf.cast(keep, tf.int32))], 0), splits)


def _reached(first, jump):
    """Which places (n,) the `first` lead to, these included, each to its `jump`, a place or n; paths double in each round.

    A place that jumps to itself ends a path; it may be missing where a path ends.
    """
    size = tf.size(jump)
    jump, flags = tf.concat([jump, [size]], 0), tf.concat([tf.cast(first, tf.int32), [0]], 0)

    def double(flags, jump):
        return tf.maximum(flags, tf.math.unsorted_segment_max(flags, jump, size + 1)), tf.gather(jump, jump)

    flags, _ = tf.while_loop(lambda _, jump: tf.reduce_any(tf.gather(jump, jump) != jump), double, (flags, jump))
    return flags[:-1] > 0


def _padded(values, splits, keep, width, filler):
    """(b, width) of the values that are kept, cut or filled up."""
    values, splits = _kept(values, splits, keep)
    return tf.RaggedTensor.from_row_splits(values, splits, validate=False).to_tensor(filler, shape=(None, width))
