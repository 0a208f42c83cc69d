"""The full training state on disk: everything that the next step depends on, and how far the run's files had come.

One file `training-state-NNNNNNNNN.pt` (images shown) per saved moment: what `torch.save` writes, of plain tensors and
primitives, so `torch.load(path, weights_only=True)` reads it; the SHA-256 of the content stands in the zip comment at
its end. Knows a run's parts by name, nothing of the order of events.
"""

import hashlib
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from dnnlib.util import atomic_file

FORMAT = 1
KEPT = 2  # the newest, and the one before it should the newest turn out damaged
NETWORKS = ("G", "D", "G_ema")
_NAME = re.compile(r"training-state-(\d{9,})\.pt")
_MARK = b"sha256:"
_COMMENT_BYTES = len(_MARK) + 64
_LENGTH_BYTES = 2  # of the comment, in the zip's last record


class StateError(ValueError):
    """A training state that cannot be used; the message is one line with the file's name."""


# --- files


def path_of(folder: Path, nimg: int) -> Path:
    """Where the state after `nimg` images lies."""
    return folder / f"training-state-{nimg:09d}.pt"


def find(folder: Path) -> list[Path]:
    """All states of a run, newest first; nothing is opened."""
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=nimg_of, reverse=True)


def nimg_of(path: Path) -> int:
    """Images shown when a state was saved, from its name."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a state atomically with its digest.

    Raises:
        OSError: It could not be written; nothing else has been touched then.
    """
    with atomic_file(path) as file:
        digesting = _Digesting(file)
        torch.save(state, digesting)  # type: ignore[arg-type]
        comment = _MARK + digesting.hexdigest().encode()
        file.seek(-_LENGTH_BYTES, os.SEEK_END)
        file.write(len(comment).to_bytes(_LENGTH_BYTES, "little") + comment)


def read(path: Path) -> dict[str, Any]:
    """Read a state, all tensors on the CPU, after its digest has been checked.

    Raises:
        StateError: Not such a file, cut short, or changed since it was written.
        OSError: It cannot be opened.
    """
    if path.is_dir():
        raise StateError(f"{path} is a folder, not a training state")
    check_digest(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as err:
        raise StateError(f"{path} is no training state: {' '.join(str(err).split())[:200]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise StateError(f"{path} is a training state of format {found}; this version reads format {FORMAT}")
    return state


def check_digest(path: Path) -> None:
    """Compare a file's content with the digest at its end.

    Raises:
        StateError: They differ, or there is none.
    """
    size = path.stat().st_size
    digest, left = hashlib.sha256(), size - _LENGTH_BYTES - _COMMENT_BYTES
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 22))):
            digest.update(chunk)
            left -= len(chunk)
        end = file.read()[_LENGTH_BYTES:]
    if not end.startswith(_MARK):
        raise StateError(f"{path} is damaged: {size} bytes without a digest at the end")
    if end != _MARK + digest.hexdigest().encode():
        raise StateError(f"{path} is damaged: its content does not have the SHA-256 that it states")


