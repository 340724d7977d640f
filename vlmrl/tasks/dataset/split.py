"""Which rows are held out: a function of the row alone.

Membership is decided when a row is drawn, from a hash of its question and its pixels. So nothing scans the data set,
every seed agrees, and two rows that ask the same thing are always on the same side, in whatever file and whatever
order they stand. Neither a path nor a row number goes into the hash, and pixels are hashed as decoded, so moving files
and packing images another way (PNG for BMP) change nothing.

Of a video file the bytes are hashed, since decoding all of it for each draw would cost seconds: a copy that was encoded
again is another video. A list of frames is hashed as decoded.

Left out on purpose: the answer (two rows with one question and two answers are a leak as well) and the system prompt
and template of the run (changing a prompt must not move rows from one side to the other).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from hashlib import blake2b

from vlmrl.tasks.dataset.videos import LoadedVideo, Media, media_hash


def content_hash(texts: Iterable[str], media: Iterable[Media]) -> str:
    """32 hex characters: blake2b of a row's question, and of its images and videos, each in order.

    `texts` are the texts of the question as they stand in the row, before any template, one for each message. Their
    Unicode form and their white space do not count. Images are uint8 [H, W, 3].

    >>> content_hash(["How many?"], []) == content_hash(["How  many? "], [])
    True
    >>> content_hash(["How", "many?"], []) == content_hash(["How many?"], [])
    False
    """
    digest = blake2b(digest_size=16)
    for text in texts:
        words = " ".join(unicodedata.normalize("NFC", text).split())
        data = words.encode("utf-8", "surrogatepass")
        digest.update(b"text %d:" % len(data) + data)
    for each in media:
        kind = b"video " if isinstance(each, LoadedVideo) else b"image "
        digest.update(kind + media_hash(each).encode())
    return digest.hexdigest()


def belongs_to_eval(content: str, fraction: float) -> bool:
    """Whether a row is held out, where `fraction` (0 to 1) of the rows are. `content` is its `content_hash`.

    A row that is held out for a fraction is held out for every larger one.

    >>> [belongs_to_eval(content_hash([f"{n} + 1?"], []), 0.5) for n in range(6)]
    [False, True, False, True, False, True]
    """
    return int(content[:16], 16) < fraction * 2**64
