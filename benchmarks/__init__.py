"""Benchmarks of this project against the reference path, its operators, and other runtimes."""
