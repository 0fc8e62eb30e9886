"""What a CUDA device must do alike; `make test-gpu` runs these and they fail where there is none."""

from __future__ import annotations

import pytest
import torch

from data_prep.dataset import Dataset
from medpretrain.data.augment import apply, pixel_noise
from medpretrain.data.batches import Batch, Stream
from medpretrain.data.mixture import Mixture
from medpretrain.data.views import BiasField, Blur, Jitter, Noise, View
from medpretrain.evaluation.evaluate import evaluate
from medpretrain.evaluation.knn import knn_scores
from medpretrain.evaluation.plan import choose_images
from medpretrain.evaluation.protocols import FineTune, Knn, Linear
from medpretrain.evaluation.source import open_source
from medpretrain.methods import METHODS
from medpretrain.recipe import Recipe
from medpretrain.training.loop import train
from medpretrain.training.process import Process

pytestmark = pytest.mark.gpu

VIEWS = {
    "crop": View(
        size=32,
        count=2,
        crop=(0.3, 1.0),
        flip=0.5,
        jitter=Jitter(brightness=0.4, contrast=0.4),
        blur=Blur(),
        noise=Noise(),
        bias_field=BiasField(),
    )
}


@pytest.fixture(scope="module")
def cuda():
    return torch.device("cuda:0")


def batch_on(device, folder) -> Batch:
    stream = Stream(
        Mixture.open([folder]), VIEWS, split="train", seed=0, global_batch=16, channels=1, mean=[0.4], std=[0.3],
        device=device, threads=2, labels=["modality", "anatomy"],
    )  # fmt: skip
    batches = stream.batches(2)
    batch = next(batches)
    batches.close()
    return batch


def test_noise_has_the_same_hashes_on_both_devices(cuda):
    keys = torch.tensor([3, 1 << 50])
    torch.testing.assert_close(pixel_noise(keys.to(cuda), (3, 32, 32)).cpu(), pixel_noise(keys, (3, 32, 32)))


def test_augmentation_agrees_with_the_cpu(cuda, small_dataset):
    stream = Stream(
        Mixture.open([small_dataset]), VIEWS, split="train", seed=0, global_batch=16, channels=1, mean=[0.4], std=[0.3],
        device=cuda, threads=2,
    )  # fmt: skip
    places = stream.order.step(0, 16)
    view, chosen = stream.parameters(places, stream.dataset.rows("train")[places.sample])[0]
    images, mean, std = torch.rand(16, 1, 32, 32), torch.tensor([0.4]), torch.tensor([0.3])
    on_cpu = apply(images.clone(), view, chosen, mean, std)
    on_gpu = apply(images.to(cuda), view, chosen, mean.to(cuda), std.to(cuda)).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, atol=2e-4, rtol=1e-4)


def test_the_stream_delivers_the_cpus_batch_up_to_rounding(cuda, small_dataset):
    on_cpu, on_gpu = batch_on(torch.device("cpu"), small_dataset), batch_on(cuda, small_dataset)
    for a, b in zip(on_cpu.micro[0]["crop"], on_gpu.micro[0]["crop"], strict=True):
        assert b.is_cuda
        assert ((a - b.cpu()).abs() * 0.3 * 255).mean() < 1.0  # gray levels


@pytest.mark.parametrize("method", sorted(METHODS))
def test_steps_on_the_gpu_have_the_loss_gradient_and_state_of_the_cpu(method, exactness, cuda):
    found = exactness.gradients(Process(0, 1, 0, 1, cuda), method, "resnet")
    compared = exactness.compare(found, exactness.gradients(exactness.ALONE, method, "resnet"))
    assert abs(compared["ratio"] - 1) < 1e-6, compared
    assert abs(compared["cosine"] - 1) < 1e-6, compared
    assert compared["buffers"] < 1e-6, compared


def test_a_run_in_bf16_trains_and_saves(cuda, small_dataset, tmp_path):
    recipe = Recipe.model_validate(
        {
            "name": "gpu",
            "device": "cuda",
            "data": {"path": str(small_dataset), "channels": 1, "labels": ["modality", "anatomy"]},
            "backbone": {"name": "resnet18", "stem": "3x3"},
            "views": {"crop": {"size": 32, "count": 2, "crop": [0.3, 1.0], "blur": {}}},
            "method": {"name": "modan_mulsupcon"},
            "optim": {"name": "sgd", "lr": 0.05},
            "train": {"steps": 6, "global_batch": 16, "precision": "bf16", "log_every": 1},
            "run": {"dir": str(tmp_path / "run")},
            "tracking": {"uri": "none"},
        }
    )
    finished = train(recipe)
    assert finished.step == 6
    assert finished.checkpoint.is_dir()


def test_knn_on_the_gpu_has_the_neighbours_of_the_cpu(cuda):
    draw = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 64, generator=draw) for n in (3000, 200))
    labels = torch.randint(0, 5, (3000,), generator=draw)
    train[1000:1010] = train[0]  # ties, which the lower row wins
    expected = knn_scores(train, labels, test, 5, k=20)
    found = knn_scores(train.to(cuda), labels.to(cuda), test.to(cuda), 5, k=20)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "asked", [Knn(k=5), Linear(variant="modan"), FineTune(variant="modan")], ids=lambda a: a.protocol
)
def test_an_evaluation_on_the_gpu_is_that_of_the_cpu(asked, cuda, small_dataset):
    dataset = Dataset.open(small_dataset)
    source = open_source("random:resnet10t", dataset=dataset, size=32)
    images = choose_images(dataset, label="class")
    scores = [
        evaluate(asked, source, images, label="class", resamples=0, process=Process(0, 1, 0, 1, device))[1].scores_RK
        for device in (torch.device("cpu"), cuda)
    ]
    torch.testing.assert_close(*map(torch.from_numpy, scores), atol=0.02, rtol=0)
