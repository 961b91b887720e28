"""Runs of the main job in a process of its own, as test_strategy.py describes them in JSON.

python child_strategy.py SPECIFICATION, a JSON object of

    out        file for what it found: {"exits": [...], "refused": [...], ...}
    devices    virtual CPU devices of this process
    runs       list of objects: workdir, options; and where they are given
                   stop     [step, signal number]: this process sends itself a signal after that step
                   places   how many of the devices data_parallel takes
                   stand_in true: MirroredStrategy takes the road of TPUStrategy
    refused    arguments of `open_strategy`, for which its messages are noted
    extra      name of a function below whose result is noted too
"""

import functools
import json
import os
import pathlib
import sys

SMALL = dict(weights=None, input_shape=(8, 8, 3), patch_size=4, width=16, depth=1, heads=2, mlp=16, classes=4)


def main():
    specification = json.loads(sys.argv[1])
    devices = specification.get("devices", 1)
    if os.environ.get("KERAS_BACKEND") == "jax":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    else:
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    from keras_vit.training import step, strategy

    real, beyond = strategy.open_strategy, step._beyond
    open_strategy = functools.cache(lambda name: real(name))  # a process can have one of each that has collectives
    closing = []
    strategy.Mesh.close, close = lambda self: closing.append(self), strategy.Mesh.close  # after the last run
    found = {"exits": [], "places": []}
    for run in specification["runs"]:
        step._beyond = (lambda strategy: True) if run.get("stand_in") else beyond
        strategy.open_strategy = functools.partial(opened, real, open_strategy, run, found["places"])
        found["exits"].append(trained(run["workdir"], run["options"], run.get("stop")))
    if "extra" in specification:
        found["extra"] = globals()[specification["extra"]](open_strategy)
    found["refused"] = [refusal(real, arguments) for arguments in specification.get("refused", ())]
    pathlib.Path(specification["out"]).write_text(json.dumps(found))
    if closing:
        close(closing[-1])
    return found["exits"][-1]


def opened(real, open_strategy, run, places, name, model_axis=None):
    import keras

    from keras_vit.training import strategy

    if run.get("places"):
        devices = keras.distribution.list_devices()[: run["places"]]
        distribution = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
        place = strategy.Mesh(distribution, name)
    elif keras.config.backend() == "jax":
        place = real(name, model_axis=model_axis)
    else:
        place = open_strategy(name)
    if run.get("stand_in"):
        place = strategy._Tpu(place.strategy, "tpu")
    places.append([place.name, place.replicas, place.worker, place.workers])
    return place


def trained(workdir, options, stop):
    from keras_vit import main
    from keras_vit.training import callbacks

    arguments = ["main", f"--workdir={workdir}", *options]
    if stop is None:
        main.train(*main.parse(arguments))
        return 0
    step, number = stop
    after = callbacks.Progress.on_train_batch_end

    def stopping(self, batch, logs=None):
        after(self, batch, logs)
        if self.step == step:
            os.kill(os.getpid(), number)

    callbacks.Progress.on_train_batch_end = stopping
    try:
        return main.main(arguments)
    finally:
        callbacks.Progress.on_train_batch_end = after


def refusal(open_strategy, arguments):
    from keras_vit.errors import ArgumentError

    try:
        open_strategy(**arguments)
    except ArgumentError as error:
        return str(error)
    return None


def replicas(open_strategy):
    return {**masks(open_strategy), **moved(open_strategy), "pairs": pairs(open_strategy)}


def moved(open_strategy):
    """Losses of Keras's own `fit` of a model that is made on one device, and compiled and fitted in another strategy's scope."""
    import keras
    import numpy as np

    import keras_vit
    from keras_vit.training.optimizers import MomentumSGD

    random = np.random.default_rng(0)
    x, y = random.standard_normal((8, 8, 8, 3)).astype("float32"), np.eye(4, dtype="float32")[np.arange(8) % 4]
    losses = []
    for name in ("one_device", "mirrored"):
        keras.utils.set_random_seed(0)
        model = keras_vit.ViT(**SMALL)
        place = open_strategy(name)
        with place.scope():
            model.compile(MomentumSGD(0.1), "categorical_crossentropy")
        losses.append(model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0).history["loss"])
    own = [len(place.strategy.experimental_local_results(weight.value)) for weight in model.weights]
    return {"moved": losses, "copies": own, "difference": float(np.max(np.abs(reloaded(model)(x) - model.predict(x, verbose=0))))}


def reloaded(model):
    import tempfile

    import keras

    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        return keras.saving.load_model(f"{folder}/model.keras")


