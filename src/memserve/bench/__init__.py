"""Benchmarks of OpenAI-compatible endpoints: workloads, load, comparisons, reports.

Workloads and the timeline are pure, so that a simulator can replay the same ones on a virtual clock.
"""
