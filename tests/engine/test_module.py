"""The training step: when prototypes move, what a step without finite numbers does, what validation measures."""

import math
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.testing import assert_close

from protoseg.config import Evaluation, Head, Model, Optim, UserError
from protoseg.engine.averaging import WeightAverage
from protoseg.engine.metrics import overlap
from protoseg.engine.module import PATIENCE, SegmentationModule, step_seed, zero_unless_
from protoseg.engine.windows import segment
from protoseg.models import build


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches(count, size=2, seed=0):
    """Tiny pictures whose class is their colour."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        label = torch.randint(0, 3, (size, 32, 32), generator=draw)
        image = (label[:, None] * 80 + torch.randint(0, 40, (size, 3, 32, 32), generator=draw)).to(torch.uint8)
        found.append({"image": image, "label": label, "name": [str(i) for i in range(size)]})
    return found


def segmenter(**head):
    torch.manual_seed(0)
    return build(Model(network="tiny"), Head(num_prototypes=2, embed_dim=8, **head), 3)


def fit(module, data, *, steps, accumulate=1, resume=None, **options):
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec).*")
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=resume)
    return trainer


def test_training_moves_prototypes_once_per_step_by_the_heads_own_rule():
    """The same as the loop a user of the head alone would write."""
    data = batches(6)
    module = SegmentationModule(segmenter(), Optim(lr=1e-3, clip=0.5), steps=3, seed=5)
    fit(module, data, steps=3, accumulate=2, gradient_clip_val=0.5)

    model = segmenter()
    model.train()
    other = SegmentationModule(model, Optim(lr=1e-3), steps=3)
    setup = other.configure_optimizers()
    optimizer, schedule = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    for step in range(3):
        kept = []
        optimizer.zero_grad()
        for micro in range(2):
            torch.manual_seed(step_seed(5, step, micro, 0))
            batch = data[2 * step + micro]
            losses = model.losses(batch["image"], batch["label"])
            (losses.total / 2).backward()
            kept.append(losses)
        model.update(kept)
        # in the optimiser's order: another order of the sum rounds otherwise
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
        optimizer.step()
        schedule.step()
    for (name, ours), theirs in zip(module.model.state_dict().items(), model.state_dict().values()):
        assert torch.equal(ours, theirs), name


def test_prototypes_move_after_the_backward_and_before_the_optimiser(monkeypatch):
    events = []
    module = SegmentationModule(segmenter(), Optim(), steps=1)
    update = module.model.update

    def noted(losses):
        events.append(("update", len(losses), next(module.model.parameters()).grad is not None))
        update(losses)

    monkeypatch.setattr(module.model, "update", noted)
    monkeypatch.setattr(SegmentationModule, "on_after_backward", lambda _: events.append("backward"))
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, closure=None: (closure(), events.append("optimiser"))[0]
    )
    fit(module, batches(3), steps=1, accumulate=3)
    assert events == ["backward", "backward", "backward", ("update", 3, True), "optimiser"]


def test_parts_of_a_step_are_the_mean_of_its_micro_batches():
    module = SegmentationModule(segmenter(), Optim(lr=0.0), steps=1)
    data = batches(2)
    fit(module, data, steps=1, accumulate=2)
    model = segmenter().train()
    expected = 0.0
    for micro, batch in enumerate(data):
        torch.manual_seed(step_seed(0, 0, micro, 0))
        expected += model.losses(batch["image"], batch["label"]).ce.item() / 2
    assert module.parts["ce"].item() == pytest.approx(expected, rel=1e-5)
    assert set(module.parts) == {"loss", "ce", "ppc", "ppd", "grad_norm"}


@pytest.mark.parametrize("kind", ["softmax", "softmax_projected", "cosine"])
def test_parametric_heads_take_the_same_road(kind):
    module = SegmentationModule(segmenter(kind=kind), Optim(lr=1e-3), steps=2)
    fit(module, batches(2), steps=2)
    assert module.parts["loss"].isfinite()


@dataclass
class Poison:
    """Makes the losses of some calls infinite, or only their gradient."""

    model: nn.Module
    calls: set[int]
    gradient_only: bool = False
    seen: int = field(default=0)

    def __call__(self, images, labels):
        losses = type(self.model).losses(self.model, images, labels)
        self.seen += 1
        if self.seen in self.calls:
            if self.gradient_only:
                weight = next(self.model.parameters()).sum()
                losses.total = losses.total + torch.sqrt(weight - weight.detach())  # value 0, gradient infinite
            else:
                losses.total = losses.total * math.inf
        return losses


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_step_that_is_not_finite_moves_nothing(gradient_only):
    model = segmenter()
    model.losses = Poison(model, {1}, gradient_only)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = SegmentationModule(model, Optim(lr=1e-2, weight_decay=0.0), steps=5)
    fit(module, batches(1), steps=1)
    assert_close(model.head.prototypes, before["head.prototypes"], rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert int(module.failures) == 1


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_keep_their_bits_or_become_zero(kind):
    broken = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-40, 3.0]).to(kind)
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).to(kind)
    gradients = [broken.clone(), last.clone()]
    zero_unless_(torch.tensor(True), gradients)
    assert torch.equal(gradients[0].view(torch.uint8), broken.view(torch.uint8))
    assert torch.equal(gradients[1], last)
    zero_unless_(torch.tensor(False), gradients)
    assert not any(gradient.any() for gradient in gradients)


# torch's tracer looks at .grad of whatever enters a graph and hides its own warning, unless warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_network_trains_compiled_validates_plain_and_keeps_its_names():
    """With a backend that compiles nothing: whether it is asked, and when."""
    calls = []

    def backend(graph, _):
        def run(*inputs):
            calls.append(torch.is_grad_enabled())
            return graph(*inputs)

        return run

    plain = SegmentationModule(segmenter(), Optim(lr=1e-3), steps=2, seed=5)
    fit(plain, batches(2), steps=2)
    module = SegmentationModule(segmenter(), Optim(lr=1e-3), steps=2, seed=5)
    module.compile_network(backend)
    fit(module, batches(2), steps=2)
    assert len(calls) == 4  # backbone and decoder, twice
    assert all(calls)
    for (name, ours), (other, theirs) in zip(module.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other
        assert_close(ours, theirs)
    module.validate([{k: v[:1] for k, v in batches(1)[0].items()}])
    assert len(calls) == 4


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    monkeypatch.setattr("protoseg.engine.module.shutil.which", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"C\+\+ compiler .*compile false"):
        SegmentationModule(segmenter(), Optim(), steps=1).compile_network()


def test_a_finite_step_ends_the_count_of_failures():
    model = segmenter()
    model.losses = Poison(model, set(range(1, PATIENCE)))
    module = SegmentationModule(model, Optim(), steps=20)
    fit(module, batches(PATIENCE), steps=PATIENCE)
    assert int(module.failures) == 0


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run():
    model = segmenter()
    model.losses = Poison(model, set(range(2, 100)))
    module = SegmentationModule(model, Optim(), steps=50)
    with pytest.raises(UserError, match=rf"{PATIENCE} steps in a row.*loss .*optim.lr"):
        fit(module, batches(50), steps=50)
    assert model.losses.seen == PATIENCE + 1
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_an_unlabelled_batch_trains_on():
    data = batches(1)
    data[0]["label"].fill_(255)
    module = SegmentationModule(segmenter(), Optim(), steps=1)
    before = module.model.head.prototypes.clone()
    fit(module, data, steps=1)
    assert module.parts["loss"].item() == 0
    assert int(module.failures) == 0
    assert torch.equal(module.model.head.prototypes, before)


def test_validation_is_one_confusion_matrix_at_label_size():
    module = SegmentationModule(segmenter(), Optim(), steps=1, evaluation=Evaluation(flip=True))
    draw = torch.Generator().manual_seed(3)
    data = []
    for i, size in enumerate([(40, 56), (33, 47), (24, 24)]):
        label = torch.randint(0, 3, (1, *size), generator=draw)
        label[:, :5] = 255
        image = torch.randint(0, 256, (1, 3, 32, 48), generator=draw).to(torch.uint8)
        data.append({"image": image, "label": label, "name": [f"picture {i}"]})
    module.model.train()
    got = module.validate(data)
    assert module.model.training

    matrix = torch.zeros(3, 3, dtype=torch.int64)
    module.model.eval()
    for batch in data:
        label = batch["label"][0]
        predicted = segment(module.model, batch["image"][0], Evaluation(flip=True), tuple(label.shape)).argmax(0)
        for truth, guess in zip(label.flatten().tolist(), predicted.flatten().tolist()):
            if truth != 255:
                matrix[truth, guess] += 1
    expected = overlap(matrix)
    assert got["val/miou"] == expected.miou
    assert got["val/pixel_accuracy"] == expected.pixel_accuracy
    assert got["val/classes"] == 3
    assert -1 <= got["prototypes/pairwise_cosine"] <= 1
    assert got["prototypes/used"] == 1


def test_validation_leaves_frozen_modules_as_they_were():
    module = SegmentationModule(segmenter(kind="softmax"), Optim(), steps=1)
    module.model.train()
    module.model.backbone.eval()
    metrics = module.validate([{k: v[:1] for k, v in batches(1)[0].items()}])
    assert not module.model.backbone.training
    assert module.model.decoder.training
    assert not any(name.startswith("prototypes") for name in metrics)


def test_seeds_of_steps_micro_batches_and_ranks_differ_and_repeat():
    seeds = {step_seed(0, step, micro, rank) for step in range(200) for micro in range(3) for rank in range(4)}
    assert len(seeds) == 200 * 3 * 4
    assert step_seed(1, 2, 3, 4) == step_seed(1, 2, 3, 4) != step_seed(2, 2, 3, 4)
    assert all(0 <= seed < 2**64 for seed in seeds)
    torch.manual_seed(max(seeds))  # torch takes all of them


def test_the_moving_average_is_its_formula():
    model = segmenter()
    module = SegmentationModule(model, Optim(lr=1e-2), steps=4)
    average = WeightAverage(0.5)
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    history = []
    module.on_train_batch_end = lambda *_: history.append(  # type: ignore[method-assign]
        {name: p.detach().clone() for name, p in module.named_parameters()}
    )
    fit(module, batches(4), steps=4, callbacks=[average])
    for step, weights in enumerate(history, start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {name: decay * old + (1 - decay) * weights[name] for name, old in expected.items()}
    assert_close(average.average, expected)

    last = {name: p.detach().clone() for name, p in module.named_parameters()}
    with average.applied(module):
        assert_close(dict(module.named_parameters()), expected, msg=None)
    assert all(torch.equal(p, last[name]) for name, p in module.named_parameters())


def test_a_run_continued_to_more_steps_goes_by_the_new_schedule_at_once(tmp_path):
    """The rate that a checkpoint at the end of a run holds is that of its end."""
    rates, place = [], tmp_path / "end.ckpt"
    for steps in (3, 6):
        module = SegmentationModule(segmenter(), Optim(lr=1e-3, schedule="poly", power=1.0), steps=steps)
        note = Callback()
        note.on_train_batch_end = lambda trainer, module, *_: rates.append(module.rate)
        trainer = fit(module, batches(3), steps=steps, callbacks=[note], resume=place if steps == 6 else None)
        trainer.save_checkpoint(place)
    assert_close(rates, [1e-3 * (1 - t / 3) for t in range(3)] + [1e-3 * (1 - t / 6) for t in range(3, 6)])
