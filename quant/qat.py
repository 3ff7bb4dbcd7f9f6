"""Quantization-aware training of a trained network:

python quant/qat.py --scheme w4a4
python quant/qat.py --scheme w4a4 --checkpoint runs/in1k-tiny/bundle --data /imagenet --out runs/w4a4

On several GPUs: torchrun --nproc-per-node 8 quant/qat.py --recipe qat-in1k-tiny --checkpoint ... --data /imagenet

Calibrates the network as post-training quantization does, then fine-tunes weights and scales with fake quantization,
in the trainer of illama/train.py. An interrupted run resumes when the same command is run again. Like quant/ptq.py,
this command may import from every package.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

from illama.cli import run_command
from illama.training.recipe import recipe_of_command_line
from quant.quantizers.qat_options import DEFAULT_RECIPE, RECIPES, QatOptions


def main(options: QatOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
    from eval.metrics.paired import paired_drop
    from illama.atomic_write import lock_folder
    from illama.inference import chance_note
    from illama.manifest import Manifest
    from illama.training.distributed import processes
    from illama.training.trainer import fit
    from quant.quantizers.qat_run import open_job, start_run, write_qat_bundle

    options = replace(options, out=options.out.resolve())
    with processes() as group, lock_folder(options.out, group.main):
        job = open_job(options)
        run = start_run(job, group)
        fit(run)
        if not group.main:
            return
        bundle = write_qat_bundle(job, run, lambda path: OnnxRuntimeEngine(path).infer, paired_drop)
    scores = Manifest.read(bundle).scores
    assert scores is not None  # write_qat_bundle evaluates
    top1 = scores.values
    print(
        f"{job.inputs.metric} of {scores.images} test images: FP32 {top1['fp32']:.2f}%, post-training quantization "
        f"{top1['ptq']:.2f}%, quantization-aware training {top1['qat']:.2f}%, exported file "
        f"{top1.get('torchao', top1.get('onnx')):.2f}%; bundle in {os.path.relpath(bundle)}"
    )
    if not job.inputs.neighbors and (note := chance_note("FP32", top1["fp32"], len(job.inputs.data.classes))):
        print(note)


if __name__ == "__main__":
    run_command(QatOptions, main, partial(recipe_of_command_line, QatOptions, RECIPES, DEFAULT_RECIPE))
