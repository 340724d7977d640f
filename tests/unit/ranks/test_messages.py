"""A message from rank 0 arrives unchanged, through shared memory and over the connection, and leaves no file open."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import warnings
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmrl.errors import RankError
from vlmrl.ranks import messages
from vlmrl.ranks.messages import LARGE_ARRAY_BYTES, Outbox, Probe, offer, receive

ARRAYS: dict[str, np.ndarray] = {
    "pixels": np.arange(300_000, dtype=np.float32).reshape(1000, 300),
    "odd": np.arange(LARGE_ARRAY_BYTES + 3, dtype=np.uint8),
    "ids": np.arange(10),
    "empty": np.empty((0, 3)),
}
KEY = bytes(range(32))
MESSAGE = ("learn", ARRAYS)

shared = pytest.param(True, marks=pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux"))


def sent_and_received(message: object, *, shares_memory: bool) -> tuple[Any, Outbox]:
    ours, theirs = Pipe()
    outbox = Outbox(ours, shares_memory=shares_memory)
    sending = threading.Thread(target=outbox.send, args=(message,))  # a pipe's buffer is smaller than an array
    sending.start()
    found = receive(theirs)
    sending.join()
    return found, outbox


def assert_equal(found: Any) -> None:
    assert found[0] == "learn"
    assert found[1].keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[1][name].dtype == array.dtype
        np.testing.assert_array_equal(found[1][name], array)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("shares_memory", [False, shared])
def test_what_arrives_is_what_was_sent_and_may_be_written_to(shares_memory: bool) -> None:
    found, outbox = sent_and_received(MESSAGE, shares_memory=shares_memory)
    outbox.answered()
    assert_equal(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about read-only arrays
        torch.from_numpy(found[1]["pixels"]).add_(1)
    assert ARRAYS["pixels"][0, 0] == 0


@pytest.mark.parametrize("shares_memory", [False, shared])
def test_read_only_arrays_stay_so(shares_memory: bool) -> None:
    """The pixels of an image are read-only, since many samples may share them."""
    pixels = ARRAYS["pixels"].copy()
    pixels.setflags(write=False)
    found, outbox = sent_and_received([pixels, pixels], shares_memory=shares_memory)
    outbox.answered()
    assert found[0] is found[1]
    assert not found[0].flags.writeable
    np.testing.assert_array_equal(found[0], pixels)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_shared_memory_that_is_gone_is_no_lost_connection() -> None:
    ours, theirs = Pipe()
    outbox = Outbox(ours, shares_memory=True)
    outbox.send(MESSAGE)
    outbox.answered()
    with pytest.raises(RankError, match=r"the shared memory with rank 0's message cannot be read: .*No such file"):
        receive(theirs)
    outbox.send(("leave", ()))
    assert receive(theirs) == ("leave", ())


@pytest.mark.parametrize("shares_memory", [False, shared])
def test_arrays_outlive_the_message_and_nothing_stays_open(shares_memory: bool) -> None:
    before = open_files()
    for _ in range(3):
        found, outbox = sent_and_received(MESSAGE, shares_memory=shares_memory)
        outbox.answered()
        del outbox
        assert_equal(found)
        del found
    assert open_files() == before


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_where_there_is_no_memory_to_share_arrays_go_over_the_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    before = open_files()
    monkeypatch.setattr(os, "pwrite", full)
    found, outbox = sent_and_received(MESSAGE, shares_memory=True)
    assert_equal(found)
    assert "No space left on device" in caplog.text
    del found, outbox
    assert open_files() == before


def test_small_messages_need_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_memory_file", lambda: pytest.fail("nothing is large"))
    found, _ = sent_and_received(("skip", (np.arange(100),)), shares_memory=True)
    np.testing.assert_array_equal(found[1][0], np.arange(100))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_a_probe_is_readable_where_it_was_offered_and_nowhere_else() -> None:
    probe, file = offer(KEY)
    assert file is not None
    assert probe.read() == KEY
    assert Probe(probe.path, hashlib.sha256(b"of another host").hexdigest()).read() is None
    os.close(file)
    assert probe.read() is None
    assert Probe(None, probe.digest).read() is None


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_a_key_comes_from_memory_of_this_user_only(tmp_path: Path) -> None:
    """Another user may change what stands in torch's store, and name a file whose content is known there."""
    probe, _ = offer(KEY)
    written = tmp_path / "key"
    written.write_bytes(KEY)
    assert Probe(str(written), probe.digest).read() is None
    if os.geteuid() == 0:
        theirs = os.memfd_create("theirs")
        os.write(theirs, KEY)
        os.fchown(theirs, 65534, 65534)
        assert Probe(f"/proc/{os.getpid()}/fd/{theirs}", probe.digest).read() is None


@pytest.mark.skipif(not hasattr(os, "memfd_create") or os.geteuid() != 0, reason="needs Linux and root")
def test_no_other_user_reads_the_key() -> None:
    probe, _ = offer(KEY)
    assert probe.path is not None
    found = subprocess.run(["/bin/cat", probe.path], user=65534, cwd="/", capture_output=True, text=True)
    assert "Permission denied" in found.stderr


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_a_probe_of_another_host_may_lead_anywhere() -> None:
    """There the path may be any open file: a pipe that stays empty, a device without an end, a larger file."""
    reading, writing = os.pipe()
    endless = os.open("/dev/zero", os.O_RDWR)
    larger = os.memfd_create("larger")
    os.truncate(larger, 33)
    for file in (reading, writing, endless, larger):
        assert Probe(f"/proc/{os.getpid()}/fd/{file}", hashlib.sha256(bytes(32)).hexdigest()).read() is None
        os.close(file)


def test_where_no_shared_memory_can_be_made_none_is_offered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", forbidden, raising=False)
    probe, file = offer(KEY)
    assert (probe.path, file) == (None, None)
    assert "Function not implemented" in caplog.text
    monkeypatch.delattr(os, "memfd_create")
    assert offer(KEY)[0].path is None
