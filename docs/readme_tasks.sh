#!/usr/bin/env bash
# Runs the five tasks of the README, and writes what each prints to results/readme.
# Needs runs/same-task (python benchmarks/same_task.py), whose network and pictures stand for the reader's own.
set -euo pipefail
out=$PWD/results/readme
rm -rf runs/readme && mkdir -p "$out" runs/readme
cp runs/same-task/vit.safetensors runs/readme/
cp -r runs/same-task/pictures/flat runs/readme/pictures
cd runs/readme
python - <<'PYTHON'
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

from illama.data.datasets import open_data

data = open_data("fashion-mnist")
images = data.calibration(2000)
for number in range(2000):
    image, label = images[number]
    folder = Path("clothes", "train" if number % 8 else "val", data.classes[label].replace("/", " or "))
    folder.mkdir(parents=True, exist_ok=True)
    to_pil_image(image).save(folder / f"{number:04}.png")
PYTHON
cp "$(find ../same-task/pictures/val/1 -name '*.png' | sort | head -1)" photo.png

fold_text() { awk '/^[|$]/ { print; next } { print | "fold -s -w 118"; close("fold -s -w 118") }'; }

show() {  # NAME COMMAND: the command, and the last part of its output, from the first line that matches FROM
    echo "== $2" >&2
    { echo '```console'; { echo "$ $2"; eval "$2" | sed -n "/${FROM:-^}/,\$p"; } | fold_text; echo '```'; } > "$out/$1.md"
}
FROM='^| scheme' show quantize "illama quantize --model timm:vit_tiny_patch16_224 --checkpoint vit.safetensors --data pictures --schemes int8 --no-engines"
show build "illama build runs/ptq/int8 --targets sm89 --batch 1"
illama serve runs/ptq/int8 --run > serve.log 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
until grep -q "illama predict\|deploy/predict.py" serve.log; do kill -0 $server; sleep 1; done
show predict "illama predict photo.png --server http://127.0.0.1:8000/v2/models/int8"
kill $server && wait $server || true
show train "illama train --data clothes --epochs 10 --batch-size 64 --micro-batch 64 --ema-decay 0 --out runs/clothes"
