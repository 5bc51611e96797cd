"""What the errors of stores and of other people's libraries mean, and what to do: the one table.

    an error -> its code (S3, GCS and Azure name one in XML, botocore in brackets), status or words -> Meaning

A code is believed wherever it comes from; a status where no code says more. HEAD has no body, so no code: who gets a bare 400 or
403 asks again with a GET.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from wds_tools.errors import NotFound, OutOfSpace, StorageError
from wds_tools.storage.base import redact

HINTS = {
    "s3": "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), and that they may use the bucket "
    "(a public one wants AWS_SKIP_SIGNATURE=true)",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS, and that this account may use the bucket",
    "az": "check AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, and that this account may use the container",
    "http": "this address needs a login, or forbids it",
    "hf": "check HF_TOKEN (or `hf auth login`), and that it may use this repository",
}

EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")
"""Codes for keys that were good before."""
_REASONS = (
    r"status code: (\d+ [A-Za-z ]+)",
    r"<Code>(\w+)</Code>",
    r'message: "([^"]+)"',  # of an errno, or of the resolver
    r"kind: (Timeout)",
)
_CODE = re.compile(r"<Code>(\w+)</Code>|error occurred \((\w+)\) when calling")
_REGION = re.compile(r"<Region>([\w-]+)</Region>|expecting '([\w-]+)'")


class Meaning(NamedTuple):
    """What happened, and what to do."""

    text: str
    """With "{hint}" for HINTS, "{bucket}" and "{region}"."""
    codes: str = ""
    """Separated by spaces."""
    statuses: tuple[int, ...] = ()
    words: str = ""
    """A pattern in the error's type and own words."""
    kind: type[StorageError] = StorageError


TABLE = (
    Meaning(
        "this machine's clock is wrong, and requests are signed with the time: set it (by NTP, say)",
        "RequestTimeTooSkewed RequestExpired RequestInTheFuture",
    ),
    Meaning(
        "the keys have expired: get new ones (AWS_SESSION_TOKEN has an end, so has `aws sso login`)",
        " ".join(EXPIRED),
    ),
    Meaning(
        "the bucket is in another region{region}: set AWS_REGION",
        "AuthorizationHeaderMalformed PermanentRedirect TemporaryRedirect IllegalLocationConstraintException",
        (301, 307),
        "inner: BareRedirect",
    ),
    Meaning("there is no bucket {bucket}: create it, or correct the URL", "NoSuchBucket ContainerNotFound", kind=NotFound),
    Meaning(
        "the store does not know this key: check AWS_ACCESS_KEY_ID (and AWS_SESSION_TOKEN, and AWS_ENDPOINT_URL)",
        "InvalidAccessKeyId InvalidToken InvalidClientTokenId",
    ),
    Meaning("the secret is not that of the key: check AWS_SECRET_ACCESS_KEY, and this machine's clock", "SignatureDoesNotMatch"),
    Meaning("it is in an archive: restore it first, or copy it to another storage class", "InvalidObjectState"),
    Meaning("the store says that it is full", "StorageFull XMinioStorageFull QuotaExceeded", (507,), kind=OutOfSpace),
    Meaning("nothing is there", "NoSuchKey BlobNotFound", (404,), "^(FileNotFound|NotFound)Error ", NotFound),
    Meaning("access denied: no keys were found; {hint}", words=r"169\.254\.169\.254"),
    Meaning(
        "access denied: {hint}",
        "AccessDenied AllAccessDisabled AuthenticationFailed",
        (401, 403),
        "^(PermissionDenied|Unauthenticated|Permission)Error ",
    ),
)


def translated(error: BaseException, show: str, verb: str, scheme: str, bucket: str) -> StorageError | None:
    """Our error for a foreign one, to be raised from it: by its code, else by its own words, else by its status.

    Args:
        error: the foreign one.
        show: the URL.
        verb: what was tried.
        scheme: a key of HINTS, or another.
        bucket: its name.

    Returns:
        None if the table has no row for it.
    """
    code, words, status = code_of(error), f"{type(error).__name__} {error}", status_of(error)
    by_code = (row for row in TABLE if code in row.codes.split())
    by_words = (row for row in TABLE if row.words and re.search(row.words, words))
    by_status = (row for row in TABLE if status in row.statuses)
    row = next((row for rows in (by_code, by_words, by_status) for row in rows), None)
    if row is None:
        return None
    found = _REGION.search(words)
    region = f" ({found[1] or found[2]})" if found else ""
    text = row.text.format(hint=HINTS.get(scheme, "check the keys of this protocol"), bucket=bucket, region=region)
    return row.kind(f"{show}: can't {verb}, {text}" + ("" if row.kind is NotFound else f" ({reason(error)})"))


def reason(error: BaseException) -> str:
    """What a foreign message comes down to: status and S3's word for it, what the socket said, or its first line."""
    text = str(error)
    parts = [match[1] for pattern in _REASONS if (match := re.search(pattern, text))]
    return ": ".join(parts) or redact(text.partition("\n")[0])[:300] or type(error).__name__


def code_of(error: BaseException) -> str:
    """The store's word for what is wrong, "NoSuchKey"; "" without one."""
    found = _CODE.search(str(error))
    return (found[1] or found[2]) if found else ""


def status_of(error: BaseException) -> int | None:
    """The HTTP status: in obstore's message, which has no field for it, or of an error's response; None without one."""
    _, found, rest = str(error).partition("status code: ")
    if found and rest[:3].isdigit():
        return int(rest[:3])
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
    return status if isinstance(status, int) else None
