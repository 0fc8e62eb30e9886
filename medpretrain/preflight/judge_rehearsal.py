"""The rows on what processes did together."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from medpretrain.preflight.facts import HostFacts
from medpretrain.preflight.report import Link, RankReport, Rehearsed
from medpretrain.preflight.rows import Limits, Row, Status, in_bytes, in_time, listed
from medpretrain.recipe import Recipe

_CHECKS = (
    *("all-reduce", "all-gather", "links", "rehearsal", "communication", "memory", "data rate", "checkpoint room"),
    *("checkpoint time", "total time"),
)


def judge_rehearsal(
    recipe: Recipe, hosts: Sequence[HostFacts], reports: Sequence[RankReport] | None, limits: Limits
) -> list[Row]:
    """A row at least for each of what is to be measured; where it was not, the row says so."""
    if not reports:
        return [
            Row(check, "not measured", "not measured: nothing is tried together where a row fails") for check in _CHECKS
        ]
    failures = _failures(reports)
    rows = []
    if len(reports) > 1:
        for check, right in (
            ("all-reduce", [(one, one.all_reduce_right) for one in reports]),
            ("all-gather", [(one, one.all_gather_right) for one in reports]),
        ):
            rows += _values(check, reports, right)
        if len(hosts) > 1:
            rows += _links(hosts, reports, limits)
    rows += failures or [_rehearsal(reports)]
    done = [one.rehearsed for one in reports if one.rehearsed is not None]
    if len(done) < len(reports):
        after = _CHECKS[_CHECKS.index("communication") :]
        return [
            *rows,
            *(Row(check, "not measured", "not measured: the rehearsal did not get so far") for check in after),
        ]
    if len(reports) > 1:
        rows += _communication(hosts, reports, done)
    rows += _memory(recipe, hosts, reports, limits)
    rows += _data(recipe, reports, limits)
    rows += _room(recipe, hosts, done)
    rows += _time(recipe, hosts, done)
    return rows


def _failures(reports: Sequence[RankReport]) -> list[Row]:
    """What ended processes. Where a host is lost that is why the others could not go on; else those that another's end
    has ended are left out, unless there is no better reason."""
    failed = [one for one in reports if one.error is not None]
    lost = [one for one in failed if one.lost]
    causes = lost or [one for one in failed if not one.consequence] or failed
    said: dict[str, list[RankReport]] = {}
    for one in causes:
        said.setdefault(one.error or "", []).append(one)
    rows = []
    for error, those in said.items():
        ranks = f"rank {listed(one.rank for one in those)}"
        at = f" while at {those[0].stage}" if those[0].stage not in error and not those[0].lost else ""
        names = ", ".join(dict.fromkeys(one.host for one in those))
        advice = "look at the host and at its own output" if lost else "training would end with the same"
        rows.append(Row("rehearsal", "fail", f"{ranks}{at}: {error}", names, advice))
    return rows


def _values(check: str, reports: Sequence[RankReport], right: Sequence[tuple[RankReport, bool | None]]) -> list[Row]:
    wrong = [one for one, told in right if told is False]
    if wrong:
        figures = f"wrong values on rank {listed(one.rank for one in wrong)}"
        advice = "take the host out; nccl-tests and dcgmi diag tell which part is broken"
        return [Row(check, "fail", figures, ", ".join(dict.fromkeys(one.host for one in wrong)), advice)]
    speeds = [one.all_reduce if check == "all-reduce" else one.all_gather for one in reports]
    moved = speeds[0]
    if any(told is None for _, told in right) or moved is None:
        return [Row(check, "not measured", "not measured: the rehearsal did not get so far")]
    figures = f"right; {in_bytes(moved.bus_bytes_s)}/s of bus bandwidth with {in_bytes(moved.bytes)}"
    return [Row(check, "pass", figures)]


def _links(hosts: Sequence[HostFacts], reports: Sequence[RankReport], limits: Limits) -> list[Row]:
    """A host is slow if its best link out, or its best link in, has less than a part of the median of the links
    between others. Two hosts have no others: there one way is compared with the other. It is a failure where a step
    would feel it, and else a warning: on busy hosts, fast links differ."""
    found: list[Link] = [link for one in reports for link in one.links]
    if len({(link.sender, link.receiver) for link in found}) < len(hosts):
        return [Row("links", "not measured", "not measured: the rehearsal did not get so far")]
    slow: dict[str, tuple[float, str]] = {}
    for place, host in enumerate(hosts):
        for way, mine in (
            ("from", [link.moved.bus_bytes_s for link in found if link.sender == place]),
            ("to", [link.moved.bus_bytes_s for link in found if link.receiver == place]),
        ):
            rest = [link.moved.bus_bytes_s for link in found if place not in (link.sender, link.receiver)]
            if rest and mine and max(mine) < limits.link * median(rest):
                said = f"at best {in_bytes(max(mine))}/s {way} it, between others {in_bytes(median(rest))}/s"
                slow[host.name] = min(slow.get(host.name, (max(mine), said)), (max(mine), said))
    if len(hosts) == 2:
        speeds = sorted((link.moved.bus_bytes_s, link.sender, link.receiver) for link in found)
        (least, sender, receiver), most = speeds[0], speeds[-1][0]
        if least < limits.link * most:
            one, other = hosts[sender].name, hosts[receiver].name
            said = f"{in_bytes(least)}/s from {one} to {other}, {in_bytes(most)}/s the other way"
            slow[f"{one}, {other}"] = least, said
    advice = "look at its cable, port and speed (ethtool, ibstat), or take it out: all wait for it"
    rows = [
        Row("links", "fail" if _felt(speed, reports, limits) else "warn", figures, name, advice)
        for name, (speed, figures) in slow.items()
    ]
    speeds_s = [link.moved.bus_bytes_s for link in found]
    span = f"{in_bytes(min(speeds_s))}/s to {in_bytes(max(speeds_s))}/s between hosts, {len(found)} links"
    return rows or [Row("links", "pass", span)]


def _felt(bytes_s: float, reports: Sequence[RankReport], limits: Limits) -> bool:
    """Whether the gradients at that speed would take a noticeable part of a step."""
    done = [one.rehearsed for one in reports if one.rehearsed is not None]
    if not done:
        return True
    takes = done[0].gradient_bytes * 2 * (len(reports) - 1) / len(reports) / bytes_s
    return takes > limits.felt * max(one.step_s for one in done)


def _rehearsal(reports: Sequence[RankReport]) -> Row:
    done = [one.rehearsed for one in reports if one.rehearsed is not None]
    step, wait = max(one.step_s for one in done), max(one.wait_s for one in done)
    images = sum(one.images for one in done) / _pace(done)
    figures = (
        f"a step {in_time(step)}, wait for data {in_time(wait)}, {images:,.0f} images/s, "
        f"first step {in_time(max(one.first_s for one in done))}"
    )
    if done[0].survey:
        figures += f"; before step 1 all {done[0].survey:,} images are surveyed, which is not measured here"
    bad = max(one.not_finite for one in done)
    if bad:
        advice = "a lower optim.lr, a longer optim.warmup or optim.clip are the usual cures"
        return Row("rehearsal", "warn", f"{figures}; {bad} steps were not finite", "", advice)
    replaced = [one for one in reports if one.rehearsed is not None and one.rehearsed.replaced]
    if replaced:
        count = sum(one.rehearsed.replaced for one in replaced if one.rehearsed is not None)
        names = ", ".join(dict.fromkeys(one.host for one in replaced))
        advice = "'medpretrain prep verify' finds all that are damaged"
        return Row("rehearsal", "warn", f"{figures}; {count} images did not decode", names, advice)
    return Row("rehearsal", "pass", figures)


def _pace(done: Sequence[Rehearsed]) -> float:
    """Seconds a step in the long run: of the slowest process, which may be one whose data are slow."""
    return max(max(one.step_s + one.wait_s, one.images / one.decode_images_s) for one in done)


def _communication(hosts: Sequence[HostFacts], reports: Sequence[RankReport], done: Sequence[Rehearsed]) -> list[Row]:
    moved = reports[0].all_reduce
    if moved is None:
        return [Row("communication", "not measured", "not measured: the rehearsal did not get so far")]
    bytes_moved = done[0].gradient_bytes * 2 * (len(done) - 1) / len(done)
    takes, step = bytes_moved / moved.bus_bytes_s, max(one.step_s for one in done)
    figures = f"{in_bytes(done[0].gradient_bytes)} of gradients take {in_time(takes)} of a step of {in_time(step)}"
    # A measured step has it inside, whole or hidden: more than half of it is more than the computing.
    if takes > step / 2:
        advice = "a faster network, a larger train.global_batch, or fewer hosts: it takes longer than computing"
        # Of two hosts none can be told to be the slow one; of more, `links` has looked.
        return [
            Row("communication", "warn", figures, ", ".join(one.name for one in hosts[:2] if len(hosts) == 2), advice)
        ]
    return [Row("communication", "pass", figures)]


def _memory(recipe: Recipe, hosts: Sequence[HostFacts], reports: Sequence[RankReport], limits: Limits) -> list[Row]:
    """Of each GPU, and of each host, where a checkpoint is copied to while training goes on."""
    on_gpu = "more train.micro_batches, train.checkpoint_activations=true or strategy=fsdp2 need less"
    on_host = "fewer data.threads, more memory for the job or container, or checkpoint.background=false"
    rows, most = [], {"a GPU": (0, 0), "a host": (0, 0)}
    for host in hosts:
        done = [one.rehearsed for one in reports if one.host == host.name and one.rehearsed is not None]
        copies = sum(one.checkpoint_bytes for one in done) if recipe.checkpoint.background else 0
        used = [("a host", sum(one.resident_bytes for one in done) + copies, host.memory, on_host)]
        devices = [(one.peak_bytes, one.device_bytes) for one in done if one.peak_bytes and one.device_bytes]
        if devices:
            used.append(("a GPU", *max(devices, key=lambda both: both[0] / both[1]), on_gpu))
        for what, taken, there, advice in used:
            most[what] = max(most[what], (taken, there))
            if taken > limits.memory * there:
                rows.append(
                    Row("memory", "warn", f"{in_bytes(taken)} of {in_bytes(there)} of {what}", host.name, advice)
                )
    figures = "; ".join(
        f"{what} {in_bytes(taken)} of {in_bytes(there)}" for what, (taken, there) in most.items() if taken
    )
    return rows or [Row("memory", "pass", f"at most: {figures}")]


def _data(recipe: Recipe, reports: Sequence[RankReport], limits: Limits) -> list[Row]:
    rows = []
    ratios: list[tuple[float, float, float]] = []
    worst: dict[str, tuple[float, float, float]] = {}
    for one in reports:
        if one.rehearsed is None:
            continue
        need = one.rehearsed.images / one.rehearsed.step_s
        found = (one.rehearsed.decode_images_s / need, one.rehearsed.decode_images_s, need)
        ratios.append(found)
        worst[one.host] = min(worst.get(one.host, found), found)
    advice = "more cores a process, data.threads, smaller images, or data on a local disk; GPUs would wait"
    for host, (ratio, rate, need) in worst.items():
        if ratio < limits.data:
            figures = f"{rate:,.0f} images/s a process and a step takes {need:,.0f} ({ratio:.2f} x)"
            rows.append(Row("data rate", "warn", figures, host, advice))
    ratio, rate, need = min(ratios)
    figures = f"{rate:,.0f} images/s a process and a step takes {need:,.0f} ({ratio:.2f} x)"
    return rows or [Row("data rate", "pass", figures)]


def kept(recipe: Recipe, steps: int) -> int:
    """How many checkpoints are there at most at a time, with the one being written."""
    keep = recipe.checkpoint
    saves = max(1, -(-steps // keep.every))
    stay = steps // keep.keep_every if keep.keep_every else 0
    return min(saves, keep.keep + stay + (keep.keep_best is not None)) + 1


def _room(recipe: Recipe, hosts: Sequence[HostFacts], done: Sequence[Rehearsed]) -> list[Row]:
    size, most = sum(one.checkpoint_bytes for one in done), kept(recipe, done[0].steps)
    there = max(host.target.there for host in hosts)
    needed = max(1, most - there) * size
    figures = f"a checkpoint {in_bytes(size)}, {most} at a time {in_bytes(most * size)}"
    rows = []
    for host in hosts:
        if host.target.free is not None and host.target.free < needed:
            what = f"{figures}, and {host.target.place} has {in_bytes(host.target.free)} free"
            advice = "make room, a smaller checkpoint.keep, or another checkpoint.to"
            rows.append(Row("checkpoint room", "fail", what, host.name, advice))
    return rows or [Row("checkpoint room", "pass", figures)]


def _time(recipe: Recipe, hosts: Sequence[HostFacts], done: Sequence[Rehearsed]) -> list[Row]:
    size, pace, steps = sum(one.checkpoint_bytes for one in done), _pace(done), done[0].steps
    speeds = [host.target.write_bytes_s for host in hosts if host.target.write_bytes_s is not None]
    rows = []
    save = 0.0
    if speeds:
        save = size / len(hosts) / min(speeds)
        between = recipe.checkpoint.every * pace
        late = save > between
        figures = f"about {in_time(save)} to write, {in_time(between)} between two"
        advice = "a larger checkpoint.every, or a faster checkpoint.to" if late else ""
        status: Status = "warn" if late else "pass"
        rows.append(Row("checkpoint time", status, figures, "", advice))
    else:
        rows.append(Row("checkpoint time", "not measured", "not measured"))
    left = steps - done[0].done
    total = left * pace + (0 if recipe.checkpoint.background else save * (left // recipe.checkpoint.every))
    which = f"the last {left:,} of {steps:,}" if done[0].done else f"{steps:,}"
    rows.append(Row("total time", "pass", f"{in_time(total)} for {which} steps of {in_time(pace)}"))
    return rows
