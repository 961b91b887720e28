"""Where a model trains: one device, the GPUs of a machine, several machines, a TPU, on TensorFlow; device meshes on JAX.

place = open_strategy("mirrored")
with place.scope():
    learner = Learner(...)
    learner.compile(...)
learner.fit(place.batches(lambda worker, workers: pipeline.train_batches(..., shard=(worker, workers)), batch=512))
"""

import contextlib
import json
import os
import re

import keras
import numpy as np

from keras_vit import errors
from keras_vit.errors import ArgumentError
from keras_vit.training import state

NAMES = {
    "tensorflow": ("auto", "one_device", "mirrored", "multi_worker", "tpu"),
    "jax": ("auto", "one_device", "data_parallel", "model_parallel"),
    "torch": ("auto", "one_device"),
}
TF_CONFIG = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'
# Which axis of a block's weights and of their slots `model_parallel` divides: heads, and the hidden layer of the MLP
_DIVIDED = {
    "qkv_kernel": (None, None, "model", None), "qkv_bias": (None, "model", None), "out_kernel": ("model", None, None),
    "fc1[/_]kernel": (None, "model"), "fc1[/_]bias": ("model",), "fc2[/_]kernel": ("model", None),
}  # fmt: skip
_SLOTS = "(_(trace|first|second|average|momentum|velocity))?"


class Place:
    """One process on its own device: what all others are told by.

    Attributes:
        name: of the strategy in use.
        worker, workers: this process and how many there are.
        replicas: over which a batch is divided, of all workers.
        model_axis: devices over which the weights of a block are divided.
    """

    name, worker, workers, replicas, model_axis = "one_device", 0, 1, 1, 1

    @property
    def chief(self):
        """Whether this process writes what all share."""
        return self.worker == 0

    def scope(self):
        """In which models and optimizers are made."""
        return contextlib.nullcontext()

    def batches(self, make, batch):
        """What `fit` takes.

        Args:
            make: (worker, workers) -> `tf.data.Dataset` of that worker's slice of every global batch.
            batch: the global batch.
        """
        return make(self.worker, self.workers)

    def agree(self, flag):
        """True on every worker as soon as it is on one; all workers call it together."""
        return bool(flag)

    def same(self, number):
        """Whether a whole number below 2**31 is the same on all workers; all call it together."""
        return True

    def checkpoints(self, folder, keep, on_error):
        """The `state.Checkpoints` of a run at this place."""
        return state.Checkpoints(folder, keep, on_error)

    def capture(self, learner):
        """The whole state of a learner, {name: array}; all workers call it together."""
        return state.capture(learner)

    def latest(self, checkpoints, learner):
        """`Checkpoints.latest` for a learner's state, once the folder can be written; all workers call it together.

        Raises:
            ResumeError, CacheError: as `Checkpoints.latest` and `check_writable`; on every worker if on the first.
        """
        checkpoints.check_writable()
        return checkpoints.latest()

    def save(self, checkpoints, step, arrays, about):
        """Saves what `capture` took, once for all workers."""
        if self.chief:
            checkpoints.save(step, arrays, about)

    def readable(self, variables):
        """In which the first worker can read all of the variables' values; all workers enter it together."""
        return contextlib.nullcontext()

    def guarded(self, workdir):
        """In which the loss of another worker ends this one with a `TrainingError` that names the folder to go on from."""
        return contextlib.nullcontext()

    def close(self):
        """Ends the work with the others, after which each may end or go on alone; all workers call it together."""

    def check_precision(self, precision):
        """Refuses a precision for which the devices have no arithmetic.

        Raises:
            ArgumentError: mixed_float16 on TPUs.
        """
        if precision == "mixed_float16" and self._on_tpu():
            raise ArgumentError(
                f"{self.name}: TPUs multiply in bfloat16, not in float16; take --config.precision=mixed_bfloat16, which needs no "
                "loss scale."
            )

    def _on_tpu(self):
        return False

    def check_sizes(self, **sizes):
        """Refuses sizes of a model that `model_parallel` cannot divide.

        Raises:
            ArgumentError: one of them, such as heads=12, is no multiple of `model_axis`.
        """
        odd = {name: size for name, size in sizes.items() if size % self.model_axis}
        if odd:
            raise ArgumentError(
                f"{self.name}: {odd} cannot be divided over {self.model_axis} devices; choose another model_axis, or "
                "data_parallel."
            )

    def check_batch(self, batch, parts=1):
        """Refuses a batch that is not divided evenly.

        Raises:
            ArgumentError: it is no multiple of replicas times parts.
        """
        if batch % (self.replicas * parts):
            raise ArgumentError(
                f"A batch of {batch} cannot be divided over {self.replicas} replicas in {parts} parts each; take a multiple of "
                f"{self.replicas * parts}."
            )


