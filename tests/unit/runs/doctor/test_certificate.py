"""What doctor.json says besides its verdicts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from vlmrl.config.model import ModelConfig
from vlmrl.record.run_dir import is_certificate
from vlmrl.runs.doctor import certificate
from vlmrl.runs.doctor.certificate import checkpoint, digest


def test_a_small_file_has_the_digest_that_everyone_computes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"{}")
    assert digest(tmp_path / "a.json") == hashlib.sha256(b"{}").hexdigest()


def test_a_large_file_is_sampled_from_its_head_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "WHOLE_BYTES", 640)  # 64 samples of 10 bytes
    path = tmp_path / "model.safetensors"
    content = bytearray(100 * 256)
    path.write_bytes(content)
    digests = {digest(path)}
    for start in (0, len(content) // 2, len(content) - 600):
        path.write_bytes(content[:start] + b"x" * 600 + content[start + 600 :])
        digests.add(digest(path))
    path.write_bytes(content + b"\0")
    digests.add(digest(path))
    assert len(digests) == 5


def test_a_checkpoint_is_known_by_its_files_and_its_revision(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "4f3a"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "chat_template.jinja", "model.safetensors", "README.md"):
        (snapshot / name).write_text(name)
    found = checkpoint(ModelConfig(name="a/b"), snapshot)
    assert (found["name"], found["revision"]) == ("a/b", "4f3a")
    assert list(found["files"]) == ["chat_template.jinja", "config.json", "model.safetensors"]
    assert checkpoint(ModelConfig(name="a/b"), tmp_path)["revision"] is None


def test_what_no_doctor_wrote_is_no_certificate() -> None:
    line = {"name": "a", "verdict": "ok", "says": ""}
    whole: dict[str, object] = {"versions": {}, "checkpoint": {}, "settings": {}, "checks": [line]}
    assert is_certificate(whole)
    others: list[object] = [
        [],
        [line],
        {},
        {"checks": []},
        whole | {"checks": [1]},
        whole | {"checks": [{"name": "a"}]},
    ]
    assert not any(is_certificate(other) for other in others)
