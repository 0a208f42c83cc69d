"""The two questions that a report answers first, from a run's figures: is it working, and when to stop."""

from collections.abc import Sequence
from dataclasses import dataclass

from stylegan_rooted.report_charts import number
from stylegan_rooted.report_curves import change_of, label_of, with_error
from stylegan_rooted.report_run import MetricRow, RunRecord
from training import watchdog

LEVEL = 3  # measurements without a better one that count as levelled off
FALLS = 3  # in a row that count as progress; of four figures in any order, 1 in 24 is this one
EARLY = 0.1  # of the run's length, up to which nobody can tell when to stop
GOOD, UNCLEAR, BAD = "good", "unclear", "bad"


@dataclass(frozen=True)
class Answer:
    """Plain words.

    Attributes:
        state: The watchdog's name for the last tick.
        mood: `good`, `unclear` or `bad`: how the first answer is marked.
        working: Is it working?
        stop: When to stop?
        take: File name of the snapshot to use; None where none can be told.
    """

    state: str
    mood: str
    working: str
    stop: str
    take: str | None


def answer(run: RunRecord) -> Answer:
    """Both answers for a run; the first word of each is the answer."""
    verdict = run.verdict()
    name, rows = run.headline()
    there = run.still_there(rows)
    take = min(there, key=lambda row: row.value).snapshot if there else None
    mood, working = _working(verdict, label_of(name), rows)
    stop = _stop(run, verdict, label_of(name), rows)
    return Answer(verdict.state, mood, working, stop, take)


def _working(verdict: watchdog.Verdict, label: str, rows: Sequence[MetricRow]) -> tuple[str, str]:
    if verdict.state == watchdog.DIVERGING:
        return BAD, f"No, it diverges: {verdict.evidence}."
    if verdict.state == watchdog.COLLAPSING:
        return BAD, f"No, it collapses: {verdict.evidence}."
    nothing_wrong = {
        watchdog.HEALTHY: "the watchdog sees nothing wrong",
        watchdog.OVERFITTING: f"the watchdog says overfitting ({verdict.evidence})",
    }.get(verdict.state, f"the watchdog says {verdict.state} ({verdict.evidence})")
    if len(rows) < 2:
        measured = f"one measurement, {label} {with_error(rows[0])}, shows no direction" if rows else "no FID or FD yet"
        return UNCLEAR, f"Unclear: {measured}; {nothing_wrong}."
    first, last, best = rows[0], rows[-1], min(rows, key=lambda row: row.value)
    path = f"{label} went from {with_error(first)} ({number(first.kimg)} kimg) to {with_error(last)}"
    path += f" ({number(last.kimg)} kimg)"
    if best is first and change_of(first, last) == "higher":
        return BAD, f"No: {path}, higher than at first and never lower; {nothing_wrong}."
    if verdict.state == watchdog.OVERFITTING:
        return UNCLEAR, f"It was: {label} {with_error(best)} at {number(best.kimg)} kimg; now {verdict.evidence}."
    change = change_of(first, last)
    if change == "lower" or (change == "same" and last.value < first.value and _falls(rows) >= FALLS):
        share = f", {1 - last.value / first.value:.0%} lower" if first.value > 0 else ""
        steady = f" (within its error, but it fell {_falls(rows)} times in a row)" if change == "same" else ""
        return GOOD, f"Yes: {path}{share}{steady}; {nothing_wrong}."
    if change_of(first, best) == "lower":
        at = f"{with_error(best)} at {number(best.kimg)} kimg was better than the start"
        return UNCLEAR, f"It was: {path}; {at}; {nothing_wrong}."
    return UNCLEAR, f"Not visibly: {path}, which its error allows for; {nothing_wrong}."


def _falls(rows: Sequence[MetricRow]) -> int:
    """How many of the last steps went down, without one between them that did not."""
    num = 0
    while num + 1 < len(rows) and rows[-1 - num].value < rows[-2 - num].value:
        num += 1
    return num


def _where(run: RunRecord, rows: Sequence[MetricRow], label: str) -> str:
    """The best snapshot by name; where its file is gone or has another network in it now, the best that is there."""
    best, there = min(rows, key=lambda row: row.value), run.still_there(rows)
    if best in there:
        return f"{best.snapshot} ({number(best.kimg)} kimg)"
    damaged = best.snapshot in run.unreadable
    gone = f"the snapshot of {number(best.kimg)} kimg, which {'cannot be opened' if damaged else 'is no longer there'}"
    if not there:
        return gone
    kept = min(there, key=lambda row: row.value)
    return f"{gone}, or else {kept.snapshot} ({number(kept.kimg)} kimg, {label} {with_error(kept)})"


def _progress(label: str, rows: Sequence[MetricRow]) -> str:
    """What shows that the figure still falls: its last step, or that it fell again and again; "" for neither."""
    if change_of(rows[-2], rows[-1]) == "lower":
        return f"{label} fell from {with_error(rows[-2])} to {with_error(rows[-1])} over the last measurement"
    num = _falls(rows)
    if num < FALLS:
        return ""
    return f"{label} fell {num} times in a row, from {with_error(rows[-1 - num])} to {with_error(rows[-1])}"


def _stop(run: RunRecord, verdict: watchdog.Verdict, label: str, rows: Sequence[MetricRow]) -> str:
    over = run.status() in ("finished", "stopped", "failed", "interrupted")
    best = min(rows, key=lambda row: row.value) if rows else None
    at = _where(run, rows, label) if rows else ""
    if verdict.state in (watchdog.DIVERGING, watchdog.COLLAPSING):
        return f"Now: {verdict.advice}." + (f" The best so far by {label}: {at}." if best is not None else "")
    if best is None:
        return (
            "Nobody can tell without figures: train with --metrics fid,kid, or measure with `stylegan-rooted metrics`."
        )
    since = len(rows) - 1 - rows.index(best)
    if since and since == len(rows) - 1 and change_of(best, rows[-1]) == "higher":
        remedy = "try smaller --glr and --dlr or a larger --gamma"
        return f"Now: {label} has only become worse since the first measurement ({with_error(best)}); {remedy}."
    if verdict.state == watchdog.OVERFITTING:
        return f"At {number(best.kimg)} kimg: {verdict.advice}. Take {at}."
    if len(rows) < 2:
        return f"Too early to tell: one measurement of {label}."
    if since == 0 and (step := _progress(label, rows)):
        longer = "It ended early: a larger --kimg goes on with it." if over else "Not yet."
        return f"{longer} {step}. Best so far: {at}."
    if since == 0 and len(rows) < LEVEL and not over:
        return f"Too early to tell: {len(rows)} measurements of {label} that their errors allow to be equal."
    if not over and run.total_kimg and run.kimg < EARLY * run.total_kimg:
        reached = f"{number(run.kimg)} of {number(run.total_kimg)} kimg"
        return f"Too early to tell: the run is at {reached}. Best so far: {at}."
    if since == 0:
        when = "About here" if over else "Soon"
        return f"{when}: {label} still falls, but by no more than its error over the last measurement. Take {at}."
    if since >= LEVEL:
        return f"It has levelled off: no better {label} in {since} measurements. Take {at}."
    worse = "within its error of" if change_of(best, rows[-1]) == "same" else "worse than"
    watch = "" if over else " Watch a few more measurements."
    return f"Perhaps now: the last {label}, {with_error(rows[-1])}, is {worse} the best. Take {at}.{watch}"
