"""The two checksums of the format. Both find damage; neither is proof against somebody who wants to deceive.

    crc32         of each sample's bytes, in the index: the CRC-32 of zlib and gzip (by ISA-L, ten times zlib's speed)
    content_hash  of each tar, in manifest and index: XXH3-128, as `xxh128sum` prints it

SHA-256 and zlib's CRC together took a seventh of a conversion's time; these take a fiftieth. See docs/decisions.
"""

from isal.isal_zlib import crc32
from xxhash import xxh3_128 as content_hash

__all__ = ["content_hash", "crc32"]