class _Mirrored(Place):
    def __init__(self, strategy, name):
        self.strategy, self.name, self.replicas = strategy, name, strategy.num_replicas_in_sync

    def scope(self):
        return self.strategy.scope()


class _Hosts(_Mirrored):
    """Each host reads its own slice, cut into those of its replicas, which have one size in all steps."""

    def batches(self, make, batch):
        def local(context):
            data = make(context.input_pipeline_id, context.num_input_pipelines)
            return data.unbatch().batch(batch // self.replicas, drop_remainder=True).prefetch(2)

        return self.strategy.distribute_datasets_from_function(local)


class _Tpu(_Hosts):
    def _on_tpu(self):
        return True


class _MultiWorker(_Hosts):
    def __init__(self, strategy):
        import tensorflow as tf

        super().__init__(strategy, "multi_worker")
        resolver = strategy.cluster_resolver
        self.worker, self.workers = resolver.task_id, resolver.cluster_spec().num_tasks("worker")

        def on_replica(number):
            return tf.distribute.get_replica_context().all_reduce("SUM", tf.identity(number))

        @tf.function(input_signature=[tf.TensorSpec((), tf.float64)], autograph=False)
        def on_all(number):
            return strategy.experimental_local_results(strategy.run(on_replica, args=(number,)))[0]

        self._on_all = on_all

    def agree(self, flag):
        return self._total(bool(flag)) > 0

    def same(self, number):
        return not self.agree(self._total(number) != number * self.workers)

    def _total(self, number):
        """The sum over all workers."""
        return float(self._on_all(float(number))) / (self.replicas // self.workers)

    def latest(self, checkpoints, learner):
        found = fault = None
        if self.chief:
            try:
                found = super().latest(checkpoints, learner)  # which moves damaged ones out of the way of the others
            except errors.KerasViTError as error:  # raised below: the others wait for an answer
                fault = error
        if self.agree(fault):
            raise fault or errors.ResumeError(f"{checkpoints.folder}: the first worker cannot use it; see its error.")
        if not self.chief:
            found = checkpoints.latest()
        if not self.same(found[0] if found else 0):
            raise errors.ResumeError(
                f"{checkpoints.folder}: the workers found checkpoints of different steps there; give all the same --workdir, "
                "which all of them see."
            )
        return found

    @contextlib.contextmanager
    def guarded(self, workdir):
        import tensorflow as tf

        try:
            yield
        except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
            _raise_lost(workdir, error)


class Mesh(Place):
    """The devices of JAX, of one or several processes.

    Args:
        distribution: of `keras.distribution`, for which it sets it; each process feeds its own examples.
        name: of the strategy.

    Raises:
        ArgumentError: a model is divided over devices of several processes that have others besides.
    """

    def __init__(self, distribution, name):
        import jax

        self.name, self.worker, self.workers = name, jax.process_index(), jax.process_count()
        mesh = distribution.device_mesh
        sizes = dict(zip(mesh.axis_names, mesh.shape))
        self.replicas, self.model_axis = sizes[distribution.batch_dim_name], sizes.get("model", 1)
        local = jax.local_device_count()
        if self.workers > 1 and local % self.model_axis and self.model_axis % local:
            raise ArgumentError(
                f"{name}: model_axis={self.model_axis} and the {local} devices of each process do not fit; choose a divisor or a "
                "multiple."
            )
        self._platform = jax.devices()[0].platform
        keras.distribution.set_distribution(distribution)

    def batches(self, make, batch):
        """Processes that hold parts of the same model read the same examples."""
        sharing = max(1, self.workers // self.replicas)
        return make(self.worker // sharing, self.workers // sharing)

    # The state of several processes is divided over them.

    def checkpoints(self, folder, keep, on_error):
        return (state.Sharded if self.workers > 1 else state.Checkpoints)(folder, keep, on_error)

    def capture(self, learner):
        if self.workers == 1:
            return super().capture(learner)
        return {name: variable.value for name, variable in state.variables(learner).items()}

    def latest(self, checkpoints, learner):
        if self.workers == 1:
            return super().latest(checkpoints, learner)
        fault = None
        if self.chief:
            try:
                checkpoints.check_writable()
            except errors.KerasViTError as error:  # raised below: the others wait for an answer
                fault = error
        if self.agree(fault):
            raise fault or errors.CacheError(f"{checkpoints.folder}: the first process cannot write there; see its error.")
        return checkpoints.latest(self.capture(learner))

    def save(self, checkpoints, step, arrays, about):
        checkpoints.save(step, arrays, about)

    def agree(self, flag):
        if self.workers == 1:
            return bool(flag)
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array(bool(flag)))))

    def same(self, number):
        if self.workers == 1:
            return True
        from jax.experimental import multihost_utils

        return bool(np.all(multihost_utils.process_allgather(np.int32(number)) == number))

    def readable(self, variables):
        if self.workers == 1:
            return super().readable(variables)
        from jax.experimental import multihost_utils

        values = multihost_utils.process_allgather([variable.value for variable in variables], tiled=True)
        return keras.StatelessScope(state_mapping=list(zip(variables, values)))

    @contextlib.contextmanager
    def guarded(self, workdir):
        import jax

        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # the latter where JAX was still dispatching
            if self.workers == 1 or isinstance(error, errors.KerasViTError):
                raise
            _raise_lost(workdir, error)

    def close(self):
        import jax

        if self.workers > 1:
            self.agree(False)
            jax.distributed.shutdown()

    def _on_tpu(self):
        return self._platform == "tpu"


def _raise_lost(workdir, error):
    """Raises an error of a backend, as a `TrainingError` if it is what collectives say of a worker that no longer answers."""
    reason = re.search("Collective ops is aborted by.*|.*(/job:worker|Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED).*", str(error))
    if not reason:
        raise error
    raise errors.TrainingError(
        f"another worker was lost ({reason[0].strip()}); start all workers again: they go on from {workdir}."
    ) from error


def open_strategy(name="auto", *, model_axis=None):
    """The place to train at. Call it once in a process, before any model is made.

    Args:
        name: on TensorFlow
            - "one_device";
            - "mirrored": all GPUs of this machine (all logical CPU devices where there is none);
            - "multi_worker": several machines, described to each by TF_CONFIG;
            - "tpu": the TPU of TPU_NAME, or the one of this machine;
            on JAX
            - "one_device";
            - "data_parallel": every device has the weights and its share of the batch;
            - "model_parallel": the heads and the MLPs' hidden layers of every block are divided over `model_axis` devices, the
              batch over the rest.
            Several JAX processes are joined by the variables of `keras.distribution.initialize`, which are
            KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and _PROCESS_ID; those of a TPU slice on GKE by TPU_WORKER_HOSTNAMES.
            "auto" is the widest that this process finds, "one_device" if it finds nothing.
        model_axis: devices over which "model_parallel" divides a model; None for all.

    Returns:
        A `Place`.

    Raises:
        ArgumentError: this backend has no such strategy, or what it needs is not there; says what to use.
    """
    backend = keras.config.backend()
    if name == "parameter_server":
        raise ArgumentError(_NO_PARAMETER_SERVER)
    if name not in NAMES[backend]:
        owner = next((other for other, names in NAMES.items() if name in names), None)
        hint = f"it is one of {owner}: set KERAS_BACKEND={owner}" if owner else "nothing is called so"
        raise ArgumentError(f"strategy {name!r}: on {backend} there are {', '.join(NAMES[backend])}; {hint}.")
    if model_axis is not None and name != "model_parallel":
        raise ArgumentError(f"model_axis is for strategy 'model_parallel', not for {name!r}; leave it out.")
    return _OPENERS[backend](name, model_axis)


_NO_PARAMETER_SERVER = (
    "parameter_server: Keras 3 has no training with parameter servers (keras#18624). Use multi_worker, and list all tasks of "
    "TF_CONFIG as 'worker'."
)


def _workers():
    """The addresses in TF_CONFIG; none where it is not set."""
    text = os.environ.get("TF_CONFIG")
    if not text:
        return []
    try:
        config = json.loads(text)
        workers, others = list(config["cluster"].pop("worker", [])), list(config["cluster"])
        task = config["task"]["type"], config["task"]["index"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArgumentError(f"TF_CONFIG must be like {TF_CONFIG}, got {text!r}; mend it.") from error
    if "ps" in others:
        raise ArgumentError(_NO_PARAMETER_SERVER)
    if others or task not in [("worker", index) for index in range(len(workers))]:
        raise ArgumentError(
            f"TF_CONFIG must list all tasks as 'worker' and say which one this is by an index from 0 to {len(workers) - 1}, got "
            f"{text!r}."
        )
    return workers


def _open_tensorflow(name, _):
    import tensorflow as tf

    if name == "auto":
        if len(_workers()) > 1:
            name = "multi_worker"
        elif os.environ.get("TPU_NAME"):
            name = "tpu"
        else:
            name = "mirrored" if len(tf.config.list_physical_devices("GPU")) > 1 else "one_device"
    if name == "mirrored":
        found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return _Mirrored(tf.distribute.MirroredStrategy([device.name for device in found]), name)
    if name == "multi_worker":
        if not _workers():
            raise ArgumentError(
                f"multi_worker: TF_CONFIG is not set. Give each machine the list of all and its number: TF_CONFIG='{TF_CONFIG}'"
            )
        return _MultiWorker(tf.distribute.MultiWorkerMirroredStrategy())
    if name == "tpu":
        return _open_tpu(tf)
    return Place()


def _open_tpu(tf):
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=os.environ.get("TPU_NAME", "local"))
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, ImportError, OSError, tf.errors.OpError) as error:
        raise ArgumentError(
            f"tpu: TensorFlow {tf.__version__} finds no TPU here ({str(error).splitlines()[0]}). Set TPU_NAME, install a "
            "TensorFlow built for TPUs, or use JAX there: KERAS_BACKEND=jax and strategy data_parallel."
        ) from error
    return _Tpu(tf.distribute.TPUStrategy(resolver), "tpu")


