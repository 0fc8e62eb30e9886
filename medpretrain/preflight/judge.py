"""From what was seen to the rows of the table; pure functions of figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launchers.head import is_loopback
from medpretrain.health.address import cure
from medpretrain.preflight.facts import REQUIRED, HostFacts
from medpretrain.preflight.judge_rehearsal import judge_rehearsal
from medpretrain.preflight.report import RankReport
from medpretrain.preflight.rows import Limits, Row, in_bytes, listed, others, usual
from medpretrain.recipe import Recipe

_MAY_DIFFER = ("about", "data.path.", "data.threads", "train.threads")
_MANY = 6


@dataclass(frozen=True)
class Clock:
    """How far a host's clock is ahead of the head's, and how exactly that is known."""

    ahead_s: float
    accuracy_s: float


@dataclass(frozen=True)
class Hosts:
    """All that is known before anything is tried together.

    Attributes:
        seen: those that answered, the head first.
        wanted: how many were to come.
        missing: names of those that did not; may be fewer than do lack, where nobody named them.
        strangers: names of those that came and were not named.
        other_code: names of those that came with a medpretrain whose words are not understood.
        clocks: by name; without the head's. None for a host that did not answer any more.
        shares_target: by name, whether the host sees what the head writes beside the checkpoints; none where they go
            to a URL.
    """

    seen: tuple[HostFacts, ...]
    wanted: int = 1
    missing: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()
    other_code: tuple[str, ...] = ()
    clocks: Mapping[str, Clock | None] = field(default_factory=dict)
    shares_target: Mapping[str, bool] = field(default_factory=dict)


def judge(
    recipe: Recipe, hosts: Hosts, reports: Sequence[RankReport] | None, limits: Limits | None = None
) -> list[Row]:
    """The whole table.

    Args:
        recipe: the head's.
        reports: of all processes; None where nothing was rehearsed.
    """
    limits = limits or Limits()
    return [*judge_hosts(recipe, hosts, limits), *judge_rehearsal(recipe, hosts.seen, reports, limits)]


def judge_hosts(recipe: Recipe, hosts: Hosts, limits: Limits) -> list[Row]:
    """The rows on what hosts are and see; where one of them fails, nothing is rehearsed."""
    rows = _present(hosts)
    for judged in (_packages, _code, _recipe, _gpus, _driver):
        rows += judged(recipe, hosts)
    rows += _addresses(hosts)
    rows += _batch(recipe, hosts)
    rows += _shared_memory(hosts, limits)
    rows += _clocks(hosts, limits)
    rows += _targets(hosts)
    for number in range(max(len(host.datasets) for host in hosts.seen)):
        rows += _dataset(number, hosts)
    return rows


def _present(hosts: Hosts) -> list[Row]:
    came = len(hosts.seen) + len(hosts.other_code)
    advice = "is it up, does it reach the head's port, was the command started there? Its own output says more"
    rows = [Row("hosts", "fail", "did not answer", name, advice) for name in hosts.missing]
    unnamed = hosts.wanted - came - len(hosts.missing)
    if unnamed > 0:
        rows.append(
            Row("hosts", "fail", f"{unnamed} of {hosts.wanted} did not answer", "", f"--hosts names it; {advice}")
        )
    rows += [Row("hosts", "fail", "is not among --hosts", name, "give its name there") for name in hosts.strangers]
    names = [host.name for host in hosts.seen]
    for name in sorted({name for name in names if names.count(name) > 1}):
        rows.append(
            Row("hosts", "fail", f"{names.count(name)} answered by this name", name, "one command a host; --name")
        )
    return rows or [Row("hosts", "pass", f"{came} of {hosts.wanted} answered")]


def _packages(recipe: Recipe, hosts: Hosts) -> list[Row]:
    rows = [
        Row("packages", "fail", "another medpretrain, which speaks another preflight", name, "install the same one")
        for name in hosts.other_code
    ]
    wanted = (*REQUIRED, "deepspeed") if recipe.strategy == "deepspeed" else REQUIRED
    for package in dict.fromkeys(name for host in hosts.seen for name in host.versions):
        versions = {host.name: host.versions.get(package) for host in hosts.seen}
        lacking = [name for name, version in versions.items() if version is None]
        if package in wanted and lacking:
            rows.append(
                Row("packages", "fail", f"{package} is not installed", ", ".join(lacking), f"pip install {package}")
            )
            versions = {name: version for name, version in versions.items() if version is not None}
        if not versions:
            continue
        expected = usual(list(versions.values()))
        for version, names in others(versions).items():
            figures = f"{package} {version or 'is not installed'}, elsewhere {expected or 'not installed'}"
            rows.append(
                Row("packages", "fail", figures, ", ".join(names), "the same environment or image on all hosts")
            )
    first = hosts.seen[0].versions
    known = ", ".join(f"{name} {first[name]}" for name in ("python", *wanted) if first.get(name))
    return rows or [Row("packages", "pass", known)]


def _code(recipe: Recipe, hosts: Hosts) -> list[Row]:
    digests = {host.name: host.code[:12] for host in hosts.seen}
    expected = usual(list(digests.values()))
    return [
        Row("code", "fail", f"files {digest}, elsewhere {expected}", ", ".join(names), "the same checkout on all hosts")
        for digest, names in others(digests).items()
    ] or [Row("code", "pass", f"files {expected}")]


def _recipe(recipe: Recipe, hosts: Hosts) -> list[Row]:
    """Threads and places of the data may differ between hosts; nothing else may."""
    values = {host.name: tuple(sorted(host.recipe.items())) for host in hosts.seen}
    expected = dict(usual(list(values.values())))
    rows = []
    for value, names in others(values).items():
        its = dict(value)
        keys = [key for key in dict.fromkeys([*expected, *its]) if expected.get(key) != its.get(key)]
        grave = [key for key in keys if not key.startswith(_MAY_DIFFER)]
        shown = "; ".join(f"{key} is {its.get(key)}, elsewhere {expected.get(key)}" for key in (grave or keys)[:_MANY])
        more = f" and {len(grave or keys) - _MANY} more" if len(grave or keys) > _MANY else ""
        advice = "the same recipe and overrides on all hosts" if grave else "well if it is meant so"
        rows.append(Row("recipe", "fail" if grave else "warn", shown + more, ", ".join(names), advice))
    return rows or [Row("recipe", "pass", f"{recipe.name}, {recipe.sha256[:12]}")]


def _gpus(recipe: Recipe, hosts: Hosts) -> list[Row]:
    rows = []
    for host in hosts.seen:
        if host.gpu_problem is not None:
            advice = "nvidia-smi and the kernel's log (dmesg) say more; take the host out"
            rows.append(Row("GPUs", "fail", f"torch cannot look at them: {host.gpu_problem}", host.name, advice))
        elif recipe.device != "cpu" and host.driver is not None and not host.gpus:
            what = f"torch sees no GPU though there is driver {host.driver}"
            rows.append(Row("GPUs", "fail", what, host.name, "a torch for this driver's CUDA? CUDA_VISIBLE_DEVICES?"))
        elif recipe.device == "cuda" and not host.gpus:
            rows.append(Row("GPUs", "fail", "no GPU, and device=cuda", host.name, "another host, or device=cpu"))
        elif host.gpus and host.processes > len(host.gpus):
            figures = f"{len(host.gpus)} for {host.processes} processes"
            rows.append(Row("GPUs", "fail", figures, host.name, f"--gpus {len(host.gpus)}, or a host with more"))
    shown = {host.name: _shown(host) for host in hosts.seen if host.gpu_problem is None}
    if not shown:
        return rows
    expected = usual(list(shown.values()))
    advice = "hosts that are alike, or --gpus; the slowest sets the pace of all"
    for value, names in others(shown).items():
        rows.append(Row("GPUs", "fail", f"{value}, elsewhere {expected}", ", ".join(names), advice))
    if not rows and recipe.device == "auto" and not hosts.seen[0].gpus:
        advice = "does the container or job have GPUs (--gpus all, --gres)? device=cpu says that none are meant"
        return [Row("GPUs", "warn", f"{expected}: device=auto trains on the CPU", "", advice)]
    return rows or [Row("GPUs", "pass", expected)]


def _shown(host: HostFacts) -> str:
    """The GPUs that train."""
    kinds = Counter((gpu.name, round(gpu.bytes / 2**30)) for gpu in host.gpus[: host.processes])
    gpus = " + ".join(f"{count} x {name} ({size} GiB)" for (name, size), count in sorted(kinds.items())) or "no GPU"
    return f"{gpus}, {host.processes} process{'es' * (host.processes > 1)}"


def _driver(recipe: Recipe, hosts: Hosts) -> list[Row]:
    drivers = {host.name: host.driver or "none" for host in hosts.seen}
    expected = usual(list(drivers.values()))
    rows = [
        Row("driver", "warn", f"{driver}, elsewhere {expected}", ", ".join(names), "the same driver on all hosts")
        for driver, names in others(drivers).items()
    ]
    return rows or [Row("driver", "pass", expected)]


def _addresses(hosts: Hosts) -> list[Row]:
    if len({host.network for host in hosts.seen}) == 1:
        return []
    rows = []
    for host in hosts.seen:
        if host.gloo_address is not None and is_loopback(host.gloo_address):
            figures = f"its own name means {host.gloo_address} there, where other hosts do not find it"
            rows.append(Row("address", "fail", figures, host.name, cure(host.interfaces)))
    found = [f"{host.name} {host.gloo_address or 'by GLOO_SOCKET_IFNAME'}" for host in hosts.seen]
    return rows or [Row("address", "pass", listed(found))]


def _batch(recipe: Recipe, hosts: Hosts) -> list[Row]:
    processes, micro = hosts.wanted * hosts.seen[0].processes, recipe.train.micro_batches
    batch = recipe.train.global_batch
    if batch % (processes * micro):
        figures = f"{batch} images do not divide among {processes} processes x {micro} micro-batches"
        return [Row("global batch", "fail", figures, "", "another number of processes, or another train.global_batch")]
    figures = f"{batch} images = {processes} processes x {micro} micro-batches x {batch // processes // micro}"
    return [Row("global batch", "pass", figures)]


def _shared_memory(hosts: Hosts, limits: Limits) -> list[Row]:
    rows = []
    for host in hosts.seen:
        if host.shared_memory is not None and host.shared_memory < limits.shared_memory and len(host.gpus) > 1:
            figures = f"/dev/shm has {in_bytes(host.shared_memory)}"
            rows.append(Row("shared memory", "warn", figures, host.name, "start the container with --ipc=host"))
    return rows


def _clocks(hosts: Hosts, limits: Limits) -> list[Row]:
    rows, worst, accuracy = [], 0.0, 0.0
    for name, clock in hosts.clocks.items():
        if clock is None:
            rows.append(Row("clock", "fail", "it does not answer any more", name, "look at its own output"))
            continue
        ahead = abs(clock.ahead_s)
        worst, accuracy = max(worst, ahead), max(accuracy, clock.accuracy_s)
        if ahead - clock.accuracy_s > limits.clock_warn_s:
            way = "ahead of" if clock.ahead_s > 0 else "behind"
            figures = f"{ahead:.1f} s {way} the head, to {clock.accuracy_s * 1000:.1f} ms"
            status = "fail" if ahead > limits.clock_fail_s else "warn"
            rows.append(Row("clock", status, figures, name, "let chrony or ntpd set it"))  # type: ignore[arg-type]
    if hosts.clocks and not rows:
        rows = [Row("clock", "pass", f"at most {worst * 1000:.1f} ms apart, to {accuracy * 1000:.1f} ms")]
    return rows


def _targets(hosts: Hosts) -> list[Row]:
    rows = []
    problems: dict[str, list[str]] = {}
    for host in hosts.seen:
        if host.target.problem is not None:
            problems.setdefault(host.target.problem, []).append(host.name)
    for problem, names in problems.items():
        advice = "make room, get the right to write there, or give another checkpoint.to or run.dir"
        rows.append(Row("checkpoint target", "fail", problem, ", ".join(names), advice))
    apart = [name for name, shared in hosts.shares_target.items() if not shared]
    if apart:
        figures = f"{hosts.seen[0].target.place} is not the folder that {hosts.seen[0].name} sees"
        advice = "a shared file system for run.dir, or a bucket for checkpoint.to"
        rows.append(Row("checkpoint target", "fail", figures, ", ".join(apart), advice))
    if rows:
        return rows
    speeds = [host.target.write_bytes_s for host in hosts.seen if host.target.write_bytes_s is not None]
    free = [host.target.free for host in hosts.seen if host.target.free is not None]
    room = f", {in_bytes(min(free))} free" if free else ""
    speed = f", {in_bytes(min(speeds))}/s written by each host at once" if speeds else ""
    return [Row("checkpoint target", "pass", f"{hosts.seen[0].target.place}{room}{speed}")]


def _dataset(number: int, hosts: Hosts) -> list[Row]:
    found = {host.name: host.datasets[number] for host in hosts.seen if number < len(host.datasets)}
    check = "dataset" if max(len(host.datasets) for host in hosts.seen) == 1 else f"dataset {number + 1}"
    problems: dict[str, list[str]] = {}
    for name, one in found.items():
        if one.problem is not None:
            problems.setdefault(one.problem, []).append(name)
    advice = "is it mounted there? 'medpretrain prep verify' finds all damage; copy it anew"
    rows = [Row(check, "fail", problem, ", ".join(names), advice) for problem, names in problems.items()]
    whole = {name: one for name, one in found.items() if one.problem is None}
    digests = {name: (one.sha256 or "")[:12] for name, one in whole.items()}
    if digests:
        expected = usual(list(digests.values()))
        for digest, names in others(digests).items():
            figures = f"{whole[names[0]].path} is dataset {digest}, elsewhere {expected}"
            rows.append(Row(check, "fail", figures, ", ".join(names), "the same dataset on all hosts"))
    if rows:
        return rows
    first = next(iter(whole.values()))
    verified = len({shard for one in whole.values() for shard in one.verified})
    slowest = min(one.bytes_s for one in whole.values() if one.bytes_s is not None)
    figures = (
        f"{first.path}: {first.samples:,} images; index and {verified} of {first.shards} shards verified, "
        f"{in_bytes(slowest)}/s"
    )
    return [Row(check, "pass", figures)]
