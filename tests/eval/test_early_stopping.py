"""Bounds of percentiles are those of MLPerf's LoadGen, for the latencies that it logs."""

import json
import random
import re
import time

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from eval.measure.latency import percentile_bound

loadgen = pytest.importorskip("mlperf_loadgen", reason="LoadGen has wheels for Linux on x86-64 only")


def run_loadgen(folder, scenario, queries):
    """Returns LoadGen's bounds in ns, by scenario, and the latency of each query that it logs."""
    draw = random.Random(queries)

    def answer(samples):
        time.sleep(draw.expovariate(1 / 0.0003))
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(each.id, 0, 0) for each in samples])

    system = loadgen.ConstructSUT(answer, lambda: None)
    library = loadgen.ConstructQSL(16, 16, lambda samples: None, lambda samples: None)
    settings, log = loadgen.TestSettings(), loadgen.LogSettings()
    settings.scenario, settings.mode = getattr(loadgen.TestScenario, scenario), loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms, settings.min_query_count, settings.max_query_count = 0, queries, queries
    settings.multi_stream_samples_per_query = 8
    log.log_output.outdir, log.enable_trace = str(folder), True
    loadgen.StartTestWithLogSettings(system, library, settings, log, "")
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(system)
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    entries = [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith(":::MLLOG")]
    bounds = {each["key"].removeprefix("early_stopping_latency_"): each["value"] for each in entries}
    latencies: dict[int, int] = {}
    trace = (folder / "mlperf_log_trace.json").read_text()  # not valid JSON as a whole
    for facts in re.findall(r'"query_seq":(\d+),.*?"issue_start_ns":(\d+),"complete_ns":(\d+)', trace):
        query, start, end = map(int, facts)
        latencies[query] = max(end - start, latencies.get(query, 0))
    assert len(latencies) == queries
    return bounds, list(latencies.values())


@pytest.mark.parametrize("queries", [63, 64, 300, 1000])
def test_single_stream(queries, tmp_path):
    bounds, latencies = run_loadgen(tmp_path, "SingleStream", queries)
    assert percentile_bound(latencies, 0.9) == (bounds["ss"] or None)


@pytest.mark.parametrize("queries", [300, 662, 1500])
def test_multi_stream(queries, tmp_path):
    bounds, latencies = run_loadgen(tmp_path, "MultiStream", queries)
    assert percentile_bound(latencies, 0.99) == (bounds["ms"] or None)


@given(count=st.integers(0, 3000), percentile=st.sampled_from([0.5, 0.9, 0.97, 0.99]))
def test_the_bound_is_the_smallest_value_that_the_binomial_formula_allows(count, percentile):
    """MLPerf's own formula is the regularized incomplete beta function."""
    bound = percentile_bound(np.random.default_rng(count).permutation(count), percentile)
    if bound is None:
        assert scipy.special.betainc(max(count - 1, 1e-9), 2, percentile) > 0.01 or count < 2
    else:
        above = count - int(bound)
        assert scipy.special.betainc(count - above, above + 1, percentile) <= 0.01
        assert scipy.special.betainc(count - above - 1, above + 2, percentile) > 0.01


@pytest.mark.parametrize(("percentile", "calls"), [(0.9, 64), (0.99, 662)])
def test_the_numbers_of_calls_that_mlperf_asks_for(percentile, calls):
    """The report's note names these numbers."""
    assert percentile_bound(range(calls - 1), percentile) is None
    assert percentile_bound(range(calls), percentile) == calls - 1
