"""Everything that may go wrong while a run trains, caused on purpose. What was saved stays, one line says what it was.

Not here: killed runs (test_kill.py), damaged states (test_checkpoint.py), measurements that raise (test_finetune.py),
processes that die beside others (test_distributed.py), builders of operators (test_custom_ops.py). The table in
docs/resuming.md names all of them.
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import forked
import pytest
import torch
from PIL import Image

from metrics import features
from stylegan_rooted import evaluation, finetune
from training import checkpoint, network_pickle, run_dir, training_loop
from training.dataset import DatasetError, ImageDataset
from training.loss import GanLoss
from training.training_loop import TrainingDiverged

OPTIONS = (
    "--resume none --cfg auto --cbase 64 --cmax 8 --zdim 8 --wdim 8 --batch 4 --device cpu --metrics none --grid 2x2 "
    "--kimg 0.032 --tick 0.008 --snap 1 --augpipe color --loss rooted --k 2"
).split()


@pytest.fixture
def pictures(pictures, tmp_path) -> Path:
    """The test's own, to damage."""
    return Path(shutil.copytree(pictures, tmp_path / "pictures"))


@pytest.fixture
def command(pictures, tmp_path):
    """Arguments of a run in `outdir`, later options replacing earlier ones."""

    def build(outdir: str, *more: object) -> list[str]:
        return ["finetune", "--data", str(pictures), "--outdir", str(tmp_path / outdir), *OPTIONS, *map(str, more)]

    return build


def only(outdir: Path) -> Path:
    """The one run folder."""
    (path,) = outdir.iterdir()
    return path


def stats(path: Path) -> list[dict]:
    return [run_dir.without_timing(row) for row in run_dir.read_jsonl(path / "stats.jsonl")]


