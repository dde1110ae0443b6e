"""Every claim of performance as a program: `python -m benchmarks.NAME [--quick]`.

Each prints a table and, last, one line of JSON with its ratios to a named baseline that the same
run measured: see `common.report`.
"""
