"""The report: what the benchmarks measured, on one page."""
