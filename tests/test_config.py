"""Configuration: validates itself, survives JSON; presets give the family's numbers."""

import json

import pytest
from helpers import assert_close

from stylegan_rooted.presets import Checkpoint, auto_preset, resolve
from training.config import (
    AugmentConfig,
    DataConfig,
    FinetuneConfig,
    LossConfig,
    MetricConfig,
    NetworkConfig,
    OptimConfig,
    RuntimeConfig,
    ScheduleConfig,
)


def test_json_round_trip_is_exact() -> None:
    config = FinetuneConfig(
        resume="a.pkl",
        data=DataConfig(path="d", subset=7),
        optim=OptimConfig(batch=8, g_reg_interval=None),
        schedule=ScheduleConfig(kimg=0.25),
    )
    assert FinetuneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values, wanted",
    [
        ({"loss": {"kay": 2}}, "loss.kay"),
        ({"optim": {"batch": "many"}}, "optim.batch should be int | None"),
        ({"optim": {"batch": True}}, "optim.batch"),
        ({"data": 3}, "data."),
        ({"nonsense": 1}, "nonsense"),
        ({"optim": {"glr": "fast"}}, "optim.glr should be float | None"),
        ({"optim": {"batch": 4.0}}, "optim.batch"),
        ({"data": {"mirror": 1}}, "data.mirror should be bool"),
        ({"data": {"path": None}}, "data.path should be str"),
        ({"metric": {"metrics": "fid"}}, "metric.metrics"),
        ({"metric": {"metrics": 5}}, "metric.metrics"),
        ({"metric": {"metrics": [1]}}, "metric.metrics"),
        ({"runtime": {"grid": [4]}}, "runtime.grid"),
        ({"runtime": {"grid": "4x2"}}, "runtime.grid"),
    ],
)
def test_bad_files_are_refused_by_name(values: dict, wanted: str) -> None:
    with pytest.raises(ValueError, match="--config") as error:
        FinetuneConfig.from_dict(values)
    assert wanted in str(error.value)


