"""What heat_fast is measured against, re-implemented for the benchmarks."""
