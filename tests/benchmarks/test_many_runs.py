"""benchmarks/many_runs.py: confidence intervals, and finished runs are not repeated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from many_runs import as_text, compare, train_all
from scipy.stats import ttest_rel
from support import SMALL, write_bundle

from illama.errors import UserError

POINTS = st.lists(st.floats(0, 100, allow_subnormal=False), min_size=3, max_size=3)


@given(one=POINTS, other=POINTS)
def test_the_interval_is_a_paired_t_test_s(one, other):
    one, other = np.round(one, 3), np.round(other, 3)
    if np.ptp(one - other) < 1e-3:
        return
    mean, interval = compare(one, other)
    expected = ttest_rel(one, other).confidence_interval(0.95)
    assert mean == pytest.approx((one - other).mean(), abs=1e-9)
    assert interval == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-6)


def test_finished_runs_are_not_repeated_and_failed_ones_named(tmp_path):
    done, bad = tmp_path / "done", tmp_path / "bad"
    write_bundle(done / "bundle", SMALL)
    (done / "options.json").write_text(as_text({"model": "none such"}))
    train_all({done: {"model": "none such"}})
    with pytest.raises(UserError, match="done"):
        train_all({done: {"model": "nano"}})
    with pytest.raises(UserError, match=r"bad failed: .*'none such'"):
        train_all({bad: {"model": "none such"}})
