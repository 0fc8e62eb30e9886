"""Batch norm over two real gloo processes against one process that holds the global batch."""

import pytest
import torch
from torch import nn

WORKER = """
import sys, torch, torch.distributed as dist
from medpretrain.models.batchnorm import use_global_batchnorm
dist.init_process_group("gloo")
rank = dist.get_rank()
work = torch.load(sys.argv[1], weights_only=False)
out = []
for model, x_shares, w_shares in work:
    x = x_shares[rank].requires_grad_()
    model = use_global_batchnorm(model)
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        y = model(x)
        (y * w_shares[rank]).sum().backward()
    grads = [p.grad for p in model.parameters()]
    for grad in grads:
        dist.all_reduce(grad)
    model.eval()
    out.append((y.detach(), x.grad, grads, dict(model.state_dict()), model(x).detach()))
refused = ""
try:
    use_global_batchnorm(nn := torch.nn.BatchNorm1d(2))(torch.zeros(1 - rank, 2))
except ValueError as error:
    refused = str(error)
torch.save((out, refused), f"{sys.argv[1]}.{rank}")
dist.destroy_process_group()
"""


def cases():
    from timm.layers import BatchNormAct2d

    torch.manual_seed(3)
    double = {"dtype": torch.float64}
    conv = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), BatchNormAct2d(3))
    head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False))
    average = nn.Sequential(nn.BatchNorm1d(3, momentum=None))
    for model, shape, out, sizes in [
        (conv, (2, 7, 7), (3, 5, 5), (4, 4)),
        (head, (6,), (4,), (6, 6)),
        (head, (6,), (4,), (5, 2)),
        (average, (3, 4), (3, 4), (3, 0)),
    ]:
        x_shares = [torch.randn(n, *shape, **double) * (2 + rank) + 10 * rank for rank, n in enumerate(sizes)]
        w_shares = [torch.randn(n, *out, **double) for n in sizes]
        yield model.double(), x_shares, w_shares


@pytest.mark.distributed
def test_two_ranks_equal_the_global_batch_in_float64(tmp_path, run_ranks):
    work = list(cases())
    torch.save(work, tmp_path / "work")
    run_ranks(["-c", WORKER, str(tmp_path / "work")], 2)
    (first, refused), (second, _) = (torch.load(tmp_path / f"work.{rank}", weights_only=False) for rank in range(2))
    assert "more than 1 value" in refused

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    for (model, x_shares, w_shares), a, b in zip(work, first, second, strict=True):
        x = torch.cat(x_shares).requires_grad_()
        for _ in range(2):
            model.zero_grad()
            x.grad = None
            y = model(x)
            (y * torch.cat(w_shares)).sum().backward()
        close(torch.cat([a[0], b[0]]), y.detach())
        close(torch.cat([a[1], b[1]]), x.grad)
        for parameter, one, two in zip(model.parameters(), a[2], b[2], strict=True):
            close(one, parameter.grad)
            close(two, parameter.grad)
        for ours in (a[3], b[3]):
            assert ours.keys() == model.state_dict().keys()
            for key, value in model.state_dict().items():
                close(ours[key], value)
        model.eval()
        close(torch.cat([a[4], b[4]]), model(x).detach())
