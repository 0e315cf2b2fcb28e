"""Benchmarks: splitrun and others on the same model under the same budgets, each in a process of its own."""
