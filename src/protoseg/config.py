"""Every setting of protoseg, typed, in one place. Only data: no torch, no import paths, no behaviour.

Names are `Literal`s that equal the keys of the tables they choose from (`tests/test_config.py`). Sizes are always
(height, width). A field that is `None` means "what the preset, the data set or the weights say".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

DatasetName = Literal[
    "folder", "camvid", "ade20k", "cityscapes", "coco_stuff_10k", "coco_stuff_164k", "voc", "synthetic"
]
NetworkName = Literal[
    "fcn_resnet101",
    "hrnetv2_w48",
    "upernet_swin_base",
    "segformer_mit_b4",
    "mobilenetv2_light",
    "tiny",
    "timm",  # any timm backbone with any decoder: see Model.backbone and Model.decoder
]
DecoderName = Literal[
    "light",
    "fcn",
    "concat",
    "stack",
    "segformer",
    "dpt",
    "fpn",
    "upernet",
    "unet",
    "unetplusplus",
    "manet",
    "linknet",
    "deeplabv3",
    "deeplabv3plus",
    "pan",
    "pspnet",
]
HeadName = Literal["prototype", "softmax", "softmax_projected", "cosine", "cosine_subcentres"]
PresetName = Literal["default", "paper", "reference", "reference_fixed"]
MetricName = Literal["miou", "pixel_accuracy", "mean_accuracy", "boundary_miou", "calibration_error"]


@dataclass(frozen=True)
class Data:
    """Which pictures, and how a training sample is cut from them.

    Args:
        name: the layout on disk; `folder` is your own data, `synthetic` is generated and needs no files.
        root: the data set's folder. Empty: the environment variable `PROTOSEG_<NAME>`, e.g. `PROTOSEG_CAMVID`.
        file: the small YAML that describes a `folder` set (default: `<root>/dataset.yaml`).
        train_split, val_split, test_split: names of the splits as the data set calls them.
        predicted: folder of predicted masks to train on beside the labelled ones (self-training), as `protoseg predict
            --keep_surest` writes them; empty: none.
        predicted_split: the split whose images they belong to.
        labelled_repeats: how often in an epoch an image with a mask of its own comes for each time one with a
            predicted mask does, so that few true masks do not drown in many guessed ones.
        base_size: short side in pixels every image is resized to before augmentation and before evaluation
            (aspect kept); `None` keeps the original size. Metrics are always at the original label size.
        max_long_side: upper bound of the long side after `base_size`.
        crop_size: (height, width) of a training crop.
        scale_range: random resize factor of a training image, uniform over this range.
        cat_max_ratio: a crop is drawn again (10 times at most) while one class covers more than this share.
        hflip: probability of a horizontal flip.
        photometric: random brightness, contrast, saturation and hue.
        workers: loader processes per rank.
        exif: apply the EXIF orientation to image and mask alike.
        limit: use only the first so many pairs of each split (smoke runs).
        cache: keep decoded pairs in memory, once per loader process (4 bytes a pixel).
        resident: decode the training split once, keep it where the network runs and cut the samples there; they are
            the same samples. `workers` are then threads on a CPU, and for a GPU processes that draw what is random.
        max_pixels: refuse to decode larger pictures (decompression bombs).
        length: `synthetic` only, the number of generated training scenes.
    """

    name: DatasetName = "synthetic"
    root: str = ""
    file: str = ""
    train_split: str = "train"
    val_split: str = "val"
    test_split: str = "test"
    predicted: str = ""
    predicted_split: str = "rest"
    labelled_repeats: int = 1
    base_size: int | None = None
    max_long_side: int | None = None
    crop_size: tuple[int, int] = (512, 512)
    scale_range: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    hflip: float = 0.5
    photometric: bool = True
    workers: int = 2
    exif: bool = False
    limit: int | None = None
    cache: bool = False
    resident: bool = False
    max_pixels: int = 89_478_485
    length: int = 256


@dataclass(frozen=True)
class Model:
    """The network below the head.

    Args:
        network: one of the named networks, or `timm` for any `backbone` with any `decoder`.
        backbone: timm model name, used by `network: timm`.
        decoder: decoder name, used by `network: timm`.
        decoder_channels: output width of the decoder where it can be chosen; `None`: the network's own.
        pretrained: load ImageNet weights of the backbone from the hub.
        weights: a local safetensors file for the backbone; wins over `pretrained`.
        drop_path: stochastic depth rate of transformer backbones; `None`: the network's own.
        auxiliary_weight: weight of an auxiliary FCN loss on the stride-16 map; 0 switches it off.
        freeze_backbone: learn decoder and head only; the backbone keeps its weights and batch statistics.
    """

    network: NetworkName = "mobilenetv2_light"
    backbone: str = ""
    decoder: DecoderName = "light"
    decoder_channels: int | None = None
    pretrained: bool = False
    weights: str = ""
    drop_path: float | None = None
    auxiliary_weight: float = 0.0
    freeze_backbone: bool = False


@dataclass(frozen=True)
class Head:
    """The classifier: prototypes, or one of the parametric baselines. `None`: what the preset says.

    The fields below `preset` are arguments of `protoseg.PrototypeHead`.

    Args:
        kind: `prototype`; or a parametric baseline: `softmax` (a plain 1x1), `softmax_projected` (behind the same
            projection), `cosine` (one learned unit vector a class behind the same projection), `cosine_subcentres`
            (`num_prototypes` of them a class).
        preset: `default`; `paper` moves prototypes by means and slowly, as the paper does; `reference` is the 2022 code
            step for step, `reference_fixed` its constants without its mistakes. The settings below override it.
        num_prototypes: K, per class.
        embed_dim: D, channels the prototypes live in; default 256, of `reference` as many as the decoder gives.
        projection: layers between decoder and prototypes.
        class_weights: one weight per class of the cross-entropy; protoseg data stats prints some.
        distance: how near a pixel is to a prototype.
        start: where prototypes begin; `data`: at the first pixels of their class.
        momentum: mu of the moving average of Eq. (8).
        momentum_rule: how mu follows the number of steps and pixels.
        assignment: how a pixel gets its prototype from the clustering.
        update_from: move prototypes by all labelled pixels, by those classified correctly, or by what is still wrong.
        kappa: entropy weight of the clustering, Eq. (4).
        sinkhorn_iterations: of the clustering.
        score_scale: what a cosine is multiplied by to be a logit.
        learn_scale: whether that number is learned.
        contrast_temperature: tau of the contrast loss (ppc), Eq. (5).
        contrast_weight: lambda1, weight of ppc in the loss, Eq. (7).
        distance_weight: lambda2, weight of the distance loss (ppd), Eq. (7).
        contrast_siblings: whether prototypes of the same class are pushed away too.
        contrast_negatives: how many prototypes are drawn at each step for the contrast loss; default all. Changes the
            loss; for thousands of classes.
        reseed_after: steps a prototype may go unused before it is placed anew.
    """

    kind: HeadName = "prototype"
    preset: PresetName = "default"
    num_prototypes: int = 10
    embed_dim: int | None = None
    projection: Literal["mlp", "linear", "none"] = "mlp"
    class_weights: tuple[float, ...] | None = None
    distance: Literal["cosine", "euclidean", "huber"] | None = None
    start: Literal["nested", "random", "data", "truncated_normal"] | None = None
    momentum: float | None = None
    momentum_rule: Literal["constant", "bias_corrected", "count_aware"] | None = None
    assignment: Literal["argmax", "nearest", "kmeans", "gumbel"] | None = None
    update_from: Literal["all", "correct", "errors"] | None = None
    kappa: float | None = None
    sinkhorn_iterations: int | None = None
    score_scale: float | None = None
    learn_scale: bool | None = None
    contrast_temperature: float | None = None
    contrast_weight: float | None = None
    distance_weight: float | None = None
    contrast_siblings: bool | None = None
    contrast_negatives: int | None = None
    reseed_after: int | None = None


@dataclass(frozen=True)
class Optim:
    """Optimiser and schedule, counted in optimiser steps.

    Args:
        name: `adamw` or `sgd`.
        lr: peak learning rate.
        head_lr: what multiplies it for decoder and head.
        weight_decay: AdamW's is decoupled from the gradient, SGD's is not.
        decay_norm: whether weight decay also acts on norms, biases and position embeddings.
        momentum: of `sgd`.
        betas: of `adamw`.
        schedule: `poly` falls as (1 - t/T)^power from `lr` to `min_lr`; `cosine` as half a cosine.
        power, min_lr: of the schedule.
        warmup_steps, warmup_ratio: linear ramp from `lr * warmup_ratio`.
        clip: largest gradient norm; 0 switches clipping off.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    head_lr: float = 1.0
    weight_decay: float = 0.01
    decay_norm: bool = False
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    power: float = 0.9
    min_lr: float = 0.0
    warmup_steps: int = 0
    warmup_ratio: float = 1e-6
    clip: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """How a whole image is segmented; the same for validation, test and prediction.

    Args:
        mode: `whole` image in one pass, or `slide`: overlapping windows, probabilities averaged.
        window, stride: (height, width) of `slide`.
        scales: image scales whose probabilities are averaged.
        flip: also average the horizontally flipped image.
        boundary: also compute boundary IoU (slower).
    """

    mode: Literal["whole", "slide"] = "whole"
    window: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (341, 341)
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    boundary: bool = True


