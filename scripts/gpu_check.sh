#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with one CUDA device: its tests, then a short benchmark of the engine.
#
#   scripts/gpu_check.sh                           # both parts
#   scripts/gpu_check.sh --tests                   # one of them
#   scripts/gpu_check.sh --tests --slow            # with the tests whose kernels compile for minutes
#   scripts/gpu_check.sh --bench --out DIR -- --concurrency 1,64 --option disable_cuda_graph=true
#
# Results go to --out, else $OUT, else gpu-check in the directory for temporary files. What follows -- is for the
# benchmark. A part that fails does not keep the next one from running; the exit code says if all passed.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  exit "$1"
}

out=${OUT:-${TMPDIR:-/tmp}/gpu-check}
tests=0
bench=0
marks="gpu and not multi_gpu and not network and not slow"
while [ $# -gt 0 ]; do
  case $1 in
    --tests) tests=1 ;;
    --bench) bench=1 ;;
    --slow) marks="gpu and not multi_gpu and not network" ;;
    --out)
      [ $# -ge 2 ] || usage 2
      out=$2
      shift
      ;;
    --)
      shift
      break
      ;;
    -h | --help) usage 0 ;;
    *) usage 2 ;;
  esac
  shift
done
if [ $tests = 0 ] && [ $bench = 0 ]; then
  tests=1
  bench=1
fi

python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
# The package need not be installed.
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out" || exit 2
status=0
summary=""

# run NAME COMMAND...: run a part, keep what it says in OUT/NAME.txt, and note how it ended and its last line.
run() {
  local name=$1 begin=$SECONDS result=passed last
  shift
  printf '== %s\n' "$name"
  if ! "$@" 2>&1 | tee "$out/$name.txt"; then
    result=FAILED
    status=1
  fi
  last=$(grep -v '^ *$' "$out/$name.txt" | tail -n 1 | cut -c -80)
  summary+=$(printf '%-8s  %-6s  %4d s  %s' "$name" "$result" $((SECONDS - begin)) "$last")$'\n'
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv,noheader || return 1
  "$python" - <<'PYTHON'
import importlib.metadata
import platform

import torch

versions = [f"python {platform.python_version()}"]
for name in ("torch", "triton", "flashinfer-python", "sglang-kernel", "flash-attn-4", "transformers"):
    try:
        versions.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        versions.append(f"no {name}")
print(", ".join(versions))
raise SystemExit(0 if torch.cuda.is_available() else "torch sees no CUDA device")
PYTHON
}

gpu_tests() {
  local files
  # Files without such tests are not even collected: they may need packages that this machine lacks.
  mapfile -t files < <(grep -rlE --include='test_*.py' 'pytest\.mark\.gpu\b' tests | sort)
  if [ ${#files[@]} = 0 ]; then
    echo "no test is marked gpu"
    return 1
  fi
  # Most of the time goes into compiling kernels, which several processes do side by side; engines of tests are small, but
  # each process has a context and workspaces of some GB.
  local jobs=()
  if "$python" -c 'import xdist' 2>/dev/null; then jobs=(-n "${JOBS:-6}"); fi
  # Warnings are errors where the versions are pinned, which they are not here. tests/conftest.py leaves the kernels to
  # Triton's interpreter unless it is told of the GPU.
  LORIKEET_TEST_GPU=1 "$python" -m pytest "${jobs[@]}" -o addopts= -o filterwarnings=default -q -ra \
    -m "$marks" --strict-markers --continue-on-collection-errors \
    --junitxml "$out/tests.xml" "${files[@]}"
}

run machine machine
if [ $tests = 1 ]; then
  run tests gpu_tests
fi
if [ $bench = 1 ]; then
  run bench "$python" -m benchmarks.engine.run --lengths 128/128 --repeats 2 \
    --profile "$out/profile" --json "$out/engine.json" "$@"
fi

if [ $bench = 1 ] && [ -f "$out/engine.json" ]; then
  printf '\n'
  "$python" -m benchmarks.engine.tables --short "$out/engine.json"
fi
printf '\n%s' "$summary"
exit $status
