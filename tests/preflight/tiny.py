"""A recipe that a process rehearses in seconds."""

from __future__ import annotations

RECIPE = """\
name: tiny
data: {{path: {dataset}, channels: 1, labels: [class], trace: true, threads: 1}}
backbone: {{name: test_resnet}}
views: {{crop: {{size: 32, crop: [0.4, 1], flip: 0.5}}}}
method: {{name: supervised}}
optim: {{name: sgd, lr: 0.01}}
train: {{steps: 30, global_batch: 8, threads: 1, log_every: 1}}
checkpoint: {{every: 5}}
run: {{dir: {folder}/run}}
device: cpu
tracking: {{uri: none}}
"""


def write_recipe(folder, dataset):
    file = folder / "tiny.yaml"
    file.write_text(RECIPE.format(dataset=dataset, folder=folder))
    return file
