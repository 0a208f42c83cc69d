"""The small languages of `compare`: losses, seeds, a grid, a share of the work."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stylegan_rooted.arms import Arm, Point, parse_grid, parse_losses, parse_seeds, parse_share
from training.config import LossConfig

BASE = LossConfig(gamma=0.5, pl_weight=0.0)
ISSUE = "logistic,rooted:k=2,rooted:k=2,tail=4,rooted:k=8,rooted:k=2:64@20"


def test_commas_separate_arms_and_settings() -> None:
    arms = parse_losses(ISSUE, BASE)
    assert [a.name for a in arms] == ["logistic", "rooted:k=2", "rooted:k=2,tail=4", "rooted:k=8", "rooted:k=2:64@20"]
    assert [a.slug for a in arms] == ["logistic", "rooted-k2", "rooted-k2-tail4", "rooted-k8", "rooted-k2-64-20"]
    assert [(a.loss.name, a.loss.k, a.loss.tail, a.loss.tail_at) for a in arms[:3]] == [
        ("logistic", "2", "none", None),
        ("rooted", "2", "none", None),
        ("rooted", "2", "linear", 4.0),
    ]
    assert {(a.loss.gamma, a.loss.pl_weight) for a in arms} == {(0.5, 0.0)}


def test_names_are_canonical() -> None:
    (arm,) = parse_losses(" rooted:k=2.0 , gamma=1.50,acts-on=D,scale=calibrated,tail=4.0", BASE)
    assert arm.name == "rooted:k=2,tail=4,scale=calibrated,acts-on=D,gamma=1.5"
    assert parse_losses(arm.name, BASE)[0] == Arm(arm.name, arm.loss, ("k", "tail", "scale", "acts-on", "gamma"))
    assert parse_losses("rooted:k=3,tail=none", BASE)[0].name == "rooted:k=3"
    assert parse_losses("rooted", BASE)[0].name == "rooted:k=2"
    assert parse_losses("logistic:gamma=0", BASE)[0].loss.gamma == 0
    assert parse_losses("rooted:scale=0.50", BASE)[0].loss.scale == "0.5"


def test_near_numbers_are_different_arms_with_different_names() -> None:
    """Names of six digits gave two such arms one folder, and rounded what was trained."""
    for text in (
        "rooted:k=2.0000001,rooted:k=2",
        "rooted:k=2:64.00000001@20,rooted:k=2:64@20",
        "rooted:tail=4,rooted:tail=4.0000001",
        "rooted:gamma=0.1234567,rooted:gamma=0.12345671",
        "rooted:scale=0.33333333,rooted:scale=0.333333",
    ):
        arms = parse_losses(text, BASE)
        assert len({a.name for a in arms}) == len({a.slug for a in arms}) == 2
        assert [parse_losses(a.name, BASE)[0].loss for a in arms] == [a.loss for a in arms]
    assert parse_losses("rooted:k=2.0000001", BASE)[0].loss.k == "2.0000001"
    assert len({p.name for p in parse_grid("lr=0.002,0.00200000001")}) == 2


@settings(deadline=None)
@given(
    st.floats(1, 1e3),
    st.none() | st.floats(0.1, 50),
    st.sampled_from(["paper", "calibrated", "2"]),
    st.sampled_from("DG"),
)
def test_a_name_is_read_back(k, tail, scale, acts_on) -> None:
    text = f"rooted:k={k},scale={scale},acts-on={acts_on}" + (f",tail={tail}" if tail else "")
    (arm,) = parse_losses(text, BASE)
    assert parse_losses(arm.name, BASE)[0].loss == arm.loss


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is no arm"),
        ("k=2", "'k=2' is no arm"),
        ("logistic,,rooted", "'' is no arm"),
        ("hinge", "'hinge' is no arm"),
        ("logistic,rooted,logistic", "logistic stands there twice"),
        ("rooted:k=2,rooted:k=2.0,tail=none", "rooted:k=2 stands there twice"),
        ("rooted:k=2,k=3", "k stands twice in one arm"),
        ("rooted:", "'' is no setting"),
        ("rooted:k", "'k' is no setting"),
        ("rooted:k=", "'k=' is no setting"),
        ("rooted:m=2", "'m=2' is no setting of an arm"),
        ("logistic:k=2", "k is for rooted"),
        ("rooted:k=0.5", "--k 0.5 is out of range"),
        ("rooted:k=2:64", "--k 2:64 is neither"),
        ("rooted:tail=-1", "tail '-1' is not a number above 0"),
        ("rooted:scale=big", "scale 'big'"),
        ("rooted:acts-on=all", "acts-on=all is unknown"),
        ("rooted:gamma=nan", "gamma 'nan'"),
    ],
)
def test_losses_that_are_refused(text, message) -> None:
    with pytest.raises(ValueError, match=f"--losses: .*{message}"):
        parse_losses(text, BASE)


def test_seeds() -> None:
    assert parse_seeds("0-4") == (0, 1, 2, 3, 4)
    assert parse_seeds("0, 2,5-6") == (0, 2, 5, 6)
    for wrong in ("", "a", "4-0", "0,0", "0-3,2", "-1", "0-99999", "9999999999", "1.5", "٣"):
        with pytest.raises(ValueError, match="--seeds"):
            parse_seeds(wrong)


def test_grid() -> None:
    assert parse_grid("lr=0.001,0.002;gamma=0,5") == (
        Point(0.001, 0.0),
        Point(0.001, 5.0),
        Point(0.002, 0.0),
        Point(0.002, 5.0),
    )
    assert [p.name for p in parse_grid("gamma=1,2")] == ["gamma=1", "gamma=2"]
    assert Point(0.001, 5.0).slug == "lr0.001-gamma5"
    for wrong in ("", "lr=0.1", "lr=0,1", "lr=1,1", "lr=1,2;lr=3,4", "k=1,2", "lr=a,b", "lr=1,2;"):
        with pytest.raises(ValueError, match="--tune"):
            parse_grid(wrong)


def test_share() -> None:
    assert parse_share("2/3") == (2, 3)
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(ValueError, match="--only"):
            parse_share(wrong)
