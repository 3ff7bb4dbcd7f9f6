"""benchmarks/timm_sweep.py on two kinds of networks: one passes, one is refused; and what a wrong network gives."""

import json

import pytest
import timm_sweep
from timm_sweep import SweepOptions, kind_of, main, shrunk, sweep


def test_a_vit_passes_and_parallel_attention_is_refused_once(tmp_path, monkeypatch):
    names = ("deit_tiny_patch16_224", "vit_base_patch16_xp_224")
    options = SweepOptions(names, engines=False, out=tmp_path, work=tmp_path / "work")
    main(options)
    kinds = {each["names"][0]: each for each in json.loads((tmp_path / "timm-sweep.json").read_text())["kinds"]}
    passed, refused = (kinds[name] for name in names)
    assert passed["outcome"] == "passed" and passed["errors"]["converted"] < 1e-5
    assert refused["outcome"] == "refused" and "ParallelScalingBlock" in refused["why"]
    table = (tmp_path / "timm-sweep.md").read_text()
    assert "1 passed, 1 are refused, 0 failed" in table
    monkeypatch.setattr(timm_sweep, "sweep", None)  # all kinds are finished
    main(options)
    assert (tmp_path / "timm-sweep.md").read_text() == table


def test_names_that_differ_in_sizes_are_one_kind():
    small, base, other = (
        kind_of(shrunk(name))
        for name in ("vit_small_patch16_dinov3", "vit_base_patch16_dinov3", "vit_small_plus_patch16_dinov3")
    )
    assert small == base != other


@pytest.mark.parametrize("error", [0.5, float("nan"), ZeroDivisionError()])
def test_a_wrong_number_or_a_crash_is_a_failure(error, monkeypatch):
    def steps(*_):
        if isinstance(error, Exception):
            raise error
        yield "converted", error, 1e-5

    monkeypatch.setattr(timm_sweep, "steps", steps)
    assert sweep(None, False)["outcome"] == "failed"
