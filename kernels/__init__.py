"""Accelerated operations, one folder each: specification, kernel, dispatch.

This folder is reached as ``heat_fast.kernels``, through the symbolic link of that name in the
package. It is never installed as a top-level ``kernels``: transformers looks for another
distribution under that name.
"""

from __future__ import annotations
