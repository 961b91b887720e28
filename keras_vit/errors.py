"""The exceptions of this package. Every message names the object, what was expected, what was got, and the next step."""


class KerasViTError(Exception):
    """Base of every error that keras_vit raises on purpose."""


class ArgumentError(KerasViTError, ValueError):
    """A call's argument is not usable: an unknown name, a wrong size, options that exclude each other."""


class ConfigError(KerasViTError, ValueError):
    """A configuration file, key or value of the console job is not usable."""


class DownloadError(KerasViTError, OSError):
    """A file could not be had from where it was said to be."""


class IntegrityError(DownloadError):
    """A file arrived, or lies in the cache, with other content than expected."""


class CacheError(KerasViTError, OSError):
    """A folder that this package keeps files in, its cache or a run's checkpoints, cannot be read or written."""


class CheckpointFormatError(KerasViTError, ValueError):
    """A file is not a well-formed checkpoint; nothing of it was used."""


class CheckpointMismatchError(KerasViTError, ValueError):
    """A well-formed checkpoint does not fit the model; the model was not touched."""


class DataError(KerasViTError, ValueError):
    """A data set is empty, unreadable or inconsistent."""


class NonFiniteError(KerasViTError, ArithmeticError):
    """A loss, gradient or weight is not a finite number; the step was not made, or not saved."""


class ResumeError(KerasViTError, RuntimeError):
    """A run cannot go on from its checkpoints, or another one is at work in its folder; nothing was changed."""


class TrainingError(KerasViTError, RuntimeError):
    """Training cannot go on: another worker is gone."""


class ExportError(KerasViTError, RuntimeError):
    """A module could not be written or does not reproduce its model; an earlier module is left as it was."""


class UntrustedArtifactError(KerasViTError, ValueError):
    """A module would run a graph that nobody vouches for; it was not loaded."""
