"""The names of figures and what they mean: the ADA family's, whose definitions are fixed, and short ones, which take
their number of images and their detector from the options. Knows names and numbers; computes nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """What one name asks for.

    Attributes:
        name: As a user types it.
        figure: What is computed: a name of `metrics.evaluate.FIGURES`, or `ppl`.
        detector: Fixed detector, that of the family's names and of the Inception score; None takes the configured one.
        num: Fixed number of generated images; None takes the configured one.
        max_real: Most real images, in the data set's order; None takes all.
        mirrored: Whether `--mirror` reaches the reference too. `_full` figures never mirror.
        space: Path length: `z` or `w`.
        sampling: Path length: `full` or `end`.
        crop: Path length: whether images are cropped.
        meaning: One line for people.
    """

    name: str
    figure: str
    meaning: str
    detector: str | None = None
    num: int | None = None
    max_real: int | None = None
    mirrored: bool = False
    space: str = "w"
    sampling: str = "end"
    crop: bool = False

    @property
    def fixed(self) -> bool:
        """Whether this is one of the family's names: random noise, subsets of 1000, nothing taken from options."""
        return self.num is not None

    def result_name(self, part: str) -> str:
        """The name of a result: the family's for its figures (`pr50k3_full_recall`), `part` for short ones."""
        if not self.fixed:
            return part
        endings = {"precision": "_precision", "recall": "_recall", "is": "_mean"}
        return self.name + endings.get(part, "")


NUM = 50_000
SHORT = (
    Definition("fid", "fid", "Fréchet distance of feature Gaussians; lower is better"),
    Definition("kid", "kid", "kernel distance, unbiased for few images; lower is better"),
    Definition("fid_inf", "fid_inf", "Fréchet distance extrapolated to infinitely many images"),
    Definition("pr", "pr", "precision (quality) and recall (variety), k = 3"),
    Definition("dc", "dc", "density and coverage, k = 5: precision and recall that outliers do not sway"),
    Definition("is", "is", "Inception score", "inception"),
    Definition("ppl", "ppl", "path length in w, end points; smoothness of the latent space"),
    Definition("memorisation", "memorisation", "share of images closer to training images than those to each other"),
)
FAMILY = (
    Definition("fid50k_full", "fid", "FID, all reals", "inception", NUM),
    Definition("kid50k_full", "kid", "KID, up to 1,000,000 reals", "inception", NUM, 1_000_000),
    Definition("pr50k3_full", "pr", "precision and recall, up to 200,000 reals", "vgg16", NUM, 200_000),
    Definition("is50k", "is", "Inception score over 10 splits", "inception", NUM),
    Definition("ppl2_wend", "ppl", "path length in w, end points, no crop", "vgg16", NUM),
    Definition("fid50k", "fid", "FID, up to 50,000 reals", "inception", NUM, NUM, True),
    Definition("kid50k", "kid", "KID, up to 50,000 reals", "inception", NUM, NUM, True),
    Definition("pr50k3", "pr", "precision and recall, up to 50,000 reals", "vgg16", NUM, NUM, True),
    *(
        Definition(
            f"ppl_{space}{sampling}",
            "ppl",
            f"path length in {space}, {sampling}, cropped",
            "vgg16",
            NUM,
            space=space,
            sampling=sampling,
            crop=True,
        )
        for sampling in ("full", "end")
        for space in ("z", "w")
    ),
)
CATALOGUE = {definition.name: definition for definition in (*SHORT, *FAMILY)}
