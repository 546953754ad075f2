"""Two packages in one distribution: `jrt`, and `jrt_recall`, which also installs alone from lm-eval-harness/.

The CUDA kernels are built only where they are asked for: JRT_BUILD_KERNELS=1 pip install --no-build-isolation .
"""

import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "jrt" / "__init__.py").read_text()).group(1)

kernels = {}
if os.environ.get("JRT_BUILD_KERNELS") == "1":
    sys.path.insert(0, str(ROOT))
    from kernels.build import BuildKernels, extensions

    kernels = {"ext_modules": extensions(), "cmdclass": {"build_ext": BuildKernels}}

setup(
    version=VERSION,
    packages=[*find_packages(include=["jrt", "jrt.*"]), "jrt_recall", "jrt_recall.harness", "jrt_recall.tasks"],
    package_dir={"jrt_recall": "lm-eval-harness/jrt_recall"},
    package_data={
        "jrt": ["minis/*/*", "checkpoints/*.jinja", "evaluate/tables/*.csv", "evaluate/report/*.jinja", "py.typed"],
        "jrt_recall": ["assets/**/*", "tasks/**/*", "tasks/*"],
    },
    **kernels,
)
