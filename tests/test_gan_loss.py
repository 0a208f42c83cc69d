"""GanLoss against the golden phases, and properties that the goldens cannot show: style mixing, edges, draws."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import assert_close

from stylegan_rooted.losses import LogisticLoss, RootedLogisticLoss
from training import loss as loss_module
from training.augment import AugmentPipe
from training.loss import PHASES, GanLoss
from training.networks import Discriminator, Generator

SMALL_RUNS = ["logistic/Gmain", "logistic/Greg", "logistic/Gboth", "logistic/Dmain", "logistic/Dreg", "logistic/Dboth",
              "rooted_k1/Gmain", "rooted_k2/Gmain", "rooted_k2/Dmain", "rooted_k3/Gmain", "rooted_k8/Dmain"]
GRADIENT_BOUND = 2e-5
REPORT_BOUND = 5e-6


class Goldens:
    """Arrays by key, from the full golden file or the packed small copy (a vector and an index of offsets)."""

    def __init__(self, path) -> None:
        with np.load(path, allow_pickle=False) as d:
            self.meta = json.loads(str(d["meta"]))
            if "index" in d.files:
                values = d["values"]
                index = json.loads(str(d["index"]))
                self.arrays = {k: values[o : o + math.prod(shape)].reshape(shape) for k, (o, shape) in index.items()}
            else:
                self.arrays = {k: d[k] for k in d.files if k != "meta" and not k.startswith("table/")}

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.arrays[key]))

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) :]: self[k] for k in self.arrays if k.startswith(prefix)}

    def networks(self):
        G, D = Generator(**self.meta["G_kwargs"]), Discriminator(**self.meta["D_kwargs"])
        G.load_state_dict(self.under("G/"))
        D.load_state_dict(self.under("D/"))
        return G.train().requires_grad_(False), D.train().requires_grad_(False)

    def loss(self, adversarial, report):
        G, D = self.networks()
        return GanLoss(G, D, adversarial, report=report, **self.meta["loss_kwargs"])


@pytest.fixture(scope="module")
def small(data_dir) -> Goldens:
    return Goldens(data_dir / "loss_phases.npz")


@pytest.fixture(scope="module")
def full(goldens) -> Goldens:
    return Goldens(goldens / "loss_phases.npz")


@pytest.fixture
def fixed_noise(monkeypatch):
    """Path-length noise as in the goldens: sqrt(2) sin(0.37 i + 0.11)."""

    def pattern(x, **_):
        i = torch.arange(x.numel(), dtype=torch.float64)
        return (math.sqrt(2) * torch.sin(0.37 * i + 0.11)).to(torch.float32).reshape(x.shape)

    monkeypatch.setattr(torch, "randn_like", pattern)


class Reports(dict):
    """Collects what is reported; a name reported twice in one phase would be an error."""

    def __call__(self, name, value):
        assert name not in self and not value.requires_grad
        self[name] = value


def adversarial_of(run: str):
    arm = run.split("/")[0]
    return RootedLogisticLoss(float(arm.removeprefix("rooted_k"))) if arm.startswith("rooted") else LogisticLoss()


def play(g: Goldens, loss: GanLoss, run: str) -> Reports:
    """One golden phase with gradients enabled for its own network only; checks everything stored about it."""
    phase, gain = g.meta["runs"][run]["phase"], g.meta["runs"][run]["gain"]
    module, letter = (loss.G, "G") if phase.startswith("G") else (loss.D, "D")
    loss._report = reports = Reports()
    loss.G.zero_grad(set_to_none=True)
    loss.D.zero_grad(set_to_none=True)
    module.requires_grad_(True)
    loss.accumulate_gradients(phase, g["real_img"], g["real_c"], g["z"], g["gen_c"], gain=gain)
    module.requires_grad_(False)

    expected = g.under(f"{run}/report/")
    assert set(reports) - set(expected) <= {"Loss/G/centred", "Loss/D/centred"}
    for name, value in expected.items():
        assert_close(reports[name], value, REPORT_BOUND, f"{run} {name}")
    assert_close(loss.pl_mean, g[f"{run}/pl_mean_after"], REPORT_BOUND, f"{run} pl_mean")
    assert_close(loss.G.mapping.w_avg, g[f"{run}/w_avg_after"], REPORT_BOUND, f"{run} w_avg")

    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None] == g.meta["runs"][run]["no_grad_params"]
    other = loss.D if letter == "G" else loss.G
    assert all(p.grad is None for p in other.parameters())
    for name, value in g.under(f"{run}/grad/{letter}/").items():
        assert_close(gradients[name], value, GRADIENT_BOUND, f"{run} grad {name}")
    return reports


@pytest.mark.parametrize("run", SMALL_RUNS)
def test_phase_of_the_small_copy(small, fixed_noise, run):
    assert len(small.under(f"{run}/grad/")) > 5
    play(small, small.loss(adversarial_of(run), None), run)


def test_every_golden_phase(full, fixed_noise):
    runs = [r for r in full.meta["runs"] if not r.startswith(("logistic_seq", "logistic/Greg_repeat"))]
    assert len(runs) == 16
    for run in runs:
        play(full, full.loss(adversarial_of(run), None), run)


def test_three_path_lengths_in_a_row(full, fixed_noise):
    loss = full.loss(LogisticLoss(), None)
    for i in range(3):
        play(full, loss, f"logistic/Greg_repeat{i}")


def test_four_phases_in_a_row(full, fixed_noise):
    loss = full.loss(LogisticLoss(), None)
    for run in ("0_Gmain", "1_Greg", "2_Dmain", "3_Dreg"):
        play(full, loss, f"logistic_seq/{run}")


def test_small_copy_is_the_full_file(small, full):
    for key, value in small.arrays.items():
        assert np.array_equal(value, full.arrays[key]), key


@pytest.mark.parametrize("adversarial", [LogisticLoss(), RootedLogisticLoss(2), RootedLogisticLoss(8)])
def test_reported_losses_stay_above_their_floors(small, adversarial):
    for phase in ("Gmain", "Dmain"):
        reports = run_phase(small, small.loss(adversarial, None), phase)
        letter = phase[0]
        floor = adversarial.floor_generator if letter == "G" else adversarial.floor_discriminator
        paper, centred = reports[f"Loss/{letter}/loss"], reports[f"Loss/{letter}/centred"]
        assert (paper > floor).all() and paper.shape == (4, 1)
        assert_close(centred, paper - floor, 1e-5, "centred")


# --- properties beyond the goldens ----------------------------------------------------------------------------------


def run_phase(g, loss, phase, gain=1.0, batch=4):
    loss._report = reports = Reports()
    module = loss.G if phase.startswith("G") else loss.D
    module.zero_grad(set_to_none=True)
    module.requires_grad_(True)
    loss.accumulate_gradients(phase, g["real_img"][:batch], g["real_c"][:batch], g["z"][:batch], g["gen_c"][:batch],
                              gain=gain)
    module.requires_grad_(False)
    return reports


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("phase", PHASES)
def test_gain_scales_gradients_and_not_reports(small, fixed_noise, phase):
    letter = phase[0]
    results = []
    for gain in (1.0, 3.0):
        loss = small.loss(LogisticLoss(), None)
        reports = run_phase(small, loss, phase, gain)
        results.append((gradients(getattr(loss, letter)), reports))
    for name, grad in results[0][0].items():
        if "noise_strength" not in name:
            assert_close(results[1][0][name], 3 * grad, 1e-5, name)
    for name, value in results[0][1].items():
        assert_close(results[1][1][name], value, 1e-6, name)


@pytest.mark.parametrize("both, parts", [("Gboth", ("Gmain", "Greg")), ("Dboth", ("Dmain", "Dreg"))])
def test_both_is_the_sum_of_its_parts(small, fixed_noise, both, parts):
    letter = both[0]
    together, apart = small.loss(LogisticLoss(), None), small.loss(LogisticLoss(), None)
    run_phase(small, together, both)
    total = {}
    for phase in parts:
        run_phase(small, apart, phase)
        for name, grad in gradients(getattr(apart, letter)).items():
            total[name] = total.get(name, 0) + grad
    for name, grad in gradients(getattr(together, letter)).items():
        if "noise_strength" not in name:
            assert_close(grad, total[name], 1e-4, name)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_path_length_of_a_tiny_batch_is_finite(small, batch):
    """A batch of 1 halved is empty: at least one sample keeps pl_mean from turning NaN for ever."""
    loss = small.loss(LogisticLoss(), None)
    reports = run_phase(small, loss, "Greg", batch=batch)
    assert len(reports["Loss/pl_penalty"]) == 1
    assert loss.pl_mean.isfinite() and loss.pl_mean > 0
    assert all(g.isfinite().all() for g in gradients(loss.G).values())


def test_path_length_uses_the_first_latents_and_labels(small, fixed_noise):
    seen = []
    loss = small.loss(LogisticLoss(), None)
    mapping = loss.G.mapping.forward
    loss.G.mapping.forward = lambda z, c, **kwargs: seen.append((z, c)) or mapping(z, c, **kwargs)
    run_phase(small, loss, "Greg")
    (z, c), = seen
    assert torch.equal(z, small["z"][:2]) and torch.equal(c, small["gen_c"][:2])


def test_a_non_finite_path_length_does_not_poison_the_mean(small):
    loss = small.loss(LogisticLoss(), None)
    run_phase(small, loss, "Greg")
    before = loss.pl_mean.clone()
    bad = {**dict(small.under("")), "z": torch.full_like(small["z"], math.nan)}
    run_phase(bad, loss, "Greg")
    assert torch.equal(loss.pl_mean, before)
    assert any(g.isnan().any() for g in gradients(loss.G).values())  # and the damage shows where it is counted


def test_zero_weights_leave_the_regularisers_out(small):
    loss = small.loss(LogisticLoss(), None)
    loss.pl_weight = loss.r1_gamma = 0
    assert run_phase(small, loss, "Greg") == {} and gradients(loss.G) == {}
    assert run_phase(small, loss, "Dreg") == {} and gradients(loss.D) == {}
    assert "Loss/r1_penalty" not in run_phase(small, loss, "Dboth")


def test_r1_is_the_gradient_before_augmentation(small):
    """Doubling contrast inside the pipe doubles the gradient with respect to the image: penalty times 4."""

    class Recorder(torch.nn.Module):
        def forward(self, img):
            seen.append(img)
            return img * 2

    seen: list = []
    loss = small.loss(LogisticLoss(), None)
    loss.augment_pipe = Recorder()
    penalty = run_phase(small, loss, "Dreg")["Loss/r1_penalty"]
    x = small["real_img"].requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss.D(2 * x, small["real_c"]).sum(), x)
    assert_close(penalty, gradient.square().sum([1, 2, 3]), 1e-5, "r1")
    assert len(seen) == 1


def test_augmentation_is_applied_to_reals_and_fakes_in_every_phase(small):
    calls = []
    loss = small.loss(LogisticLoss(), None)
    loss.augment_pipe = lambda img: calls.append(img.shape) or img
    counts = {}
    for phase in PHASES:
        calls.clear()
        run_phase(small, loss, phase)
        counts[phase] = len(calls)
    assert counts == {"Gmain": 1, "Greg": 0, "Gboth": 1, "Dmain": 2, "Dreg": 1, "Dboth": 2}


@pytest.mark.parametrize(
    "group, batch, passes",
    [(4, 4, 1), (2, 4, 1), (1, 3, 1), (3, 3, 1), (0, 3, 1), (None, 4, 2), (4, 2, 2)],
)
@pytest.mark.parametrize("is_augmented", [False, True])
def test_fakes_and_reals_go_through_d_together_with_the_same_result(
    small, monkeypatch, group, batch, passes, is_augmented
):
    """Minibatch-std groups hold fakes or reals, never both; where they cannot, D sees them one after the other."""
    results = []
    for limit in (1 << 16, 0):
        monkeypatch.setattr(loss_module, "MAX_JOINT_PIXELS", limit)
        loss = small.loss(RootedLogisticLoss(2), None)
        if group == 0:
            kwargs = {**small.meta["D_kwargs"], "epilogue_kwargs": {"mbstd_num_channels": 0}}
            torch.manual_seed(0)
            loss.D = Discriminator(**kwargs).train().requires_grad_(False)
        else:
            loss.D.b4.mbstd.group_size = group
        if is_augmented:
            loss.augment_pipe = AugmentPipe(xflip=1, xint=1, brightness=1)
            loss.augment_pipe.p.fill_(0.7)
        sizes = []
        loss.D.register_forward_hook(lambda _m, inputs, _y, sizes=sizes: sizes.append(len(inputs[0])))
        torch.manual_seed(1)
        reports = run_phase(small, loss, "Dmain", gain=0.5, batch=batch)
        results.append((sizes, reports, gradients(loss.D), torch.rand([])))
    (sizes, reports, found, drawn), (apart, expected_reports, expected, drawn_apart) = results
    assert sizes == [2 * batch // passes] * passes and apart == [batch] * 2
    assert reports.keys() == expected_reports.keys() and drawn == drawn_apart
    for name, value in expected_reports.items():
        assert_close(reports[name], value, 1e-5, name)
    for name, value in expected.items():
        assert_close(found[name], value, 1e-5, name)


def test_the_definitions_alone_see_fakes_and_reals_apart(small, monkeypatch):
    monkeypatch.setenv("STYLEGAN_ROOTED_OPS", "ref")
    loss, sizes = small.loss(LogisticLoss(), None), []
    loss.D.register_forward_hook(lambda _m, inputs, _y: sizes.append(len(inputs[0])))
    run_phase(small, loss, "Dmain")
    assert len(sizes) == 2


def test_works_without_reports_and_with_a_bare_protocol(small):
    class Bare:
        def generator(self, fake_logits):
            return -fake_logits

        def discriminator_fake(self, fake_logits):
            return fake_logits

        def discriminator_real(self, real_logits):
            return -real_logits

    loss = small.loss(Bare(), None)
    assert "Loss/G/centred" not in run_phase(small, loss, "Gmain")
    assert "Loss/D/centred" not in run_phase(small, loss, "Dmain")
    loss._report = None
    loss.D.requires_grad_(True)
    loss.accumulate_gradients("Dboth", small["real_img"], small["real_c"], small["z"], small["gen_c"], gain=1)


def test_rooted_loss_gathers_its_diagnostics(small):
    adversarial = RootedLogisticLoss(2, tail="linear", tail_at=0.5)
    loss = small.loss(adversarial, None)
    fake = run_phase(small, loss, "Dboth")["Loss/scores/fake"]
    figures = adversarial.drain()
    assert figures["Loss/tail_share/discriminator_fake"] == (-fake < -0.5).float().mean().item()
    assert "Loss/max_slope/discriminator_real" in figures and "Loss/top1_share/generator" not in figures


def test_unknown_phase_and_bad_arguments(small):
    loss = small.loss(LogisticLoss(), None)
    with pytest.raises(ValueError, match="unknown phase 'Gnone'; one of Gmain"):
        run_phase(small, loss, "Gnone")
    G, D = loss.G, loss.D
    for options, message in [
        ({"style_mixing_prob": 1.5}, "--style-mixing 1.5"), ({"r1_gamma": -1.0}, "--gamma -1.0"),
        ({"r1_gamma": math.nan}, "--gamma nan"), ({"pl_weight": -2.0}, "--pl-weight -2.0"),
        ({"pl_batch_shrink": 0}, "at least 1"), ({"pl_decay": 2.0}, "decay 2.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            GanLoss(G, D, LogisticLoss(), **options)


# --- style mixing (not in the goldens) ------------------------------------------------------------------------------

NUM_WS = 6


class ToyMapping(torch.nn.Module):
    """ws = z repeated over the layers; counts w_avg updates and remembers labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones([]))
        self.updates, self.labels, self.latents = 0, [], []

    def forward(self, z, c, skip_w_avg_update=False):
        self.updates += not skip_w_avg_update
        self.labels.append(c)
        self.latents.append(z)
        return (z * self.weight)[:, None].repeat(1, NUM_WS, 1)


