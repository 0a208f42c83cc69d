"""Inception score: goldens, torch-fidelity, closed forms."""

import numpy as np
import pytest
import torch
from helpers import assert_close

from metrics.features import torch_fidelity_module
from metrics.inception_score import inception_score


@pytest.mark.parametrize("name, num_splits", [("is", 10), ("is_uneven", 5)])
def test_goldens(goldens, name, num_splits):
    archive = np.load(goldens / "metrics.npz", allow_pickle=False)
    score = inception_score(archive[f"{name}/probs"], num_splits=num_splits)
    assert_close([score.mean, score.std], [archive[f"{name}/mean"], archive[f"{name}/std"]], 1e-6, name)


def test_small_copy_of_goldens(data_dir):
    archive = np.load(data_dir / "metrics.npz", allow_pickle=False)
    score = inception_score(archive["is_uneven/probs"], num_splits=5)
    assert_close([score.mean, score.std], [archive["is_uneven/mean"], archive["is_uneven/std"]], 1e-6, "is_uneven")


def test_closed_forms():
    certain = np.tile(np.eye(5), (8, 1))
    assert inception_score(certain, num_splits=4).mean == pytest.approx(5)  # sure of every image, all classes equal
    assert inception_score(np.full((10, 5), 0.2), num_splits=2).mean == pytest.approx(1)
    one = inception_score(certain, num_splits=1)
    assert (one.std, one.std_error, one.num_splits) == (0, 0, 1)


def test_agrees_with_torch_fidelity():
    try:
        theirs = torch_fidelity_module("metric_isc").isc_features_to_metric
    except ImportError as error:
        pytest.skip(str(error))
    logits = np.random.RandomState(0).randn(400, 12)
    expected = theirs(torch.from_numpy(logits), splits=10, shuffle=False)
    score = inception_score(torch.from_numpy(logits).softmax(1).numpy())
    assert_close(score.mean, expected["inception_score_mean"], 1e-9, "torch-fidelity mean")
    assert_close(score.std, expected["inception_score_std"], 1e-9, "torch-fidelity std")
    assert score.std_error == pytest.approx(score.std * (10 / 9) ** 0.5 / 10**0.5)


@pytest.mark.parametrize(
    "rows, message",
    [(np.ones((4, 3)), "no probabilities"), (np.full((3, 2), 0.5), "splits"), (np.array([[1.5, -0.5]] * 9), "no prob")],
)
def test_refusals(rows, message):
    with pytest.raises(ValueError, match=message):
        inception_score(rows, num_splits=4)
