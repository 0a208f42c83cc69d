"""Fine-tuning, end to end, on networks of 8x8 pixels: its files, determinism, refusal, stopping, divergence."""

import json
import math
import os
import signal
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
from helpers import assert_close
from PIL import Image
from runs import NUM_PICTURES, quiet

from stylegan_rooted import cli, evaluation, finetune, scalars
from training import execution, network_pickle, run_dir, training_loop, weights_file
from training.config import (
    AugmentConfig,
    FinetuneConfig,
    MetricConfig,
    NetworkConfig,
    OptimConfig,
    ScheduleConfig,
)
from training.training_loop import TrainingDiverged

SCRATCH = [
    "--resume",
    "none",
    "--cbase",
    "64",
    "--cmax",
    "8",
    "--zdim",
    "8",
    "--wdim",
    "8",
    "--batch",
    "4",
    "--device",
    "cpu",
]


def run_cli(*args: object) -> int:
    """Exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
        raise SystemExit(0)
    return int(stop.value.code or 0)


def tiny(pictures: Path, outdir: Path, **changes) -> FinetuneConfig:
    augment, optim = AugmentConfig(aug="ada", augpipe="color"), OptimConfig(batch=4, g_reg_interval=2, d_reg_interval=2)
    return runs.tiny(pictures, outdir, augment=augment, optim=optim).replace(**changes)


def weights(path: Path) -> dict[str, torch.Tensor]:
    networks = network_pickle.load(path)
    return {
        f"{name}.{key}": value
        for name in ("G", "D", "G_ema")
        for key, value in getattr(networks, name).state_dict().items()
    }


def test_a_run_leaves_exactly_these_files_and_can_be_resumed(pictures, tmp_path, capsys) -> None:
    outdir = tmp_path / "runs"
    assert (
        run_cli(
            "finetune",
            "--data",
            pictures,
            "--outdir",
            outdir,
            *SCRATCH,
            "--kimg",
            "0.016",
            "--tick",
            "0.008",
            "--snap",
            "2",
            "--metrics",
            "fid,kid",
            "--metric-num",
            "8",
            "--grid",
            "4x2",
            "--loss",
            "rooted",
            "--k",
            "2",
        )
        == 0
    )
    (path,) = outdir.iterdir()
    names = {p.name for p in path.iterdir() if not p.name.startswith("events.")}
    assert names == {
        "best-snapshot.json",
        "environment.json",
        "fakes000000.png",
        "fakes_init.png",
        "history.jsonl",
        "log.txt",
        "metric-fd.jsonl",
        "metric-kd.jsonl",
        "network-snapshot-000000.config.json",
        "network-snapshot-000000.pkl",
        "network-snapshot-000000.safetensors",
        "reals.png",
        "stats.jsonl",
        "training-state-000000004.pt",
        "training-state-000000016.pt",
        "training_options.json",
    }
    rows = run_dir.read_jsonl(path / "stats.jsonl")
    assert [row["Progress/kimg"]["mean"] for row in rows] == pytest.approx([0.004, 0.012, 0.016])
    for row in rows:
        assert row["Loss/D/loss"]["mean"] >= 4 and row["Loss/G/loss"]["mean"] >= 2  # the floors 2k and k
        assert {"Loss/scores/real", "Loss/signs/fake", "Timing/Gmain", "Resources/cpu_mem_gb", "timestamp"} <= set(row)
    metric = run_dir.read_jsonl(path / "metric-fd.jsonl")[-1]
    assert metric["provenance"]["num_fake"] == 8 and metric["provenance"]["num_real"] == NUM_PICTURES
    environment = json.loads((path / "environment.json").read_text())
    assert len(environment["data"]["fingerprint"]) == 64 and environment["resume"] is None
    assert metric["provenance"]["data_fingerprint"] == environment["data"]["fingerprint"]
    with Image.open(path / "reals.png") as grid:
        assert grid.size == (32, 16)
    options = json.loads((path / "training_options.json").read_text())
    assert options["optim"]["batch"] == 4 and options["loss"]["gamma"] is not None

    snapshot = path / "network-snapshot-000000.pkl"
    assert (
        run_cli(
            "finetune",
            "--data",
            pictures,
            "--outdir",
            outdir,
            "--resume",
            snapshot,
            "--batch",
            "4",
            "--kimg",
            "0.004",
            "--metrics",
            "none",
            "--grid",
            "2x2",
            "--freezed",
            "2",
            "--device",
            "cpu",
        )
        == 0
    )
    second = sorted(outdir.iterdir())[1]
    assert second.name.startswith("00001-") and "resumecustom-freezed2" in second.name
    before, after = weights(snapshot), weights(second / "network-snapshot-000000.pkl")
    assert set(before) == set(after)
    assert torch.equal(before["D.b8.fromrgb.weight"], after["D.b8.fromrgb.weight"])  # frozen
    assert not torch.equal(before["D.b8.conv1.weight"], after["D.b8.conv1.weight"])
    assert capsys.readouterr().out == ""


def test_the_file_beside_a_snapshot_makes_the_same_images_and_starts_runs(pictures, tmp_path) -> None:
    path = finetune.run(tiny(pictures, tmp_path / "runs", metric=MetricConfig(metrics=("kid",), num=4)), say=quiet)
    file = path / "network-snapshot-000000.safetensors"
    for network in (file, file.with_suffix(".pkl")):
        assert run_cli("generate", "--network", network, "--seeds", "1", "--outdir", tmp_path / network.suffix) == 0
    (ours,), (theirs,) = ((tmp_path / ending).glob("*.png") for ending in (".safetensors", ".pkl"))
    assert ours.read_bytes() == theirs.read_bytes()
    header = weights_file.read(file.read_bytes())[1]
    assert header == json.loads(file.with_suffix(".config.json").read_text()) and set(header["networks"]) == {"G_ema"}
    assert header["training"]["kimg"] == 0.016 and header["training"]["options"]["loss"]["name"] == "logistic"
    assert str(tmp_path) not in json.dumps(header)  # such files are given away
    assert run_cli("convert", file, tmp_path / "given.safetensors") == 0
    assert json.loads((tmp_path / "given.config.json").read_text())["metrics"][0]["metric"] == "kd"
    said: list[str] = []
    finetune.run(tiny(pictures, tmp_path / "warm", resume=str(file), network=NetworkConfig()), say=said.append)
    assert any("no discriminator in the file: a new one" in line for line in said)


def test_runs_are_deterministic_and_metrics_disturb_nothing(pictures, tmp_path) -> None:
    plain = finetune.run(tiny(pictures, tmp_path), say=quiet)
    measured = finetune.run(tiny(pictures, tmp_path / "measured", metric=MetricConfig(num=6)), say=quiet)
    a, b = weights(plain / "network-snapshot-000000.pkl"), weights(measured / "network-snapshot-000000.pkl")
    assert all(torch.equal(a[key], b[key]) for key in a)
    other = finetune.run(tiny(pictures, tmp_path, runtime__seed=1), say=quiet)
    c = weights(other / "network-snapshot-000000.pkl")
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_chunks_of_a_batch_are_averaged(pictures, tmp_path) -> None:
    """R1 depends on the real images alone, so two chunks must give the gradient of one; a sum would double it."""
    gradients = []
    for batch_gpu in (4, 2):
        config = tiny(
            pictures, tmp_path, optim__batch_gpu=batch_gpu, network__mbstd_group=1, augment=AugmentConfig(aug="noaug")
        )
        run = finetune.build_run(finetune.prepare(config), tmp_path)
        real, labels = next(run.batches)
        assert run.phases[3].name == "Dreg"
        run.phases[3].opt.step = lambda run=run: gradients.append(
            torch.cat([p.grad.flatten() for p in run.D.parameters()])
        )
        training_loop.step_phase(run, run.phases[3], real.float() / 127.5 - 1, labels)
        assert all(p.grad is None for p in run.D.parameters())
    assert_close(gradients[1], gradients[0], 1e-5, "two chunks against one")


def test_conditional_training(pictures, tmp_path) -> None:
    path = finetune.run(tiny(pictures, tmp_path, data__cond=True), say=quiet)
    networks = network_pickle.load(path / "network-snapshot-000000.pkl")
    assert networks.G_ema.c_dim == 2 and networks.training_set_kwargs["use_labels"] is True


def test_interrupt_ends_with_a_snapshot(pictures, tmp_path) -> None:
    before = signal.getsignal(signal.SIGINT)
    said: list[str] = []

    def interrupt(text: str) -> None:
        said.append(text)
        if text.startswith("tick 0"):
            os.kill(os.getpid(), signal.SIGINT)

    config = tiny(pictures, tmp_path, schedule=ScheduleConfig(kimg=100, tick=50, snap=50))
    path = finetune.run(config, say=interrupt)
    rows = run_dir.read_jsonl(path / "stats.jsonl")
    assert rows[-1]["Progress/kimg"]["mean"] < 1 and any("SIGINT" in line for line in said)
    assert weights(path / "network-snapshot-000000.pkl")
    assert signal.getsignal(signal.SIGINT) is before


def test_non_finite_gradients_are_counted_left_out_and_fatal_past_the_limit(pictures, tmp_path, monkeypatch) -> None:
    config = tiny(pictures, tmp_path, optim__max_nonfinite=3, schedule=ScheduleConfig(kimg=1, tick=1, snap=1))
    plan = finetune.prepare(config)
    original = finetune.build_run

    def poisoned(*args, **kwargs):
        run = original(*args, **kwargs)
        run.adversarial.generator = lambda logits: logits * float("nan")
        return run

    monkeypatch.setattr(finetune, "build_run", poisoned)
    said: list[str] = []
    with pytest.raises(TrainingDiverged, match="4 steps had non-finite gradients"):
        finetune.run(config, say=said.append)
    (path,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert all(torch.isfinite(value).all() for value in weights(path / "network-snapshot-000000.pkl").values())
    assert any("non-finite" in line for line in said)
    assert plan.config.optim.max_nonfinite == 3


def test_dry_run_prints_what_config_reads_back(pictures, tmp_path, capsys) -> None:
    arguments = [
        "finetune",
        "--data",
        pictures,
        *SCRATCH,
        "--outdir",
        tmp_path / "out",
        "--kimg",
        "0.5",
        "--g-reg-interval",
        "none",
        "--grid",
        "3x2",
    ]
    assert run_cli(*arguments, "--dry-run") == 0
    first = capsys.readouterr().out
    assert json.loads(first)["optim"]["g_reg_interval"] is None and json.loads(first)["runtime"]["grid"] == [3, 2]
    (tmp_path / "c.json").write_text(first)
    assert run_cli("finetune", "--config", tmp_path / "c.json", "--dry-run") == 0
    assert capsys.readouterr().out == first
    assert not (tmp_path / "out").exists()
    import yaml

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(json.loads(first)))
    assert run_cli("finetune", "--config", tmp_path / "c.yaml", "--dry-run") == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    "arguments, code, wanted",
    [
        (["--data", "nowhere"], 1, "nowhere"),
        (["--k", "0.5"], 2, "--k"),
        (["--loss", "hinge"], 2, "--loss"),
        (["--loss", "logistic", "--k", "3"], 2, "--k is for --loss rooted"),
        (["--loss", "rooted", "--tail", "linear"], 2, "--tail-at"),
        (["--tail", "linear"], 2, "--tail is for --loss rooted, not --loss logistic"),
        (["--batch", "6", "--batch-gpu", "4"], 2, "--batch 6 is not a multiple"),
        (["--augpipe", "sparkles"], 2, "--augpipe"),
        (["--cfg", "mega"], 2, "--cfg"),
        (["--kimg", "-1"], 2, "--kimg"),
        (["--metrics", "fid,beauty"], 2, "--metrics"),
        (["--device", "tpu"], 2, "--device"),
        (["--resolution", "64"], 1, "64"),
        (["--subset", "13"], 1, "--subset"),
        (["--config", "missing.json"], 1, "missing.json"),
        (["--nonsense"], 2, "--nonsense"),
        (["--g-reg-interval", "0"], 2, "--g-reg-interval"),
        (["--g-reg-interval", "-1"], 2, "--g-reg-interval"),
        (["--ada-kimg", "0"], 2, "--ada-kimg"),
        (["--ema-kimg", "-1"], 2, "--ema-kimg"),
        (["--gamma", "inf"], 2, "--gamma"),
        (["--zdim", "0"], 2, "--zdim"),
        (["--seed", "-1"], 2, "--seed"),
        (["--device", "cuda:x"], 2, "--device"),
        (["--metrics", ""], 2, "--metrics"),
        (["--grid", "4"], 2, "--grid"),
        (["--grid", "1000x1000"], 2, "--grid"),
        (["--threads", "100000"], 2, "--threads"),
        (["--kimg", "1e308"], 2, "--kimg"),
        (["--tick", "1e308"], 2, "--tick"),
        (["--resume", ""], 2, "missing option --resume"),
        (["--aug", "noaug", "--augpipe", "bg"], 2, "--augpipe is for --aug ada or fixed"),
        (["--aug", "fixed", "--p", "0.1", "--p-max", "0.5"], 2, "--p-max is for --aug ada"),
    ],
)
def test_wrong_use_is_one_line_with_the_right_exit_code(pictures, tmp_path, capsys, arguments, code, wanted) -> None:
    base = ["finetune", "--outdir", tmp_path / "out", *SCRATCH]
    if "--data" not in arguments:
        base += ["--data", pictures]
    assert run_cli(*base, *arguments) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and wanted in lines[0], captured.err
    assert captured.out == "" and not (tmp_path / "out").exists()


def test_outdir_that_is_a_file_or_read_only(pictures, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert run_cli("finetune", "--data", pictures, "--outdir", tmp_path / "file", *SCRATCH) == 1
    assert "is a file" in capsys.readouterr().err
    (tmp_path / "link").symlink_to("nowhere")
    for outdir in (tmp_path / "link", tmp_path / "link" / "below"):
        assert run_cli("finetune", "--data", pictures, "--outdir", outdir, *SCRATCH) == 1
        assert "is a link to nowhere, which is not there; make that" in capsys.readouterr().err
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert run_cli("finetune", "--data", pictures, "--outdir", tmp_path / "locked", *SCRATCH) == 1
        assert "no permission" in capsys.readouterr().err


def test_a_missing_detector_does_not_stop_training(pictures, tmp_path) -> None:
    said: list[str] = []
    config = tiny(
        pictures, tmp_path, metric=MetricConfig(detector="inception", detector_file=str(tmp_path / "absent.pt"))
    )
    path = finetune.run(config, say=said.append)
    assert (path / "network-snapshot-000000.pkl").exists()
    assert any(line.startswith("Metrics left out: ") and "absent.pt" in line for line in said)


def test_any_failure_of_a_measurement_is_one_line_and_training_goes_on(pictures, tmp_path, monkeypatch) -> None:
    def broken(self, G):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(evaluation.Evaluator, "measure", broken)
    said: list[str] = []
    path = finetune.run(tiny(pictures, tmp_path, metric=MetricConfig(num=4)), say=said.append)
    assert "Metrics left out: RuntimeError: out of memory (see log.txt) (training goes on)" in said
    assert run_dir.read_jsonl(path / "stats.jsonl")[-1]["Progress/kimg"]["mean"] == pytest.approx(0.016)
    assert "Traceback" in (path / "log.txt").read_text()


def test_interrupt_while_measuring_ends_the_run_at_once(pictures, tmp_path, monkeypatch) -> None:
    measured = []

    def interrupted(self, G):
        measured.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return []

    monkeypatch.setattr(evaluation.Evaluator, "measure", interrupted)
    said: list[str] = []
    path = finetune.run(tiny(pictures, tmp_path, metric=MetricConfig(num=4)), say=said.append)
    assert len(measured) == 1 and "Metrics left out: stopped by SIGTERM" in said
    assert [row["Progress/kimg"]["mean"] for row in run_dir.read_jsonl(path / "stats.jsonl")] == pytest.approx([0.004])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_signal_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    hooks = SimpleNamespace(stop_requested=None, measuring=False)
    with pytest.raises(KeyboardInterrupt), finetune.catch_signals(hooks):
        os.kill(os.getpid(), signal.SIGINT)
        assert hooks.stop_requested == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_failure_before_the_first_step_leaves_no_folder(pictures, tmp_path, monkeypatch) -> None:
    def broken(*args):
        raise ValueError("no grid")

    monkeypatch.setattr(finetune, "write_start", broken)
    with pytest.raises(ValueError, match="no grid"):
        finetune.run(tiny(pictures, tmp_path / "runs"), say=quiet)
    assert not list((tmp_path / "runs").iterdir())


def test_interrupt_right_after_the_folder_is_made_leaves_none(pictures, tmp_path) -> None:
    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.run(tiny(pictures, tmp_path / "runs"), say=interrupted)
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("deep.json", b"[" * 100_000, "deep.json is not JSON"),
        ("deep.yaml", b"[" * 100_000, "deep.yaml is not YAML"),
        ("binary.json", b"\xff\xfe", "binary.json is not a text file"),
    ],
)
def test_config_files_that_are_none(pictures, tmp_path, capsys, name: str, content: bytes, wanted: str) -> None:
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    (tmp_path / name).write_bytes(content)
    assert run_cli("finetune", "--config", tmp_path / name) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert wanted in line


def test_a_full_disk_names_the_file(tmp_path, monkeypatch) -> None:
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="options.json"):
        run_dir.write_json(tmp_path / "options.json", {})
    assert not list(tmp_path.iterdir())


def test_demo_with_an_unknown_device_is_wrong_use(capsys) -> None:
    assert run_cli("demo", "--device", "tpu") == 2
    assert "--device tpu" in capsys.readouterr().err


def test_frozen_layers_of_a_checkpoint_thaw_unless_asked(pictures, tmp_path) -> None:
    first = finetune.run(tiny(pictures, tmp_path, optim__freezed=2), say=quiet)
    snapshot = first / "network-snapshot-000000.pkl"
    names = {}
    for freezed in (0, 2, 3):
        plan = finetune.prepare(tiny(pictures, tmp_path, resume=str(snapshot), optim__freezed=freezed))
        _, D, _ = finetune.build_networks(plan)
        names[freezed] = {name for name, _ in D.named_buffers() if name.endswith("weight")}
        assert torch.equal(dict(D.state_dict())["b8.fromrgb.weight"], weights(snapshot)["D.b8.fromrgb.weight"])
    assert names[0] == set() and len(names[2]) == 2 and len(names[3]) == 3


def test_more_frozen_layers_than_there_are_is_refused(pictures, tmp_path) -> None:
    for resume in ("none", str(finetune.run(tiny(pictures, tmp_path), say=quiet) / "network-snapshot-000000.pkl")):
        with pytest.raises(ValueError, match="--freezed 5: this discriminator has 4 layers"):
            finetune.run(tiny(pictures, tmp_path / "runs", resume=resume, optim__freezed=5), say=quiet)
        finetune.build_networks(finetune.prepare(tiny(pictures, tmp_path, resume=resume, optim__freezed=4)))


def test_bf16_trains_and_what_a_cpu_lacks_is_refused_at_once(pictures, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="--precision fp16 is for GPUs"):
        finetune.prepare(tiny(pictures, tmp_path, runtime__precision="fp16"))
    monkeypatch.setattr(execution, "has_fast_bf16", lambda: True)
    run = finetune.build_run(finetune.prepare(tiny(pictures, tmp_path, runtime__precision="bf16")), tmp_path)
    training_loop.step(run)
    assert run.progress.num_nonfinite == 0
    assert {p.dtype for network in (run.G, run.D, run.G_ema) for p in network.parameters()} == {torch.float32}
    monkeypatch.setattr(execution, "has_fast_bf16", lambda: False)
    with pytest.raises(ValueError, match="--precision bf16: this processor"):
        finetune.prepare(tiny(pictures, tmp_path, runtime__precision="bf16"))


def test_snapshots_keep_the_precision_of_their_checkpoint(pictures, tmp_path) -> None:
    """A CPU runs a GPU's network in float32 and says nothing of it in the file."""
    config = tiny(pictures, tmp_path, network__num_fp16_res=1)
    run = finetune.build_run(finetune.prepare(config), tmp_path)
    z, c = torch.randn(2, run.G.z_dim), torch.zeros(2, 0)
    exact = deepcopy(run.G)(z, c, noise_mode="const", force_fp32=True)
    torch.testing.assert_close(run.G(z, c, noise_mode="const"), exact, rtol=1e-5, atol=1e-5)
    training_loop.step(run)
    networks = network_pickle.load(training_loop.save_snapshot(run))
    for network in (networks.G, networks.D, networks.G_ema):
        assert sum(getattr(module, "use_fp16", False) for module in network.modules()) == 1


