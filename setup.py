"""Build steps that pyproject.toml cannot express.

All metadata is in pyproject.toml. This file is where the compiled extension of ``csrc/`` is
declared once there is one; until then it only hands over to setuptools.
"""

from setuptools import setup

setup()