def _open_jax(name, model_axis):
    import jax

    if not jax.distributed.is_initialized():
        _join_processes()
    devices = [f"{device.platform}:{device.id}" for device in sorted(jax.devices(), key=lambda d: (d.process_index, d.id))]
    if name == "auto":
        name = "data_parallel" if len(devices) > 1 else "one_device"
    if name == "data_parallel":
        return Mesh(keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False), name)
    if name == "model_parallel":
        axis = len(devices) if model_axis is None else model_axis
        if axis < 1 or len(devices) % axis:
            raise ArgumentError(
                f"model_parallel: model_axis={axis} does not divide the {len(devices)} devices; choose a divisor."
            )
        mesh = keras.distribution.DeviceMesh((len(devices) // axis, axis), ("batch", "model"), devices)
        layouts = layout_map(mesh)
        divided = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False)
        return Mesh(divided, name)
    if jax.process_count() > 1:
        raise ArgumentError("one_device: there are several JAX processes; use data_parallel or model_parallel.")
    keras.distribution.set_distribution(None)
    return Place()


def _join_processes():
    """Makes one of the processes that the environment describes.

    (`keras.distribution.initialize` keeps JAX's times: a lost process is noticed after 100 s, and one that failed waits 300 s for
    the others, which wait for it.)
    """
    import jax

    given = {name: os.environ.get(f"KERAS_DISTRIBUTION_{name}") for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")}
    times = dict(heartbeat_timeout_seconds=40, shutdown_timeout_seconds=20)
    if any(given.values()):
        try:
            first, count, index = given["JOB_ADDRESSES"].split(",")[0], int(given["NUM_PROCESSES"]), int(given["PROCESS_ID"])
            if not 0 <= index < count or ":" not in first:
                raise ValueError(f"{index} is not from 0 to {count - 1}, or {first!r} is no host:port")
        except (ValueError, TypeError, AttributeError) as error:
            raise ArgumentError(
                "Several JAX processes need KERAS_DISTRIBUTION_JOB_ADDRESSES=host0:port, _NUM_PROCESSES and _PROCESS_ID, got "
                f"{given} ({error}); set all three or none."
            ) from error
        jax.distributed.initialize(first, count, index, **times)
    elif len([host for host in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]) > 1:
        jax.distributed.initialize(**times)


def layout_map(mesh):
    """A `keras.distribution.LayoutMap` for the blocks of every transformer here, on a mesh with an axis "model".

    Heads and hidden units lie whole on one device, so that a block needs one all-reduce after its attention and one after its MLP
    (Megatron-LM, arXiv 1909.08053, section 3). All other weights are on every device.
    """
    layouts = keras.distribution.LayoutMap(mesh)
    for name, axes in _DIVIDED.items():
        layouts[rf"(.*/)?block_\d+[/_].*{name}{_SLOTS}"] = axes
    return layouts


_OPENERS = {"tensorflow": _open_tensorflow, "jax": _open_jax, "torch": lambda name, _: Place()}
