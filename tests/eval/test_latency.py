"""Turns of engines, refused batches, sensors in made-up sysfs trees of the documented layouts, pinned threads."""

import contextlib
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from eval.measure.latency import UNREADABLE, TimingOptions, _Turns, measure_latency
from eval.measure.machine import _cores_first, pin_threads
from eval.measure.sensors import Gpu, Watch, find_gpu, open_meter, read_cpu, read_governor, read_gpu
from illama.errors import UserError
from illama.hardware import usable_cores

IMAGES = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1)


def plant(root: Path, files: dict[str, object]) -> None:
    """Writes files of a tree, each with a final newline, as in sysfs."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def test_engines_take_turns_in_a_new_order_each_round():
    seen = []
    engines = {name: lambda images, name=name: seen.append(name) or images for name in "abc"}
    timings = measure_latency(engines, IMAGES, options=TimingOptions(20, 2, 1, progress=False))
    turns = ["".join(seen[start : start + 3]) for start in range(len(seen) - 20 * 9, len(seen), 3)]
    assert set(turns) == {"aaa", "bbb", "ccc"}
    rounds = [tuple(turns[start : start + 3]) for start in range(0, 60, 3)]
    assert all(len(set(each)) == 3 for each in rounds) and len(set(rounds)) > 3
    (latency,) = timings.latency["a"]
    assert (latency.batch, latency.calls, latency.joules) == (1, 40, None) and latency.p50 > 0
    assert latency.p90 is latency.p99 is None  # of 40 calls
    assert latency.images_per_second == pytest.approx(1e3 / latency.mean)
    assert timings.conditions["energy"] == UNREADABLE and timings.conditions["threads"] == usable_cores()
    assert timings.conditions["involuntary context switches a second"] >= 0


def test_a_batch_larger_than_the_images_repeats_them():
    shapes = {}

    def infer(images):
        shapes[len(images)] = images[:, 0, 0, 0].tolist()
        return images

    timings = measure_latency({"a": infer}, IMAGES, (2, 1024), TimingOptions(1, 1, 1, progress=False))
    assert shapes == {2: [0, 1], 1024: [i % 3 for i in range(1024)]}
    assert [each.batch for each in timings.latency["a"]] == [2, 1024]


def test_a_refused_batch_leaves_the_others(tmp_path):
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 1, 1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 1, 1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [shape], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")

    def only_two(images):
        if len(images) != 2:
            raise UserError("the engine takes 2 images at once")
        return images

    engines = {
        "static": OnnxRuntimeEngine(tmp_path / "m.onnx").infer,
        "two": only_two,
        "any": lambda images: images,
        "torch": lambda images: (
            torch.zeros(1, 2) @ torch.zeros(2, 1) if len(images) == 1 else torch.zeros(1, 2) @ torch.zeros(3, 1)
        ),
    }
    timings = measure_latency(engines, IMAGES, (1, 2), TimingOptions(2, 1, 1, progress=False))
    assert {name: [each.batch for each in found] for name, found in timings.latency.items()} == {
        "static": [1],
        "two": [2],
        "any": [1, 2],
        "torch": [1],
    }
    assert list(timings.refused["static"]) == list(timings.refused["torch"]) == [2]
    assert timings.refused["two"] == {1: "the engine takes 2 images at once"}
    assert timings.refused["any"] == {}


def test_a_defect_is_not_taken_for_a_refusal():
    with pytest.raises(AttributeError):
        measure_latency({"a": lambda images: images.nothing}, IMAGES, options=TimingOptions(progress=False))


def test_a_slow_engine_has_fewer_calls_and_costs_no_other_its_own():
    engines = {"slow": lambda images: time.sleep(0.05) or images, "fast": lambda images: images}
    start = time.perf_counter()
    timings = measure_latency(engines, IMAGES, options=TimingOptions(20, seconds=0.4, progress=False))
    assert time.perf_counter() - start < 3  # 20 rounds of all calls would take 13 s
    (slow,), (fast,) = timings.latency["slow"], timings.latency["fast"]
    assert 3 <= slow.calls <= 4 and fast.calls == 200


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 5), st.integers(0, 3000))
def test_turns_stay_within_their_share(turns, calls, settle, affordable):
    plan = _Turns(turns, calls, settle).within(affordable + 0.5, 1.0)
    assert min(turns, 3) <= plan.turns <= turns and 1 <= plan.calls <= calls and 0 <= plan.settle <= settle
    assert plan.turns * (plan.settle + plan.calls) <= max(affordable, 3)
    if turns * (calls + settle) <= affordable:
        assert plan == _Turns(turns, calls, settle)


@pytest.mark.parametrize(
    "options",
    [
        {"batches": ()},
        {"batches": (0,)},
        {"batches": (2, 2)},
        {"rounds": 0},
        {"calls": 0},
        {"settle": 0},
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"images": IMAGES[:0]},
    ],
)
def test_numbers_that_mean_nothing_are_refused(options):
    with pytest.raises(UserError):
        given = {name: options[name] for name in ("images", "batches") if name in options}
        timing = {name: value for name, value in options.items() if name not in given}
        how = TimingOptions(**timing, progress=False)
        measure_latency({"a": lambda images: images}, **{"images": IMAGES, **given}, options=how)


def test_rapl_counts_the_joules_of_a_call_over_a_wrap_around(tmp_path):
    energy, begin, wraps = "class/powercap/intel-rapl:{}/energy_uj", 98_000_000, 100_000_000
    for zone, name in (("0", "package-0"), ("1", "package-1"), ("0:0", "core"), ("2", "psys")):
        folder = f"class/powercap/intel-rapl:{zone}"
        plant(tmp_path, {f"{folder}/name": name, f"{folder}/max_energy_range_uj": wraps, energy.format(zone): begin})
    spent = begin

    def infer(images):
        nonlocal spent
        spent = (spent + 1_000_000) % wraps
        for zone, value in (("0", spent), ("0:0", spent), ("2", spent)):
            plant(tmp_path, {energy.format(zone): value})
        time.sleep(0.03)
        return images

    meter = open_meter(False, tmp_path)
    timings = measure_latency({"a": infer}, IMAGES, (1,), TimingOptions(1, 1, 1, progress=False), {"a": meter})
    assert timings.latency["a"][0].joules == pytest.approx(1.0)
    assert "RAPL" in timings.conditions["energy"]

    meter.start()
    plant(tmp_path, {energy.format("0"): (spent - 1_000_000) % wraps})  # 99 J later
    assert meter.stop() == pytest.approx(99.0)
    meter.start()
    (tmp_path / energy.format("1")).unlink()
    assert meter.stop() is None and open_meter(False, tmp_path) is None


def test_the_board_of_an_orin_nano_is_its_input_rail(tmp_path):
    hwmon = "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/"
    rails = {1: ("VDD_IN", 5000, 2000), 2: ("VDD_CPU_GPU_CV", 5000, 800), 3: ("VDD_SOC", 5000, 400)}
    for channel, (label, millivolts, milliamperes) in rails.items():
        plant(
            tmp_path,
            {
                f"{hwmon}in{channel}_label": label,
                f"{hwmon}in{channel}_input": millivolts,
                f"{hwmon}curr{channel}_input": milliamperes,
            },
        )
    plant(
        tmp_path,
        {
            f"{hwmon}in7_label": "Sum of shunt voltages",
            f"{hwmon}in7_input": 99,
            "class/devfreq/17000000.gpu/cur_freq": 624_750_000,
            "class/devfreq/15340000.vic/cur_freq": 999_000_000,
            "class/thermal/thermal_zone0/type": "cpu-thermal",
            "class/thermal/thermal_zone0/temp": 51_500,
            "class/thermal/thermal_zone1/type": "gpu-thermal",
            "class/thermal/thermal_zone1/temp": 49_000,
        },
    )
    meter = open_meter(True, tmp_path)
    assert meter.covers == "board (VDD_IN, sampled)"
    start = time.perf_counter()
    meter.start()
    time.sleep(0.1)
    joules = meter.stop()
    assert 1.0 <= joules <= 10 * (time.perf_counter() - start) + 1e-6
    assert not any(thread.name.endswith("(_watch)") for thread in threading.enumerate())
    assert read_gpu(tmp_path) == {"GPU temperature, C": 49.0, "GPU clock, MHz": 624.75}
    assert read_cpu(tmp_path) == {"CPU temperature, C": 51.5}


def test_a_board_without_an_input_rail_adds_up_its_rails_and_thor_has_one(tmp_path):
    first, second = "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/", "bus/i2c/drivers/ina238/2-0044/hwmon/hwmon4/"
    for channel, label in enumerate(("VDD_GPU", "VDD_CPU_SOC_MSS", "NC"), 1):
        plant(
            tmp_path,
            {
                f"{first}in{channel}_label": label,
                f"{first}in{channel}_input": 1000 * channel,
                f"{first}curr{channel}_input": 1000,
            },
        )
    meter = open_meter(False, tmp_path)
    assert meter.covers == "board (VDD_CPU_SOC_MSS + VDD_GPU, sampled)" and meter._watts() == pytest.approx(3.0)
    plant(tmp_path, {f"{second}label": "VIN", f"{second}in1_input": 20_000, f"{second}curr1_input": 1500})
    meter = open_meter(True, tmp_path)
    assert meter.covers == "board (VIN, sampled)" and meter._watts() == pytest.approx(30.0)


def test_a_desktop_s_clock_temperature_and_governor(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    for core in cores:
        folder = f"devices/system/cpu/cpu{core}/cpufreq/"
        plant(tmp_path, {folder + "scaling_cur_freq": 3_000_000, folder + "scaling_governor": "powersave"})
    plant(
        tmp_path,
        {
            "class/hwmon/hwmon2/name": "k10temp",
            "class/hwmon/hwmon2/temp1_input": 61_250,
            "class/hwmon/hwmon1/name": "nvme",
            "class/hwmon/hwmon1/temp1_input": 80_000,
        },
    )
    assert read_cpu(tmp_path) == {"CPU temperature, C": 61.25, "CPU clock, MHz": 3000.0}
    assert read_governor(tmp_path) == "powersave"
    watch = Watch(tmp_path)
    watch.look()
    plant(tmp_path, {"class/hwmon/hwmon2/temp1_input": 70_000})
    watch.look(now=False)  # too soon
    watch.look()
    numbers = re.findall(r"[\d.]+", watch.summary()["CPU temperature, C"])
    assert numbers == ["61.2", "70", "61.2", "70"]  # first, last, lowest, highest


def test_what_cannot_be_read_is_left_out(tmp_path):
    assert read_cpu(tmp_path) == read_gpu(tmp_path) == Watch(tmp_path).summary() == {}
    assert (
        read_governor(tmp_path) is None and open_meter(False, tmp_path) is None and open_meter(True, tmp_path) is None
    )
    plant(
        tmp_path,
        {
            "class/thermal/thermal_zone0/type": "x86_pkg_temp",
            "class/thermal/thermal_zone0/temp": "busy",
            "class/powercap/intel-rapl:0/name": "package-0",
            "class/powercap/intel-rapl:0/energy_uj": "?",
            "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/in1_label": "VDD_IN",
        },
    )
    (tmp_path / "class/devfreq/17000000.gpu/cur_freq").mkdir(parents=True)  # a folder where a file should be
    assert read_cpu(tmp_path) == read_gpu(tmp_path) == {}
    assert open_meter(False, tmp_path) is None
    assert read_gpu(tmp_path, Gpu(None)) == {} and open_meter(True, tmp_path, Gpu(None)) is None


@pytest.mark.gpu
def test_a_gpu_tells_its_temperature_and_energy():
    found = read_gpu(gpu=find_gpu())
    assert 0 < found["GPU temperature, C"] < 120 and found["GPU clock, MHz"] > 0
    meter = open_meter(True, gpu=find_gpu())
    meter.start()
    time.sleep(meter.shortest)
    assert meter.stop() > 0


def test_pinning_reaches_threads_that_run_already():
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    ended, seen = threading.Event(), {}
    other = threading.Thread(target=lambda: ended.wait() and seen.update(cores=os.sched_getaffinity(0)))
    other.start()
    try:
        assert pin_threads(None) == sorted(before) and usable_cores() == len(before)
        (core,) = pin_threads(1)
        assert os.sched_getaffinity(0) == {core} and usable_cores() == torch.get_num_threads() == 1
        with pytest.raises(UserError, match="1 to 1"):
            pin_threads(2)
    finally:
        ended.set()
        other.join()
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), before)
        torch.set_num_threads(threads)
    assert seen["cores"] == {core}
    with pytest.raises(UserError, match="not 0"):
        pin_threads(0)


def test_one_hardware_thread_of_each_core_comes_first(tmp_path):
    for cpu, siblings in enumerate(("0-1", "0-1", "2-3", "2-3")):
        plant(tmp_path, {f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": siblings})
    assert _cores_first([0, 1, 2, 3], tmp_path) == [0, 2, 1, 3]
    assert _cores_first([1, 2, 3], tmp_path) == [1, 2, 3]
    assert _cores_first([4, 5], tmp_path) == [4, 5]
