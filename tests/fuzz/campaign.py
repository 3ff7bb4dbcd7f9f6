"""Reads mutated files and command lines, and counts how that ends:

python tests/fuzz/campaign.py --count 10000 --seed 7 --out results/fuzz

A process imports everything and writes an intact file of each kind; each input is read in a forked child with limits
(tests/fuzz/fork_input.py). An input is correct (the value that was read is valid), clean (refused in one line), or a
fault: any other exception, a hang, a death or gigabytes. Faulty inputs and their tracebacks are kept in OUT/faults.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # threads do not survive a fork

import argparse
import random
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import torch
from fork_input import Outcome, run_in_fork
from kinds import Kind, make_kinds, options_command

from eval.report.store import write_results
from illama.markdown_table import markdown

OUTCOMES = ("correct", "clean", "fault")


def run_input(kinds: list[Kind], draw: random.Random) -> tuple[Outcome, bytes]:
    """Draws one of the entries of a kind and a mutation, and reads the mutated file, which it also returns."""
    kind = draw.choice(kinds)
    if kind.name == "options":
        arguments, act = options_command(draw)
        return run_in_fork(act), "\0".join(arguments).encode(errors="surrogateescape")
    intact = kind.file.read_bytes()
    content = draw.choice(kind.mutate)(draw, intact)
    try:
        kind.file.write_bytes(content)
        return run_in_fork(kind.read), content
    finally:
        kind.file.write_bytes(intact)


def check_intact(kinds: list[Kind]) -> None:
    """Raises RuntimeError unless every intact file is read."""
    for kind in kinds:
        if (outcome := run_in_fork(kind.read)).kind != "correct":
            raise RuntimeError(f"the intact {kind.file} ends as {outcome.kind}: {outcome.message}")


def run_campaign(kinds: list[Kind], count: int, seed: int, faults: Path) -> dict[str, Counter[str]]:
    """Returns kind -> outcome -> number of inputs; the kinds take turns."""
    grouped: dict[str, list[Kind]] = defaultdict(list)
    for kind in kinds:
        grouped[kind.name].append(kind)
    counts: dict[str, Counter[str]] = {name: Counter() for name in grouped}
    names = list(grouped)
    for number in range(count):
        name = names[number % len(names)]
        outcome, content = run_input(grouped[name], random.Random(f"{name} {seed} {number}"))
        counts[name][outcome.kind] += 1
        if outcome.kind == "fault":
            faults.mkdir(parents=True, exist_ok=True)
            path = faults / f"{seed}-{number}-{name}"
            path.write_bytes(content)
            path.with_name(f"{path.name}.txt").write_text(outcome.message)
            print(f"FAULT: {path}: {outcome.message.strip().splitlines()[-1]:.300}", flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="number of inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", help="only these kinds; all if not given")
    parser.add_argument("--out", type=Path, default=Path("results/fuzz"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kinds = [each for each in make_kinds(Path(folder)) if not options.kinds or each.name in options.kinds]
        check_intact(kinds)
        counts = run_campaign(kinds, options.count, options.seed, options.out / "faults")
    rows = [(name, *(str(each[outcome]) for outcome in OUTCOMES)) for name, each in counts.items()]
    total = sum(counts.values(), Counter())
    rows.append(("all", *(str(total[outcome]) for outcome in OUTCOMES)))
    facts = {
        "inputs": options.count,
        "seed": options.seed,
        "kinds": {name: dict(each) for name, each in counts.items()},
    }
    write_results(options.out, f"fuzz-{options.seed}", facts, markdown(("kind", *OUTCOMES), rows))
    print(markdown(("kind", *OUTCOMES), rows))
    return int(total["fault"] > 0)


if __name__ == "__main__":
    sys.exit(main())
