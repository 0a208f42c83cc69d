"""Moving average of the generator: half-life, ramp-up, buffers."""

import json

import pytest
import torch
from helpers import assert_close

from training.ema import ema_beta, update_ema


class Net(torch.nn.Module):
    def __init__(self, param: float, buffer: float) -> None:
        super().__init__()
        self.param = torch.nn.Parameter(torch.tensor(param))
        self.register_buffer("buffer", torch.tensor(buffer))


# Rows of the golden table: batch, images seen, half-life in kimg, ramp-up -> beta, parameter after (from -1 towards 2).
ROWS = [
    (16, 0, 5, None, 0.9977843871238888, -0.9933531284332275),
    (16, 0, 5, 0.05, 0.0, 2.0),
    (16, 32, 10, 0.05, 0.0009765625, 1.9970703125),
    (16, 1000, 5, 0.05, 0.8010698775896221, -0.4032095670700073),
]


@pytest.mark.parametrize("batch, nimg, kimg, rampup, beta, after", ROWS)
def test_beta_and_average(batch, nimg, kimg, rampup, beta, after):
    check(batch, nimg, kimg, rampup, beta, after, 5.0)


def test_golden_table(goldens):
    ema = json.loads((goldens / "training_traces.json").read_text())["ema"]
    assert ema["note_values"] == {"param": 2.0, "ema_param_before": -1.0, "buffer": 5.0, "ema_buffer_before": 7.0}
    assert len(ema["table"]) > 20
    for row in ema["table"]:
        check(row["batch_size"], row["cur_nimg"], row["ema_kimg"], row["ema_rampup"], row["beta"],
              row["ema_param_after"], row["ema_buffer_after"])


def check(batch, nimg, kimg, rampup, beta, param_after, buffer_after):
    assert ema_beta(batch, nimg, kimg, rampup) == pytest.approx(beta, rel=1e-14, abs=0)
    G, G_ema = Net(2.0, 5.0), Net(-1.0, 7.0)
    update_ema(G_ema, G, beta)
    assert_close(G_ema.param, param_after, 2e-7, f"batch {batch} nimg {nimg} ema {kimg}/{rampup}")
    assert G_ema.buffer.item() == buffer_after
    assert G.param.item() == 2.0 and G.buffer.item() == 5.0


def test_half_life_is_a_half_life():
    G, G_ema = Net(1.0, 0.0), Net(0.0, 0.0)
    for _ in range(100):
        update_ema(G_ema, G, ema_beta(50, 10**9, 5))
    assert_close(G_ema.param, 0.5, 1e-5, "half-life")


def test_no_averaging_and_zero_beta_copy_exactly():
    assert ema_beta(4, 0, 0) == 0.0
    assert ema_beta(4, 0, 10, 0.0) == 0.0
    G, G_ema = Net(0.1, 0.3), Net(1e30, 7.0)
    update_ema(G_ema, G, 0.0)
    assert torch.equal(G_ema.param, G.param)


def test_no_gradient_history_and_integer_buffers():
    G, G_ema = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    G.num_batches_tracked.fill_(41)
    update_ema(G_ema, G, 0.9)
    assert G_ema.num_batches_tracked.item() == 41
    assert all(p.grad_fn is None for p in G_ema.parameters())


def test_different_structure_is_refused():
    with pytest.raises(ValueError, match="differ in structure: only one has bias"):
        update_ema(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2), 0.5)
