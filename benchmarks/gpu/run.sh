#!/usr/bin/env bash
# One call on any CUDA machine, 9 minutes at most: the gpu tests, numerics against float64, and latency of everything.
#   bash benchmarks/gpu/run.sh [NAME]      writes results/gpu/NAME.json and NAME.md; NAME is the GPU's if not given
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
