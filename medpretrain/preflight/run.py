"""`medpretrain preflight`: one agent a host; they meet, look, rehearse, and the head judges."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_prep.errors import UserError, WorkFailed
from data_prep.store import is_url
from launchers.head import Head
from medpretrain.health.restarts import going_on
from medpretrain.preflight.facts import HostFacts, look
from medpretrain.preflight.judge import Clock, Hosts, judge_hosts
from medpretrain.preflight.judge_rehearsal import judge_rehearsal
from medpretrain.preflight.meeting import Meeting, meet
from medpretrain.preflight.report import RankReport
from medpretrain.preflight.rows import Limits, Row
from medpretrain.preflight.table import show
from medpretrain.preflight.target import marker, sees_marker
from medpretrain.preflight.workers import free_port, rehearse_here
from medpretrain.recipe import Recipe
from medpretrain.tracking.state import write_whole

VERIFY_SHARDS = 2
REHEARSAL_S = 900.0
_ANSWER_S = 30.0
_BYE_S = 10.0
_log = logging.getLogger(__name__)
_FACTS, _REPORTS, _ROWS = TypeAdapter(HostFacts), TypeAdapter(list[RankReport]), TypeAdapter(list[Row])


def preflight(
    recipe: Recipe,
    *,
    nodes: int | None = None,
    gpus: int | None = None,
    head: str | None = None,
    hosts: Sequence[str] = (),
    name: str | None = None,
    timeout_s: float = 180.0,
    verify_shards: int | None = VERIFY_SHARDS,
    local: bool = False,
    rehearsal_s: float = REHEARSAL_S,
    limits: Limits | None = None,
    json_file: Path | None = None,
    resume: str = "auto",
    override: tuple[str, ...] = (),
) -> bool:
    """Check the hosts of a run, print the table on the head, and say whether no row fails; the same on every host.

    Nothing is written to the run folder or to a tracker, and nothing stays at the checkpoint target.

    Args:
        nodes: how many hosts, each with one such command; None: as many as `hosts`, or one.
        gpus: processes on this host; None: one for each GPU, or one.
        head: HOST:PORT where the hosts meet; the one whose address it is hosts it. Needed for several.
        hosts: the names by which they check in, so that those which do not come can be named.
        name: this host's; None: SLURMD_NODENAME, else its host name.
        timeout_s: how long the others are waited for.
        verify_shards: of how many shards of each dataset the bytes are verified on each host; None: of all.
        local: this host alone, nothing with others and no steps: for one that joins a job that runs.
        rehearsal_s: after which the rehearsal is ended.
        json_file: the table and all figures, on the head.
        resume, override: as of `medpretrain train`.

    Raises:
        UserError: options that do not go together, a recipe without a dataset, a `json_file` that cannot be written.
        WorkFailed: the head cannot be reached or is lost.
    """
    if not recipe.data.path:
        raise UserError("the recipe names no dataset; give one, as in data.path=shards/fundus")
    named = [host for host in hosts if host]
    if len(set(named)) < len(named):
        raise UserError(f"--hosts names a host twice: {', '.join(named)}")
    wanted = 1 if local else nodes or len(named) or 1
    if named and not local and len(named) != wanted:
        raise UserError(f"--hosts names {len(named)} hosts, and --nodes is {wanted}")
    if wanted > 1 and head is None:
        raise UserError(f"{wanted} hosts meet at one of them: give --head HOST:PORT, the same on each")
    own = name or _own_name(named)
    address = Head.parse(head) if head is not None and wanted > 1 else None
    if json_file is not None:
        _refuse_unwritable(json_file)
    how = _How(timeout_s, rehearsal_s, going_on(recipe.run_dir, resume), override, limits or Limits())
    with _ended_by_signals():
        if address is not None and importlib.util.find_spec("torch") is None:
            # It cannot meet the others, so it says itself what is wrong.
            facts = _looked(recipe, own, gpus, verify_shards)
            show(judge_hosts(recipe, Hosts((facts,)), how.limits), (facts,))
        meeting = meet(address, own, wanted, timeout_s) if address is not None else None
        # The head listens before it looks at itself, and those that have come show that they are there while they do.
        facts = _looked(recipe, own, gpus, verify_shards, meeting)
        head_name = "127.0.0.1" if address is None else address.host
        agent = _Agent(recipe, facts, wanted, tuple(named), meeting, how, head_name)
        return agent.lead(local, json_file) if meeting is None or meeting.leads else agent.follow()


def _looked(
    recipe: Recipe, name: str, gpus: int | None, verify_shards: int | None, meeting: Meeting | None = None
) -> HostFacts:
    _log.info("%s: looking at this host", name)
    return look(
        recipe,
        name,
        gpus=gpus,
        verify_shards=verify_shards,
        on_progress=lambda doing: _log.info("%s: %s", name, doing),
        meanwhile=meeting.sign if meeting is not None else lambda: None,
    )


@dataclasses.dataclass(frozen=True)
class _How:
    timeout_s: float
    rehearsal_s: float
    resume: str
    override: tuple[str, ...]
    limits: Limits


@dataclasses.dataclass(frozen=True)
class _Agent:
    recipe: Recipe
    facts: HostFacts
    wanted: int
    named: tuple[str, ...]
    meeting: Meeting | None
    how: _How
    head: str

    def lead(self, local: bool, json_file: Path | None) -> bool:
        """On the head, or alone."""
        hosts, slots = self._gathered()
        rows = judge_hosts(self.recipe, hosts, self.how.limits)
        go = not local and not any(row.status == "fail" for row in rows)
        port = free_port()
        reports: list[RankReport] | None = None
        if self.meeting is not None:
            self.meeting.tell("plan", {"rehearse": go, "master": [self.head, port]})
        if go:
            _log.info("rehearsing on %d hosts", len(hosts.seen))
            reports = self._rehearsed(0, self.head, port)
            deadline = time.monotonic() + _ANSWER_S
            for place, slot in enumerate(slots, start=1):
                reports += self._reports_of(hosts.seen[place], place, slot, deadline)
        if not local:
            rows += judge_rehearsal(self.recipe, hosts.seen, reports, self.how.limits)
        passed = not any(row.status == "fail" for row in rows)
        show(rows, hosts.seen)
        if self.meeting is not None:
            self.meeting.tell("verdict", {"passed": passed, "rows": _ROWS.dump_python(rows, mode="json")})
            deadline = time.monotonic() + _BYE_S
            for slot in slots:  # the store ends with this process
                try:
                    self.meeting.hear(f"bye/{slot}", max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    continue
        if json_file is not None:
            write_whole(json_file, json.dumps(_everything(passed, rows, hosts, reports), indent=1) + "\n")
        return passed

    def follow(self) -> bool:
        """On every other host."""
        meeting = self.meeting
        assert meeting is not None
        meeting.check_in({"name": self.facts.name, "facts": _FACTS.dump_python(self.facts, mode="json")})
        met = self._heard("met", math.inf)  # the head waits for others as long as they show that they are there
        place = met["slots"].index(meeting.slot) + 1 if meeting.slot in met["slots"] else None
        if place is None:
            raise WorkFailed(f"{self.facts.name} came too late, or runs another medpretrain than the head {self.head}")
        patience = _ANSWER_S + len(met["slots"]) * _ANSWER_S
        try:
            meeting.answer_time(patience)
            if met["marker"] is not None:
                self._heard("marker", patience)
                meeting.tell(f"marker/{meeting.slot}", sees_marker(self.recipe, met["marker"]))
        except TimeoutError:
            raise WorkFailed(f"the head {self.head} says nothing any more; its own output says why") from None
        plan = self._heard("plan", patience)
        if plan["rehearse"]:
            reports = self._rehearsed(place, *plan["master"])
            meeting.tell(f"reports/{meeting.slot}", _REPORTS.dump_python(reports, mode="json"))
        verdict = self._heard("verdict", self.how.rehearsal_s + patience)
        meeting.tell(f"bye/{meeting.slot}", True)
        rows = _ROWS.validate_python(verdict["rows"])
        mine = [row for row in rows if row.status == "fail" and self.facts.name in row.host.split(", ")]
        if mine:
            show(mine, (self.facts,))
        said = "passed" if verdict["passed"] else f"failed: see the table of the head {self.head}"
        _log.info("%s: preflight %s", self.facts.name, said)
        return bool(verdict["passed"])

    def _gathered(self) -> tuple[Hosts, list[int]]:
        """All hosts, and the slots of those but the head, in their order."""
        meeting = self.meeting
        if meeting is None:
            return Hosts((self.facts,)), []
        came, lost = meeting.others(
            self.wanted,
            self.how.timeout_s,
            lambda count: _log.info("%d of %d hosts have answered", count, self.wanted),
        )
        known: dict[int, HostFacts] = {}
        foreign: list[str] = []
        for slot, brought in sorted(came.items()):
            try:
                known[slot] = _FACTS.validate_python(brought["facts"])
            except ValidationError:
                foreign.append(str(brought["name"]))
        folder = not (self.recipe.checkpoint.to and is_url(self.recipe.checkpoint.to))
        mark = f".preflight-{secrets.token_hex(8)}" if folder and self.facts.target.problem is None else None
        slots = list(known)
        meeting.tell("met", {"slots": slots, "marker": mark})
        clocks: dict[str, Clock | None] = {}
        for slot, one in known.items():
            found = meeting.ask_time(slot)
            clocks[one.name] = None if found is None else Clock(*found)
        shares: dict[str, bool] = {}
        if mark is not None:
            with marker(self.recipe, mark):
                meeting.tell("marker", True)
                for slot, one in known.items():
                    if clocks[one.name] is not None and one.target.problem is None:
                        try:
                            shares[one.name] = bool(meeting.hear(f"marker/{slot}", _ANSWER_S))
                        except TimeoutError:
                            clocks[one.name] = None
        names = [self.facts.name, *(one.name for one in known.values()), *foreign]
        missing = [*(name for name in self.named if name not in names), *(name for name in lost if name not in names)]
        hosts = Hosts(
            (self.facts, *known.values()),
            self.wanted,
            missing=tuple(dict.fromkeys(missing)),
            strangers=tuple(name for name in names if self.named and name not in self.named),
            other_code=tuple(foreign),
            clocks=clocks,
            shares_target=shares,
        )
        return hosts, slots

    def _rehearsed(self, place: int, master: str, port: int) -> list[RankReport]:
        meeting = self.meeting
        return rehearse_here(
            self.recipe,
            host=self.facts.name,
            node=place,
            nodes=self.wanted,
            processes=self.facts.processes,
            master=(master, port),
            limit_s=self.how.rehearsal_s,
            resume=self.how.resume,
            override=self.how.override,
            failed_elsewhere=lambda: meeting is not None and meeting.knows("failed"),
            on_failure=lambda: meeting.tell("failed", self.facts.name) if meeting is not None else None,
        )

    def _reports_of(self, host: HostFacts, place: int, slot: int, deadline: float) -> list[RankReport]:
        assert self.meeting is not None
        try:
            return _REPORTS.validate_python(self.meeting.hear(f"reports/{slot}", deadline - time.monotonic()))
        except TimeoutError:
            ranks = range(place * host.processes, (place + 1) * host.processes)
            error = "its host does not answer any more"
            return [RankReport(rank, host.name, error=error, lost=True) for rank in ranks]

    def _heard(self, key: str, timeout_s: float) -> Any:
        assert self.meeting is not None
        try:
            return self.meeting.hear(key, timeout_s)
        except TimeoutError:
            raise WorkFailed(
                f"the head {self.head} said nothing to {self.facts.name} for {timeout_s:.0f} s; its output says why"
            ) from None


def _everything(
    passed: bool, rows: Sequence[Row], hosts: Hosts, reports: Sequence[RankReport] | None
) -> dict[str, Any]:
    return {
        "passed": passed,
        "rows": _ROWS.dump_python(list(rows), mode="json"),
        "hosts": TypeAdapter(Hosts).dump_python(hosts, mode="json"),
        "reports": None if reports is None else _REPORTS.dump_python(list(reports), mode="json"),
    }


def _refuse_unwritable(file: Path) -> None:
    """
    Raises:
        UserError: the table could not be written when all is measured.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"--json {file} cannot be written: {error.strerror or error}") from None
    if file.is_dir():
        raise UserError(f"--json {file} is a folder; give a file")


def _own_name(named: Sequence[str]) -> str:
    """As SLURM calls this host, or its host name; as `named` has it where they differ in the domain alone."""
    own = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    alike = [host for host in named if host.partition(".")[0] == own.partition(".")[0]]
    return alike[0] if own not in named and len(alike) == 1 else own


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM as an error, so that processes which were started are ended on the way out."""

    def end(number: int, frame: FrameType | None) -> None:
        raise WorkFailed(f"the preflight was ended by {signal.Signals(number).name}")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