class ToyG(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mapping = ToyMapping()
        self.synthesis = lambda ws: ws.sum([1, 2])[:, None, None, None].repeat(1, 1, 4, 4)


def toy_loss(prob: float) -> GanLoss:
    return GanLoss(ToyG(), torch.nn.Linear(1, 1), LogisticLoss(), style_mixing_prob=prob)


def mix(loss: GanLoss, seed: int, batch: int = 3):
    torch.manual_seed(seed)
    z, c = torch.full([batch, 2], 7.0), torch.arange(batch)[:, None].float()
    ws = loss.G.mapping(z, c)
    return loss.mix_styles(ws, z, c)


def test_mixing_replaces_exactly_the_layers_from_the_cutoff():
    loss = toy_loss(1.0)
    cutoffs = set()
    for seed in range(100):
        ws = mix(loss, seed)
        own = (ws == 7.0).all(dim=2)  # [N, L]
        assert torch.equal(own, own[:1].expand_as(own))  # one cutoff for the whole micro-batch
        cutoff = int(own[0].sum())
        assert own[0, :cutoff].all() and not own[0, cutoff:].any()
        assert (ws[:, cutoff:] == ws[:, cutoff : cutoff + 1]).all()  # one other style per sample
        assert len({tuple(w.tolist()) for w in ws[:, -1]}) == 3  # another one for every sample
        cutoffs.add(cutoff)
    assert cutoffs == set(range(1, NUM_WS))


def test_keep_probability_and_cutoffs_are_uniform():
    loss = toy_loss(0.9)
    num = 1000
    z, c = torch.full([1, 2], 7.0), torch.zeros([1, 0])
    ws = loss.G.mapping(z, c).detach()
    torch.manual_seed(0)
    with torch.no_grad():
        cutoffs = [int((loss.mix_styles(ws, z, c)[0, :, 0] == 7.0).sum()) for _ in range(num)]
    counts = np.bincount(cutoffs, minlength=NUM_WS + 1)
    mixed = num - counts[NUM_WS]
    assert abs(mixed / num - 0.9) < 4 * math.sqrt(0.9 * 0.1 / num)
    expected = mixed / (NUM_WS - 1)
    assert (abs(counts[1:NUM_WS] - expected) < 4 * math.sqrt(expected)).all()
    assert counts[0] == 0


def test_second_mapping_has_the_same_labels_and_leaves_w_avg_alone():
    loss = toy_loss(0.9)
    mix(loss, 0)
    mapping = loss.G.mapping
    assert mapping.updates == 1 and len(mapping.labels) == 2
    assert mapping.labels[1] is mapping.labels[0]


def test_draws_come_in_order_cutoff_keep_latents_and_always():
    """The other latents are drawn whether or not they are used: what follows in the stream does not depend on it."""
    for seed in range(10):
        for prob in (0.5, 1.0):
            loss = toy_loss(prob)
            ws = mix(loss, seed)
            after = torch.rand([])
            torch.manual_seed(seed)
            cutoff = int(torch.randint(1, NUM_WS, []))
            kept = bool(torch.rand([]) < prob)
            other = torch.randn(3, 2)
            assert torch.equal(after, torch.rand([]))
            assert torch.equal(loss.G.mapping.latents[1], other)
            assert torch.equal(ws[:, -1], other if kept else torch.full_like(other, 7.0))
            assert int((ws[0] == 7.0).all(dim=1).sum()) == (cutoff if kept else NUM_WS)


def test_without_mixing_nothing_is_drawn():
    loss = toy_loss(0.0)
    ws = mix(loss, 5)
    torch.manual_seed(5)
    assert (ws == 7.0).all() and torch.equal(torch.rand([]), mix_free_draw(loss))


def mix_free_draw(loss):
    mix(loss, 5)
    return torch.rand([])


def test_gradient_reaches_the_mapping_through_both_styles():
    loss = toy_loss(1.0)
    ws = mix(loss, 1)
    cutoff = int((ws[0] == 7.0).all(dim=1).sum())
    ws[:, cutoff:].sum().backward()
    assert loss.G.mapping.weight.grad.item() == pytest.approx(ws[:, cutoff:].sum().item(), rel=1e-5)


@pytest.mark.parametrize("phase", ["Gmain", "Greg", "Dmain"])
def test_mixing_is_used_wherever_fakes_are_made(small, phase):
    loss = small.loss(LogisticLoss(), None)
    loss.style_mixing_prob = 1.0
    calls = []
    mapping = loss.G.mapping.forward
    loss.G.mapping.forward = lambda z, c, **kwargs: calls.append(kwargs) or mapping(z, c, **kwargs)
    run_phase(small, loss, phase)
    assert calls == [{}, {"skip_w_avg_update": True}]
