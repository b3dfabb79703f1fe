"""Operator registry, microbenchmarks, the machine-code ledger and the roofline."""
