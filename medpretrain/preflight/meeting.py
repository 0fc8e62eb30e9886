"""How the agents of a preflight find each other: a store of torch on the head, to which every host checks in.

Keys of the store: `arrived` counts those that came; `name/SLOT` is who it is; `sign/SLOT` changes while it looks at
itself; `in/SLOT` is what it brought; `met` tells who is there, in order.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from data_prep.errors import WorkFailed
from launchers.head import Head
from medpretrain.preflight.patience import answered

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

HEAD = 0
SILENT_S = 30.0
"""A host of which nothing is heard for so long is lost."""
_POLL_S = 0.05
_POLL_TIME_S = 0.001
_ROUND_TRIPS = 9
Result = TypeVar("Result")


class Meeting:
    """A store in which the agents leave each other words, as JSON.

    Attributes:
        slot: 0 on the head; elsewhere the number of its arrival.
    """

    def __init__(self, store: TCPStore, slot: int, name: str, head: Head) -> None:
        self._store, self.slot, self.name, self._head = store, slot, name, head

    @property
    def leads(self) -> bool:
        return self.slot == HEAD

    def tell(self, key: str, value: Any) -> None:
        self._asked(lambda: self._store.set(key, json.dumps(value)))

    def knows(self, key: str) -> bool:
        return bool(self._asked(lambda: self._store.check([key])))

    def hear(self, key: str, timeout_s: float, every_s: float = _POLL_S) -> Any:
        """What was told under `key`, once it is; asked for again and again, since torch warns of each wait that ends.

        Raises:
            TimeoutError: nothing was.
            WorkFailed: the head is lost.
        """
        deadline = time.monotonic() + timeout_s
        while not self.knows(key):
            if time.monotonic() >= deadline:
                raise TimeoutError(key)
            time.sleep(every_s)
        return json.loads(self._asked(lambda: self._store.get(key)))

    def arrive(self) -> None:
        """A host that is not the head says who it is, before it looks at itself."""
        self.tell(f"name/{self.slot}", self.name)

    def sign(self) -> None:
        """It is still there."""
        if not self.leads:
            self._asked(lambda: self._store.add(f"sign/{self.slot}", 1))

    def check_in(self, brought: Any) -> None:
        """A host that is not the head leaves what it brings."""
        self.tell(f"in/{self.slot}", brought)

    def others(
        self, nodes: int, timeout_s: float, on_arrival: Callable[[int], None]
    ) -> tuple[dict[int, Any], list[str]]:
        """On the head: what each other host brought, by its slot, and the names of those that came and were lost.

        Ends when all have brought it, or when the time is over and no host that came in it shows a sign of life.
        """
        found: dict[int, Any] = {}
        signs: dict[int, tuple[int, float]] = {}
        deadline = time.monotonic() + timeout_s
        while len(found) < nodes - 1:
            for slot in range(1, int(self._asked(lambda: self._store.add("arrived", 0))) + 1):
                if slot not in found and self.knows(f"in/{slot}"):
                    found[slot] = self.hear(f"in/{slot}", 0)
                    on_arrival(len(found) + 1)
                elif slot not in found:
                    sign = int(self._asked(lambda slot=slot: self._store.add(f"sign/{slot}", 0)))  # type: ignore[misc]
                    if slot not in signs or signs[slot][0] != sign:
                        signs[slot] = sign, time.monotonic()
            now = time.monotonic()
            if now > deadline and not [s for s, (_, at) in signs.items() if s not in found and now - at < SILENT_S]:
                break
            time.sleep(_POLL_S)
        lost = [slot for slot in signs if slot not in found and self.knows(f"name/{slot}")]
        return found, [str(self.hear(f"name/{slot}", 0)) for slot in lost]

    def ask_time(self, slot: int, timeout_s: float = 10.0) -> tuple[float, float] | None:
        """On the head: how far the clock of a host is ahead of ours, and how exactly that is known, in seconds.

        The host answers between our question and our hearing of it, so half the shortest round trip is the accuracy.
        None where it does not answer.
        """
        best: tuple[float, float] | None = None
        for turn in range(_ROUND_TRIPS):
            asked = time.time()
            self.tell(f"time/{slot}/{turn}", asked)
            try:
                said = float(self.hear(f"time/{slot}/{turn}/answer", timeout_s, _POLL_TIME_S))
            except TimeoutError:
                return best
            heard = time.time()
            if best is None or (heard - asked) / 2 < best[1]:
                best = said - (asked + heard) / 2, (heard - asked) / 2
        return best

    def answer_time(self, timeout_s: float) -> None:
        """On another host: the other end of `ask_time`."""
        for turn in range(_ROUND_TRIPS):
            self.hear(f"time/{self.slot}/{turn}", timeout_s, _POLL_TIME_S if turn else _POLL_S)
            self.tell(f"time/{self.slot}/{turn}/answer", time.time())

    def _asked(self, call: Callable[[], Result]) -> Result:
        """An answer of the store; torch waits without end for one on a host that has fallen silent."""
        from torch.distributed import DistError

        try:
            return answered(call, SILENT_S)
        except TimeoutError:
            said = f"it gave no answer for {SILENT_S:.0f} s"
        except DistError as error:
            said = str(error).splitlines()[0]
        raise WorkFailed(f"{self.name} has lost the head {self._head} ({said}); its own output says why")


def meet(head: Head, name: str, nodes: int, timeout_s: float) -> Meeting:
    """Host the store where the head's address is one of this machine's; else find it, which may start later.

    Where the port is taken on the head itself, another agent of this machine has it already, and is joined.

    Raises:
        WorkFailed: torch is not installed, the head's name does not resolve, it cannot be reached in time, or as many
            as `nodes` are there.
    """
    try:
        from torch._C._distributed_c10d import TCPStore
        from torch.distributed import DistError
    except ModuleNotFoundError:
        raise WorkFailed(f"torch is not installed on {name}, so it cannot meet the others: pip install torch") from None
    deadline = time.monotonic() + timeout_s
    listening = _listen(head)
    if listening is not None:
        store = TCPStore(
            head.host,
            head.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listening.detach(),
        )
        return Meeting(store, HEAD, name, head)
    _reach(head, name, deadline, timeout_s)
    left = timedelta(seconds=max(5.0, deadline - time.monotonic()))

    def join() -> tuple[TCPStore, int]:
        store = TCPStore(head.host, head.port, is_master=False, wait_for_workers=False, timeout=left)
        return store, int(store.add("arrived", 1))

    try:
        store, slot = answered(join, SILENT_S)
    except (DistError, TimeoutError) as error:
        said = (str(error) or f"it says nothing for {SILENT_S:.0f} s").splitlines()[0]
        raise WorkFailed(f"what answers at {head} is no head of a preflight: {said}; take another port") from None
    if slot >= nodes:
        raise WorkFailed(f"{name} comes to {head} as host number {slot + 1}, and {nodes} are wanted: see --nodes")
    meeting = Meeting(store, slot, name, head)
    meeting.arrive()
    return meeting


def _listen(head: Head) -> socket.socket | None:
    """A socket on the head's port, if the head is this machine and nobody has it.

    It listens on all addresses, for a machine's own name may mean a loopback address to itself alone; where loopback is
    asked for, on that only.
    """
    for family, kind, protocol, _, where in _resolved(head):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((where[0], 0))
            except OSError:
                continue
        only_here = head.host == "localhost" or head.host.startswith("127.") or head.host == "::1"
        everywhere = "::" if family == socket.AF_INET6 else "0.0.0.0"
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((where[0] if only_here else everywhere, head.port))
            listening.listen(4096)
        except OSError:
            listening.close()
            return None
        return listening
    return None


def _resolved(head: Head) -> list[Any]:
    try:
        return socket.getaddrinfo(head.host, head.port, type=socket.SOCK_STREAM)
    except OSError:
        return []


def _reach(head: Head, name: str, deadline: float, timeout_s: float) -> None:
    """Wait until something answers at the head's address.

    Raises:
        WorkFailed: nothing does.
    """
    while True:
        try:
            with socket.create_connection((head.host, head.port), timeout=2.0):
                return
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise WorkFailed(
                f"{name} cannot reach the head {head} ({why}), tried for {timeout_s:.0f} s; was the command started "
                "there, is it a name that this host resolves, and does a firewall let the port through?"
            )
        time.sleep(0.5)
