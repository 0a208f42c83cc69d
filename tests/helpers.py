"""Comparison with expected numbers, and a record of how close each group came."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

_worst: dict[str, tuple[int, float, float, str]] = {}
_implementation = ""


@contextlib.contextmanager
def goldens_through(what: str, implementation: str) -> Iterator[None]:
    """Within, comparisons form a group of their own: stored numbers of `what` by `implementation`."""
    global _implementation
    before, _implementation = _implementation, f"goldens of {what}: {implementation}"
    try:
        yield
    finally:
        _implementation = before


def as_array(value: Any) -> np.ndarray:
    """NumPy float64 view of a tensor, array or number."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def assert_close(actual: Any, expected: Any, rel: float, what: str = "") -> None:
    """Require max|actual - expected| <= rel * max|expected| (absolute `rel` where expected is all zero).

    The group of the record is the running test file's name, or what `goldens_through` says; its worst ratio to the
    bound is shown at the run's end.
    """
    a, e = as_array(actual), as_array(expected)
    assert a.shape == e.shape, f"{what}: shape {a.shape}, expected {e.shape}"
    if not e.size:
        return
    assert np.isfinite(a).all() or not np.isfinite(e).all(), f"{what}: non-finite values"
    scale = float(np.abs(e).max()) or 1.0
    error = float(np.abs(a - e).max()) / scale
    file = os.environ.get("PYTEST_CURRENT_TEST", "?").split("::")[0].split("/")[-1].removesuffix(".py")
    group = _implementation or file
    count, worst, bound, where = _worst.get(group, (0, -1.0, rel, ""))
    if worst < 0 or error / rel > worst / bound:
        worst, bound, where = error, rel, what
    _worst[group] = (count + 1, worst, bound, where)
    assert error <= rel, f"{what}: relative error {error:.3e} exceeds {rel:.1e}"


def worst_errors() -> dict[str, tuple[int, float, float, str]]:
    """Per test file: number of comparisons, worst relative error, its bound, where."""
    return dict(sorted(_worst.items()))
