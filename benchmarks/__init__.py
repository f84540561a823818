"""One question a file; `python -m benchmarks NAME` prints a table of ratios from one run."""