def latest(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest state that can be used; None where there are no states.

    Damaged ones that are newer are named and renamed to `.damaged`.

    Raises:
        StateError: All are damaged: each is named, none is touched.
    """
    damaged: list[tuple[Path, StateError]] = []
    for path in find(folder):
        try:
            state = read(path)
        except StateError as err:
            damaged.append((path, err))
            continue
        for bad, reason in damaged:
            say(f"Warning: {reason}; taking {path.name}")
            os.replace(bad, bad.with_name(f"{bad.name}.damaged"))
        return path, state
    if damaged:
        raise StateError("; ".join(str(err) for _, err in damaged))
    return None


def prune(folder: Path, keep: int = KEPT) -> None:
    """Remove all but the newest states."""
    for path in find(folder)[keep:]:
        path.unlink(missing_ok=True)


class _Digesting:
    """A file to write to that knows the SHA-256 of all but the last two bytes so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._held = b""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < _LENGTH_BYTES:
            view = memoryview(self._held + bytes(view))
        else:
            self._digest.update(self._held)
        cut = max(len(view) - _LENGTH_BYTES, 0)
        self._digest.update(view[:cut])
        self._held = bytes(view[cut:])
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        assert self._held == b"\0\0", "a zip ends with the length of its empty comment"
        return self._digest.hexdigest()


# --- content


def capture(run: Any) -> dict[str, Any]:
    """Everything that the next step of `run` depends on, as tensors on the CPU and primitives.

    All processes of a run take part; what each of them counts for itself is put together, and only rank 0's result is
    the state. The caller adds `files`, the sizes of the files that grow with the run.
    """
    env = run.env
    return {
        "format": FORMAT,
        "torch": str(torch.__version__),
        "config": run.config.to_dict(),
        "progress": run.progress.state_dict(),
        "networks": {name: _on_cpu(getattr(run, name).state_dict()) for name in NETWORKS},
        "optimizers": {name: _on_cpu(opt.state_dict()) for name, opt in _optimizers(run).items()},
        "augment_p": None if run.augment_pipe is None else float(run.augment_pipe.p),
        "ada": None if run.ada is None else run.ada.state_dict(env.sum if env.world > 1 else None),
        "pl_mean": run.loss.pl_mean.cpu(),
        "stats": run.stats.state_dict(env.sum if env.world > 1 else None),
        "objectives": env.gather(run.adversarial.state_dict()),
        "data": {
            "num_items": len(run.dataset),
            "drawn": run.progress.step * run.config.optim.batch,
            "unreadable": sorted({name for names in env.all_gather(run.unreadable.names) for name in names}),
        },
        "random": _random_streams(),
        "files": {},
    }


def restore(run: Any, state: dict[str, Any]) -> None:
    """Put a freshly built run where `capture` found another one. The order of data is set where it is opened.

    Rank 0 goes on with what the processes had counted together, the others from zero.

    Raises:
        StateError: The state belongs to other networks.
    """
    env = run.env
    try:
        for name in NETWORKS:
            getattr(run, name).load_state_dict(state["networks"][name])
        for name, opt in _optimizers(run).items():
            opt.load_state_dict(state["optimizers"][name])
        run.progress.load_state_dict(state["progress"])
        run.stats.load_state_dict(state["stats"], run.device, share=float(env.is_main))
        # With another number of processes, one tick's figures of the objective are those of some samples twice or not.
        run.adversarial.load_state_dict(state["objectives"][env.rank % len(state["objectives"])])
        run.unreadable.names.extend(state["data"]["unreadable"])
        run.loss.pl_mean = state["pl_mean"].to(run.device)
    except (RuntimeError, KeyError, TypeError, ValueError) as err:
        raise StateError(f"the training state does not fit this run: {' '.join(str(err).split())[:300]}") from err
    if run.augment_pipe is not None and state["augment_p"] is not None:
        run.augment_pipe.p.fill_(state["augment_p"])
    if run.ada is not None and state["ada"] is not None:
        run.ada.load_state_dict(state["ada"], share=float(env.is_main))
    _restore_random_streams(state["random"])


def seed_random_streams(seed: int) -> None:
    """Put the global generators where a new run's stand, so that its states depend on nothing but the command."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def nonfinite_weight(run: Any) -> str | None:
    """Name of a weight or buffer that holds a NaN or an infinity, or None. One synchronisation where all is well."""
    for name in NETWORKS:
        tensors = {k: v for k, v in getattr(run, name).state_dict().items() if v.is_floating_point() and v.numel()}
        if not tensors:
            continue
        largest = torch.stack(torch._foreach_norm(list(tensors.values()), float("inf")))
        if not bool(largest.isfinite().all()):
            return f"{name}.{next(k for k, v in tensors.items() if not bool(v.isfinite().all()))}"
    return None


def _optimizers(run: Any) -> dict[str, torch.optim.Optimizer]:
    """One per network: its phases share it."""
    return {phase.name[0]: phase.opt for phase in run.phases}


def _on_cpu(value: Any) -> Any:
    """Plain dicts and lists with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return value


def _random_streams() -> dict[str, Any]:
    """The global generators. Training draws from streams keyed by position and needs none of them; hooks might."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def _restore_random_streams(streams: dict[str, Any]) -> None:
    torch.set_rng_state(streams["torch"])
    if streams["cuda"] and torch.cuda.is_available() and len(streams["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(streams["cuda"])
    name, keys, position, has_gauss, gauss = streams["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(streams["python"])
