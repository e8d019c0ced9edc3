"""Dtypes under CUDA's autocast, on fake tensors: the dense part is in half precision."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (cc)")
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch with CUDA, without a GPU")
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, whose runtime it would replace")
def test_dtypes_under_autocast(tmp_path) -> None:
    (tmp_path / "runtime.c").write_text(fake_cuda.RUNTIME, encoding="utf-8")
    library = tmp_path / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library]
    subprocess.run(["cc", *options, tmp_path / "runtime.c"], check=True)
    tests = Path(fake_cuda.__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, fake_cuda.__file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 4
    for name, dtypes in results.items():
        half = name.split(", ")[1]
        expected = {key: [half] for key in ("features", "logits", "deltas", "masks")}
        expected |= {key: ["torch.float32"] for key in ("losses", "gradients")}
        assert dtypes == expected, name
