"""benchmarks/ptq_cost.py on a small network: the phases add up."""

import json
import sys
import time

import pytest
from ptq_cost import Clock, CostOptions, growth, main, mark_verdict, table
from support import run_command

from illama.errors import UserError

COMMAND = "benchmarks/ptq_cost.py"


def test_a_phase_inside_another_is_not_counted_twice():
    clock = Clock()
    with clock.phase("outer"):
        time.sleep(0.05)
        clock.timed("inner", time.sleep)(0.2)
        clock.timed("inner", time.sleep)(0.1)
    assert clock.seconds["inner"] == pytest.approx(0.3, abs=0.1)
    assert clock.seconds["outer"] == pytest.approx(0.05, abs=0.05)


def test_cost_of_a_small_network(small_bundle, tmp_path):
    options = ["--checkpoint", small_bundle, "--schemes", "int8", "--images", 8, "--threads", 1, "--fused"]
    result = run_command(COMMAND, *options, "--out", tmp_path / "cost")
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "cost" / "bundle-fused.json").read_text())
    (row,) = content["rows"]
    phases = row["phases"]
    assert {"imports", "load checkpoint", "read images", "calibrate", "torch.export", "translate"} <= phases.keys()
    assert "learn rounding" not in phases and all(seconds >= 0 for seconds in phases.values())
    assert 0.7 * row["seconds"] < sum(phases.values()) <= row["seconds"]
    assert 0.3 < row["peak_memory_gib"] < 3 and row["cpu_seconds"] > 1
    assert content["machine"]["cores"] and content["versions"]["torch"]
    assert table(content["rows"]) == (tmp_path / "cost" / "bundle-fused.md").read_text()
    assert table(content["rows"]).strip() in result.stdout


def test_the_limits_are_of_seconds_and_memory():
    assert mark_verdict({"seconds": 60.0, "peak_memory_gib": 4.0}) == "met"
    assert mark_verdict({"seconds": 60.1, "peak_memory_gib": 1.0}) == "missed"
    assert mark_verdict({"seconds": 1.0, "peak_memory_gib": 4.1}) == "missed"


def test_growth_is_from_the_first_network_in_the_same_scheme():
    assert list(CostOptions(models=("tiny", "base"), sizes=(224, 384)).networks) == [
        *("tiny", "base", "tiny-384", "base-384")
    ]
    facts = {"parameters": 10, "tokens": 197, "seconds": 2.0, "peak_memory_gib": 1.0}
    rows = [{"network": "tiny", "scheme": scheme, **facts} for scheme in ("int8", "fp8")]
    assert growth(rows) == []
    rows += [{"network": "base", "scheme": "fp8", **facts, "parameters": 2**28, "seconds": 8.0, "peak_memory_gib": 3.0}]
    assert (
        growth(rows)[-1].startswith("| base | fp8 | ") and " | 4.0 times | 3.0 times | 3.0 times |" in growth(rows)[-1]
    )


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'int3'"):
        main(CostOptions(("int3",), out=tmp_path))
    with pytest.raises(UserError, match="int8-dynamic"):
        main(CostOptions(("int8-dynamic",), out=tmp_path))
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UserError, match=r"int8 .*exit status 1"):
        main(CostOptions(("int8",), tmp_path / "none.safetensors", images=2, out=tmp_path))