def test_curves_for_tensorboard(pictures, tmp_path, monkeypatch) -> None:
    points = []

    class Events:
        def add_scalar(self, name, value, global_step, walltime):
            points.append((name, value, global_step, walltime))

        def close(self):
            points.append("closed")

    monkeypatch.setattr(scalars.TensorBoard, "open", lambda path: scalars.TensorBoard(Events()))
    path = finetune.run(tiny(pictures, tmp_path, metric=MetricConfig(metrics=("kid",), num=4)), say=quiet)
    assert points.pop() == "closed"
    drawn = [(name, value) for name, value, *_ in points if math.isfinite(value)]
    rows = run_dir.read_jsonl(path / "stats.jsonl")
    recorded = [(n, v["mean"]) for row in rows for n, v in row.items() if isinstance(v, dict) and v["mean"] is not None]
    measured = [("Metrics/KD", row["results"]["kd"]) for row in run_dir.read_jsonl(path / "metric-kd.jsonl")]
    assert sorted(drawn) == sorted(recorded + measured) and {"Loss/D/loss", "Progress/augment"} <= {n for n, _ in drawn}
    assert all(step == 0 and 0 <= seconds < 1000 for _, _, step, seconds in points)


def test_run_names_and_data_record_follow_the_family(pictures, tmp_path) -> None:
    def plan(**changes) -> finetune.Plan:
        return finetune.prepare(tiny(pictures, tmp_path, **changes))

    name = finetune.describe(plan(data__subset=5, augment=AugmentConfig(augpipe="bg", target=0.5)))
    assert name.startswith("pictures") and "-subset5-" in name and "-target0.5-bg-noresume" in name
    for subset, seeded in ((5, True), (NUM_PICTURES, False), (None, False)):
        found = plan(data__subset=subset)
        record = finetune.training_set_kwargs(found.config, found.dataset)
        assert record["max_size"] == (subset or NUM_PICTURES) and ("random_seed" in record) is seeded
        assert ("subset" in finetune.describe(found)) is seeded


