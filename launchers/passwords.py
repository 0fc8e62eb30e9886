"""Passwords in URLs: scripts and manifests are printed, kept and read by others."""

from __future__ import annotations

import re

from data_prep.errors import UserError

SHOWN = (
    "a URL with a password in it, which scripts and manifests would show: leave it out, and set "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, where the "
    "run starts (on Kubernetes: --secret NAME)"
)

# A password may hold slashes, and then stands behind a colon that is no port's. git@ is how all come to a git server.
_BEFORE_HOST = re.compile(r"([\w+.-]+://)(?!git@)(?:[^\s'\"/]*|[^\s'\"/:]*:(?!\d*/)[^\s'\"]*)@")
_IN_QUERY = re.compile(r"([?&][\w-]*(?:password|token|secret|key)=)[^&\s'\"]+", re.IGNORECASE)


def without_passwords(text: str) -> str:
    """`text` with whatever stands before the host of its URLs, and secrets in their queries, as ***.

    >>> without_passwords("s3://AK:secret/key@bucket/run https://mlflow.example:5000/api@1?token=abc")
    's3://***@bucket/run https://mlflow.example:5000/api@1?token=***'
    """
    return _IN_QUERY.sub(r"\1***", _BEFORE_HOST.sub(r"\1***@", text))


def refuse_password(text: str, where: str = "") -> None:
    """
    Args:
        where: it stands; without it `text` is shown, but for the password.

    Raises:
        UserError: a URL in `text` holds one.
    """
    shown = without_passwords(text)
    if shown != text:
        raise UserError(f"{where or shown}: {SHOWN}")