def content(path: Path) -> dict[str, bytes]:
    """All files of a run but its history."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name != "history.jsonl"}


def networks_of(path: Path) -> bytes:
    return (path / "network-snapshot-000000.pkl").read_bytes()


def configured(command, *arguments: object) -> finetune.FinetuneConfig:
    """What the command line makes of these arguments, for a run in this process."""
    from stylegan_rooted.cli.finetune import FIELDS
    from stylegan_rooted.cli.finetune import command as click_command
    from stylegan_rooted.cli.options import apply_fields

    context = click_command.make_context("finetune", command(*arguments)[1:])
    return apply_fields(finetune.FinetuneConfig(), FIELDS, context.params)


# --- the machine


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_within_the_step(command, tmp_path, number, code) -> None:
    child = forked.start(*command("out", "--kimg", "100", "--tick", "50"))
    forked.wait_for(lambda: list(tmp_path.glob("out/*/training-state-*.pt")))
    time.sleep(0.1)
    child.kill(number)
    ended = child.wait()
    assert ended.code == code and "the same command goes on" in ended.err and not ended.errors
    path = only(tmp_path / "out")
    (row,) = [row for row in run_dir.read_jsonl(path / "history.jsonl") if row["event"] == "stopped"]
    newest = checkpoint.find(path)[0]
    assert row["nimg"] == checkpoint.nimg_of(newest) and row["reason"] == signal.Signals(number).name
    # An uninterrupted run of that length has the same networks and, but for the stop's own row, the same figures.
    kimg = row["nimg"] / 1000
    assert forked.run(*command("whole", "--kimg", kimg, "--tick", "50")).code == 0
    assert networks_of(path) == networks_of(only(tmp_path / "whole"))
    assert stats(path) == stats(only(tmp_path / "whole"))


def test_a_write_that_fails_ends_the_run_and_loses_nothing(command, tmp_path) -> None:
    assert forked.run(*command("whole")).code == 0
    assert forked.run(*command("out", "--kimg", "0.012")).code == 0
    path = only(tmp_path / "out")
    size = checkpoint.find(path)[0].stat().st_size
    before = {p.name: p.read_bytes() for p in checkpoint.find(path)}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 4096, size - 4096))

    ended = forked.run(*command("out"), before=limit)
    assert ended.code == 1 and len(ended.errors) == 1
    assert "training-state-000000020.pt: File too large" in ended.errors[0]
    assert "Saved up to 0.012 kimg; the same command goes on from there" in ended.err
    assert {p.name: p.read_bytes() for p in checkpoint.find(path)} == before
    assert not list(path.glob(".*"))
    assert forked.run(*command("out")).code == 0
    assert stats(path) == stats(only(tmp_path / "whole")) and networks_of(path) == networks_of(only(tmp_path / "whole"))


@pytest.fixture(scope="module")
def mounts() -> None:
    """A process may have mounts of its own here."""
    if not forked.can_mount():
        pytest.skip("this system lets no test process mount a file system of its own")


def test_a_full_disk(command, tmp_path, mounts) -> None:
    """A file system in memory, filled up while the run trains; then room is made."""
    assert forked.run(*command("whole")).code == 0
    reference = only(tmp_path / "whole")
    (tmp_path / "out").mkdir()

    def fill_then_free() -> int:
        forked.own_mounts()
        forked.mount_tmpfs(tmp_path / "out", "size=4m")
        assert forked.run(*command("out", "--kimg", "0.012")).code == 0
        path = only(tmp_path / "out")
        with (path / "ballast").open("wb") as ballast:
            while True:
                try:
                    os.write(ballast.fileno(), bytes(4096))
                except OSError:
                    break
        os.truncate(path / "ballast", (path / "ballast").stat().st_size - 65536)  # room for lines, not for a state
        saved = {p.name: p.read_bytes() for p in checkpoint.find(path)}
        ended = forked.run(*command("out"))
        assert ended.code == 1 and len(ended.errors) == 1 and "No space left on device" in ended.errors[0], ended
        assert {p.name: p.read_bytes() for p in checkpoint.find(path)} == saved and not list(path.glob(".*"))
        (path / "ballast").unlink()
        ended = forked.run(*command("out"))
        assert ended.code == 0, ended
        assert stats(path) == stats(reference) and networks_of(path) == networks_of(reference)
        return 0

    ended = forked.Child(fill_then_free).wait()
    assert ended.code == 0, ended.err


def test_a_read_only_outdir(command, tmp_path, mounts) -> None:
    (tmp_path / "out").mkdir()

    def attempt() -> int:
        forked.own_mounts()
        forked.mount_tmpfs(tmp_path / "out", "size=4m")
        assert forked.run(*command("out", "--kimg", "0.012")).code == 0
        before = content(only(tmp_path / "out"))
        forked.mount_tmpfs(tmp_path / "out", "size=4m", read_only=True, remount=True)
        for options in ([], ["--restart"]):
            ended = forked.run(*command("out", *options))
            assert ended.code == 1 and len(ended.err.splitlines()) == 1 and "no permission to write" in ended.err, ended
        assert content(only(tmp_path / "out")) == before
        return 0

    ended = forked.Child(attempt).wait()
    assert ended.code == 0, ended.err


def test_two_runs_started_at_the_same_moment(command, tmp_path) -> None:
    children = [forked.start(*command("out", "--kimg", "0.2")) for _ in range(2)]
    ended = sorted((child.wait() for child in children), key=lambda end: end.code)
    assert [end.code for end in ended] == [0, 1]
    path = only(tmp_path / "out")
    (line,) = ended[1].err.splitlines()
    assert line.startswith(f"Error: {path}: is being trained by ") and "--restart" in line
    assert str(children[0].pid) in line or str(children[1].pid) in line or "another process" in line
    again = forked.run(*command("out", "--kimg", "0.2"))
    assert again.code == 0 and again.err.startswith(f"Finished already: {path}")


# --- the data


def damage_after(condition: str, action) -> object:
    """A `say` that calls `action` when the run says a line that starts with `condition`."""
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text.startswith(condition):
            action()

    say.lines = said
    return say


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_vanish_or_turn_corrupt_are_named_skipped_and_counted(
    command, pictures, workers
) -> None:
    def damage() -> None:
        (pictures / "03.png").unlink(missing_ok=True)
        (pictures / "07.png").write_bytes(b"no picture")

    say = damage_after("tick 0", damage)
    path = finetune.run(configured(command, "out", "--kimg", "0.1", "--workers", workers, "--cache-gib", "0"), say=say)
    warnings = [line for line in say.lines if line.startswith("Warning: ")]
    assert len(warnings) == 2
    assert any("03.png" in line and "image" in line for line in warnings) and any("07.png" in w for w in warnings)
    rows = run_dir.read_jsonl(path / "stats.jsonl")
    assert rows[0]["Progress/unreadable"]["mean"] == 0 and rows[-1]["Progress/unreadable"]["mean"] == 2
    assert rows[-1]["Progress/kimg"]["mean"] == pytest.approx(0.1)


def test_too_many_unreadable_images_end_the_run_with_its_state_saved(command, pictures, tmp_path) -> None:
    reference = finetune.run(configured(command, "whole"), say=lambda text: None)
    backup = {p.name: p.read_bytes() for p in pictures.iterdir()}

    def vanish() -> None:
        for name in backup:
            (pictures / name).unlink(missing_ok=True)

    say = damage_after("tick 1", vanish)
    with pytest.raises(DatasetError, match=r"\.png .*--max-unreadable is 0"):
        finetune.run(configured(command, "out", "--max-unreadable", "0", "--cache-gib", "0"), say=say)
    path = only(tmp_path / "out")
    assert "Saved up to 0.012 kimg; the same command goes on from there" in say.lines
    for name, data in backup.items():
        (pictures / name).write_bytes(data)
    finetune.run(configured(command, "out"), say=lambda text: None)
    assert stats(path) == stats(reference) and networks_of(path) == networks_of(reference)


def test_changed_images_are_not_the_same_run(command, pictures, tmp_path) -> None:
    assert forked.run(*command("out", "--kimg", "0.012")).code == 0
    Image.new("RGB", (8, 8), "red").save(pictures / "05.png")
    ended = forked.run(*command("out", "--kimg", "0.032"))
    assert ended.code == 0 and len(list((tmp_path / "out").iterdir())) == 2  # the first is finished: a new one begins
    Image.new("RGB", (8, 8), "blue").save(pictures / "05.png")
    (path,) = (tmp_path / "out").glob("00001-*")
    (path / "history.jsonl").unlink()  # as if it had not come to its end
    ended = forked.run(*command("out", "--kimg", "0.032"))
    assert ended.code == 1 and len(ended.errors) == 1
    assert "--data" in ended.errors[0] and "its content was another" in ended.errors[0]


def test_a_reading_thread_that_dies_changes_nothing(command, monkeypatch) -> None:
    reference = finetune.run(configured(command, "whole"), say=lambda text: None)
    original, died = ImageDataset.__getitem__, []

    def dying(self, index):
        if threading.current_thread() is not threading.main_thread() and len(died) < 3:
            died.append(index)
            raise MemoryError("no room for a thread")
        return original(self, index)

    monkeypatch.setattr(ImageDataset, "__getitem__", dying)
    path = finetune.run(configured(command, "out", "--workers", "2"), say=lambda text: None)
    assert len(died) == 3 and stats(path) == stats(reference) and networks_of(path) == networks_of(reference)


# --- the numbers


def nan_in_data(run) -> None:
    original, left = run.batches, [2]

    def poisoned():
        for image, label in original:
            image = image.float() / 127.5 - 1
            if left[0] and run.progress.step >= 2:
                left[0] -= 1
                image[0, 0, 0, 0] = float("nan")
            yield image, label

    run.batches = poisoned()


def nan_in_a_logit(run) -> None:
    original, left = run.loss.run_d, [2]

    def run_d(img, c):
        logits = original(img, c)
        if left[0] and run.progress.step >= 2:
            left[0] -= 1
            logits = logits * torch.tensor([[float("nan")]] + [[1.0]] * (len(logits) - 1))
        return logits

    run.loss.run_d = run_d


@pytest.mark.parametrize("poison", [nan_in_data, nan_in_a_logit])
def test_nan_on_the_way_is_left_out_and_counted(command, monkeypatch, poison) -> None:
    original = finetune.build_run

    def build(*args, **kwargs):
        run = original(*args, **kwargs)
        poison(run)
        return run

    monkeypatch.setattr(finetune, "build_run", build)
    if poison is nan_in_data:
        monkeypatch.setattr(training_loop.images, "from_uint8", lambda img: img)
    said: list[str] = []
    path = finetune.run(configured(command, "out"), say=said.append)
    assert any("had non-finite gradients and were left out" in line for line in said)
    counts = [row["Progress/nonfinite"]["mean"] for row in stats(path)]
    assert counts[0] == 0 and 1 <= counts[-1] <= 6
    networks = network_pickle.load(path / "network-snapshot-000000.pkl")
    for network in (networks.G, networks.D, networks.G_ema):
        assert all(value.isfinite().all() for value in network.state_dict().values())


def test_nan_in_a_weight_is_not_saved_over_the_last_good_state(command, tmp_path, monkeypatch) -> None:
    reference = finetune.run(configured(command, "whole"), say=lambda text: None)
    original = training_loop.step

    def poisoned(run) -> None:
        original(run)
        if run.progress.step == 4:
            run.G.synthesis.b8.conv1.weight.data[0, 0, 0, 0] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "step", poisoned)
        with pytest.raises(TrainingDiverged, match=r"G\.synthesis\.b8\.conv1\.weight .*000000012\.pt"):
            finetune.run(configured(command, "out"), say=lambda text: None)
    path = only(tmp_path / "out")
    assert [checkpoint.nimg_of(p) for p in checkpoint.find(path)] == [12, 4]
    finetune.run(configured(command, "out"), say=lambda text: None)
    assert stats(path) == stats(reference) and networks_of(path) == networks_of(reference)


def test_divergence_has_its_own_exit_code(command) -> None:
    def poison() -> None:
        original = training_loop.step_phase

        def step_phase(run, *args):
            run.adversarial.generator = lambda logits: logits * float("nan")
            original(run, *args)

        training_loop.step_phase = step_phase

    ended = forked.run(*command("out", "--max-nonfinite", "2"), before=poison)
    assert ended.code == 3 and len(ended.errors) == 1 and "3 steps had non-finite gradients" in ended.errors[0]
    named = re.search(r"last state: (\S+\.pt)\. The same command would end here again", ended.errors[0])
    assert named and checkpoint.read(Path(named[1]))
    assert forked.run(*command("out", "--max-nonfinite", "2")).errors == ended.errors  # as it says
    assert forked.run(*command("out", "--max-nonfinite", "3")).code == 0


# --- the metrics


def test_a_measurement_that_hangs_is_left_out(command, monkeypatch) -> None:
    calls = []

    def hang(self, G):
        calls.append(1)
        time.sleep(60)

    monkeypatch.setattr(evaluation.Evaluator, "measure", hang)
    said: list[str] = []
    start = time.monotonic()
    path = finetune.run(configured(command, "out", "--metrics", "fid", "--metric-minutes", "0.003"), say=said.append)
    assert time.monotonic() - start < 30 and len(calls) == 1
    assert any("Metrics left out: took longer than --metric-minutes 0.003" in line for line in said)
    assert stats(path)[-1]["Progress/kimg"]["mean"] == pytest.approx(0.032)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


@pytest.mark.parametrize("file", [[], ["--detector-file", f"https://weights.example/inception.pt#sha256={'0' * 64}"]])
def test_a_measurement_without_network_is_left_out(command, tmp_path, monkeypatch, file) -> None:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    tried = tmp_path / "tried"

    def unplug() -> None:
        def connect(*args) -> None:
            tried.write_text("")
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

        socket.getaddrinfo = socket.socket.connect = connect  # type: ignore[method-assign, assignment]
        features.inception_home = lambda: tmp_path

    arguments = command("out", "--kimg", 0.004, "--metrics", "fid", "--detector", "inception", *file)
    ended = forked.run(*arguments, before=unplug)
    assert ended.code == 0 and not ended.errors, ended
    (line,) = [line for line in ended.err.splitlines() if line.startswith("Metrics left out: ")]
    assert ("cannot fetch the detector: " if file else "the inception detector needs its weights: fetch ") in line, line
    assert networks_of(only(tmp_path / "out"))
    assert tried.exists() == bool(file)  # nothing is fetched unasked


# --- the memory


def test_out_of_memory_is_one_line_with_what_fits(command, tmp_path) -> None:
    def shrink() -> None:
        original = GanLoss.accumulate_gradients

        def accumulate(self, phase, real_img, *args, **kwargs):
            if len(real_img) > 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
            return original(self, phase, real_img, *args, **kwargs)

        GanLoss.accumulate_gradients = accumulate  # type: ignore[method-assign]

    ended = forked.run(*command("out", "--batch-gpu", "4"), before=shrink)
    assert ended.code == 1 and len(ended.errors) == 1, ended
    assert "out of memory with --batch-gpu 4" in ended.errors[0] and "--batch-gpu 2 fits" in ended.errors[0]
    assert forked.run(*command("out", "--batch-gpu", "2"), before=shrink).code == 0


# --- what is kept


def test_snapshot_budget(command, tmp_path, monkeypatch) -> None:
    """The newest two, every third, and the best by KD; figures are set, so the best one is known."""
    monkeypatch.setattr(training_loop.Progress, "kimg_name", property(lambda self: f"{self.cur_nimg:06d}"))
    values = iter([5.0, 1.0, 4.0, 3.0, 6.0, 7.0, 8.0, 9.0])
    original = evaluation.records

    def records(rows, **kwargs):
        for name, record in original(rows, **kwargs):
            yield name, {**record, "results": {name: next(values)}}

    monkeypatch.setattr(evaluation, "records", records)
    arguments = ["--metrics", "kid", "--metric-num", "4", "--kimg", "0.06", "--keep-last", "2", "--keep-every", "3"]
    path = finetune.run(configured(command, "out", *arguments), say=lambda text: None)
    # Snapshots after 4, 12, 20, 28, 36, 44, 52, 60 images; their numbers are 0 to 7.
    kept = [int(p.stem.removeprefix("network-snapshot-")) for p in sorted(path.glob("*.pkl"))]
    assert kept == [4, 12, 28, 52, 60]
    for kind in ("safetensors", "config.json"):  # the inference files go and stay with them
        assert [p.name for p in sorted(path.glob(f"*.{kind}"))] == [f"network-snapshot-{n:06d}.{kind}" for n in kept]
    assert json.loads((path / "best-snapshot.json").read_text())["snapshot"] == "network-snapshot-000012.pkl"
    assert len(list(path.glob("fakes0*.png"))) == 8  # the pictures all stay
    rows = [json.loads(line) for line in (path / "metric-kd.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and len(checkpoint.find(path)) == 2


def test_keep_every_needs_keep_last(command) -> None:
    ended = forked.run(*command("out", "--keep-every", "3"))
    assert ended.code == 2 and "--keep-last" in ended.errors[0]