@pytest.mark.parametrize("side, wanted", [(12, 8), (4, 8)])
def test_scratch_on_images_of_no_usable_size_names_the_remedy(tmp_path, capsys, side: int, wanted: int) -> None:
    (tmp_path / "odd").mkdir()
    Image.new("RGB", (side, side)).save(tmp_path / "odd" / "a.png")
    assert run_cli("finetune", "--data", tmp_path / "odd", "--outdir", tmp_path / "out", *SCRATCH) == 1
    message = capsys.readouterr().err
    assert f"{side}x{side}" in message and f"DEST.zip --resolution {wanted}`" in message


def test_neither_checkpoint_nor_scratch_is_wrong_use(pictures, tmp_path, capsys) -> None:
    assert run_cli("finetune", "--data", pictures, "--outdir", tmp_path / "out") == 2
    assert "missing option --resume" in capsys.readouterr().err and not (tmp_path / "out").exists()
    run_cli("finetune", "--help")  # and no default is promised for it
    assert "none to train from scratch. [default: required, unless --resol" in " ".join(capsys.readouterr().out.split())


def test_help_names_every_option_with_its_default(capsys) -> None:
    assert run_cli("finetune", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("Objective:", "--gamma", "0.0002 * resolution^2 / batch", "[default: 0.85]", "[default: logistic]"):
        assert part in text
