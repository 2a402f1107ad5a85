#!/usr/bin/env bash
# Collects into a folder what gpu_check.sh needs on a GPU machine without network: wheels of what such
# machines lack, and CIFAR-10 as tar.gz where a tar of it is given.
#
#   bash benchmarks/gpu_bundle.sh BUNDLE [PYTHON_VERSION] [CIFAR10_TAR] [HAS]      # e.g. 3.12
#
# HAS: a file with the names of packages that the machine has (`pip list --format=freeze`); they are left out.
set -euo pipefail
bundle=${1:?name a folder for the bundle}
python=${2:-3.12}
cifar=${3:-}
has=${4:-/dev/null}
mkdir -p "$bundle/wheels"

# Not on a machine that has torch, torchvision, timm, pandas, pyarrow, opencv, onnxruntime, scikit-learn
# and pytest; with all they need themselves, but for what those bring, and for what they only import
# where it is there (debugpy, jedi, aiohttp).
packages="pydantic pydantic-core annotated-types typing-inspection simplejpeg onnx onnxscript onnx-ir ml-dtypes
  protobuf typer shellingham rich markdown-it-py mdurl pygments click tqdm psutil matplotlib contourpy cycler fonttools
  kiwisolver pyparsing safetensors pyyaml papermill ansicolors requests urllib3 idna certifi charset-normalizer
  tenacity nbclient nbformat fastjsonschema jsonschema jsonschema-specifications referencing rpds-py attrs
  jupyter-client jupyter-core platformdirs pyzmq tornado traitlets ipykernel comm ipython ipython-pygments-lexers
  decorator typing-extensions packaging matplotlib-inline nest-asyncio pexpect ptyprocess prompt-toolkit wcwidth stack-data executing
  asttokens pure-eval ipywidgets nest-asyncio2 entrypoints annotated-doc"
platforms=""
missing=""
for name in manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_12 \
  manylinux2010 manylinux_2_5 manylinux1; do
  platforms="$platforms --platform ${name}_x86_64"
done
# shellcheck disable=SC2086
for package in $packages; do
  if grep -qiE "^${package//-/[-_]}(==|[[:space:]]|$)" "$has"; then continue; fi
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python" \
    --implementation cp $platforms --dest "$bundle/wheels" "$package" \
    || { echo "no wheel of $package for Python $python" >&2; missing=1; }
done
if [ -n "$missing" ]; then exit 1; fi
if [ -n "$cifar" ]; then
  gzip --stdout --best "$cifar" > "$bundle/cifar10.tar.gz"
fi
du -sm "$bundle" | awk '{ print $1 " MiB"; exit $1 >= 60 }' \
  || { echo "the bundle is above 60 MiB; remove what the machine has already" >&2; exit 1; }
