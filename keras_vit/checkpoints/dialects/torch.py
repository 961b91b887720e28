"""PyTorch's spelling: weight / bias; matrices (out, in), convolutions (out, in, h, w); statistics of batch norms are buffers."""

from keras_vit.checkpoints.names import constant, rule
from keras_vit.checkpoints.transforms import Part, Turned

MATRIX = Turned((1, 0))
FILTER = Turned((3, 2, 0, 1))


def param(original, ours):
    return rule(original, ours)


def weight(original, ours, transform=MATRIX):
    """A layer without bias."""
    return [rule(f"{original}.weight", f"{ours}/kernel", transform)]


def linear(original, ours):
    return [*weight(original, ours), rule(f"{original}.bias", f"{ours}/bias")]


def conv(original, ours):
    return [*weight(original, ours, FILTER), rule(f"{original}.bias", f"{ours}/bias")]


def pointwise(original, ours):
    """A convolution with a kernel of 1 x 1, (out, in, 1, 1), into a matrix (in, out)."""
    return [*weight(original, ours, Turned((1, 0), (1, 1, 0, 0))), rule(f"{original}.bias", f"{ours}/bias")]


def depthwise(original, ours):
    """A convolution of as many groups as channels, (c, 1, h, w), into Keras's kernel (h, w, c, 1)."""
    return [*weight(original, ours, Turned((2, 3, 0, 1))), rule(f"{original}.bias", f"{ours}/bias")]


def mlp(original, ours):
    """The two dense layers of an MLP block."""
    return [*linear(f"{original}.fc1", f"{ours}/fc1"), *linear(f"{original}.fc2", f"{ours}/fc2")]


def norm(original, ours):
    return [rule(f"{original}.weight", f"{ours}/gamma"), rule(f"{original}.bias", f"{ours}/beta")]


def batch_norm(original, ours):
    """Scale, shift and statistics; the count of training steps is kept for the way back."""
    return [
        *norm(original, ours),
        rule(f"{original}.running_mean", f"{ours}/moving_mean"),
        rule(f"{original}.running_var", f"{ours}/moving_variance"),
        constant(f"{original}.num_batches_tracked", f"{ours}/moving_mean"),
    ]


def qkv(original, ours, bias=True):
    """Query, key and value in one matrix (3 * d, d): ours keeps parts, heads and their numbers as axes."""
    rules = [rule(f"{original}.weight", f"{ours}/qkv_kernel", Turned((1, 2, 3, 0), (3, 1)))]
    return [*rules, rule(f"{original}.bias", f"{ours}/qkv_bias", Turned((0, 1, 2), (3,)))] if bias else rules


def attention_out(original, ours):
    return [
        rule(f"{original}.weight", f"{ours}/out_kernel", Turned((2, 0, 1), (1, 2))),
        rule(f"{original}.bias", f"{ours}/out_bias"),
    ]


def attention(original, ours, bias=True):
    """timm's spelling, which the authors' repositories follow: `qkv` fused, `proj` behind it."""
    return [*qkv(f"{original}.qkv", ours, bias), *attention_out(f"{original}.proj", ours)]


def split_attention(original, ours, out, names=("query", "key", "value"), biases=(0, 1, 2)):
    """Query, key and value in a matrix (d, d) each, as Hugging Face keeps them; `out` is the projection behind them.

    Args:
        biases: which of the three have a bias; our `qkv_bias` then has as many parts.
    """
    kernels = [
        rule(f"{original}.{name}.weight", f"{ours}/qkv_kernel", Turned((1, 2, 0), (2, 1), Part(index, 3, 1)))
        for index, name in enumerate(names)
    ]
    shifts = [
        rule(f"{original}.{names[part]}.bias", f"{ours}/qkv_bias", Turned((0, 1), (2,), Part(index, len(biases), 0)))
        for index, part in enumerate(biases)
    ]
    return [*kernels, *shifts, *attention_out(out, ours)]


def block(original, ours, nth="", our_nth=""):
    """timm's spelling of a pre-norm block but for its attention; scales of its branches, which not all blocks have, included.

    Args:
        nth, our_nth: what marks the second branches of a parallel block, in the original's names and in ours.
    """
    end = nth and f"_{nth}"
    return [
        *norm(f"{original}.norm1{nth}", f"{ours}/attention_norm{our_nth}"),
        param(f"{original}.gamma_1{end}", f"{ours}/attention{our_nth}_scale/gamma"),
        *norm(f"{original}.norm2{nth}", f"{ours}/mlp_norm{our_nth}"),
        *mlp(f"{original}.mlp{nth}", f"{ours}/mlp{our_nth}"),
        param(f"{original}.gamma_2{end}", f"{ours}/mlp{our_nth}_scale/gamma"),
    ]


# Where all arrays of a file lie, and what lies beside them: bare, as a parallel model keeps them, and as training jobs store them
ROOTS = {
    "": (), "module.": (), "model/": ("optimizer/*", "lr_scheduler/*", "scaler/*", "model_ema/*"),
    "model/module.": ("optimizer/*", "lr_scheduler/*", "scaler/*", "model_ema/*"), "model_state/": ("optimizer_state/*",),
    "state_dict/": ("optimizer/*", "amp_scaler/*"), "state_dict_ema/": ("state_dict/*", "optimizer/*", "amp_scaler/*"),
}  # fmt: skip


def spellings(names, style="torch"):
    """{layout: Names} of a family's files under each of `ROOTS`."""
    return {f"{root}{style}": names.under(root, beside) for root, beside in ROOTS.items()}
