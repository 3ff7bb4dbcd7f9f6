#!/usr/bin/env bash
# Runs the gpu tests, and measures numerics and latency, within 9 minutes on any CUDA machine.
#   bash benchmarks/gpu/run.sh [NAME]      writes results/gpu/NAME.json and NAME.md; NAME defaults to the GPU's
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD
tests=$(mktemp)
timeout 120 "$python" -m pytest -q -m gpu -p no:cacheprovider tests >"$tests" 2>&1
tested=$?
echo "pytest's exit status: $tested" >>"$tests"
tail -n 5 "$tests"
timeout 400 "$python" benchmarks/gpu/measure.py --seconds 360 --tests "$tests" ${1:+--name "$1"}
status=$?
rm -f "$tests"
exit $((status ? status : tested))
