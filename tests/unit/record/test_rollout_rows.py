"""Files of rollouts: exact numbers, several row groups, and files that a stranger or a broken disk has made."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.rollout_builders import group, rollout
from support.rollout_files import edit
from vlmrl.errors import VlmrlError
from vlmrl.record import rollout_rows, rollout_table
from vlmrl.record.rollout_schema import OLD_TURNS, SCHEMA
from vlmrl.record.rollout_table import encode, reference_text
from vlmrl.record.rollouts import RolloutRecord, read_rollouts
from vlmrl.record.tool_fields import message_of, tools_of
from vlmrl.types import Message, Printed, Supports, Text, TokenMetrics, ToolCall, ToolSpec, TurnSampling


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "step_000001.parquet"
    made.write_bytes(encode(1, {"train": group(8).rollouts}))
    return made


def read(path: Path, wanted: Callable[[str], bool] = lambda rollout_id: True) -> tuple[list[RolloutRecord], list[str]]:
    """The records, and the sentences about damage."""
    said: list[str] = []
    return list(read_rollouts(path, wanted, said.append)), said


def test_every_bit_of_a_float_comes_back(tmp_path: Path) -> None:
    """Also those of numbers that JSON has no name for: NaN with a payload, infinities, -0.0, subnormal numbers."""
    bits = np.array([0x7FC12345, 0xFF800000, 0x7F800000, 0x80000000, 1, 0x3F800001], np.uint32)
    bits = np.concatenate([bits, np.random.default_rng(0).integers(0, 2**32, 250, np.uint32)])
    made = rollout(tokens=256)
    for turn in made.turns:
        object.__setattr__(turn.completion, "logprobs", bits.view(np.float32))
        turn.learned = TokenMetrics(bits[::-1].copy().view(np.float32), np.roll(bits, 7).view(np.float32))
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(encode(1, {"train": [made]}))
    turns = pq.read_table(path).column("turns").combine_chunks().flatten()
    for name, wanted in (("logprobs", bits), ("trainer_logprobs", bits[::-1]), ("entropies", np.roll(bits, 7))):
        found = turns.field(name).flatten().to_numpy().view(np.uint32)
        assert np.array_equal(found, np.concatenate([wanted, wanted])), name


@pytest.mark.parametrize(
    "kind", OLD_TURNS, ids=["before supports", "before stop", "before tools", "before starts_over", "before gaps"]
)
def test_an_older_file_lacks_columns(path: Path, kind: Any) -> None:
    whole, _ = read(path)
    rows = pq.read_table(path).to_pylist()
    turns = SCHEMA.get_field_index("turns")
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA.set(turns, pa.field("turns", kind))), path)
    assert read(path) == (whole, [])
    assert {turn["starts_over"] for record in whole for turn in record["turns"]} == {False}
    assert {place[3] for record in whole for turn in record["turns"] for place in turn["placeholders"]} == {()}


def test_the_stop_string_that_ended_a_completion_is_recorded(tmp_path: Path) -> None:
    made = rollout()
    made.turns[0].completion = replace(made.turns[0].completion, stop="Observation:")
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(encode(1, {"train": [made]}))
    (record,), said = read(path)
    assert (said, [turn["stop"] for turn in record["turns"]]) == ([], ["Observation:", None])


def test_from_which_tokens_a_token_was_sampled_is_recorded(tmp_path: Path) -> None:
    """Sizes and ids, of which a size of 0 stands for the whole vocabulary; null for a turn without."""
    made = rollout(tokens=3)
    made.turns[0].completion = replace(made.turns[0].completion, supports=Supports.of([[5, 70000], [], [9]]))
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(encode(1, {"train": [made]}))
    (record,), said = read(path)
    found = [(turn["support_sizes"], turn["support_ids"]) for turn in record["turns"]]
    assert (said, found) == ([], [([2, 0, 1], [5, 70000, 9]), (None, None)])


@pytest.mark.parametrize(
    ("sizes", "ids"), [([2, 0], [5, 6]), ([2, 0, 1], [5, 6]), ([3, -1, 1], [5, 6, 7]), ([1, 1, 1], None)]
)
def test_supports_that_no_run_wrote_are_damage(tmp_path: Path, sizes: list[int], ids: list[int] | None) -> None:
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(encode(1, {"train": [rollout(tokens=3)]}))

    def change(rows: list[dict[str, Any]]) -> None:
        rows[0]["turns"][0] |= {"support_sizes": sizes, "support_ids": ids}

    edit(path, change)
    found, (sentence,) = read(path)
    assert not found
    assert "no run wrote it" in sentence


@pytest.mark.parametrize("sampling", [TurnSampling(0.7, 0.9, 5, 2**63 - 1), TurnSampling(0.0), TurnSampling(), None])
def test_how_a_client_sampled_a_turn_is_recorded(tmp_path: Path, sampling: TurnSampling | None) -> None:
    made = rollout()
    made.turns[0].sampling = sampling
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(encode(1, {"train": [made]}))
    (record,), said = read(path)
    (found, other), wanted = (turn["sampling"] for turn in record["turns"]), sampling and asdict(sampling)
    assert (said, found, other) == ([], wanted, None)


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"temperature":0.5,"top_p":1.0,"top_k":0}',
        '{"temperature":-1,"top_p":1.0,"top_k":0,"seed":null}',
        '{"temperature":0.5,"top_p":1.0,"top_k":0.5,"seed":null}',
        '{"temperature":0.5,"top_p":2.0,"top_k":0,"seed":null}',
        '{"temperature":0.5,"top_p":1.0,"top_k":0,"seed":-1}',
    ],
)
def test_a_sampling_that_no_run_wrote_is_damage(path: Path, text: str) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[0]["turns"][0]["sampling"] = text

    edit(path, change)
    records, said = read(path)
    assert len(records) == 7
    assert "no run wrote it" in said[0]


def test_an_older_file_has_no_output_of_programs(path: Path) -> None:
    whole, _ = read(path)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["stdout", "stderr"]), path)
    assert read(path) == (whole, [])
    assert {(record["stdout"], record["stderr"]) for record in whole} == {(None, None)}


def test_the_output_of_a_program_comes_back(tmp_path: Path) -> None:
    made = rollout()
    made.printed = Printed("1\n", "a warning \udcff")
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(encode(1, {"train": [made]}))
    (record,), said = read(path)
    assert (record["stdout"], record["stderr"], said) == ("1\n", "a warning \\udcff", [])


def test_a_turn_that_starts_over_is_marked(tmp_path: Path) -> None:
    made = rollout()
    made.turns[1].starts_over, made.turns[1].branch = True, 1
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(encode(1, {"train": [made]}))
    (record,), said = read(path)
    assert ([turn["starts_over"] for turn in record["turns"]], said) == ([False, True], [])


def test_tools_and_calls_come_back(tmp_path: Path) -> None:
    made = rollout()
    tool = ToolSpec("zoom", "Enlarge “it”.", {"type": "object", "properties": {"image": {"type": "integer"}}})
    call = ToolCall("zoom", {"image": 1, "box": [0, 0.5]}, "call_1")
    called = Message("assistant", (Text("I look."),), (call,), reasoning="small")
    result = Message("tool", (Text("enlarged"),), tool_call_id="call_1", name="zoom")
    made.turns[1].tools, made.turns[1].messages = (tool,), [called, result]
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(encode(1, {"train": [made]}))
    (record,), said = read(path)
    assert said == []
    before, turn = record["turns"]
    assert before["tools"] == []
    assert set(before["messages"][0]) == {"role", "content"}
    assert tools_of(turn["tools"]) == (tool,)
    assert turn["messages"] == [
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I look."}],
            "tool_calls": [{"name": "zoom", "arguments": {"image": 1, "box": [0, 0.5]}, "id": "call_1"}],
            "reasoning": "small",
        },
        {
            "role": "tool",
            "content": [{"type": "text", "text": "enlarged"}],
            "tool_call_id": "call_1",
            "name": "zoom",
        },
    ]
    assert message_of("assistant", called.content, turn["messages"][0]) == called
    assert message_of("tool", result.content, turn["messages"][1]) == result


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tools", "{"),
        ("tools", '{"name": "zoom"}'),
        ("tools", '[{"name": "zoom", "description": 1, "parameters": {}}]'),
        ("message_fields", "["),
        ("message_fields", "[{}, {}]"),
        ("message_fields", '[{"name": 1}]'),
        ("message_fields", '[{"tool_calls": [{"name": "zoom", "arguments": [], "id": ""}]}]'),
        ("message_fields", '[{"content": []}]'),
    ],
)
def test_tools_that_no_run_wrote_are_damage(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(encode(1, {"train": [rollout()]}))
    rows = pq.read_table(path).to_pylist()
    rows[0]["turns"][1][name] = text
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
    records, said = read(path)
    assert records == []
    assert len(said) == 1
    assert "no run wrote it" in said[0]


def test_only_the_wanted_rollouts_come(path: Path) -> None:
    whole, _ = read(path)
    some, said = read(path, lambda rollout_id: rollout_id.endswith(("03", "06")))
    assert (some, said) == ([whole[3], whole[6]], [])


def test_a_long_step_has_several_row_groups(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_table, "ROW_GROUP_TOKENS", 100)
    parts = tmp_path / "parts.parquet"
    parts.write_bytes(encode(1, {"train": group(8).rollouts}))
    assert pq.ParquetFile(parts).num_row_groups == 2
    assert read(parts) == read(path)


def test_a_file_of_another_program_has_no_checksum(path: Path) -> None:
    """A row group of it that cannot be read costs the rows from there on."""
    whole, _ = read(path)
    pq.write_table(pq.read_table(path), path, row_group_size=3, write_page_checksum=True, compression="zstd")
    assert read(path) == (whole, [])
    rewritten = bytearray(path.read_bytes())
    second = pq.ParquetFile(path).metadata.row_group(1).column(0)
    rewritten[second.dictionary_page_offset + 40] ^= 1
    path.write_bytes(rewritten)
    records, said = read(path)
    assert records == whole[:3]
    (sentence,) = said
    assert sentence.startswith(f"the rest of {path} from rollout 4 on is damaged (")
    with pytest.raises(VlmrlError, match=r"from rollout 4 on cannot be read .* restore it from a copy"):
        list(read_rollouts(path))


def test_a_broken_file_gives_what_was_written_or_says_so(path: Path) -> None:
    """One byte is another, or the end is missing: no other record, no other exception."""
    content, (whole, _) = path.read_bytes(), read(path)
    choose = random.Random(0)
    damaged = 0
    for _ in range(400):
        broken = bytearray(content)
        broken[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
        path.write_bytes(broken if choose.random() < 0.8 else content[: choose.randrange(len(content))])
        records, said = read(path)
        assert said or records == whole
        assert [record for record in records if record not in whole] == []
        damaged += bool(said)
    assert damaged > 300


def longer_logprobs(rows: list[dict[str, Any]]) -> None:
    rows[2]["turns"][0]["logprobs"].append(0.0)


def other_folder(rows: list[dict[str, Any]]) -> None:
    rows[2]["turns"][0]["placeholders"][0]["hash"] = "../../secret"


def gap_outside(rows: list[dict[str, Any]]) -> None:
    rows[2]["turns"][0]["placeholders"][0]["gaps"] = [{"start": 1, "length": 1}]


def other_image(rows: list[dict[str, Any]]) -> None:
    rows[2]["images"][0] = "/etc/passwd"


def more_messages(rows: list[dict[str, Any]]) -> None:
    rows[2]["turns"][1]["new_messages"] = 2**31 - 1


def fewer_messages(rows: list[dict[str, Any]]) -> None:
    rows[2]["turns"][1]["new_messages"] = -5


def no_answer(rows: list[dict[str, Any]]) -> None:
    rows[2]["messages"][1]["content"] = []


def negative_token(rows: list[dict[str, Any]]) -> None:
    rows[2]["turns"][0]["completion_ids"][0] = -7


@pytest.mark.parametrize(
    "change",
    [longer_logprobs, other_folder, gap_outside, other_image, more_messages, fewer_messages, no_answer, negative_token],
)
def test_a_row_that_no_run_wrote_is_left_out(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    whole, _ = read(path)
    edit(path, change)
    records, said = read(path)
    assert records == whole[:2] + whole[3:]
    assert said == [f"rollout 3 of {path} is damaged (no run wrote it) and is skipped"]


def test_an_empty_value_is_found(path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[2]["turns"][0]["completion_ids"][0] = None

    edit(path, change)
    assert read(path)[1] == [
        f"the rest of {path} from rollout 1 on is damaged (column turns[].completion_ids[] has an empty value) and is "
        "skipped"
    ]


@pytest.mark.parametrize("name", ["turns", "rollout_id", "messages"])
def test_other_columns_are_refused(path: Path, name: str) -> None:
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    pq.write_table(table.drop_columns([name]), path)
    assert read(path) == ([], [f"{path} is damaged (it has no column {name}, or several) and is skipped"])
    pq.write_table(table.set_column(place, name, pa.array([5] * 8)), path)
    assert read(path) == ([], [f"{path} is damaged (column {name} has the type int64) and is skipped"])


def test_more_columns_do_not_matter(path: Path) -> None:
    whole, _ = read(path)
    pq.write_table(pq.read_table(path).append_column("mine", pa.array(range(8))), path)
    assert read(path) == (whole, [])


def test_a_file_of_billions_of_values_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred bytes may stand for a list of any length. Its size is seen before anything is read."""
    monkeypatch.setattr(rollout_rows, "MAX_COLUMN_VALUES", 2**20)
    made = rollout(tokens=2**20 + 1)
    path = tmp_path / "huge.parquet"
    path.write_bytes(encode(1, {"train": [made]}))
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_: pytest.fail("it was read"))
    records, (sentence,) = read(path)
    assert records == []
    assert "are more than a run writes at once" in sentence


