"""`Segmenter`: any size in, the same size out; padding is neither seen by the loss nor left in the output."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from protoseg.config import Head, Model, Optim
from protoseg.engine.optim import parameter_groups
from protoseg.method.inference import freeze
from protoseg.method.losses import segmentation_cross_entropy
from protoseg.models import HEADS, Segmenter, assemble, networks
from protoseg.models.segmenter import count_parameters


class Downsample(nn.Module):
    """A backbone whose two maps are average pooled pixels: what goes in can be read off what comes out."""

    channels, strides, multiple = [3, 3], [4, 8], 8

    def forward(self, x):
        return [nn.functional.avg_pool2d(x, 4), nn.functional.avg_pool2d(x, 8)]


class First(nn.Module):
    out_channels = 3

    def forward(self, maps):
        return maps[0]


class Plain(nn.Module):
    """A head that scores with the features themselves."""

    num_classes, in_channels, ignore_index, align_corners, class_weights = 3, 3, 255, False, None

    def forward(self, features):
        return features


def transparent():
    return Segmenter(Downsample(), First(), Plain(), (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


def small(kind="prototype", auxiliary=0.0, **settings):
    torch.manual_seed(0)
    model = Model(network="tiny", auxiliary_weight=auxiliary, **settings)
    parts = networks.tiny(model, width=8, widths=(16, 16, 16, 16), depths=(1, 1, 1, 1))
    return assemble(*parts, model, Head(kind=kind, num_prototypes=2, embed_dim=8), 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (31, 33), (32, 64), (97, 5)])
@pytest.mark.parametrize("kind", HEADS)
def test_output_size_is_input_size(size, kind):
    with torch.no_grad():
        assert small(kind).eval()(torch.rand(2, 3, *size)).shape == (2, 3, *size)


def test_pixels_are_normalised_by_mean_and_std():
    image = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1).expand(1, 3, 9, 11)
    assert_close(transparent()(image), torch.zeros(1, 3, 9, 11))
    assert_close(transparent()(image + 0.1)[0, :, 0, 0], 0.1 / torch.tensor([0.2, 0.25, 0.5]))


def test_uint8_and_float_are_the_same_image():
    image = torch.randint(0, 256, (1, 3, 13, 7), dtype=torch.uint8)
    assert_close(transparent()(image), transparent()(image / 255))


def test_output_is_aligned_with_the_input():
    image = torch.full((1, 3, 24, 40), 0.5)
    image[:, :, :, 16:] = 0.9
    score = transparent()(image)[0, 0, 12]
    assert bool((score[:12] < 0.1).all())
    assert bool((score[20:] > 1.9).all())


def test_padding_is_the_mean_colour_and_does_not_depend_on_what_it_pads():
    features = transparent().features(torch.ones(1, 3, 5, 8))
    assert features.shape == (1, 3, 2, 2)
    assert_close(features[0, 0, 1], features[0, 0, 0] / 4)  # one row of pixels, three of zeros


def test_padding_has_no_label():
    """A label map cropped to the image gives the losses of one that is void where the image was padded."""
    segmenter = small().eval()
    images, labels = torch.rand(2, 3, 32, 64), torch.randint(0, 3, (2, 32, 64))
    mean = segmenter.mean.expand(2, 3, 32, 64)
    cut, void = images.clone(), labels.clone()
    cut[:, :, 21:], cut[..., 50:] = mean[:, :, 21:], mean[..., 50:]
    void[:, 21:], void[..., 50:] = 255, 255
    a = segmenter.losses(images[:, :, :21, :50], labels[:, :21, :50])
    b = segmenter.losses(cut, void)
    for key in a.parts:
        assert_close(a.parts[key], b.parts[key])


@pytest.mark.parametrize("kind", HEADS)
def test_the_auxiliary_loss_is_part_of_the_total(kind):
    segmenter = small(kind, auxiliary=0.4).eval()
    images, labels = torch.rand(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    losses = segmenter.losses(images, labels)
    alone = segmenter.head.losses(segmenter.features(images), labels)
    maps = segmenter.backbone(segmenter._prepare(images))
    aux = segmentation_cross_entropy(segmenter.auxiliary(maps[-2]), labels)
    assert_close(losses.parts["aux"], aux.detach())
    assert_close(losses.total, alone.total + 0.4 * aux)
    assert_close(losses.parts["loss"], losses.total.detach())
    segmenter.update(losses)


def test_without_auxiliary_weight_there_is_no_auxiliary_head():
    assert small().auxiliary is None
    assert "aux" not in small().losses(torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.int64)).parts


def test_a_frozen_backbone_keeps_its_weights_and_statistics_and_the_rest_learns():
    segmenter = small(auxiliary=0.4, freeze_backbone=True)
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    groups = parameter_groups(segmenter, Optim())
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for mode in (True, False, True):
        segmenter.train(mode)
        assert not any(module.training for module in segmenter.backbone.modules())
        assert segmenter.decoder.training == mode
    losses = segmenter.losses(torch.rand(2, 3, 96, 96), torch.randint(0, 3, (2, 96, 96)))
    losses.total.backward()
    optimizer.step()
    segmenter.update(losses)
    assert {group["name"].removesuffix("_no_decay") for group in groups} == {"head"}
    after = segmenter.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("backbone.")} <= same
    kernels = {name for name, p in segmenter.named_parameters() if p.ndim > 1}  # the next norm can undo a bias
    assert {name for name in kernels if not name.startswith("backbone.")} & same == set()
    assert count_parameters(segmenter)["frozen"] == sum(p.numel() for p in segmenter.backbone.parameters())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 4, 8, 8), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "uint8, or float"),
    ],
)
def test_what_is_no_image_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        transparent()(images)


def test_labels_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(8, 9\) but images \(8, 8\)"):
        small().losses(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 9, dtype=torch.int64))


@pytest.mark.parametrize("kind", HEADS)
def test_autocast_and_channels_last(kind):
    segmenter = small(kind, auxiliary=0.4).eval()
    images, labels = torch.rand(2, 3, 40, 40), torch.randint(0, 3, (2, 40, 40))
    with torch.no_grad():
        plain = segmenter(images)
        segmenter.to(memory_format=torch.channels_last)
        assert_close(segmenter(images.contiguous(memory_format=torch.channels_last)), plain, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = segmenter(images)
        losses = segmenter.train().losses(images, labels)
    losses.total.backward()
    segmenter.update(losses)
    assert losses.total.dtype == torch.float32
    assert scores.isfinite().all()


class Training(nn.Module):
    def __init__(self, segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images, labels):
        self.losses = self.segmenter.losses(images, labels)
        return self.losses.total


@pytest.mark.parametrize("kind", HEADS)
def test_data_parallel_needs_no_search_for_unused_parameters(kind, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        training = nn.parallel.DistributedDataParallel(Training(small(kind, auxiliary=0.4)))
        images, labels = torch.rand(2, 3, 40, 40), torch.randint(0, 3, (2, 40, 40))
        for step in range(3):
            labels = torch.full_like(labels, 255) if step == 1 else labels  # also on a step without a label
            training(images, labels).backward()
            training.module.segmenter.update(training.module.losses)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 96)])
@pytest.mark.parametrize("kind", HEADS)
def test_labels_are_the_arg_max_of_the_scores(kind, size):
    model, images = small(kind).eval(), torch.rand(2, 3, *size)
    with torch.no_grad():
        top = model(images).topk(2, dim=1)
    clear = top.values[:, 0] - top.values[:, 1] > 1e-4
    heads = [model.head, freeze(model.head)] if kind == "prototype" else [model.head]
    for head in heads:
        model.head = head
        labels = model.labels(images, dtype=torch.uint8)
        assert labels.shape == (2, *size)
        assert torch.equal(labels[clear].long(), top.indices[:, 0][clear])


@pytest.mark.parametrize("kind", HEADS)
def test_the_form_for_inference_answers_alike_and_leaves_the_network_alone(kind):
    model, images = small(kind).eval(), torch.rand(1, 3, 33, 47)
    keys, head = list(model.state_dict()), model.head
    fast = model.for_inference()
    with torch.no_grad():
        assert_close(fast(images), model(images), rtol=0, atol=1e-5)
    assert model.head is head
    assert list(model.state_dict()) == keys
    assert fast.backbone is model.backbone
    assert (fast.head is head) == (kind != "prototype")
