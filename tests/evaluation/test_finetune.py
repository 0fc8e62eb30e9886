"""Each phase of fine-tuning moves what it should and nothing else, and the numbers do not depend on how images come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_prep.dataset import Dataset
from data_prep.errors import UserError, WorkFailed
from medpretrain.data.views import View
from medpretrain.evaluation import finetune
from medpretrain.evaluation.classifier import Training, epoch_order, first_linear, learning_rate
from medpretrain.evaluation.finetune import (
    LAYER_DECAY,
    MODAN,
    PLAIN,
    REPORT,
    FineTuned,
    FinetuneSetting,
    finetune_scores,
    finetune_setting,
)
from medpretrain.evaluation.labelled import Labelled, labelled, occurring_classes
from medpretrain.evaluation.training_images import TrainingImages
from medpretrain.models.preprocessing import Preprocessing

GRAY = Preprocessing(size=16, channels=1, mean=(0.5,), std=(0.25,))
CPU = torch.device("cpu")


class Tiny(nn.Module):
    """A network with BatchNorm and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def parts(small_dataset: Path) -> tuple[Labelled, Labelled]:
    dataset = Dataset.open(small_dataset)
    classes = occurring_classes(dataset, "class")
    return labelled(dataset, ["train"], "class", classes), labelled(dataset, ["test"], "class", classes)


