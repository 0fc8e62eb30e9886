"""What is launched: a run of `medpretrain train`, or a preparation in parts; the same words wherever it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError

PYTHON = "python"
"""Of an image or an activated environment, where a command is for another machine than this one."""


@dataclass(frozen=True)
class Job:
    """A run of `medpretrain train`, as every launcher starts it.

    Attributes:
        name: the recipe's.
        recipe: its name, or the path of its file.
        overrides: key=value, as in `optim.lr=3e-4`.
        run_dir: where the run writes.
        global_batch, micro_batches: of the recipe, to refuse numbers of processes that do not divide it.
        options: further words of `train`, as in ("--resume", "never").
        checkpoint_to: where the recipe says that checkpoints go, a folder or a URL; None: into the run's folder.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    run_dir: Path
    global_batch: int
    micro_batches: int = 1
    options: tuple[str, ...] = ()
    checkpoint_to: str | None = None

    @property
    def train(self) -> list[str]:
        """The words after `python -m medpretrain`."""
        return ["train", self.recipe, *self.overrides, *self.options]

    @property
    def train_under_torchrun(self) -> list[str]:
        """The same; torchrun takes `$$` for `$`, and `${local_rank}` for a number, in the words of its processes."""
        return [word.replace("$", "$$") for word in self.train]

    @property
    def preflight(self) -> list[str]:
        """The words after `python -m medpretrain`, to which a launcher adds `--nodes`, `--gpus`, `--head`, ..."""
        return ["preflight", self.recipe, *self.overrides, *self.options]

    def refuse_size(self, processes: int, said: str = "") -> None:
        """
        Args:
            said: how the number comes about.

        Raises:
            UserError: so many processes cannot share the global batch evenly.

        >>> Job("dino", "dino", (), Path("runs/dino"), 512).refuse_size(24, "3 nodes x 8 processes")
        Traceback (most recent call last):
            ...
        data_prep.errors.UserError: 3 nodes x 8 processes = 24 do not divide train.global_batch=512; \
possible are 16 or 32 processes, or train.global_batch=504
        """
        parts = processes * self.micro_batches
        if self.global_batch % parts == 0:
            return
        fits = [n for n in range(1, self.global_batch + 1) if self.global_batch % (n * self.micro_batches) == 0]
        nearest = [
            max((n for n in fits if n < processes), default=None),
            min((n for n in fits if n > processes), default=None),
        ]
        possible = " or ".join(str(n) for n in nearest if n is not None)
        what = f"{said or 'processes'} = {processes}" + (
            f" x {self.micro_batches} micro-batches" * (self.micro_batches > 1)
        )
        ways = [f"{possible} processes"] if possible else []
        ways.append(f"train.global_batch={max(parts, self.global_batch // parts * parts)}")
        raise UserError(
            f"{what} do not divide train.global_batch={self.global_batch}; possible are {', or '.join(ways)}"
        )


@dataclass(frozen=True)
class PrepJob:
    """A preparation in `parts` parts, each a `medpretrain prep KIND SOURCE OUT ... --part i/n`.

    Attributes:
        words: after `medpretrain prep`: the kind, SOURCE, OUT and options, in any order that it takes.
        out: OUT among them, where the shards go.
        says_workers: whether they say how many processes a part has.
        private: the folder of `--private` among them.
        reads: SOURCE and the files that options name, each with what names it: ("--key-file", "/keys/key").
    """

    words: tuple[str, ...]
    parts: int
    out: str
    says_workers: bool = False
    private: str | None = None
    reads: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return f"prep-{self.words[0]}"
