"""The paper's findings, each with the small runs that ask whether it holds here, and the paper's own numbers.

The numbers are top-1 on ImageNet-1K, in percent: of ViT-L after 800 epochs with pixels that are not normalised, unless
a label says otherwise (He et al., tables 1 to 3, figures 5, 7 and 9). Everything that decides a verdict is in this file
and in verdict.py, and was fixed before the seeds were run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from data_pipeline.errors import UsageError

FINETUNE, PROBE, SPEED = "finetune", "probe", "speed"
"""What is measured of a pre-training: top-1 after a transfer, percent; images per second while it is trained."""
PARTIAL = ("partial-0.5", "partial-1", "partial-2")
FEW, MORE, MANY = "finetune", "finetune-4x", "finetune-16x"
"""Fine-tuning on few labels, on four times and on sixteen times as many."""

Values = Callable[[str, str], float]
"""(pre-training, what is measured) to its value under one seed."""


@dataclass(frozen=True)
class Pretraining:
    """A pre-training: its recipe, what it changes of it, and the length of its schedule as a share of the base's."""

    recipe: str
    overrides: tuple[str, ...] = ()
    share: float = 1
    predicts_words: bool = False
    """Of the tokeniser that was trained on the same images."""
    transfer: tuple[str, ...] = ()
    """Changes of a transfer's recipe, so that it takes this encoder."""


@dataclass(frozen=True)
class Transfer:
    """A training on labels: its recipe, and how many labels per class, as a multiple of the few."""

    recipe: str
    overrides: tuple[str, ...] = ()
    labels: int = 1


@dataclass(frozen=True)
class Arm:
    """A row of a finding's table: a pre-training (None: from scratch), and the paper's numbers."""

    label: str
    pretraining: str
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and the difference, under one seed, that is above 0 where it holds."""

    text: str
    paper: str
    difference: Callable[[Values], float]
    unit: str = "points"
    """Of the difference: points of top-1, or % of a rate."""


@dataclass(frozen=True)
class Finding:
    """A comparison of the paper: its arms, what is measured of each, and what is claimed of them."""

    title: str
    measures: tuple[str, ...]
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]

    @property
    def name(self) -> str:
        """The title as it is given on the command line."""
        return self.title.lower().replace(" ", "-")


SCRATCH, TOKENISER = "scratch", "tokeniser"
MAE, BEIT, MOCO = "paper/mae", "paper/beit", "paper/moco"
SMALL, LARGE = ("model.width=48",), ("model.width=144", "model.depth=6")
CLS, BEIT_ENCODER = ("classifier.pool=cls",), ("model.encoder=beit", "model.layer_scale=0.1")

PRETRAININGS: dict[str, Pretraining] = {
    "mae": Pretraining(MAE),
    **{f"mask-ratio-{ratio}": Pretraining(MAE, (f"model.mask_ratio={ratio}",)) for ratio in (0.25, 0.5, 0.9)},
    "encoder-mask-tokens": Pretraining(MAE, ("model.encoder_mask_tokens=true",)),
    **{f"decoder-depth-{depth}": Pretraining(MAE, (f"model.decoder_depth={depth}",)) for depth in (1, 4)},
    **{f"decoder-width-{width}": Pretraining(MAE, (f"model.decoder_width={width}",)) for width in (16, 96)},
    "pixels": Pretraining(MAE, ("model.target=pixels",)),
    "pca": Pretraining(MAE, ("model.target=pca",)),
    "tokens": Pretraining(MAE, ("model.target=tokens",), predicts_words=True),
    "no-augmentation": Pretraining(MAE, ("data.augmentation=none",)),
    "fixed-crop": Pretraining(MAE, ("data.augmentation=fixed_crop",)),
    "flip": Pretraining(MAE, ("data.flip=0.5",)),
    "colour-jitter": Pretraining(MAE, ("data.augmentation=random_resized_crop_color_jitter",)),
    "block-50": Pretraining(MAE, ("model.masking=block", "model.mask_ratio=0.5")),
    "block-75": Pretraining(MAE, ("model.masking=block",)),
    "grid-75": Pretraining(MAE, ("model.masking=grid",)),
    **{f"schedule-{share}": Pretraining(MAE, share=share) for share in (0.25, 0.5, 2)},
    "small": Pretraining(MAE, SMALL, transfer=SMALL),
    "large": Pretraining(MAE, LARGE, transfer=LARGE),
    "moco": Pretraining(MOCO, transfer=CLS),
    "moco-schedule-0.5": Pretraining(MOCO, share=0.5, transfer=CLS),
    "beit": Pretraining(BEIT, predicts_words=True, transfer=BEIT_ENCODER),
    "beit-pixels": Pretraining(BEIT, ("model.target=normalised_pixels",), transfer=BEIT_ENCODER),
}
TRANSFERS: dict[str, Transfer] = {
    FINETUNE: Transfer("paper/finetune"),
    PROBE: Transfer("paper/probe"),
    **{name: Transfer("paper/partial", (f"classifier.trained_blocks={name[8:]}",)) for name in PARTIAL},
    MORE: Transfer("paper/finetune", labels=4),
    MANY: Transfer("paper/finetune", labels=16),
}


def _more(measure: str, better: str, worse: str) -> Callable[[Values], float]:
    """Return the difference of a measure between two pre-trainings."""
    return lambda value: value(better, measure) - value(worse, measure)


def _within(measure: str, name: str, other: str) -> Callable[[Values], float]:
    """Return how much less than a point another pre-training is better than this one."""
    return lambda value: 1 - (value(other, measure) - value(name, measure))


def _faster(better: str, worse: str) -> Callable[[Values], float]:
    """Return by how many per cent the rate of a pre-training exceeds another's."""
    return lambda value: 100 * (value(better, SPEED) / value(worse, SPEED) - 1)


