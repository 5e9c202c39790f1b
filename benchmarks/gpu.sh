#!/usr/bin/env bash
# Tests and benchmarks on the GPU of this machine, within ten minutes.
#
#   benchmarks/gpu.sh [-o FOLDER] [-f TEXT] [STAGE ...]
#
# STAGE is tests, rnn, attention (these three if none is named), tune or sanitize. FOLDER gets the results and the log;
# without it benchmarks/results does. TEXT keeps the benchmarks' rows with it in their names.
#
# Needed: the Python in $PYTHON (python3 if unset) with torch for CUDA, Triton, rich and pytest; pytest-xdist makes the
# tests faster. seqkern need not be installed and nothing is downloaded: where that Python does not find it, a folder of
# links to the sources is put on its path. Triton compiles each kernel for this GPU when it is first called.
#
# Exits 0 if every stage passed, 1 if one failed or ran out of time (the others run all the same), 2 if nothing was run:
# no GPU, or a mistake in the arguments.
set -uo pipefail
cd "$(dirname "$0")/.."

declare -A LIMIT=([tests]=230 [rnn]=150 [attention]=200 [tune]=400 [sanitize]=150) # seconds
ATTEMPTS=4                                                                        # of a suite whose device was lost
LOST=3                                                                            # the exit code that says so
PYTHON=${PYTHON:-python3}
folder=benchmarks/results
filter=

usage() {
  sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
while getopts "o:f:h" option; do
  case $option in
    o) folder=$OPTARG ;;
    f) filter=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(tests rnn attention)
for stage in "${stages[@]}"; do
  [ -n "${LIMIT[$stage]:-}" ] || {
    echo "gpu.sh: there is no stage $stage, only ${!LIMIT[*]}" >&2
    usage
  }
done
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
log=$folder/gpu.log
export PYTHONUNBUFFERED=1

if ! "$PYTHON" -c "import seqkern.kernels" 2> /dev/null; then
  links=$PWD/build/links
  mkdir -p "$links/seqkern"
  ln -sfn "$PWD"/python/seqkern/* "$PWD/kernels" "$links/seqkern/"
  export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}"
fi
"$PYTHON" benchmarks/gpu.py check || exit 2

tests() {
  local jobs=()
  "$PYTHON" -c "import xdist" 2> /dev/null && jobs=(-n "$(nproc)")
  # The files that know such tests: others may need packages that are not here. Warnings of a newer Python or numpy
  # than the project is developed with are no failures.
  grep -l "mark\.gpu" tests/test_*.py | xargs timeout -k 10 "$1" "$PYTHON" -m pytest -q -m "gpu and not slow" \
    -W default -p no:cacheprovider "${jobs[@]}"
}
sanitize() {
  local checker status=0
  command -v compute-sanitizer > /dev/null || {
    echo "compute-sanitizer is not here: skipped"
    return 0
  }
  for checker in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 $(($1 / 2)) compute-sanitizer --tool "$checker" \
      --error-exitcode 1 "$PYTHON" -m pytest -q -x -m gpu -W default -p no:cacheprovider \
      tests/test_triton_rnn.py tests/test_attention_kernels.py \
      -k "(test_op_meets_oracle and float16 and lstm and dense) or (test_half and plain and float16)" || status=1
  done
  return $status
}
suite() {
  local end=$((SECONDS + $2)) attempt status
  for ((attempt = 0; attempt < ATTEMPTS; attempt++)); do
    [ $SECONDS -lt $end ] || return 124
    timeout -k 10 $((end - SECONDS)) "$PYTHON" benchmarks/gpu.py bench "$1" "$folder" "$filter"
    status=$?
    [ $status -eq $LOST ] || return $status
  done
  return $LOST
}
rnn() { suite rnn-cuda "$1"; }
attention() { suite attention-cuda "$1"; }
tune() { timeout -k 10 "$1" "$PYTHON" benchmarks/gpu.py tune "$folder"; }

: > "$log"
told=()
failed=0
for stage in "${stages[@]}"; do
  echo "== $stage, at most ${LIMIT[$stage]} s" | tee -a "$log"
  begin=$SECONDS
  "$stage" "${LIMIT[$stage]}" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  case $status in
    0) said=passed ;;
    124 | 137) said="out of time" ;;
    *) said="failed, exit code $status" ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  told+=("$stage: $said, $((SECONDS - begin)) s")
done
"$PYTHON" benchmarks/gpu.py summary "$folder" 2>&1 | tee -a "$log"
printf '%s\n' "${told[@]}" | tee -a "$log"
exit $failed
