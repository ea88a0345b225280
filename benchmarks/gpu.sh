#!/usr/bin/env bash
# On a machine with a CUDA GPU, without network: build, run the GPU tests, run the rung's benchmark, write
# benchmarks/results/<gpu>.json. Reports nothing after a red test. Each step has its own time limit: 9 minutes in all.
#   PYTHON=/path/to/python bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"

fail() {
  echo "gpu.sh: $*" >&2
  exit 1
}

"$python" - <<'PY' || exit 1
import importlib.util, sys

needed = {"torch": "torch", "triton": "triton", "pytest": "pytest", "pytest_benchmark": "pytest-benchmark",
          "hypothesis": "hypothesis", "pybind11": "pybind11", "scikit_build_core": "scikit-build-core",
          "setuptools": "setuptools", "numpy": "numpy", "safetensors": "safetensors"}
missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
if missing:
    sys.exit(f"gpu.sh: missing Python packages: {', '.join(missing)}; install them first")
import torch
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: no CUDA device: PyTorch {torch.__version__} sees none; run this on a machine with an NVIDIA GPU")
PY
[ -d /usr/local/cuda/bin ] && PATH="$PATH:/usr/local/cuda/bin"
command -v nvcc > /dev/null || [ -n "${CUDACXX:-}" ] || fail "no nvcc: put it on PATH or set CUDACXX"

gpu="$("$python" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))')"
result="benchmarks/results/$gpu.json"
raw="$(mktemp)"
trap 'rm -f "$raw"' EXIT
export PYTHONDONTWRITEBYTECODE=1

echo "== build"
timeout 150 "$python" -m pip install -q --no-build-isolation --no-deps -e . || fail "the build failed"
"$python" -c 'from tlfast import _native; i = _native.build_info(); print(i); assert i["cuda_architectures"]' \
  || fail "the library was built without CUDA"

echo "== tests"
timeout 210 "$python" -m pytest -q -m gpu tests/ops || fail "a GPU test is red or too slow: nothing is reported"

echo "== benchmark"
timeout 150 "$python" -m pytest -q -p no:cacheprovider --benchmark-json="$raw" benchmarks/bench_rung.py \
  || fail "the benchmark failed: nothing is reported"

mkdir -p benchmarks/results
"$python" - "$raw" "$result" <<'PY'
import json, sys
from tlfast.bench import measure

raw, result = sys.argv[1:]
with open(raw, encoding="utf-8") as file:
    content = json.load(file)
for entry in content["benchmarks"]:
    entry["stats"].pop("data", None)
    print(json.dumps(entry["extra_info"]["row"], indent=1))
kept = {name: content[name] for name in ("datetime", "version", "benchmarks")} | {"environment": measure.environment()}
with open(result, "w", encoding="utf-8") as file:
    file.write(json.dumps(kept, indent=1, sort_keys=True) + "\n")
PY
echo "== wrote $result"
