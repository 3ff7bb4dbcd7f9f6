"""Evaluates models on a whole split in chunks, which are divided among processes and kept over an interruption.

Each chunk's logits are reduced at once to a few numbers per image (:class:`eval.metrics.predictions.Predictions`), so
that memory does not grow with the number of classes. Chunks do not depend on the process that computes them: the result
is bit-identical for one process and for many, interrupted or not, provided that a runtime's logits are reproducible.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from eval.metrics.predictions import Evaluated, NotFinite, Predictions, count_not_finite
from illama.atomic_write import write_file
from illama.checkpoints.tensor_files import read_tensors
from illama.errors import UserError
from illama.inference import Infer, predict_chunks
from illama.nearest_neighbors import Classifier, as_it_is
from illama.partial_work import claim
from illama.progress import Activity
from illama.training.distributed import ALONE, Processes

UNFINISHED = "unfinished"  # folder of an interrupted evaluation, beside its results
CHUNK = 1000  # images
PATIENCE = 1800.0  # seconds


@dataclass(frozen=True)
class Evaluation:
    """How a split is evaluated.

    Attributes:
        work: folder where finished chunks are stored, and from which an interrupted evaluation continues; a temporary
            folder if None. Several processes must share one.
        workers: number of processes that read images.
        batch: number of images in a call of a model; by their size if None.
        facts: everything else that determines the result, such as the name of the data and the files' SHA-256.
        processes: the group of processes; each computes every ``count``-th chunk and returns the whole result.
        chunk: number of images in a chunk.
        patience: seconds that a finished process waits for a new chunk of the others.
        restart: discard another evaluation in ``work``.
        reference: model whose outputs the others' are compared with; None for no comparison.
        labeled: whether the images have labels; if not, the classes that ``reference`` predicts take their place.
        classifier: computes logits from the outputs, if they are features.
    """

    work: Path | None = None
    workers: int = 0
    batch: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    processes: Processes = ALONE
    chunk: int = CHUNK
    patience: float = PATIENCE
    restart: bool = False
    reference: str | None = None
    labeled: bool = True
    classifier: Classifier = as_it_is


def evaluate(
    models: Mapping[str, Infer],
    images: Dataset[tuple[Tensor, int]],
    temperatures: Mapping[str, float] | None = None,
    how: Evaluation | None = None,
) -> dict[str, Evaluated | NotFinite]:
    """Returns each model's predictions over a whole split; images are read once for all models.

    A model whose logits are not finite has none, and does not affect the others.

    Args:
        images: the split's preprocessed images and labels.
        temperatures: model -> its temperature, if it has one.

    Raises:
        UserError: a model's logits do not fit the labels; ``work`` holds another evaluation or damaged chunks; another
            process ended, or finished no chunk in ``patience`` seconds.
        ValueError: there are several processes and no ``work``.
    """
    how, temperatures, total = how or Evaluation(), temperatures or {}, len(images)  # type: ignore[arg-type]
    processes = how.processes
    chunks = [range(start, min(start + how.chunk, total)) for start in range(0, total, how.chunk)]
    sizes = {"images": total, "batch": how.batch, "chunk": how.chunk}
    pinned = {**how.facts, "models": list(models), "temperatures": dict(temperatures), **sizes}
    pinned |= {"reference": how.reference, "labeled": how.labeled}
    if how.work is None and processes.count > 1:
        raise ValueError("several processes must share a work folder: give one")
    with nullcontext(how.work) if how.work else tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        if processes.main:
            claim(Path(folder), pinned, restart=how.restart)
        processes.barrier()
        if not processes.main:
            claim(Path(folder), pinned)
        paths = {each: Path(folder) / f"{each.start:09d}.safetensors" for each in chunks}
        own = chunks[processes.rank :: processes.count]
        missing = [each for each in own if not paths[each].exists()]
        with _progress(own, missing, processes) as bar:
            predicted = predict_chunks(models, images, missing, how.batch, how.workers, bar.update)
            for each, (outputs, labels) in zip(missing, predicted, strict=True):
                _write(paths[each], _reduce(outputs, labels, temperatures, how))
        with Activity("wait for the other processes", shown=processes.main):
            _wait_for(list(paths.values()), how.patience)
        parts = [_read(path, models, len(each)) for each, path in paths.items()]
    return {name: _concatenate([part[name] for part in parts], total) for name in models}


def _progress(own: Sequence[range], missing: Sequence[range], processes: Processes) -> Activity:
    """Returns a progress bar over this process's share, which starts where the run was interrupted."""
    images, left = (sum(len(each) for each in chunks) for chunks in (own, missing))
    share = f" (1 of {processes.count} shares)" if processes.count > 1 else ""
    return Activity(f"evaluate{share}", "img", images, images - left, processes.main)


