"""A TF-Hub module as a layer of Keras 3, which `hub.KerasLayer`, a layer of tf_keras, cannot be."""

import difflib
import os
import re

import keras
import tensorflow as tf

from keras_vit.errors import ArgumentError, IntegrityError, UntrustedArtifactError
from keras_vit.hub import manifest


@keras.saving.register_keras_serializable("keras_vit")
class HubLayer(keras.layers.Layer):
    """(b, ...) -> (b, ...): calls a reusable SavedModel, and trains its variables.

        layer = keras_vit.hub.HubLayer("exported/module", trainable=True)
        model = keras.Sequential([keras.Input((224, 224, 3)), layer, keras.layers.Dense(5)])
        model.fit(...)

    A module is a program. One that this package exported is loaded if all its files are as its manifest says; any other, and any
    that is not a local folder, only with the `digest` that you name. On the TensorFlow backend; under a strategy, make it in the
    strategy's scope. In `fit` dropout is alive and the module's regularisation losses count, unless the layer is frozen. A
    `.keras` file holds the handle and the weights: the module itself must still be there.

    Args:
        handle: folder of a module; with `digest` also a handle of TF-Hub, which `tensorflow_hub.resolve` brings.
        trainable: False; True for all that the module declares trainable; or a regular expression: those of them in whose name
            it is found ("block_1[01]/|head/"). Names are those of the exported model's weights, or the variables' own.
        signature: name of a signature to call in place of the module itself; it cannot be trained.
        output_key: which output, where there is a dict of them.
        digest: of `keras_vit.hub.digest`: what the folder must hold.
        **kwargs: of `keras.layers.Layer`.

    Attributes:
        names: {name: Keras variable} of the module.

    Raises:
        ArgumentError: the folder, signature or output is not there, the pattern fits nothing, or a signature is to be trained.
        UntrustedArtifactError: nobody vouches for the module. IntegrityError: its files are other ones.
    """

    def __init__(self, handle, trainable=False, signature=None, output_key=None, digest=None, **kwargs):
        if keras.config.backend() != "tensorflow":
            raise ArgumentError(f"HubLayer: a module runs on TensorFlow, not on {keras.config.backend()}; set KERAS_BACKEND.")
        super().__init__(trainable=bool(trainable), **kwargs, autocast=False)  # the module casts inside, as it was exported
        self.handle, self.tuned, self.signature, self.output_key, self.digest = handle, trainable, signature, output_key, digest
        folder, names = _checked(handle, digest)
        self._module = tf.saved_model.load(folder)  # kept alive: its functions do not hold its variables
        self._function = self._entry(signature)
        if signature and trainable:
            raise ArgumentError(f"{handle}: signature {signature!r} cannot be trained; leave it out, or trainable=False.")
        self.names = self._variables(names)
        self.built = True

    def _entry(self, signature):
        if signature is None:
            if not callable(self._module):
                known = sorted(getattr(self._module, "signatures", {}))
                raise ArgumentError(f"{self.handle}: this module cannot be called itself; name one of its signatures: {known}.")
            return self._module
        if signature not in self._module.signatures:
            known = sorted(self._module.signatures)
            raise ArgumentError(f"{self.handle}: expected a signature among {known}, got {signature!r}.")
        return self._module.signatures[signature]

    def _variables(self, names):
        """Wraps the module's variables, without a copy, and has Keras track them."""
        variables = list(getattr(self._module, "variables", ()))
        declared = {id(v) for v in getattr(self._module, "trainable_variables", ())}
        if names is None or len(names) != len(variables):
            names = [v.name.partition(":")[0] for v in variables]
        chosen = [id(v) in declared for v in variables]
        if isinstance(self.tuned, str):
            chosen = [free and bool(re.search(self.tuned, name)) for free, name in zip(chosen, names)]
            if not any(chosen):
                free = [name for name, v in zip(names, variables) if id(v) in declared]
                near = difflib.get_close_matches(self.tuned, free, 3, cutoff=0.0)
                raise ArgumentError(
                    f"{self.handle}: trainable={self.tuned!r} is found in none of {len(free)} trainable variables; such as: "
                    f"{', '.join(near)}."
                )
        found = {}
        for name, variable, free in zip(names, variables, chosen):
            own = keras.Variable(
                initializer=variable, shape=variable.shape, dtype=variable.dtype.name, trainable=free, name=name.replace("/", "_")
            )
            assert own.value is variable  # as Keras does with a variable of TensorFlow: the module's functions read this one
            self._track_variable(own)
            found[name] = own
        return found

    def call(self, x, training=None):
        arguments = {}
        if self.signature is None and self._takes_training():
            arguments["training"] = bool(training) and self.trainable
        if self.signature:
            (name,) = self._function.structured_input_signature[1]
            y = self._function(**{name: x})
        else:
            y = self._function(x, **arguments)
        if self.trainable:
            for loss in getattr(self._module, "regularization_losses", ()):
                self.add_loss(loss())
        return self._chosen(y)

    def _takes_training(self):
        functions = self._module.__call__.concrete_functions
        given = [function.structured_input_signature for function in functions]
        return any("training" in (by_name or {}) or len(in_order) > 1 for in_order, by_name in given)

    def _chosen(self, y):
        if isinstance(y, dict) and self.output_key is None and len(y) == 1:
            return next(iter(y.values()))
        if self.output_key is None:
            return y
        if not isinstance(y, dict) or self.output_key not in y:
            known = sorted(y) if isinstance(y, dict) else "one tensor"
            raise ArgumentError(f"{self.handle}: expected output_key among {known}, got {self.output_key!r}.")
        return y[self.output_key]

    def get_config(self):
        own = dict(handle=os.fspath(self.handle), signature=self.signature, output_key=self.output_key, digest=self.digest)
        config = {**super().get_config(), **own}
        return {**config, "trainable": self.trainable and self.tuned}


def _checked(handle, digest):
    """(folder, names of its variables or None) of a module that may be loaded."""
    handle = os.fspath(handle)
    if "://" in handle:
        if digest is None:
            raise UntrustedArtifactError(
                f"{handle}: a module from elsewhere is a program from elsewhere. Pass digest=, the sha256 that "
                "keras_vit.hub.digest gives for the folder you trust."
            )
        import tensorflow_hub

        folder = tensorflow_hub.resolve(handle)
    else:
        folder = os.path.abspath(os.path.expanduser(handle))
    if not os.path.isfile(os.path.join(folder, "saved_model.pb")):
        raise ArgumentError(f"{handle}: expected the folder of a module, with saved_model.pb, got none. Pass what export wrote.")
    if digest is None:
        return folder, _names(manifest.verify(folder))
    record = manifest.verify(folder) if os.path.exists(os.path.join(folder, manifest.MANIFEST)) else None
    found = manifest.digest_of(record["files"]) if record else manifest.digest(folder)
    if found != str(digest).lower():
        raise IntegrityError(f"{handle}: expected a module of digest {digest}, got {found}. Get the right one, or pin this one.")
    return folder, record and _names(record)


def _names(record):
    return [variable["name"] for variable in record["variables"]]
