#!/bin/sh
# Runs the card's tests and measurements on a machine with a card, from what `make cuda-carry` put together: no compiler is needed.
# It takes some minutes and writes report.md and speed.jsonl.
#
#     sh core/cuda/check.sh target/cuda/carry OUT
#
# The repository is needed beside it for tests/reference. A python3 with torch and transformers, where there is one, is measured too,
# and lends its cuBLAS.
set -u
carried=$(cd "$1" && pwd) || exit 2
mkdir -p "$2"
out=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
chmod +x "$carried/locum-core-tests"

# Where PyTorch's wheels keep cuBLAS; elsewhere the toolkit's own folder is known to the loader.
blas=$("$python" - <<'PY' 2>/dev/null
import glob, os, sysconfig
found = [p for site in {sysconfig.get_paths()[k] for k in ("purelib", "platlib")} for p in glob.glob(site + "/nvidia/*/lib/libcublas.so.1[23]")]
print(os.path.dirname(found[0]) if found else "")
PY
)
LD_LIBRARY_PATH="${blas:+$blas:}/usr/local/cuda/lib64:${LD_LIBRARY_PATH:-}"
export LD_LIBRARY_PATH
export LOCUM_TEST_CUDA="$carried/liblocum_cuda.so" LOCUM_TEST_FIXTURES="$here/../../tests/reference"

# A dry run, on the stand-in, names the small measurement here.
measurement=${MEASUREMENT:-measure_the_card}
tests() {
  timeout "$1" "$carried/locum-core-tests" "$2" --nocapture --test-threads=1 $3 2>&1
}
failed=0
began=$(date +%s)
# With these limits it ends within ten minutes, whatever hangs.
for room in parity training engine::answers_on_a_card; do
  tests ${LIMIT:-60} "device::tests::$room" "" > "$out/tests-$(echo $room | tr -d ':').log" || failed=1
done
tests 150 "device::tests::speed::$measurement" --include-ignored > "$out/speed.log" || failed=1
tests 120 "device::tests::label::$measurement" --include-ignored >> "$out/speed.log" || failed=1
grep '^speed ' "$out/speed.log" | cut -c7- > "$out/speed.jsonl"
if "$python" -c 'import torch, transformers; assert torch.cuda.is_available()' 2>/dev/null; then
  timeout 145 "$python" "$here/peers.py" >> "$out/speed.jsonl" 2> "$out/peers.log" || echo "the peers did not all finish: peers.log" >> "$out/speed.log"
fi
cat "$out"/tests-*.log "$out/speed.log" > "$out/all.log"
rm -f "$out"/tests-*.log "$out/speed.log"
{
  echo "# liblocum_cuda.so on a card"
  echo
  grep -h -m1 '^on \|\.\.\. on ' "$out/all.log" | sed 's/.*\.\.\. on/on/'
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv,noheader 2>/dev/null
  echo
  grep -h '^test result\|FAILED\|panicked' "$out/all.log"
  echo
  echo '| engine | what | median | least | most | unit |'
  echo '| --- | --- | --- | --- | --- | --- |'
  "$python" - "$out/speed.jsonl" <<'PY'
import json, sys
for line in open(sys.argv[1]):
    row = json.loads(line)
    cells = [row.get(k, "") for k in ("engine", "what", "median", "least", "most", "unit")]
    print("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
PY
  echo
  echo "$(( $(date +%s) - began )) s in all; $([ $failed = 0 ] && echo 'everything passed' || echo 'something FAILED: all.log')"
} > "$out/report.md"
cat "$out/report.md"
exit $failed