def _reduce(
    outputs: Mapping[str, np.ndarray], labels: np.ndarray, temperatures: Mapping[str, float], how: Evaluation
) -> dict[str, Evaluated | NotFinite]:
    """Returns each model's predictions for a chunk; UserError if logits do not fit the labels."""
    reduced: dict[str, Evaluated | NotFinite] = {}
    exact = outputs[how.reference].reshape(len(labels), -1).astype(np.float64) if how.reference else None
    if how.reference and not how.labeled:
        labels = how.classifier(outputs[how.reference]).argmax(1)
    for name, output in outputs.items():
        if (failed := count_not_finite(output)) is not None:
            reduced[name] = failed
            continue
        try:
            values = how.classifier(output)
            scaled = Predictions.of(values, labels, temperatures[name]) if name in temperatures else None
            plain = Predictions.of(values, labels)
            reduced[name] = Evaluated(plain, scaled, None if exact is None else _powers(exact, output))
        except ValueError as error:
            raise UserError(f"{name} does not fit the images: {error}") from error
    return reduced


def _powers(exact: np.ndarray, output: np.ndarray) -> np.ndarray:
    """Returns the powers of :class:`Evaluated` of a chunk; ``exact`` is the reference's output, (n, values) float64."""
    own = output.reshape(len(exact), -1).astype(np.float64)
    return np.stack([(each**2).sum(1) for each in (exact, own - exact, own)], 1)


def _concatenate(parts: Sequence[Evaluated | NotFinite], images: int) -> Evaluated | NotFinite:
    whole = [part for part in parts if isinstance(part, Evaluated)]
    if len(whole) < len(parts):
        return NotFinite(sum(part.images for part in parts if isinstance(part, NotFinite)), images)
    scaled = [part.scaled for part in whole if part.scaled]
    powers = [part.powers for part in whole if part.powers is not None]
    return Evaluated(
        Predictions.concatenate([part.plain for part in whole]),
        Predictions.concatenate(scaled) if scaled else None,
        np.concatenate(powers) if powers else None,
    )


def _write(path: Path, part: Mapping[str, Evaluated | NotFinite]) -> None:
    """Writes a chunk as arrays named MODEL/FORM/FIELD, MODEL/powers or MODEL/not_finite; MODEL is the model's index."""
    arrays: dict[str, np.ndarray] = {}
    for place, each in enumerate(part.values()):
        if isinstance(each, NotFinite):
            arrays[f"{place}/not_finite"] = np.array([each.images])
            continue
        for form, predictions in (("plain", each.plain), ("scaled", each.scaled)):
            if predictions is not None:
                arrays |= {f"{place}/{form}/{name}": values for name, values in vars(predictions).items()}
        if each.powers is not None:
            arrays[f"{place}/powers"] = each.powers
    with write_file(path) as draft:
        draft.write_bytes(safetensors.numpy.save(arrays))


def _read(path: Path, models: Mapping[str, Infer], images: int) -> dict[str, Evaluated | NotFinite]:
    stored = {name: value.numpy() for name, value in read_tensors(path, (torch.int64, torch.float64)).items()}

    def form(prefix: str) -> Predictions:
        arrays = [stored[f"{prefix}/{entry.name}"] for entry in fields(Predictions)]
        if wrong := next((each.shape for each in arrays if each.shape != (images,)), None):
            raise ValueError(f"{wrong} instead of {images} images")
        return Predictions(*arrays)

    def model(place: int) -> Evaluated | NotFinite:
        if f"{place}/not_finite" in stored:
            return NotFinite(int(stored[f"{place}/not_finite"].item()), images)
        scaled = form(f"{place}/scaled") if f"{place}/scaled/labels" in stored else None
        powers = stored.get(f"{place}/powers")
        if powers is not None and powers.shape != (images, 3):
            raise ValueError(f"{powers.shape} instead of {(images, 3)} powers")
        return Evaluated(form(f"{place}/plain"), scaled, powers)

    try:
        return {name: model(place) for place, name in enumerate(models)}
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run the command again") from error


def _wait_for(paths: Sequence[Path], patience: float) -> None:
    """Waits until all files exist; raises UserError if no new one appears for ``patience`` seconds.

    Unlike a barrier, it distinguishes a slow process from one that has ended.
    """
    last, since = len(paths) + 1, time.monotonic()
    while missing := [path for path in paths if not path.exists()]:
        if len(missing) < last:
            last, since = len(missing), time.monotonic()
        elif time.monotonic() - since > patience:
            raise UserError(
                f"no other process finished a chunk in {patience:g} s, and {len(missing)} of {len(paths)} are missing "
                f"in {missing[0].parent}: check that all processes run and share this folder, then run the command "
                "again; finished chunks are kept"
            )
        time.sleep(0.2)
