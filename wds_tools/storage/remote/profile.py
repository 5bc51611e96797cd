"""Keys in a profile of AWS' own tools, which obstore does not read: boto3 is asked for them.

Keys of a role, of `aws sso login` or of a program have an end, before which boto3 gets new ones. Those that stand in a file are
looked at again and again, since whoever rotates them writes that file.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from wds_tools.errors import MissingPackage, StorageError
from wds_tools.storage.base import cause
from wds_tools.storage.remote.meanings import reason

LOOK_EVERY_S = 30.0


def has_default_profile(settings: Mapping[str, str]) -> bool:
    """Whether the files of AWS' own tools have a profile of that name."""
    files = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
    for variable, name in files.items():
        with suppress(OSError):
            if "[default]" in Path(settings.get(variable) or Path.home() / ".aws" / name).read_text("utf-8", "replace"):
                return True
    return False


class ProfileKeys:
    """What obstore calls for keys that are less than five minutes from their end, at most ten times a second.

    Args:
        name: of the profile, for messages: boto3 finds it by AWS_PROFILE.

    Raises:
        MissingPackage: boto3 isn't here.
        StorageError: the profile gives no keys.
    """

    def __init__(self, name: str) -> None:
        try:
            self._keys = self._look()
        except ImportError as error:
            raise MissingPackage(
                f"the keys are in the profile {name} (AWS_PROFILE, ~/.aws), which takes boto3 to read: pip install boto3, or set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for a public bucket AWS_SKIP_SIGNATURE=true)"
            ) from error
        except Exception as error:  # noqa: BLE001  boto3's errors have no base that is here without it
            raise StorageError(f"the profile {name} (AWS_PROFILE, ~/.aws) gives no keys: {reason(error)}") from cause(error)
        self.config = self._keys.config

    def __call__(self) -> Any:
        """The keys, and until when obstore need not ask again."""
        is_due = time.monotonic() - self._looked_at > LOOK_EVERY_S
        if is_due and not hasattr(self._keys.credentials, "refresh_needed"):  # those with an end boto3 renews by itself
            with suppress(Exception):  # the file is just being written, say: the keys so far may still do
                self._keys = self._look()
        return self._keys()

    def _look(self) -> Any:
        self._looked_at = time.monotonic()
        return importlib.import_module("obstore.auth.boto3").Boto3CredentialProvider(ttl=timedelta(seconds=LOOK_EVERY_S))
