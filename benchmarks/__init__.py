"""Benchmarks, installed as `dino_fast.benchmarks`."""
