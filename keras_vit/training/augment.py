"""Light augmentation of batches on tf.data; the crop and flip of the original are in `data.pipeline`."""

import tensorflow as tf


def shifted(batches, seed, start=0):
    """Moves every image of (b, h, w, c) batches by up to an eighth of its side, up or down and left or right.

    The distances are uniform, rounded to whole pixels (for 8 pixels: half of the images stay, a quarter moves either way). What
    moves in repeats the border. They are a function of `seed` and the batch's number alone.

    Args:
        batches: `tf.data.Dataset` of (images, labels).
        seed: whole number.
        start: number of the first batch.
    """

    def shift(number, pair):
        images, labels = pair
        count, height, width = tf.unstack(tf.shape(images)[:3])
        reach = tf.cast([height, width], tf.float32) / 8
        draws = tf.random.stateless_uniform([count, 2], tf.stack([tf.constant(seed, tf.int64), number + start]), -1.0, 1.0)
        moves = tf.cast(tf.round(draws * reach), tf.int32)
        rows = tf.clip_by_value(tf.range(height) + moves[:, :1], 0, height - 1)
        columns = tf.clip_by_value(tf.range(width) + moves[:, 1:], 0, width - 1)
        moved = tf.gather(tf.gather(images, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
        return tf.ensure_shape(moved, images.shape), labels

    return batches.enumerate().map(shift, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(2)
