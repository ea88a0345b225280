#!/usr/bin/env bash
# On a machine with a CUDA GPU, without network: build, run the GPU tests, run the GPU's benchmarks, write
# benchmarks/results/<gpu>.json. Reports nothing after a red test or a wrong result. Each step has its own time limit, and
# all together $LIMIT seconds, 9 minutes if it is not set; a benchmark that does not end in time is named and left out, and
# keeps the entries that the file has of it. Named suites are run alone, in their order.
#   PYTHON=/path/to/python bash benchmarks/gpu.sh [SUITE ...]
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
          "setuptools": "setuptools", "numpy": "numpy", "safetensors": "safetensors", "transformers": "transformers"}
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
raw="$(mktemp -d)"
trap 'rm -rf "$raw"' EXIT
export PYTHONDONTWRITEBYTECODE=1

# within SECONDS COMMAND...: the command, ended after as many or when all are over; 124 says that it was
SECONDS=0
within() {
  local limit="$1" left=$((${LIMIT:-540} - SECONDS))
  shift
  [ "$left" -gt 0 ] || return 124
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@"
}

echo "== build"
within 150 "$python" -m pip install -q --no-build-isolation --no-deps -e . || fail "the build failed"
"$python" -c 'from tlfast import _native; i = _native.build_info(); print(i); assert i["cuda_architectures"]' \
  || fail "the library was built without CUDA"

echo "== tests"
# kernels are compiled on the host's cores, as many tests at a time where pytest-xdist is there
parallel=()
"$python" -c 'import xdist' 2> /dev/null && parallel=(-n "$(($(nproc) < 14 ? $(nproc) : 14))" --dist worksteal)
within 240 "$python" -m pytest -q -m gpu "${parallel[@]}" tests/ops tests/backbone tests/graph tests/ladder || fail "a GPU test is red or too slow: nothing is reported"

suites=("$@")
[ $# -gt 0 ] || suites=(ladder_gpu frozen_kernels frozen_gpu rung hetero_gpu contrastive_gpu)
for suite in "${suites[@]}"; do
  echo "== benchmark: $suite"
  status=0
  within 120 "$python" -m pytest -q -s -p no:cacheprovider --benchmark-json="$raw/$suite.json" \
    "benchmarks/bench_$suite.py" || status=$?
  case "$status" in
    0) ;;
    124 | 137) echo "gpu.sh: benchmark $suite did not end in time and is left out" >&2 && rm -f "$raw/$suite.json" ;;
    *) fail "the benchmark $suite failed: nothing is reported" ;;
  esac
done

mkdir -p benchmarks/results
"$python" - "$raw" "$result" <<'PY'
import json, pathlib, sys
from tlfast.bench import measure

raw, result = sys.argv[1:]
contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(pathlib.Path(raw).glob("*.json"))]
if not contents:
    sys.exit("gpu.sh: no benchmark ran to its end: nothing is reported")
entries = {}
if pathlib.Path(result).is_file():
    earlier = json.loads(pathlib.Path(result).read_text(encoding="utf-8"))["benchmarks"]
    entries = {entry["fullname"]: entry for entry in earlier}
for entry in (entry for content in contents for entry in content["benchmarks"]):
    entry["stats"].pop("data", None)
    entries[entry["fullname"]] = entry
    print(json.dumps(entry["extra_info"]["row"], indent=1))
entries = [entries[name] for name in sorted(entries)]
kept = {name: contents[0][name] for name in ("datetime", "version")}
kept |= {"benchmarks": entries, "environment": measure.environment()}
with open(result, "w", encoding="utf-8") as file:
    file.write(json.dumps(kept, indent=1, sort_keys=True) + "\n")
PY
echo "== wrote $result"
