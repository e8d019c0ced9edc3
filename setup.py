import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The package's version, without importing it: torch may not be there yet."""
    text = (ROOT / "tensormask" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('tensormask/__init__.py has no line __version__ = "..."')
    return match.group(1)


setup(
    name="tensormask",
    version=read_version(),
    description="TensorMask: dense sliding-window instance segmentation on today's PyTorch",
    license="Apache-2.0",
    packages=find_packages(include=["tensormask", "tensormask.*"]),
    package_data={"tensormask": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11,<3",
        "torchvision>=0.26,<1",
        "numpy>=2,<3",
        "pycocotools>=2.0.8,<3",
        "fvcore>=0.1.5.post20221221,<0.2",
        "yacs>=0.1.8,<0.2",
        "PyYAML>=6.0,<7",
        # The headless build is the same cv2 without windows on the screen, which need system
        # libraries (libGL, X11) that servers and containers lack.
        "opencv-python-headless>=4.9,<6",
        "pillow>=10,<14",
        "tensorboard>=2.16,<3",
        "tqdm>=4.66,<5",
    ],
)
