"""Peers that quantize the float ONNX graph, continued: Microsoft's Olive and Qualcomm's AIMET."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from illama.bundle import INPUT
from peers.base import Peer, Task
from peers.onnx_peers import PRODUCTS, with_float_graph
from peers.runtimes import OPENVINO, ORT

_OLIVE_PAGE = "microsoft.github.io/Olive, OnnxStaticQuantization"
_OLIVE = (("olive", "olive-ai"),)
_AIMET_PAGE = "quic.github.io/aimet-pages, aimet_onnx.QuantizationSimModel, to_onnx_qdq"
_AIMET = (("aimet_onnx", "aimet-onnx"),)
# Olive imports a script by its path, in which a data set is registered.
_SCRIPT = f"""
import numpy as np
from olive.data.registry import Registry


class Images:
    def __init__(self, path):
        self.images = np.load(path)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {{"{INPUT}": self.images[index]}}, 0


@Registry.register_dataset()
def saved_images(path, **_):
    return Images(path)
"""


def olive_static(task: Task, **settings: Any) -> Path:
    """Olive's OnnxStaticQuantization, calibrated by ONNX Runtime on the CPU."""

    def quantize(source: Path, target: Path) -> None:
        os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
        from olive.workflows import run

        folder = source.parent
        np.save(folder / "images.npy", task.images)
        (folder / "pictures.py").write_text(_SCRIPT)
        loaded = {"type": "saved_images", "path": str(folder / "images.npy")}
        script = str(folder / "pictures.py")
        data = {"name": "calibration", "type": "DataContainer", "user_script": script, "load_dataset_config": loaded}
        run(
            {
                "input_model": {"type": "ONNXModel", "model_path": str(source)},
                "data_configs": [data],
                "passes": {"int8": {"type": "OnnxStaticQuantization", "data_config": "calibration", **settings}},
                "output_dir": str(folder / "out"),
                "cache_dir": str(folder / "cache"),
            }
        )
        shutil.copyfile(folder / "out" / "model.onnx", target)

    return with_float_graph(task, quantize)


def aimet(task: Task, per_channel: bool = False, sequential_mse: bool = False) -> Path:
    """AIMET's quantization simulation, written as Q/DQ."""

    def quantize(source: Path, target: Path) -> None:
        import aimet_onnx
        from aimet_onnx.common.quantsim_config.utils import get_path_for_per_channel_config

        inputs = [{INPUT: batch} for batch in task.batches()]
        config = get_path_for_per_channel_config() if per_channel else None
        simulated = aimet_onnx.QuantizationSimModel(
            onnx.load(source), param_type="int8", activation_type="int8", config_file=config
        )
        if sequential_mse:
            aimet_onnx.apply_seq_mse(simulated, inputs)
        simulated.compute_encodings(inputs)
        onnx.save(simulated.to_onnx_qdq(prequantize_constants=True), target)

    return with_float_graph(task, quantize)


def _aimet_peer(name: str, what: str, **settings: Any) -> Peer:
    about = f"int8, min-max; {what} ({_AIMET_PAGE})"
    return Peer(f"AIMET, {name}", partial(aimet, **settings), (ORT, OPENVINO), about, _AIMET)


OLIVE_AIMET_PEERS: dict[str, Peer] = {
    "olive": Peer("Olive, default", olive_static, (ORT,), f"OnnxStaticQuantization ({_OLIVE_PAGE})", _OLIVE),
    "olive-products": Peer(
        "Olive, products only, per channel",
        partial(
            olive_static,
            activation_type="uint8",
            per_channel=True,
            op_types_to_quantize=PRODUCTS,
            prepare_qdq_config=False,
        ),
        (ORT,),
        f"OnnxStaticQuantization, operators that multiply, U8S8 ({_OLIVE_PAGE})",
        _OLIVE,
    ),
    "aimet": _aimet_peer("default", "its default configuration"),
    "aimet-per-channel": _aimet_peer("per channel", "its configuration with weights per channel", per_channel=True),
    "aimet-seq-mse": _aimet_peer(
        "per channel, sequential MSE", "the same after apply_seq_mse", per_channel=True, sequential_mse=True
    ),
}
