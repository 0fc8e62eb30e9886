"""Pseudonyms: keyed hashes of patient, study, series and instance, and the key that makes them.

HMAC-SHA256 (RFC 2104) with a secret key, since a bare hash of a record number is found again by hashing all numbers.
The key belongs to the hospital and never lies in a dataset.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
import unicodedata
from pathlib import Path

from data_prep.errors import UserError

KEY_BYTES = 32
_LEAST_DISTINCT = 8  # 32 random bytes have about 30 different ones, as hex about 14


class Pseudonyms:
    """Pseudonyms under one key: a letter and 128 bits in hex; the same value and key always give the same.

    Values are stripped of padding and compared as Unicode in normal form C; an empty one has no pseudonym (None).

    >>> pseudonyms = Pseudonyms(bytes(range(32)))
    >>> pseudonyms.study("1.2.3") == pseudonyms.study("1.2.3 "), pseudonyms.study("") is None
    (True, True)
    """

    def __init__(self, key: bytes) -> None:
        assert len(key) >= KEY_BYTES
        self._key = key

    def __repr__(self) -> str:
        return f"Pseudonyms(key_id={self.key_id!r})"

    @property
    def key_id(self) -> str:
        """Says whether two runs had the same key, and nothing else of it: 64 bits of the HMAC of a constant."""
        return hmac.digest(self._key, b"medpretrain key id", "sha256")[:8].hex()

    def patient(self, patient_id: str | None, issuer: str | None = None) -> str | None:
        """`p...` of PatientID within IssuerOfPatientID: two hospitals may give the same number to two patients."""
        if not _normal(patient_id):
            return None
        return self._hash("p", patient_id, issuer)

    def study(self, uid: str | None) -> str | None:
        """`s...` of StudyInstanceUID."""
        return self._hash("s", uid)

    def series(self, uid: str | None) -> str | None:
        """`e...` of SeriesInstanceUID."""
        return self._hash("e", uid)

    def instance(self, uid: str | None) -> str | None:
        """`i...` of SOPInstanceUID."""
        return self._hash("i", uid)

    def _hash(self, letter: str, *values: str | None) -> str | None:
        parts = [_normal(value) for value in values]
        if not any(parts):
            return None
        # Lengths first, so that no two lists of values join to the same bytes.
        message = b"".join((b"medpretrain ", letter.encode(), *(b"%d:" % len(part) + part for part in parts)))
        return letter + hmac.digest(self._key, message, "sha256")[:16].hex()


def _normal(value: str | None) -> bytes:
    if value is None:
        return b""
    return unicodedata.normalize("NFC", value).strip(" \0\t\r\n").encode("utf-8", "surrogatepass")


def load_key(path: Path) -> bytes:
    """Read a key file: its bytes, less one newline at the end.

    Raises:
        UserError: no such file; others may read it; too short; or not random.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(1 << 16)
    except OSError as error:
        raise UserError(f"the key file {path} cannot be read: {error.strerror}") from None
    if os.name == "posix" and mode & (stat.S_IROTH | stat.S_IWOTH):
        raise UserError(f"the key file {path} is open to every user of this machine; run: chmod 600 {path}")
    key = content.removesuffix(b"\n").removesuffix(b"\r")
    if len(key) < KEY_BYTES:
        raise UserError(f"the key file {path} holds {len(key)} bytes; a key needs at least {KEY_BYTES} random ones")
    periodic = key in (key + key)[1:-1]
    if periodic or len(set(key)) < _LEAST_DISTINCT:
        raise UserError(f"the key file {path} does not hold random bytes: whoever guesses it finds the patients again")
    return key


def write_key(path: Path) -> None:
    """Write a new random key (hex, mode 0600) where no file is yet.

    Raises:
        UserError: the file exists, or its folder cannot be written.
    """
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        raise UserError(f"{path} exists; a key that is replaced makes other pseudonyms of the same patients") from None
    except OSError as error:
        raise UserError(f"the key file {path} cannot be written: {error.strerror}") from None
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_hex(KEY_BYTES).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
