"""Shape bias of networks trained on ImageNet-1k:

python eval/shape_bias.py BUNDLE --stimuli DIR
python eval/shape_bias.py runs/tiny/fp32 runs/tiny/int8 --stimuli DIR --out runs/shape-bias

Measures whether a network decides by shape or by texture if the two disagree, by the cue-conflict protocol of Geirhos
et al. (arXiv 1811.12231). eval/metrics/cue_conflict.py describes it and says where the pictures are published.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from illama.options import Existing


@dataclass(frozen=True)
class ShapeBiasOptions:
    """Measure the shape bias of networks trained on ImageNet-1k.

    Prints a table, and writes it to OUT as shape-bias.md, and with all figures as shape-bias.json.

    Attributes:
        bundles: bundles of python quant/ptq.py, with ImageNet's 1,000 classes in the order of their WordNet IDs.
        stimuli: path to the folder with the 16 folders of cue-conflict pictures.
        out: folder for the results.
    """

    bundles: Annotated[tuple[Existing, ...], tyro.conf.Positional]
    stimuli: Path
    out: Path = Path("runs/shape-bias")


def main(options: ShapeBiasOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from eval.measure.open_bundles import open_bundles, predict_checked
    from eval.metrics.cue_conflict import Stimuli, check_classes, decide, shape_bias, shape_bias_tables
    from eval.report.store import write_results

    bundles = open_bundles(options.bundles)
    stimuli = Stimuli(options.stimuli, bundles.preprocessing.exif)
    check_classes(bundles.classes, options.bundles[0])
    logits, _ = predict_checked(bundles, stimuli, bundles.preprocessing.transform())
    results = {model: shape_bias(decide(values), stimuli.shapes, stimuli.textures) for model, values in logits.items()}
    facts = {"models": {model: {"bias": each.bias, **asdict(each)} for model, each in results.items()}}
    write_results(options.out, "shape-bias", facts, shape_bias_tables(results))


if __name__ == "__main__":
    run_command(ShapeBiasOptions, main)