@pytest.mark.parametrize(
    "make, option",
    [
        (lambda: OptimConfig(batch=0), "--batch"),
        (lambda: OptimConfig(batch=6, batch_gpu=4), "--batch 6 is not a multiple of --batch-gpu 4"),
        (lambda: OptimConfig(glr=-1.0), "--glr"),
        (lambda: OptimConfig(glr=float("nan")), "--glr"),
        (lambda: AugmentConfig(aug="fixed"), "--p"),
        (lambda: AugmentConfig(aug="ada", p=0.5), "--p"),
        (lambda: AugmentConfig(aug="noaug", target=0.5), "--target"),
        (lambda: AugmentConfig(aug="fixed", p=1.5), "--p"),
        (lambda: ScheduleConfig(kimg=0), "--kimg"),
        (lambda: ScheduleConfig(tick=float("inf")), "--tick"),
        (lambda: ScheduleConfig(snap=0), "--snap"),
        (lambda: RuntimeConfig(device="tpu"), "--device"),
        (lambda: RuntimeConfig(grid=(0, 2)), "--grid 0x2"),
        (lambda: RuntimeConfig(seed=2**32), "--seed"),
        (lambda: OptimConfig(g_reg_interval=-1), "--g-reg-interval -1"),
        (lambda: OptimConfig(ema_rampup=float("nan")), "--ema-rampup"),
        (lambda: OptimConfig(beta2=1.0), "optim.beta2"),
        (lambda: NetworkConfig(d_architecture="odd"), "network.d_architecture"),
        (lambda: MetricConfig(detector_mode="blurred"), "--detector-mode"),
    ],
)
def test_values_are_checked_where_they_live(make, option: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert option in str(error.value)


def test_what_yaml_confuses_is_put_right() -> None:
    """YAML 1.1 reads `1e-08` as text, and `k: 2` and `scale: 1.5` as numbers."""
    config = FinetuneConfig.from_dict({"optim": {"eps": "1e-08"}, "loss": {"k": 2, "scale": 1.5}})
    assert config.optim.eps == 1e-8 and config.loss.k == "2" and config.loss.scale == "1.5"


def test_cifar_leaves_regularisers_out_unless_asked() -> None:
    def resolved(**loss) -> LossConfig:
        config = FinetuneConfig(cfg="cifar", loss=LossConfig(**loss))
        return resolve(config, resolution=32, checkpoint=None, device="cuda").loss

    assert (resolved().pl_weight, resolved().style_mixing) == (0, 0)
    assert (resolved(pl_weight=2.0).pl_weight, resolved(style_mixing=0.9).style_mixing) == (2, 0.9)


def test_fp32_is_short_for_a_precision() -> None:
    assert RuntimeConfig().precision == "auto" and RuntimeConfig(fp32=True).precision == "fp32"
    assert RuntimeConfig(fp32=True, precision="fp32").precision == "fp32"
    with pytest.raises(ValueError, match="--fp32 is short for --precision fp32, not bf16; drop one"):
        RuntimeConfig(fp32=True, precision="bf16")
    with pytest.raises(ValueError, match="--precision fp8 is unknown; one of auto, fp32, fp16, bf16"):
        RuntimeConfig(precision="fp8")
    with pytest.raises(ValueError, match="--cache-gib -1 is outside"):
        DataConfig(cache_gib=-1)


def test_half_precision_follows_the_device_unless_asked() -> None:
    def network(device: str, fp32: bool = False, **settings) -> NetworkConfig:
        config = FinetuneConfig(network=NetworkConfig(**settings), runtime=RuntimeConfig(fp32=fp32))
        return resolve(config, resolution=64, checkpoint=None, device=device).network

    assert network("cuda").num_fp16_res == 4 and network("cpu").num_fp16_res == 0
    assert network("cuda", num_fp16_res=0).num_fp16_res == 0  # a file written on a CPU means the same on a GPU
    assert (network("cuda", fp32=True).num_fp16_res, network("cuda", fp32=True).conv_clamp) == (0, None)


@pytest.mark.parametrize(
    "batch, resolution, wanted", [(32, 64, 16), (16, 32, 16), (24, 64, 12), (2, 64, 2), (8, 256, 4)]
)
def test_a_cpu_takes_a_batch_in_parts_that_divide_it(batch: int, resolution: int, wanted: int) -> None:
    config = FinetuneConfig(optim=OptimConfig(batch=batch))
    optim = resolve(config, resolution=resolution, checkpoint=None, device="cpu").optim
    assert optim.batch_gpu == wanted and batch % wanted == 0


def test_presets_match_the_goldens(goldens) -> None:
    traces = json.loads((goldens / "training_traces.json").read_text())["auto_config"]
    checked = 0
    for row in traces:
        request = row["request"]
        if set(request) - {"res", "gpus", "num_images", "cfg"} or "error" in row["result"]:
            continue
        args = row["result"]["args"]
        if request.get("cfg", "auto") == "auto":
            preset = auto_preset(request["res"], request["gpus"])
            got = (preset.batch, preset.mbstd, int(preset.fmaps * 32768), preset.map_depth)
            want = (
                args["batch_size"],
                args["D_kwargs"]["epilogue_kwargs"]["mbstd_group_size"],
                args["G_kwargs"]["synthesis_kwargs"]["channel_base"],
                args["G_kwargs"]["mapping_kwargs"]["num_layers"],
            )
            assert got == want, request
            for value, expected in (
                (preset.lr, args["G_opt_kwargs"]["lr"]),
                (preset.gamma, args["loss_kwargs"]["r1_gamma"]),
                (preset.ema_kimg, args["ema_kimg"]),
                (preset.ema_rampup, args["ema_rampup"]),
            ):
                assert_close(value, expected, 1e-9, str(request))
            if request["gpus"] != 1:
                continue
        config = resolve(
            FinetuneConfig(cfg=request.get("cfg", "auto")), resolution=request["res"], checkpoint=None, device="cuda"
        )
        assert config.optim.batch == args["batch_size"] and config.optim.batch_gpu == args["batch_gpu"], request
        assert config.network.channel_base == args["G_kwargs"]["synthesis_kwargs"]["channel_base"]
        assert config.network.mbstd_group == args["D_kwargs"]["epilogue_kwargs"]["mbstd_group_size"]
        assert config.network.d_architecture == args["D_kwargs"].get("architecture", "resnet")
        assert config.loss.style_mixing == args["loss_kwargs"].get("style_mixing_prob", 0.9)
        assert config.loss.pl_weight == args["loss_kwargs"].get("pl_weight", 2.0)
        for value, expected in (
            (config.optim.glr, args["G_opt_kwargs"]["lr"]),
            (config.loss.gamma, args["loss_kwargs"]["r1_gamma"]),
            (config.optim.ema_kimg, args["ema_kimg"]),
        ):
            assert_close(value, expected, 1e-9, str(request))
        checked += 1
    assert checked >= 12


def test_checkpoint_decides_and_nothing_is_invented() -> None:
    config = resolve(FinetuneConfig(resume="x"), resolution=64, checkpoint=Checkpoint(64, 4), device="cpu")
    assert config.network == FinetuneConfig().network
    assert config.augment.ada_kimg == 100 and config.optim.ema_rampup is None
    assert config.optim.batch % config.optim.batch_gpu == 0


def test_batch_that_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch 6 .* multiple of 4"):
        resolve(FinetuneConfig(optim=OptimConfig(batch=6)), resolution=32, checkpoint=Checkpoint(32, 4), device="cpu")