def some(part: Labelled, count: int) -> Labelled:
    """The first images of it, shuffled so that all classes are there."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(part))[:count])
    return Labelled(
        part.dataset, part.rows_N[chosen], part.labels_N[chosen], part.patients_N[chosen], part.classes, part.left_out
    )


def short(setting: FinetuneSetting, **changes: Any) -> FinetuneSetting:
    return FinetuneSetting(**setting.model_dump() | {"epochs": 2, "batch": 16} | changes)


def run(
    parts: tuple[Labelled, Labelled], setting: FinetuneSetting, network: nn.Module | None = None, **o: Any
) -> FineTuned:
    options = {"seed": 3, "device": "cpu", "threads": 1} | o
    return finetune_scores(network or Tiny(), *parts, GRAY, setting, **options)


def pixels(part: Labelled) -> Tensor:
    return torch.cat(list(TrainingImages(part, GRAY, CPU, threads=1).in_order(np.arange(len(part)), 16)))


def test_the_settings_are_those_of_the_papers() -> None:
    assert (MODAN.optimizer, MODAN.lr, MODAN.epochs, MODAN.batch) == ("adam", 1e-4, 10, 32)
    assert (MODAN.schedule, MODAN.step_epochs, MODAN.gamma, MODAN.frozen_epochs) == ("step", 5, 0.1, 0)
    assert (REPORT.frozen_epochs, REPORT.epochs, REPORT.head) == (10, 30, "relu_linear")
    assert (PLAIN.schedule, PLAIN.warmup_epochs, PLAIN.layer_decay) == ("cosine", 5, None)
    assert LAYER_DECAY.layer_decay == 0.75
    with pytest.raises(UserError, match="did you mean 'layer_decay'"):
        finetune_setting("layer-decay")


def test_scores_are_those_of_a_plain_training_loop(parts: tuple[Labelled, Labelled]) -> None:
    train, test = parts
    setting = short(MODAN, epochs=6)
    found = run(parts, setting)
    network, head = Tiny(), first_linear(8, 3, 3)
    model = nn.Sequential(network, head)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)
    x, y = pixels(train), torch.from_numpy(train.labels_N).long()
    model.train()
    for epoch in range(6):
        for places in epoch_order(len(train), 3, epoch).split(16):
            if len(places) > 1:
                optimizer.zero_grad()
                functional.cross_entropy(model(x[places]), y[places]).backward()
                optimizer.step()
        scheduler.step()
    model.eval()
    expected = model(pixels(test)).softmax(dim=1).detach().numpy()
    assert found.scores_MK == pytest.approx(expected, abs=1e-5)
    assert found.scores_MK.dtype == np.float64
    assert found.scores_MK.sum(axis=1) == pytest.approx(1.0, abs=1e-12)
    assert found.parameters["scored_epoch"] == found.parameters["epochs"] == 6


def test_classes_that_differ_are_told_apart(parts: tuple[Labelled, Labelled]) -> None:
    found = run(parts, short(REPORT, frozen_epochs=5, epochs=12, lr=1e-2))
    assert (found.scores_MK.argmax(axis=1) == parts[1].labels_N).mean() > 0.9
    assert 0 < found.parameters["train_loss"] < 0.6


def test_while_the_head_is_trained_alone_no_bit_of_the_network_changes(parts: tuple[Labelled, Labelled]) -> None:
    network, states = Tiny(), []
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:

        def none_of_it(self: Any) -> Iterator[float]:
            states.append({name: value.clone() for name, value in network.state_dict().items()})
            states.append(self._model[1][-1].weight.detach().clone())
            return iter([0.0])

        patch.setattr(finetune._Tuner, "train_all", none_of_it)
        run(parts, short(REPORT, frozen_epochs=3), network)
    after, head = states
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.allclose(head, first_linear(8, 3, 3).weight)


def test_afterwards_weights_and_statistics_of_all_layers_change(parts: tuple[Labelled, Labelled]) -> None:
    network = Tiny().requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(parts, short(REPORT, frozen_epochs=1), network)
    after = network.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_the_head_alone_learns_as_from_features_computed_every_epoch(parts: tuple[Labelled, Labelled]) -> None:
    train, _ = parts
    images = TrainingImages(train, GRAY, CPU, threads=1)
    network, head = Tiny().eval(), nn.Sequential(nn.ReLU(), first_linear(8, 3, 3))
    setting = short(REPORT, frozen_epochs=3)
    finetune._Tuner(nn.Sequential(network, head), images, setting, 3).train_head()
    other = nn.Sequential(nn.ReLU(), first_linear(8, 3, 3))
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-3)
    x, y = pixels(train), torch.from_numpy(train.labels_N).long()
    for epoch in range(3):
        for places in epoch_order(len(train), 3, epoch).split(16):
            optimizer.zero_grad()
            functional.cross_entropy(other(network(x[places]).detach()), y[places]).backward()
            optimizer.step()
    torch.testing.assert_close(head[1].weight, other[1].weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("setting", [short(REPORT, frozen_epochs=1), short(PLAIN)], ids=["report", "plain"])
def test_images_held_in_memory_and_decoded_every_epoch_give_the_same_bits(
    parts: tuple[Labelled, Labelled], setting: FinetuneSetting
) -> None:
    held, streamed = (run(parts, setting, in_memory_bytes=limit) for limit in (1 << 30, 0))
    assert np.array_equal(held.scores_MK, streamed.scores_MK)
    assert held.parameters == streamed.parameters


@pytest.mark.parametrize("augment", ["none", "flip_crop"])
def test_a_seed_gives_the_same_bits_and_another_gives_others(parts: tuple[Labelled, Labelled], augment: str) -> None:
    setting = short(PLAIN, augment=augment)
    first, second, other = (run(parts, setting, Tiny(dropout=0.5), seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.scores_MK, second.scores_MK)
    assert first.parameters == second.parameters
    assert not np.allclose(first.scores_MK, other.scores_MK, atol=1e-4)


def test_torchs_global_generator_is_neither_read_nor_moved(parts: tuple[Labelled, Labelled]) -> None:
    one, two = Tiny(dropout=0.5), Tiny(dropout=0.5)
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), run(parts, short(PLAIN), one)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert np.array_equal(run(parts, short(PLAIN), two).scores_MK, first.scores_MK)


def test_augmentation_is_a_function_of_seed_epoch_and_image(parts: tuple[Labelled, Labelled]) -> None:
    images, view = TrainingImages(parts[0], GRAY, CPU, threads=1), View(size=16, crop=(0.5, 1.0), flip=0.5)

    def made(order: list[int], batch: int, seed: int = 0, epoch: int = 0) -> Tensor:
        parts = images.augmented(np.array(order), batch, view, seed=seed, epoch=epoch)
        return torch.cat(list(parts))

    one = made([4, 9, 1, 30, 2], 5)
    assert torch.equal(made([2, 1, 4, 30, 9], 2), one[[4, 2, 0, 3, 1]])
    for other in (made([4, 9, 1, 30, 2], 5, epoch=1), made([4, 9, 1, 30, 2], 5, seed=1)):
        assert all(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one, pixels(parts[0])[[4, 9, 1, 30, 2]])


@pytest.mark.parametrize("name", ["test_vit", "resnet10t"])
def test_layer_l_of_L_has_the_rate_of_the_equation(name: str) -> None:
    network = timm.create_model(name, num_classes=0)
    head = nn.Sequential(first_linear(network.num_features, 3, 0))
    model = nn.Sequential(network, head)
    optimizer = finetune._optimizer(LAYER_DECAY, model, 1e-3, 0.75)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    of = {path: rate[id(parameter)] for path, parameter in model.named_parameters()}
    assert of["1.0.weight"] == of["1.0.bias"] == 1e-3
    if name == "test_vit":
        blocks = len(network.blocks)
        depth = {"0.pos_embed": 0, "0.patch_embed.proj.weight": 0, "0.norm.weight": blocks}
        depth |= {f"0.blocks.{i}.mlp.fc1.weight": i + 1 for i in range(blocks)}
        top = blocks + 1
    else:
        depth = {"0.conv1.0.weight": 0, "0.layer1.0.conv1.weight": 1, "0.layer4.0.bn2.weight": 4}
        top = 5
    for path, layer in depth.items():
        assert of[path] == pytest.approx(1e-3 * 0.75 ** (top - layer)), path
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert all((id(p) in decayed) == (p.ndim > 1) for p in model.parameters())


def test_rates_of_layers_follow_the_schedule(parts: tuple[Labelled, Labelled]) -> None:
    seen: list[tuple[float, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        step = finetune._step

        def watched(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
            rates = [group["lr"] for group in optimizer.param_groups]
            seen.append((min(rates), max(rates)))
            return step(model, x, y, optimizer)

        patch.setattr(finetune, "_step", watched)
        network = timm.create_model("resnet10t", num_classes=0, in_chans=1)
        run(parts, short(LAYER_DECAY, epochs=3, warmup_epochs=1), network)
    assert len(seen) == 9  # 46 images are three batches of 16
    assert [high for _, high in seen[:3]] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert [high for _, high in seen[3:]] == pytest.approx([1e-3 * (1 + np.cos(np.pi * s / 6)) / 2 for s in range(6)])
    assert all(low == pytest.approx(high * 0.75**5) for low, high in seen)


def test_the_warm_up_of_a_cosine_rises_by_steps() -> None:
    setting = Training(
        name="x", optimizer="adamw", lr=1.0, schedule="cosine", epochs=4, batch=2, weight_decay=0, warmup_epochs=2
    )
    rates = [learning_rate(setting, step // 2, step, 2) for step in range(8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-5)


@pytest.mark.parametrize("count", [17, 33, 5])
def test_a_last_batch_of_one_image_and_a_set_below_a_batch_are_harmless(
    parts: tuple[Labelled, Labelled], count: int
) -> None:
    class PerChannel(Tiny):
        """BatchNorm of one value a channel and image: it refuses a batch of one."""

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(x))

    network = PerChannel()
    run((some(parts[0], count), parts[1]), short(REPORT, frozen_epochs=1), network)
    assert int(network.last.num_batches_tracked) == 2 * max(1, count // 16)


def test_val_chooses_the_epoch_where_a_setting_says_so(parts: tuple[Labelled, Labelled]) -> None:
    wild = short(PLAIN, lr=0.3, warmup_epochs=0, schedule="constant", choose="val", epochs=6)
    losses: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        measure = finetune._cross_entropy

        def watched(model: nn.Module, images: TrainingImages) -> float:
            losses.append(measure(model, images))
            return losses[-1]

        patch.setattr(finetune, "_cross_entropy", watched)
        found = run(parts, wild, val=parts[1])
    assert len(losses) == 6
    assert found.parameters["scored_epoch"] == int(np.argmin(losses)) + 1
    assert found.parameters["val_loss"] == min(losses)
    labels = parts[1].labels_N
    scored = -np.log(found.scores_MK[np.arange(len(labels)), labels]).mean()
    assert scored == pytest.approx(min(losses), rel=1e-9), "the weights of that epoch are the ones that score"
    assert run(parts, short(PLAIN), val=parts[1]).parameters == run(parts, short(PLAIN)).parameters


def test_what_cannot_be_tuned_is_refused(parts: tuple[Labelled, Labelled]) -> None:
    with pytest.raises(UserError, match="val images, and there are none"):
        run(parts, short(PLAIN, choose="val"))
    with pytest.raises(UserError, match="timm does not have for Tiny"):
        run(parts, short(LAYER_DECAY))
    with pytest.raises(UserError, match="at least one training image"):
        run((some(parts[0], 0), parts[1]), short(PLAIN))
    with pytest.raises(ValueError, match="adamw"):
        short(MODAN, layer_decay=0.7)


def test_a_loss_that_leaves_the_numbers_names_epoch_and_rate(parts: tuple[Labelled, Labelled]) -> None:
    wild = short(MODAN, lr=1e38, epochs=5)
    with pytest.raises(WorkFailed, match=r"'modan' is not finite in epoch \d at a learning rate of 1e\+38"):
        run(parts, wild)
