"""What has changed since an older certificate."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from vlmrl.errors import ConfigError
from vlmrl.preflight.rules.past_run import older_certificate
from vlmrl.runs.doctor.changes import changes


def line(name: str, verdict: str = "ok", **figures: float | None) -> dict[str, Any]:
    return {"name": name, "verdict": verdict, "says": "", "bound": "", "figures": figures}


def certificate() -> dict[str, Any]:
    return {
        "versions": {"python": "3.11.7", "transformers": "5.19.0", "vllm": "0.32.0"},
        "checkpoint": {"name": "a", "files": {"config.json": "1" * 64, "chat_template.jinja": "2" * 64}},
        "settings": {"packing": "tree", "attention": ["full"]},
        "checks": [
            line("pixels", images=20),
            line("logprobs, version 0", mismatch_kl=1e-13, max_delta=3e-6, limit=1e-8, max_limit=1e-4, tokens=576),
            line("images, trainer", mismatch_kl=2.5, limit=1e-8),
            line("weights", compared=67, differing=0, unmatched=0),
        ],
    }


def found(now: dict[str, Any]) -> list[tuple[str, str]]:
    return [(change.title, change.line) for change in changes(certificate(), now)]


def test_an_equal_certificate_has_not_changed() -> None:
    assert found(certificate()) == []


def test_rounding_and_sharper_images_are_no_change() -> None:
    now = certificate()
    now["checks"][1]["figures"] |= {"mismatch_kl": 8e-13, "max_delta": 9e-6}
    now["checks"][2]["figures"]["mismatch_kl"] = 900.0
    assert found(now) == []


def test_versions_files_and_settings() -> None:
    now = certificate()
    now["versions"] = {"python": "3.11.7", "transformers": "5.20.0", "tokenizers": "0.24"}
    now["checkpoint"]["files"]["chat_template.jinja"] = "3" * 64
    now["settings"]["packing"] = "varlen"
    assert found(now) == [
        ("versions transformers", "5.19.0 → 5.20.0"),
        ("versions vllm", "0.32.0 → absent"),
        ("versions tokenizers", "absent → 0.24"),
        ("files chat_template.jinja", "222222222222 → 333333333333"),
        ("settings packing", "tree → varlen"),
    ]


def test_verdicts_and_numbers() -> None:
    now = certificate()
    now["checks"][1] = line(
        "logprobs, version 0", "FAILED", mismatch_kl=3.4e-6, max_delta=2e-3, limit=1e-8, max_limit=1e-4, tokens=576
    )
    now["checks"][3] = line("weights", compared=66, differing=0, unmatched=1)
    del now["checks"][0]
    now["checks"].append(line("gradient, one by one", relative=1e-6))
    assert found(now) == [
        ("verdict logprobs, version 0", "ok → FAILED"),
        ("number logprobs, version 0, mismatch_kl", "1e-13 → 3.4e-06"),
        ("number logprobs, version 0, max_delta", "3e-06 → 0.002"),
        ("number weights, compared", "67 → 66"),
        ("number weights, unmatched", "0 → 1"),
        ("verdict gradient, one by one", "absent → ok"),
        ("verdict pixels", "ok → absent"),
    ]


def test_an_error_that_grows_within_its_bound_is_seen() -> None:
    now = certificate()
    now["checks"][1]["figures"] |= {"mismatch_kl": 5e-9, "max_delta": 9e-5}
    assert found(now) == [("number logprobs, version 0, mismatch_kl", "1e-13 → 5e-09")]
    now["checks"][1]["figures"]["mismatch_kl"] = None  # what JSON has of NaN
    assert found(now) == [("number logprobs, version 0, mismatch_kl", "1e-13 → absent")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is no JSON"),
        ("{}", "was not written by mode=doctor"),
        ('[{"name": "pixels"}]', "is of an older vlmrl and names no versions"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "doctor.json").write_text(content)
    for named in (tmp_path, tmp_path / "doctor.json"):
        with pytest.raises(ConfigError) as error:
            older_certificate(str(named))
        assert str(error.value).startswith(f"against={named}: {tmp_path}/doctor.json ")
        assert said in str(error.value)


def test_a_run_and_its_file_name_the_same_certificate(tmp_path: Path) -> None:
    (tmp_path / "doctor.json").write_text(json.dumps(certificate()))
    before = copy.deepcopy(certificate())
    assert older_certificate(str(tmp_path)) == older_certificate(str(tmp_path / "doctor.json")) == before
