"""One uniform view of Hugging Face causal language models, and its four readings."""

from __future__ import annotations

from heat_fast.decoder.attention import Rows
from heat_fast.decoder.view import Decoder, check_supported, supported_classes, view

__all__ = ["Decoder", "Rows", "check_supported", "supported_classes", "view"]
