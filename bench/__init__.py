"""The benchmarks: operator registry, microbenchmarks, machine-code ledger, roofline and report."""
