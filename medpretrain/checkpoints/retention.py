"""Which checkpoints stay."""

from __future__ import annotations

import logging

from data_prep.errors import WorkFailed
from medpretrain.checkpoints.manifest import MANIFEST, CheckpointError, CheckpointInfo, parse
from medpretrain.checkpoints.target import Target, step_of

_log = logging.getLogger(__name__)


def retire(target: Target, step: int, *, keep: int, keep_every: int | None, keep_best: bool) -> list[str]:
    """Remove the checkpoints up to `step` that nothing keeps; gives their names.

    The newest `keep` stay, those of steps that `keep_every` divides, and with `keep_best` the one with the lowest
    metric, of equal ones the latest. Only whole ones count, by their manifest and the sizes of their files, so the last
    good one always stays. Damaged ones are left for `newest` to name, and so are later ones, from before a rollback.
    """
    whole: list[tuple[str, CheckpointInfo]] = []
    spare = []
    for name in target.names():
        its_step = step_of(name)
        if its_step is None or its_step > step:
            continue
        try:
            manifest = parse(target.manifest(name), its_step, target.place(name, MANIFEST))
            target.check_files(name, manifest)
        except CheckpointError:
            continue
        if whole and whole[-1][1].step == its_step:
            spare.append(name)  # an `.old` one, and the later save of its step is whole
        else:
            whole.append((name, manifest.info))
    kept = {name for name, _ in whole[:keep]}
    if keep_every is not None:
        kept |= {name for name, info in whole if info.step % keep_every == 0}
    measured = [(info.metric, -info.step, name) for name, info in whole if info.metric is not None]
    if keep_best and measured:
        kept.add(min(measured)[-1])
    spare += [name for name, _ in whole if name not in kept]
    for name in spare:
        try:
            target.remove(name)
        except (OSError, WorkFailed, CheckpointError) as error:
            _log.warning("an old checkpoint could not be removed: %s", error)
    return spare