def masks(open_strategy):
    """Gradient norms with dropout, of a batch on one device and of one where each of two replicas has the same examples."""
    import keras
    import numpy as np
    import tensorflow as tf

    import keras_vit
    from keras_vit.training import step
    from keras_vit.training.optimizers import MomentumSGD

    random = np.random.default_rng(0)
    x, y = random.standard_normal((4, 8, 8, 3)).astype("float32"), np.eye(4, dtype="float32")
    found = []
    for name, copies in (("one_device", 1), ("mirrored", 2)):
        place = open_strategy(name)
        keras.utils.set_random_seed(0)
        with place.scope():
            model = keras_vit.ViT(**SMALL, classifier_activation=None, dropout_rate=0.5)
            model.get_layer("head").kernel.assign(np.random.default_rng(1).standard_normal((16, 4)) / 4)
            learner = step.Learner(model.inputs, model.outputs)
            learner.compile(MomentumSGD(0.0), keras.losses.CategoricalCrossentropy(from_logits=True))
        data = tf.data.Dataset.from_tensors((np.concatenate([x] * copies), np.concatenate([y] * copies)))
        found.append(learner.fit(data, epochs=2, verbose=0).history["grad_norm"])
    local = place.strategy.experimental_local_results
    seeds = [[each.numpy().tolist() for each in local(v.value)] for v in learner.non_trainable_variables]
    return {"norms": found, "seeds": seeds}


def pairs(open_strategy):
    """{"kind duplicates": [(losses, gradients) on one device, the same on two replicas]} of the contrastive losses."""
    import numpy as np
    import tensorflow as tf

    from keras_vit.models.lit import Similarity
    from keras_vit.training import contrastive

    random, found = np.random.default_rng(0), {}
    x, tokens = random.standard_normal((2, 8, 4)).astype("float32"), random.integers(0, 2, (8, 2)).astype("int32")
    for kind in contrastive.LOSSES:
        for duplicates in contrastive.DUPLICATES:
            of_places = []
            for name in ("one_device", "mirrored"):
                strategy = getattr(open_strategy(name), "strategy", tf.distribute.get_strategy())
                with strategy.scope():
                    scale = Similarity(7.0, -3.0)
                    scale.build((None, 4), (None, 4))
                layer, count = contrastive.PairLoss(scale, kind, duplicates), strategy.num_replicas_in_sync

                def step(images, texts, tokens, layer=layer, scale=scale):
                    weights = [images, texts, scale.t.value, scale.b.value]
                    with tf.GradientTape() as tape:
                        tape.watch(weights[:2])
                        losses = layer([images, texts, tokens])
                    found = tape.gradient(losses, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
                    return losses, *found

                def cut(part, strategy=strategy, count=count):
                    return strategy.experimental_distribute_values_from_function(
                        lambda context: tf.constant(np.split(part, count)[context.replica_id_in_sync_group])
                    )

                parts = [cut(part) for part in (*x, tokens)]
                results = tf.function(lambda *parts, strategy=strategy, step=step: strategy.run(step, parts))(*parts)
                local = [[each.numpy() for each in strategy.experimental_local_results(result)] for result in results]
                whole = [np.concatenate(each) for each in local[:3]] + [sum(each) for each in local[3:]]
                of_places.append([value.tolist() for value in whole])
            found[f"{kind} {duplicates}"] = of_places
    return found


def reset(open_strategy):
    """The distribution of Keras before and after "one_device" is opened."""
    import keras

    found = [keras.distribution.distribution() is None]
    return [*found, open_strategy("one_device").name, keras.distribution.distribution() is None]


def bare(open_strategy):
    """What Keras's own `fit` says of a model here that was made in a strategy's scope, and of one that was made outside of it."""
    import numpy as np

    import keras_vit
    from keras_vit.errors import ArgumentError

    place = open_strategy("multi_worker")
    found = []
    outside = keras_vit.ViT(**SMALL)
    outside.compile("sgd", "categorical_crossentropy")
    with place.scope():
        inside = keras_vit.ViT(**SMALL)
        for call in (
            lambda: inside.compile("sgd", "categorical_crossentropy"),
            lambda: inside.fit(np.zeros((4, 8, 8, 3)), np.eye(4)),
            lambda: outside.fit(np.zeros((4, 8, 8, 3)), np.eye(4)),
        ):
            try:
                call()
            except ArgumentError as error:
                found.append(str(error))
    return found


if __name__ == "__main__":
    sys.exit(main())
