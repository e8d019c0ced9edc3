#!/usr/bin/env bash
# Make what check.sh needs on a machine without network: wheels and data in .gpu/, the CUDA library.
#
# Runs in the repository's root, with network; `make gpu-prepare` calls it. The machine with the GPU
# has Python 3.12 and PyTorch. Take .gpu/ and tensormask/_C.abi3.so there.
set -euo pipefail
PY=${PY:-.venv/bin/python}
NUCLEI=${NUCLEI:-../shared/data/nuclei_dsb2018} # without this folder, the set in the package serves

mkdir -p .gpu/wheels
rm -f .gpu/wheels/*
"$PY" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d .gpu/wheels pycocotools yacs pooch platformdirs termcolor
# Plain Python, without wheels on the index.
"$PY" -m pip wheel -q --no-deps -w .gpu/wheels fvcore iopath
if [ -d "$NUCLEI" ] && [ ! -d .gpu/nuclei ]; then
    cp -r "$NUCLEI" .gpu/nuclei
fi
# The stable ABI: compiled with this Python and PyTorch, it loads in later ones, and in 2.11.
FORCE_CUDA=1 CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} \
    "$PY" setup.py build_ext --build-temp .gpu/build --inplace
rm -r .gpu/build
du -sh .gpu tensormask/_C.abi3.so
