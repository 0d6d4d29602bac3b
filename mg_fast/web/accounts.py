"""Who may use a server: names with passwords from a file, asked for by HTTP's Basic scheme."""

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Mapping

from ..errors import PromptError, quoted

REALM = 'Basic realm="mg_fast", charset="UTF-8"'


class Accounts:
    """Names and passwords, of which only digests are held.

    Args:
        passwords: by name.
    """

    def __init__(self, passwords: Mapping[str, str]):
        # Digests have one length, so comparing them tells nothing of a password's length.
        self._digests = {name: _digest(password) for name, password in passwords.items()}

    @classmethod
    def read(cls, path: str) -> "Accounts":
        """The accounts of a file with lines `name:password`; empty lines and those that begin with # are left out.

        Raises:
            PromptError: the file cannot be read, others than its owner may read it, or a line is no account.
        """
        try:
            with open(path, encoding="utf-8") as file:
                mode, lines = os.fstat(file.fileno()).st_mode, file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"--auth {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if os.name == "posix" and mode & 0o077:
            raise PromptError(f"--auth {path}: others may read this file: chmod 600 {path}")
        passwords = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, colon, password = line.partition(":")
            if not name or not colon or not password:
                raise PromptError(f"--auth {path}, line {number}: expected name:password")
            if name in passwords:
                raise PromptError(f"--auth {path}, line {number}: {quoted(name)} stands there twice")
            passwords[name] = password
        if not passwords:
            raise PromptError(f"--auth {path}: expected at least one line name:password")
        return cls(passwords)

    def name_of(self, authorization: str) -> str | None:
        """The name that an `Authorization` header proves; None where it proves none."""
        kind, _, encoded = authorization.partition(" ")
        if kind.lower() != "basic":
            return None
        try:
            name, colon, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
        # An unknown name takes as long as a known one.
        right = self._digests.get(name, _digest("\0"))
        return name if hmac.compare_digest(right, _digest(password)) and colon and name in self._digests else None


def _digest(password: str) -> bytes:
    return hashlib.sha256(password.encode()).digest()
