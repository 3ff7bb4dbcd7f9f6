"""Large engines are open one at a time, and compute the same."""

import weakref
from functools import partial

import numpy as np
import pytest
from support import write_linear_bundle

from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from eval.measure.latency import TimingOptions
from eval.measure.reopened_engine import ReopenedEngine, engine_store, free, time_engines
from illama.bundle import CPU_ONNX

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def files(tmp_path):
    folders = [
        write_linear_bundle(tmp_path / str(k), np.full((768, 3), k + 1.0), 16, ["a", "b", "c"]) for k in range(3)
    ]
    return [folder / CPU_ONNX for folder in folders]


@pytest.fixture
def opened():
    """The engines that are alive, and the most that were alive together."""
    return {"alive": weakref.WeakSet(), "most": 0}


def engines_of(files, opened):
    def load(path):
        engine = OnnxRuntimeEngine(path)
        opened["alive"].add(engine)
        opened["most"] = max(opened["most"], len(opened["alive"]))
        return engine

    store = engine_store()
    return [ReopenedEngine(partial(load, path), path, store) for path in files]


@pytest.mark.parametrize(("kept", "most"), [(1, 1), (2**28, 3)])
def test_large_engines_are_open_one_at_a_time(kept, most, files, opened, monkeypatch):
    monkeypatch.setattr("eval.measure.reopened_engine.KEPT", kept)
    engines = engines_of(files, opened)
    for _ in range(2):
        for engine, path in zip(engines, files, strict=True):
            np.testing.assert_array_equal(engine.infer(IMAGES), OnnxRuntimeEngine(path).infer(IMAGES))
            assert engine.runtime.startswith("onnxruntime")
    assert opened["most"] == most
    free(engines)
    assert not opened["alive"]


@pytest.mark.parametrize(("together", "most"), [(0, 1), (2**30, 3)])
def test_small_engines_are_timed_together_and_large_ones_alone(together, most, files, opened, monkeypatch):
    monkeypatch.setattr("eval.measure.reopened_engine.KEPT", 1)
    monkeypatch.setattr("eval.measure.reopened_engine.TIMED_TOGETHER", together)
    engines = dict(zip("abc", engines_of(files, opened), strict=True))
    found = time_engines(engines, IMAGES, (1, 2), TimingOptions(rounds=3, calls=2, seconds=0.5, progress=False), {})
    assert opened["most"] == most
    assert [[each.batch for each in found.latency[name]] for name in "abc"] == [[1, 2]] * 3
    assert ("order" in found.conditions) == (most == 1) and not any(found.refused.values())