def _range(value: Values, measure: str, pretrainings: tuple[str, ...]) -> float:
    found = [value(name, measure) for name in pretrainings]
    return max(found) - min(found)


_RATIOS = ("mask-ratio-0.25", "mask-ratio-0.5", "mae", "mask-ratio-0.9")
_DEPTHS = ("decoder-depth-1", "mae", "decoder-depth-4")

FINDINGS: tuple[Finding, ...] = (
    Finding(
        "Mask ratio",
        (FINETUNE, PROBE),
        (
            Arm("25 %", _RATIOS[0]),
            Arm("50 %", _RATIOS[1], {FINETUNE: 84.9, PROBE: 69.9}),
            Arm("75 %", _RATIOS[2], {FINETUNE: 84.9, PROBE: 73.5}),
            Arm("90 %", _RATIOS[3], {FINETUNE: 83.0, PROBE: 66.1}),
        ),
        (
            Claim(
                "probing is better at 75 % than at 25 %",
                "rises steadily, by up to 20 points, until 75 %",
                _more(PROBE, "mae", "mask-ratio-0.25"),
            ),
            Claim("probing is better at 75 % than at 90 %", "73.5 to 66.1", _more(PROBE, "mae", "mask-ratio-0.9")),
            Claim(
                "fine-tuning depends less on the ratio than probing",
                "40 to 80 % work well for fine-tuning",
                lambda value: _range(value, PROBE, _RATIOS) - _range(value, FINETUNE, _RATIOS),
            ),
        ),
    ),
    Finding(
        "Mask tokens in the encoder",
        (FINETUNE, PROBE, SPEED),
        (
            Arm("in it", "encoder-mask-tokens", {FINETUNE: 84.2, PROBE: 59.6}),
            Arm("not in it", "mae", {FINETUNE: 84.9, PROBE: 73.5}),
        ),
        (
            Claim("probing is better without them", "73.5 to 59.6", _more(PROBE, "mae", "encoder-mask-tokens")),
            Claim("fine-tuning is better without them", "84.9 to 84.2", _more(FINETUNE, "mae", "encoder-mask-tokens")),
            Claim("training is faster without them", "2.8 times (ViT-L)", _faster("mae", "encoder-mask-tokens"), "%"),
        ),
    ),
    Finding(
        "Decoder depth",
        (FINETUNE, PROBE),
        (
            Arm("1 block (paper: 1)", _DEPTHS[0], {FINETUNE: 84.8, PROBE: 65.5}),
            Arm("2 blocks (paper: 8)", _DEPTHS[1], {FINETUNE: 84.9, PROBE: 73.5}),
            Arm("4 blocks (paper: 12)", _DEPTHS[2], {FINETUNE: 84.4, PROBE: 73.3}),
        ),
        (
            Claim("a deeper decoder probes better", "73.5 to 65.5", _more(PROBE, "mae", "decoder-depth-1")),
            Claim(
                "fine-tuning depends less on the depth than probing",
                "84.4 to 84.9; 65.5 to 73.5",
                lambda value: _range(value, PROBE, _DEPTHS) - _range(value, FINETUNE, _DEPTHS),
            ),
        ),
    ),
    Finding(
        "Decoder width",
        (FINETUNE, PROBE),
        (
            Arm("16 (paper: 128)", "decoder-width-16", {FINETUNE: 84.9, PROBE: 69.1}),
            Arm("48 (paper: 512)", "mae", {FINETUNE: 84.9, PROBE: 73.5}),
            Arm("96 (paper: 1024)", "decoder-width-96", {FINETUNE: 84.3, PROBE: 73.1}),
        ),
        (
            Claim("a narrow decoder probes worse", "73.5 to 69.1", _more(PROBE, "mae", "decoder-width-16")),
            Claim(
                "a wide decoder fine-tunes at most a point better",
                "84.3 to 84.9",
                _within(FINETUNE, "mae", "decoder-width-96"),
            ),
        ),
    ),
    Finding(
        "Target",
        (FINETUNE, PROBE),
        (
            Arm("pixels", "pixels", {FINETUNE: 84.9, PROBE: 73.5}),
            Arm("normalised pixels", "mae", {FINETUNE: 85.4, PROBE: 73.9}),
            Arm("PCA", "pca", {FINETUNE: 84.6, PROBE: 72.3}),
            Arm("words of a tokeniser", "tokens", {FINETUNE: 85.3, PROBE: 71.6}),
        ),
        (
            Claim("normalised pixels fine-tune better than pixels", "85.4 to 84.9", _more(FINETUNE, "mae", "pixels")),
            Claim("pixels fine-tune better than PCA", "84.9 to 84.6", _more(FINETUNE, "pixels", "pca")),
            Claim(
                "words fine-tune at most a point better than normalised pixels",
                "85.3 to 85.4",
                _within(FINETUNE, "mae", "tokens"),
            ),
            Claim("normalised pixels probe better than words", "73.9 to 71.6", _more(PROBE, "mae", "tokens")),
        ),
    ),
    Finding(
        "Augmentation",
        (FINETUNE, PROBE),
        (
            Arm("none", "no-augmentation", {FINETUNE: 84.0, PROBE: 65.7}),
            Arm("crop of one size", "fixed-crop", {FINETUNE: 84.7, PROBE: 73.1}),
            Arm("crop of random size", "mae", {FINETUNE: 84.9, PROBE: 73.5}),
            Arm("crop of random size, flip", "flip"),
            Arm("crop of random size, colour jitter", "colour-jitter", {FINETUNE: 84.3, PROBE: 71.9}),
        ),
        (
            Claim(
                "a crop of random size probes better than none", "73.5 to 65.7", _more(PROBE, "mae", "no-augmentation")
            ),
            Claim("colour jitter makes probing worse", "71.9 to 73.5", _more(PROBE, "mae", "colour-jitter")),
            Claim(
                "fine-tuning loses at most a point without any",
                "84.0 to 84.9",
                _within(FINETUNE, "no-augmentation", "mae"),
            ),
        ),
    ),
    Finding(
        "Mask sampling",
        (FINETUNE, PROBE),
        (
            Arm("random, 75 %", "mae", {FINETUNE: 84.9, PROBE: 73.5}),
            Arm("block, 50 %", "block-50", {FINETUNE: 83.9, PROBE: 72.3}),
            Arm("block, 75 %", "block-75", {FINETUNE: 82.8, PROBE: 63.9}),
            Arm("grid, 75 %", "grid-75", {FINETUNE: 84.0, PROBE: 66.0}),
        ),
        (
            Claim("random probes better than block at 75 %", "73.5 to 63.9", _more(PROBE, "mae", "block-75")),
            Claim("random probes better than grid", "73.5 to 66.0", _more(PROBE, "mae", "grid-75")),
            Claim("random fine-tunes better than block at 75 %", "84.9 to 82.8", _more(FINETUNE, "mae", "block-75")),
        ),
    ),
    Finding(
        "Length of the schedule",
        (FINETUNE, PROBE),
        (
            Arm("MAE, a quarter (paper: 200 epochs)", "schedule-0.25", {FINETUNE: 83.3, PROBE: 64.4}),
            Arm("MAE, half (400)", "schedule-0.5", {FINETUNE: 84.3, PROBE: 69.7}),
            Arm("MAE, whole (800)", "mae", {FINETUNE: 84.9, PROBE: 73.5}),
            Arm("MAE, double (1600)", "schedule-2", {FINETUNE: 85.1, PROBE: 75.1}),
            Arm("MoCo v3, half", "moco-schedule-0.5"),
            Arm("MoCo v3, whole (300)", "moco", {FINETUNE: 84.1, PROBE: 77.6}),
        ),
        (
            Claim("MAE probes better after a double schedule", "75.1 to 73.5", _more(PROBE, "schedule-2", "mae")),
            Claim("MAE fine-tunes better after a double one", "85.1 to 84.9", _more(FINETUNE, "schedule-2", "mae")),
            Claim(
                "doubling it helps MAE's probing more than MoCo v3's",
                "no saturation at 1600 epochs; MoCo v3 saturates at 300",
                lambda value: (
                    (value("schedule-2", PROBE) - value("mae", PROBE))
                    - (value("moco", PROBE) - value("moco-schedule-0.5", PROBE))
                ),
            ),
        ),
    ),
    Finding(
        "Size of the model",
        (FINETUNE, PROBE),
        (
            Arm("width 48, 4 blocks (paper: ViT-B, 1600 epochs)", "small", {FINETUNE: 83.6, PROBE: 68.0}),
            Arm("width 96, 4 blocks (ViT-L, 1600 epochs)", "mae", {FINETUNE: 85.9, PROBE: 75.8}),
            Arm("width 144, 6 blocks (ViT-H, 1600 epochs)", "large", {FINETUNE: 86.9, PROBE: 76.6}),
        ),
        (
            Claim("the middle one fine-tunes better than the small", "85.9 to 83.6", _more(FINETUNE, "mae", "small")),
            Claim("the large one fine-tunes better than the middle", "86.9 to 85.9", _more(FINETUNE, "large", "mae")),
        ),
    ),
    Finding(
        "Partial fine-tuning",
        (PROBE, *PARTIAL, FINETUNE),
        (
            Arm("MAE", "mae", {PROBE: 73.5, "partial-0.5": 79.1, "partial-1": 81.0, "partial-2": 83.1, FINETUNE: 84.9}),
            Arm("MoCo v3", "moco", {PROBE: 77.6, "partial-1": 79.9, "partial-2": 80.8, FINETUNE: 84.1}),
        ),
        (
            Claim("MoCo v3 probes better", "77.6 to 73.5", _more(PROBE, "moco", "mae")),
            Claim("MAE is better when a block is trained", "81.0 to 79.9", _more("partial-1", "mae", "moco")),
            Claim(
                "one block gives MAE over half of what all blocks give",
                "81.0 of 84.9, from 73.5",
                lambda value: (
                    (value("mae", "partial-1") - value("mae", PROBE))
                    - 0.5 * (value("mae", FINETUNE) - value("mae", PROBE))
                ),
            ),
        ),
    ),
    Finding(
        "Labels",
        (FEW, MORE, MANY),
        (Arm("from scratch (paper: all labels)", SCRATCH, {MANY: 82.5}), Arm("MAE (all labels)", "mae", {MANY: 84.9})),
        (
            Claim("pre-training helps with many labels", "84.9 to 82.5", _more(MANY, "mae", SCRATCH)),
            Claim("pre-training helps with few labels", "not in the paper", _more(FEW, "mae", SCRATCH)),
            Claim(
                "it helps more the fewer labels there are",
                "not in the paper",
                lambda value: (value("mae", FEW) - value(SCRATCH, FEW)) - (value("mae", MANY) - value(SCRATCH, MANY)),
            ),
        ),
    ),
    Finding(
        "Methods",
        (FINETUNE, PROBE, SPEED),
        (
            Arm("MAE (paper: ViT-B, 1600 epochs)", "mae", {FINETUNE: 83.6, PROBE: 68.0}),
            Arm("BEiT (800 epochs)", "beit", {FINETUNE: 83.2}),
            Arm("BEiT, normalised pixels", "beit-pixels"),
            Arm("MoCo v3 (300 epochs)", "moco", {FINETUNE: 83.2, PROBE: 76.7}),
        ),
        (
            Claim("MAE fine-tunes better than BEiT", "83.6 to 83.2", _more(FINETUNE, "mae", "beit")),
            Claim("MAE fine-tunes better than MoCo v3", "83.6 to 83.2", _more(FINETUNE, "mae", "moco")),
            Claim(
                "BEiT fine-tunes worse with pixels than with words",
                "82.9 to 81.0, after 300 epochs (BEiT, table 4)",
                _more(FINETUNE, "beit", "beit-pixels"),
            ),
            Claim("MAE trains faster than BEiT", "3.5 times per epoch", _faster("mae", "beit"), "%"),
            Claim(
                "MAE trains faster than MoCo v3",
                "1600 epochs in 31 h, 300 in 36 h",
                _faster("mae", "moco"),
                "%",
            ),
        ),
    ),
)


def findings_named(names: Sequence[str]) -> tuple[Finding, ...]:
    """Return the findings of these names, all without any. Raises UsageError for a name that none has."""
    known = [one.name for one in FINDINGS]
    for name in names:
        if name not in known:
            raise UsageError(f"--finding {name} is not known; expected one of {', '.join(known)}")
    return tuple(one for one in FINDINGS if one.name in names or not names)
