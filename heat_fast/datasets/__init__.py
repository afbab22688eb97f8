"""Prompts with targets and evidence: public sets, the paper's curated set, the synthetic one."""

from heat_fast.datasets.example import Example, Span, tokens_in

__all__ = ["Example", "Span", "tokens_in"]
