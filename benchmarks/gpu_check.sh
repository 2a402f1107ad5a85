#!/usr/bin/env bash
# Installs a bundle of gpu_bundle.sh beside the machine's own packages, offline, and runs gpu_check.py.
#
#   bash benchmarks/gpu_check.sh BUNDLE OUT [--device cuda|cpu] [--minutes 9]
set -euo pipefail
bundle=$(realpath "${1:?name the folder of gpu_bundle.sh}")
out=$(realpath -m "${2:?name a folder for the results}")
cd "$(dirname "$0")/.."
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
# A package that is missing or too old is named before any part starts.
"$python" - "$site" <<'PY'
import importlib.metadata as metadata
import sys
import tomllib

from packaging.requirements import Requirement

# Imported only where they are there: gpu_bundle.sh leaves them out.
optional = {"widgetsnbextension", "jupyterlab_widgets", "debugpy", "jedi", "aiohttp", "jupyterlab"}
wrong = []
with open("pyproject.toml", "rb") as file:
    needs = {"workbench": tomllib.load(file)["project"]["dependencies"]}
for found in metadata.distributions(path=[sys.argv[1]]):
    needs[found.name] = found.requires or ()
for name in needs:
    for need in map(Requirement, needs[name]):
        if need.name in optional:
            continue
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            try:
                version = metadata.version(need.name)
            except metadata.PackageNotFoundError:
                version = None
            if version is None or not need.specifier.contains(version, prereleases=True):
                wrong.append(f"{name} needs {need}, there is {version}")
print("\n".join(wrong) or "all packages fit", file=sys.stderr)
PY
data=()
if [ -f "$bundle/cifar10.tar.gz" ]; then data=(--data "$bundle/cifar10.tar.gz"); fi
"$python" benchmarks/gpu_check.py --out "$out" "${data[@]}" "$@"