@dataclass(frozen=True)
class Recipe:
    """One training run, whole.

    Args:
        steps: optimiser steps.
        batch_size: GLOBAL batch: images per optimiser step over all devices and accumulated micro-batches.
        micro_batch: images per device and forward pass; `None`: batch_size / devices. Fewer devices accumulate.
        seed: everything random is a function of it.
        out: the run folder. An existing run there is refused unless `resume` says otherwise.
        resume: `auto` continues `out` if it holds a checkpoint, else starts; a path names the checkpoint.
        ema: decay of an exponential moving average of the weights; 0 switches it off.
        val_every: optimiser steps between validations; 0: only at the end.
        checkpoint_every: optimiser steps between writes of `last.ckpt`; 0: only before validations and at the end.
        checkpoint_minutes: also write it when so many minutes have passed since the last time; 0: never for that.
        log_every: optimiser steps between reports.
        accelerator: `auto` takes a GPU where there is one. Batch norm sees all devices on GPUs, each its own on CPUs.
        devices: processes per machine; 0: all at hand.
        nodes: machines; under torchrun both come from torchrun.
        precision: `16-mixed` needs a GPU.
        deterministic: torch's deterministic algorithms; somewhat slower on a GPU.
        compile: let torch.compile fuse backbone and decoder for the training steps: minutes at the start, for a GPU
            that waits for its next kernel; no gain was measured on a CPU. Files saved are of the same form.
    """

    data: Data = Data()
    model: Model = Model()
    head: Head = Head()
    optim: Optim = Optim()
    evaluation: Evaluation = Evaluation()
    steps: int = 80_000
    batch_size: int = 16
    micro_batch: int | None = None
    seed: int = 0
    out: str = "runs/train"
    resume: str = ""
    ema: float = 0.0
    val_every: int = 1000
    checkpoint_every: int = 500
    checkpoint_minutes: float = 0.0
    log_every: int = 50
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    nodes: int = 1
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    deterministic: bool = True
    compile: bool = False


@dataclass(frozen=True)
class Study:
    """Variants of one recipe, each trained with the same seeds and compared seed by seed.

    Args:
        recipe: the YAML of the recipe that is varied; looked for beside the study's own file first.
        overrides: settings of all runs by dotted name, such as `{data.limit: 100}`.
        variants: name -> its settings by dotted name; `{}` is the recipe itself.
        grid: dotted setting -> its values; every combination is one more variant.
        baselines: variants that all others are compared with.
        seeds: one run each of every variant.
        evaluate: column -> split of the data set, or `test/NAME*` for the images of it whose names begin so.
        metrics: what the report shows, the first one in its plot; results.json holds all of them.
    """

    recipe: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    baselines: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluate: dict[str, str] = field(default_factory=lambda: {"test": "test"})
    metrics: tuple[MetricName, ...] = (
        "miou",
        "pixel_accuracy",
        "mean_accuracy",
        "boundary_miou",
        "calibration_error",
    )


class UserError(ValueError):
    """Something the user gave is wrong. The message names it (file, value, count) and the next step."""


class DataError(UserError):
    """A data set, image or mask that cannot be used as it is."""
