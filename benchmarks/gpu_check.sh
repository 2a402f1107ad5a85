#!/usr/bin/env bash
# Installs a bundle of gpu_bundle.sh beside the machine's own packages, offline, and runs gpu_check.py.
#
#   bash benchmarks/gpu_check.sh BUNDLE OUT [--device cuda|cpu] [--minutes 9]
set -euo pipefail
cd "$(dirname "$0")/.."
bundle=${1:?name the folder of gpu_bundle.sh}
out=${2:?name a folder for the results}
shift 2
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
  "$bundle"/wheels/*.whl
# The machine's own packages come first: a second protobuf or numpy would not fit its torch or timm.
own=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export PYTHONPATH="$PWD:$own:$site${PYTHONPATH:+:$PYTHONPATH}"
export JUPYTER_PATH="$site/share/jupyter" OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
data=()
if [ -f "$bundle/cifar10.tar.gz" ]; then data=(--data "$bundle/cifar10.tar.gz"); fi
"$python" benchmarks/gpu_check.py --out "$out" "${data[@]}" "$@"
