"""What can be known about TPUs without one: the order of calls, static shapes, and a train step that XLA compiles whole.

That the same step gives the same numbers under MirroredStrategy, on the road that TPUStrategy takes, is in test_strategy.py.
"""

import contextlib
import types

import keras
import numpy as np
import pytest

import keras_vit
from keras_vit import main
from keras_vit.data import pipeline
from keras_vit.errors import ArgumentError
from keras_vit.training import strategy
from keras_vit.training.optimizers import MomentumSGD
from keras_vit.training.step import Learner

if keras.config.backend() != "tensorflow":
    pytest.skip("for TensorFlow", allow_module_level=True)

import tensorflow as tf

CORES = 8
# Operations that would have to run on the machine that holds the TPU
HOST_OPS = {
    "Assert", "DecodeJpeg", "DecodePng", "EagerPyFunc", "HashTableV2", "IteratorGetNext", "LookupTableFindV2", "Print", "PrintV2",
    "PyFunc", "PyFuncStateless", "ReadFile", "StringFormat", "Unique", "Where", "WriteFile", "WriteScalarSummary",
}  # fmt: skip
HOST_HLO = ("infeed", "outfeed", "send(", "recv(", "callback", "custom-call")


@pytest.fixture
def calls(monkeypatch):
    """A TPU of 8 cores that only notes what is asked of it."""
    noted = []

    class Strategy:
        num_replicas_in_sync = CORES

        def __init__(self, resolver):
            noted.append(f"strategy of {resolver}")

        @contextlib.contextmanager
        def scope(self):
            noted.append("scope")
            yield
            noted.append("end of scope")

        def distribute_datasets_from_function(self, make):
            return [make(types.SimpleNamespace(input_pipeline_id=host, num_input_pipelines=2)) for host in range(2)]

    def resolver(tpu):
        noted.append(f"resolver of {tpu}")
        return "resolver"

    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", resolver)
    monkeypatch.setattr(tf.config, "experimental_connect_to_cluster", lambda it: noted.append(f"connect {it}"))
    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", lambda it: noted.append(f"initialize {it}"))
    monkeypatch.setattr(tf.distribute, "TPUStrategy", Strategy)
    return noted


def test_the_tpu_is_connected_and_initialized_before_its_scope_opens_and_the_model_is_made(calls, tmp_path, monkeypatch):
    class Made(Exception):
        pass

    def made(*args):
        calls.append("model")
        raise Made

    monkeypatch.setenv("TPU_NAME", "mine")
    monkeypatch.setattr(main, "build_model", made)
    with pytest.raises(Made):
        main.train(*main.parse(["main", f"--workdir={tmp_path}", "--config.strategy=tpu"]))
    assert calls == [
        "resolver of mine", "connect resolver", "initialize resolver", "strategy of resolver",
        "scope", "end of scope",  # of the task, whose teacher or tokenizer would be made here
        "scope", "model",
    ]  # fmt: skip


def test_auto_takes_the_tpu_that_is_named_and_tpu_alone_the_one_of_this_machine(calls, monkeypatch):
    monkeypatch.delenv("TPU_NAME", raising=False)
    assert strategy.open_strategy("tpu").name == "tpu" and calls[0] == "resolver of local"
    monkeypatch.setenv("TPU_NAME", "mine")
    assert strategy.open_strategy().name == "tpu" and calls[4] == "resolver of mine"


def test_float16_is_refused_on_a_tpu_with_what_to_take(calls):
    place = strategy.open_strategy("tpu")
    place.check_precision("mixed_bfloat16")
    place.check_precision("float32")
    with pytest.raises(ArgumentError, match="--config.precision=mixed_bfloat16"):
        place.check_precision("mixed_float16")


def test_every_core_gets_batches_of_one_static_shape_and_all_together_the_batch_of_one_device(calls):
    source = pipeline.open_source("digits", "train")

    def batches(*shard):
        return pipeline.train_batches(source, size=8, batch=64, augment=False, shard=shard or (0, 1))

    hosts = strategy.open_strategy("tpu").batches(batches, 64)
    for host in hosts:
        assert [spec.shape.as_list() for spec in host.element_spec] == [[64 // CORES, 8, 8, 3], [64 // CORES, 10]]
    whole = next(iter(batches()))
    parts = [part for host in hosts for part in host.take(CORES // 2)]
    for place in range(2):
        np.testing.assert_array_equal(np.concatenate([part[place] for part in parts]), whole[place])


@pytest.fixture(scope="module")
def compiled():
    """A learner in mixed bfloat16 that has made a step, its train step as XLA is to compile it, and a batch."""
    keras.utils.set_random_seed(0)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        small = dict(input_shape=(8, 8, 3), patch_size=4, width=16, depth=1, heads=2, mlp=32, classes=10)
        model = keras_vit.ViT(weights=None, classifier_activation=None, dropout_rate=0.1, **small)
        learner = Learner(model.inputs, model.outputs, parts=2, clip_norm=1.0)
    finally:
        keras.config.set_dtype_policy(before)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    learner.compile(MomentumSGD(0.1, trace_dtype="bfloat16"), loss, jit_compile=True)
    data = pipeline.train_batches(pipeline.open_source("digits", "train"), size=8, batch=16, augment=False)
    learner.fit(data, steps_per_epoch=1, shuffle=False, verbose=0)
    return learner, tf.function(learner.train_step, jit_compile=True, autograph=False), next(iter(data))


def test_the_train_step_runs_as_one_program_of_xla_in_bfloat16(compiled):
    learner, step, batch = compiled
    assert learner.get_layer("block_0").compute_dtype == "bfloat16"
    before = [weight.numpy() for weight in learner.trainable_variables]
    logs = {name: float(value) for name, value in step(batch).items()}
    assert logs["healthy"] == 1 and np.isfinite(logs["step_loss"]) and logs["grad_norm"] > 0
    assert any(np.any(old != new.numpy()) for old, new in zip(before, learner.trainable_variables))
    assert step.experimental_get_tracing_count() == 1


def test_nothing_of_the_train_step_runs_on_the_host(compiled):
    _, step, batch = compiled
    graph = step.get_concrete_function(batch).graph.as_graph_def()
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    found = {node.op for node in nodes}
    assert {"MatMul", "AssignVariableOp"} & found and len(found) > 20
    assert not found & HOST_OPS
    program = step.experimental_get_compiler_ir(batch)(stage="hlo")
    assert "bf16[" in program and "dot(" in program
    assert not [word for word in HOST_HLO if word in program]
    assert "[<=" not in program and "?" not in program  # sizes that are known only as the step runs


def test_a_step_that_prints_would_be_seen(compiled):
    learner, _, batch = compiled

    def printing(data):
        tf.print("on the host")
        return learner.train_step(data)

    graph = tf.function(printing, autograph=False).get_concrete_function(batch).graph.as_graph_def()
    assert {node.op for node in graph.node} & HOST_OPS
