"""Build steps that pyproject.toml cannot express: the compiled extension of ``csrc/``.

Without a C++ compiler the package still installs and runs on torch alone; the build then says so,
and ``heat_fast.build_info()`` tells at run time. ``HEAT_FAST_NATIVE=0`` leaves the extension out,
``HEAT_FAST_NATIVE=1`` makes a failure to build it an error.
"""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

WANTED = os.environ.get("HEAT_FAST_NATIVE", "")
SOURCES = ("bindings", "parallel", "kernels_base", "kernels_avx2", "kernels_avx512")

native = Pybind11Extension(
    "heat_fast._native",
    [f"csrc/{name}.cpp" for name in SOURCES],
    depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
    include_dirs=["csrc"],
    cxx_std=17,
    # Fused multiply-adds whatever the language standard; no errno from exp and sqrt.
    extra_compile_args=["-O3", "-ffp-contract=fast", "-fno-math-errno"],
    libraries=["dl"] if sys.platform == "linux" else [],
    optional=WANTED != "1",
)

ParallelCompile("MAX_JOBS", default=2).install()
setup(
    ext_modules=[] if WANTED == "0" else [native],
    cmdclass={"build_ext": build_ext},
)
