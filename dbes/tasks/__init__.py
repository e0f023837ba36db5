"""Benchmarks: task files, their documents from local files or the hub, and texts to train on."""
