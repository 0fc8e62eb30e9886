"""A command with its environment: printed as a shell would take it, or run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from launchers.on_host import noted_signals
from launchers.site import Site


@dataclass(frozen=True)
class Command:
    """Words, and the variables that are set for them beside those that are there.

    >>> print(Command(["echo", "a b"], {"LANG": "C"}))
    LANG=C \\
        echo 'a b'
    """

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " \\\n    ".join([*variables, shlex.join(self.words)])

    def run(self) -> int:
        """The exit code; signals to this process are passed on, and its end waited for."""
        sys.stdout.flush()
        with noted_signals() as asked:
            process = subprocess.Popen(list(self.words), env=os.environ | self.environment)
            told = 0
            while process.poll() is None:
                for number in asked[told:]:
                    told += 1
                    if number != signal.SIGINT:  # which the terminal sends to both
                        process.send_signal(number)
                time.sleep(0.1)
            return process.returncode or (128 + asked[0] if asked else 0)

    def become(self) -> NoReturn:
        """Take this process's place, so that signals and the exit code are the command's."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(self.words[0], list(self.words), os.environ | self.environment)


def after_setup(words: Sequence[str], site: Site) -> list[str]:
    """The words, after the site's shell lines."""
    if not site.setup:
        return list(words)
    return ["bash", "-c", "\n".join([*site.setup, 'exec "$@"']), "bash", *words]


def medpretrain(words: Sequence[str], python: str = sys.executable) -> list[str]:
    """The words that start `medpretrain WORDS`, by this Python."""
    return [python, "-m", "medpretrain", *words]