def test_a_row_group_of_too_many_rows_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_rows, "MAX_ROW_GROUP_ROWS", 7)
    records, (sentence,) = read(path)
    assert records == []
    assert "8 rows of" in sentence


def test_the_columns_are_those_that_are_written(path: Path) -> None:
    """Whatever reads the file finds these types: no Arrow schema is stored in it."""
    assert pq.read_schema(path).equals(SCHEMA)


class Odd:
    pass


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (None, None),
        ("12", "12"),
        (12, "12"),
        ([[1, 2], [3, 4]], "[[1,2],[3,4]]"),
        (np.array([1.5, 2]), "[1.5,2.0]"),
        ({"a": 1, 2: True}, '{"a":1,"2":true}'),
        (Odd(), '"<Odd>"'),
        (2**70, "<int>"),
        ("\ud83d", "\ud83d"),
    ],
)
def test_a_reference_is_a_text(reference: Any, text: str | None) -> None:
    assert reference_text(reference) == text


def test_a_text_that_is_no_unicode_is_written(tmp_path: Path) -> None:
    made = rollout()
    made.reference = made.problem_id = "a\ud83d"
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(encode(1, {"train": [made]}))
    (record,), said = read(path)
    assert (record["reference"], record["problem_id"], said) == ("a\\ud83d", "a\\ud83d", [])
