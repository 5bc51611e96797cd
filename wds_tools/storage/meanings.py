"""What the errors of stores and of other people's libraries mean, and what to do: the one table.

    an error -> its code (S3, GCS and Azure name one in XML, botocore in brackets), status or words -> Meaning

A code is believed wherever it comes from; a status where no code says more. HEAD has no body, so no code: who gets a bare 400 or
403 asks again with a GET.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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

_REASONS = (
    r"status code: (\d+ [A-Za-z ]+)",
    r"<Code>(\w+)</Code>",
    r'message: "([^"]+)"',  # of an errno, or of the resolver
    r"kind: (Timeout)",
)
_CODE = re.compile(r"<Code>(\w+)</Code>|error occurred \((\w+)\) when calling")
_REGION = re.compile(r"<Region>([\w-]+)</Region>|expecting '([\w-]+)'")


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What happened, and what to do."""

    text: str
    """With "{hint}" for HINTS, "{bucket}" and "{region}"."""
    codes: frozenset[str] = frozenset()
    statuses: frozenset[int] = frozenset()
    words: str = ""
    """A pattern in the error's own words."""
    kind: type[StorageError] = StorageError


TABLE = (
    Meaning(
        text="this machine's clock is wrong, and requests are signed with the time: set it (by NTP, say)",
        codes=frozenset({"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"}),
    ),
    Meaning(
        text="the keys have expired: get new ones (AWS_SESSION_TOKEN has an end, so has `aws sso login`)",
        codes=frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}),
    ),
    Meaning(
        text="the bucket is in another region{region}: set AWS_REGION",
        codes=frozenset(
            {"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException"}
        ),
        statuses=frozenset({301, 307}),
        words="inner: BareRedirect",
    ),
    Meaning(
        text="there is no bucket {bucket}: create it, or correct the URL",
        codes=frozenset({"NoSuchBucket", "ContainerNotFound"}),
        kind=NotFound,
    ),
    Meaning(
        text="the store does not know this key: check AWS_ACCESS_KEY_ID (and AWS_SESSION_TOKEN, and AWS_ENDPOINT_URL)",
        codes=frozenset({"InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId"}),
    ),
    Meaning(
        text="the secret is not that of the key: check AWS_SECRET_ACCESS_KEY, and this machine's clock",
        codes=frozenset({"SignatureDoesNotMatch"}),
    ),
    Meaning(
        text="it is in an archive: restore it first, or copy it to another storage class", codes=frozenset({"InvalidObjectState"})
    ),
    Meaning(
        text="the store says that it is full",
        codes=frozenset({"StorageFull", "XMinioStorageFull", "QuotaExceeded"}),
        statuses=frozenset({507}),
        kind=OutOfSpace,
    ),
    Meaning(
        text="nothing is there",
        codes=frozenset({"NoSuchKey", "BlobNotFound"}),
        statuses=frozenset({404}),
        words="^(FileNotFound|NotFound)Error ",
        kind=NotFound,
    ),
    Meaning(text="access denied: no keys were found; {hint}", words=r"169\.254\.169\.254"),
    Meaning(
        text="access denied: {hint}",
        codes=frozenset({"AccessDenied", "AllAccessDisabled", "AuthenticationFailed"}),
        statuses=frozenset({401, 403}),
        words="^(PermissionDenied|Unauthenticated|Permission)Error ",
    ),
)


def meaning_of(error: BaseException) -> Meaning | None:
    """The row of an error, by its code, else by its own words, else by its status; None if it has none."""
    code, words, status = code_of(error), f"{type(error).__name__} {error}", status_of(error)
    by_code = (row for row in TABLE if code in row.codes)
    by_words = (row for row in TABLE if row.words and re.search(row.words, words))
    by_status = (row for row in TABLE if status in row.statuses)
    return next((row for rows in (by_code, by_words, by_status) for row in rows), None)


def translated(error: BaseException, row: Meaning, show: str, verb: str, scheme: str, bucket: str) -> StorageError:
    """Our error for one that has a row, to be raised from it.

    Args:
        error: the foreign one.
        row: of the table.
        show: the URL.
        verb: what was tried.
        scheme: a key of HINTS, or another.
        bucket: its name.
    """
    region = _REGION.search(str(error))
    text = row.text.format(
        hint=HINTS.get(scheme, "check the keys of this protocol"),
        bucket=bucket,
        region=f" ({region[1] or region[2]})" if region else "",
    )
    why = "" if row.kind is NotFound else f" ({reason(error)})"
    return row.kind(f"{show}: can't {verb}, {text}{why}")


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
