"""GAN losses of one micro-batch: adversarial terms, path length and R1, and their gradients.

Owns how G and D are run in each phase and what is reported. The adversarial objective comes in as an `AdversarialLoss`;
optimisers, augmentation strength and the order of phases are others' business.

Source: spec training-and-metrics.md section 1.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_utils import custom_ops
from torch_utils.ops import conv2d_gradfix, epilogue
from training import networks

PHASES = ("Gmain", "Greg", "Gboth", "Dmain", "Dreg", "Dboth")
MAX_JOINT_PIXELS = 1 << 16  # of all fakes: beyond, one pass over fakes and reals costs memory and saves no time


class AdversarialLoss(Protocol):
    """Per-sample losses on raw discriminator logits, [N, 1] -> [N, 1].

    An implementation may also offer `centred(part, logits)`, the same minus its floor, and `observe(part, logits)`, to
    gather figures of its own; `part` is the name of one of the three methods below.
    """

    def generator(self, fake_logits: Tensor) -> Tensor: ...
    def discriminator_fake(self, fake_logits: Tensor) -> Tensor: ...
    def discriminator_real(self, real_logits: Tensor) -> Tensor: ...


class GanLoss:
    """Losses and gradients of the training phases.

    Random draws come from torch's global generators: the caller seeds them.

    Args:
        G: Generator with children `mapping` and `synthesis`.
        D: Discriminator.
        adversarial: The objective on logits.
        augment_pipe: Applied to everything D sees, reals and fakes, in every phase; None for no augmentation.
        style_mixing_prob: Probability that the later layers get another latent's style, in [0, 1].
        r1_gamma: Weight of R1 (Mescheder et al. 2018); 0 leaves it out.
        pl_batch_shrink: The path length uses 1 / this of the micro-batch (at least one sample).
        pl_decay: Share of each micro-batch in the running mean of path lengths, `pl_mean`.
        pl_weight: Weight of the path length penalty (Karras et al. 2020); 0 leaves it out.
        report: Called with a name and per-sample values, before any gain; None to report nothing.

    Raises:
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        G: Any,
        D: Any,
        adversarial: AdversarialLoss,
        *,
        augment_pipe: Any = None,
        style_mixing_prob: float = 0.9,
        r1_gamma: float = 10.0,
        pl_batch_shrink: int = 2,
        pl_decay: float = 0.01,
        pl_weight: float = 2.0,
        report: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        if not 0 <= style_mixing_prob <= 1:
            raise ValueError(f"--style-mixing {style_mixing_prob} is outside [0, 1]")
        if not 0 <= r1_gamma < math.inf:
            raise ValueError(f"--gamma {r1_gamma} is not a finite number >= 0")
        if not 0 <= pl_weight < math.inf:
            raise ValueError(f"--pl-weight {pl_weight} is not a finite number >= 0")
        if pl_batch_shrink < 1:
            raise ValueError(f"the path length's batch is 1/{pl_batch_shrink} of the batch; the divisor is at least 1")
        if not 0 <= pl_decay <= 1:
            raise ValueError(f"the path length's decay {pl_decay} is outside [0, 1]")
        self.G = G
        self.D = D
        self.adversarial = adversarial
        self.augment_pipe = augment_pipe
        self.style_mixing_prob = style_mixing_prob
        self.r1_gamma = r1_gamma
        self.pl_batch_shrink = pl_batch_shrink
        self.pl_decay = pl_decay
        self.pl_weight = pl_weight
        self.pl_mean = torch.zeros([], device=next(G.parameters()).device)
        self._report = report

    def accumulate_gradients(
        self, phase: str, real_img: Tensor, real_c: Tensor, gen_z: Tensor, gen_c: Tensor, *, gain: float
    ) -> None:
        """Add one micro-batch's gradients of a phase to the network that the phase trains.

        The caller has that network's gradients enabled and the other's disabled.

        Args:
            phase: One of `PHASES`.
            real_img: Reals, float32 [N, C, H, W] in [-1, 1].
            real_c: Their labels, [N, c_dim].
            gen_z: Latents of the fakes, [N, z_dim].
            gen_c: Labels of the fakes, [N, c_dim].
            gain: Factor on every loss: the phase's interval divided by the number of micro-batches.

        Raises:
            ValueError: Unknown phase.
        """
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}; one of {', '.join(PHASES)}")
        if phase in ("Gmain", "Gboth"):
            self._generator_main(gen_z, gen_c, gain)
        if phase in ("Greg", "Gboth") and self.pl_weight != 0:
            self._path_length(gen_z, gen_c, gain)
        main = phase in ("Dmain", "Dboth")
        r1 = phase in ("Dreg", "Dboth") and self.r1_gamma != 0
        group = self._joint_group(real_img) if main and not r1 else 0
        if group:
            return self._discriminator_joint(real_img, real_c, gen_z, gen_c, gain, group)
        fake_losses = self._discriminator_fake(gen_z, gen_c, gain) if main else None
        if main or r1:
            self._discriminator_real(real_img, real_c, gain, r1=r1, fake_losses=fake_losses)

    def run_g(self, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Fakes [N, C, H, W] and the styles they were made from, ws [N, num_ws, w_dim], with style mixing."""
        ws = self.mix_styles(self.G.mapping(z, c), z, c)
        return self.G.synthesis(ws), ws

    def mix_styles(self, ws: Tensor, z: Tensor, c: Tensor) -> Tensor:
        """Give the layers from a random cutoff on another latent's style, for the whole micro-batch alike.

        Draws in this order: cutoff in {1 .. num_ws - 1}, whether to mix at all, the other latents. Nothing waits for
        the device: the choice is a mask, not an index.
        """
        num_ws = ws.shape[1]
        if self.style_mixing_prob == 0 or num_ws < 2:
            return ws
        cutoff = torch.randint(1, num_ws, [], device=ws.device)
        kept = torch.rand([], device=ws.device) < self.style_mixing_prob
        other = self.G.mapping(torch.randn_like(z), c, skip_w_avg_update=True)
        replaced = (torch.arange(num_ws, device=ws.device) >= cutoff) & kept  # [L]
        return torch.where(replaced[None, :, None], other, ws)

    def run_d(self, img: Tensor, c: Tensor) -> Tensor:
        """Logits [N, 1] of augmented images."""
        if self.augment_pipe is not None:
            img = self.augment_pipe(img)
        return self.D(img, c)

    def _generator_main(self, gen_z: Tensor, gen_c: Tensor, gain: float) -> None:
        img, _ = self.run_g(gen_z, gen_c)
        logits = self.run_d(img, gen_c)
        loss = self.adversarial.generator(logits)
        self._report_logits("fake", logits)
        self._say("Loss/G/loss", loss)
        centred = self._centred("generator", logits)
        if centred is not None:
            self._say("Loss/G/centred", centred)
        loss.mean().mul(gain).backward()

    def _path_length(self, gen_z: Tensor, gen_c: Tensor, gain: float) -> None:
        # At least one sample: the mean over an empty batch would be NaN and stay in pl_mean for ever.
        num = max(len(gen_z) // self.pl_batch_shrink, 1)
        ws = self.mix_styles(self.G.mapping(gen_z[:num], gen_c[:num]), gen_z[:num], gen_c[:num])
        if not ws.requires_grad:  # a frozen mapping network
            ws.requires_grad_(True)
        with epilogue.inputs_kept():
            img = self.G.synthesis(ws)
        noise = torch.randn_like(img) / math.sqrt(img.shape[2] * img.shape[3])
        with conv2d_gradfix.no_weight_gradients():
            jacobian, = torch.autograd.grad([(img * noise).sum()], [ws], create_graph=True)  # [b, L, w_dim]
        lengths = jacobian.square().sum(dim=2).mean(dim=1).sqrt()  # [b]
        # The mean that the penalty sees is not detached: its share of the gradient belongs to the method.
        mean = self.pl_mean.lerp(lengths.mean(), self.pl_decay)
        # A bad micro-batch makes this loss non-finite, which the loop counts; it must not spoil all later ones.
        self.pl_mean = torch.where(mean.isfinite(), mean, self.pl_mean).detach()
        penalty = (lengths - mean).square()
        loss = penalty * self.pl_weight
        self._say("Loss/pl_penalty", penalty)
        self._say("Loss/G/reg", loss)
        # 0 * pixel: parameters without influence on the path length still get a (zero) gradient.
        (img[:, 0, 0, 0] * 0 + loss).mean().mul(gain).backward()

    def _discriminator_fake(self, gen_z: Tensor, gen_c: Tensor, gain: float) -> Tensor:
        """Backward of D's loss on fresh fakes. Returns the losses and their centred values, [2, N, 1]."""
        with torch.no_grad():
            img, _ = self.run_g(gen_z, gen_c)
        logits = self.run_d(img, gen_c)
        loss = self.adversarial.discriminator_fake(logits)
        self._report_logits("fake", logits)
        loss.mean().mul(gain).backward()
        centred = self._centred("discriminator_fake", logits)
        return torch.stack([loss.detach(), loss.detach() if centred is None else centred])

    def _discriminator_real(
        self, real_img: Tensor, real_c: Tensor, gain: float, *, r1: bool, fake_losses: Tensor | None
    ) -> None:
        """Backward of D's loss on reals (if fakes went before), of R1, or of both in one."""
        img = real_img.detach().requires_grad_(r1)
        logits = self.run_d(img, real_c)
        self._report_logits("real", logits)
        total = logits * 0  # every parameter gets a gradient, D's last bias in Dreg too
        if fake_losses is not None:
            loss = self.adversarial.discriminator_real(logits)
            self._say("Loss/D/loss", fake_losses[0] + loss)
            centred = self._centred("discriminator_real", logits)
            if centred is not None:
                self._say("Loss/D/centred", fake_losses[1] + centred)
            total = total + loss
        if r1:
            with conv2d_gradfix.no_weight_gradients():
                gradient, = torch.autograd.grad([logits.sum()], [img], create_graph=True)
            penalty = gradient.square().sum(dim=[1, 2, 3])  # [N]
            loss = penalty * (self.r1_gamma / 2)
            self._say("Loss/r1_penalty", penalty)
            self._say("Loss/D/reg", loss)
            total = total + loss[:, None]
        total.mean().mul(gain).backward()

    def _joint_group(self, real_img: Tensor) -> int:
        """Size of D's minibatch-std groups if fakes and reals can go through it together, and should; else 0.

        Nothing else of this project's discriminators mixes images. Small batches are worth it, on a CPU: one pass has
        half the calls, and transforms weights once. Large ones would only hold twice the activations.
        """
        num, _, height, width = real_img.shape
        if not isinstance(self.D, networks.Discriminator) or num * height * width > MAX_JOINT_PIXELS:
            return 0
        if real_img.device.type != "cpu" or not custom_ops.fast_paths():
            return 0
        mbstd = self.D.b4.mbstd
        group = 1 if mbstd is None else mbstd.group_size  # None: one group of all, which a joint batch would enlarge
        return group if group and num % group == 0 else 0

    def _discriminator_joint(
        self, real_img: Tensor, real_c: Tensor, gen_z: Tensor, gen_c: Tensor, gain: float, group: int
    ) -> None:
        """Backward of D's loss on fresh fakes and on reals in one pass, up to rounding what two passes give.

        Sample n is in group n mod (number of groups): `group` runs of fakes and reals in turn keep them apart.
        """
        with torch.no_grad():
            img, _ = self.run_g(gen_z, gen_c)
            if self.augment_pipe is not None:
                img, real_img = self.augment_pipe(img), self.augment_pipe(real_img)

        def mixed(fake: Tensor, real: Tensor) -> Tensor:
            return torch.cat([t.unflatten(0, (group, len(t) // group)) for t in (fake, real)], dim=1).flatten(0, 1)

        runs = self.D(mixed(img, real_img), mixed(gen_c, real_c)).unflatten(0, (group, -1))  # [group, runs, 1]
        fake, real = (half.flatten(0, 1) for half in runs.chunk(2, dim=1))
        losses = self.adversarial.discriminator_fake(fake), self.adversarial.discriminator_real(real)
        self._report_logits("fake", fake)
        self._report_logits("real", real)
        self._say("Loss/D/loss", losses[0] + losses[1])
        centred = self._centred("discriminator_fake", fake), self._centred("discriminator_real", real)
        if centred[0] is not None and centred[1] is not None:
            self._say("Loss/D/centred", centred[0] + centred[1])
        (losses[0] + losses[1]).mean().mul(gain).backward()

    def _report_logits(self, kind: str, logits: Tensor) -> None:
        self._say(f"Loss/scores/{kind}", logits)
        self._say(f"Loss/signs/{kind}", logits.sign())

    def _centred(self, part: str, logits: Tensor) -> Tensor | None:
        """The part's loss minus its floor for the books, if the objective knows it; lets the objective look, too."""
        if self._report is None:
            return None
        with torch.no_grad():
            if hasattr(self.adversarial, "observe"):
                self.adversarial.observe(part, logits)
            return self.adversarial.centred(part, logits) if hasattr(self.adversarial, "centred") else None

    def _say(self, name: str, values: Tensor) -> None:
        if self._report is not None:
            self._report(name, values.detach())
