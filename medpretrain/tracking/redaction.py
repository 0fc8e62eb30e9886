"""Passwords and tokens are cut out of whatever is shown or kept."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from launchers.site import SECRET_NAMES

_SHORTEST_SECRET = 8  # anything shorter in an unknown variable would blank out ordinary words


def redact(text: str, uri: str = "") -> str:
    """`text` without the passwords and tokens that URIs in it, `uri` or the environment's variables hold.

    >>> redact("cannot reach https://me:secret@mlflow.example/api?token=abc")
    'cannot reach https://***@mlflow.example/api?token=***'
    """
    credentials = re.match(r"[\w+.-]+://(\S*)@", uri)
    known = [os.environ.get(name, "") for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")]
    known += [
        value
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name) and len(value) >= _SHORTEST_SECRET and not value.startswith("/")  # no file's path
    ]
    if credentials:
        password = credentials[1].partition(":")[2]
        known += [password, unquote(password), credentials[1]]
    for secret in sorted(filter(None, known), key=len, reverse=True):
        text = text.replace(secret, "***")
    # Rather a path with an @ cut than a password shown; what is refused as one is told more finely.
    text = re.sub(r"([\w+.-]+://)[^\s'\"]*@", r"\1***@", text)
    return re.sub(r"(?i)(\b[\w-]*(?:password|token|secret|key)=)[^&\s'\"]+", r"\1***", text)
