"""Prompts with targets and evidence: public sets, the paper's curated set, the synthetic one."""

from heat_fast.datasets.annotations import Agreement, agreement, intersection, read_annotations
from heat_fast.datasets.encoding import EncodedExample, encode
from heat_fast.datasets.example import Example, Span, tokens_in
from heat_fast.datasets.generated import restated, synthetic
from heat_fast.datasets.pairs import curated
from heat_fast.datasets.public import (
    authors,
    load,
    longra,
    narrativeqa,
    narratives,
    sciq,
    tellmewhy,
    wikibio,
)
from heat_fast.datasets.ranking import bm25, bm25_evidence

__all__ = [
    "Agreement",
    "EncodedExample",
    "Example",
    "Span",
    "agreement",
    "authors",
    "bm25",
    "bm25_evidence",
    "curated",
    "encode",
    "intersection",
    "load",
    "longra",
    "narrativeqa",
    "narratives",
    "read_annotations",
    "restated",
    "sciq",
    "synthetic",
    "tellmewhy",
    "tokens_in",
    "wikibio",
]
