"""`task=program` from the command line: a program with pictures, two turns and tools of the standard library only."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from support.agents import CLIENT
from support.command_line import SHORT, Home
from vlmrl.record.rollouts import read_rollouts

pytestmark = pytest.mark.slow

AGENT = (
    CLIENT
    + """
import base64, random, struct, zlib

def png(color, size=32):
    row = b"\\0" + bytes(color) * size
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * size)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\\x89PNG\\r\\n\\x1a\\n" + data).decode()

COLORS = {"A": (255, 0, 0), "B": (0, 255, 0), "C": (0, 0, 255)}

for line in sys.stdin:
    problem = json.loads(line)
    draw = random.Random(problem["seed"])
    messages, right = [], 0
    for _ in range(2):
        letter = draw.choice("ABC")
        messages.append(user("Which letter?", png(COLORS[letter])))
        answer = ask(problem, *messages)
        messages.append({"role": "assistant", "content": answer["content"].strip()})
        right += answer["content"].strip() == letter
    if problem["index"] == problem["args"].get("fails"):
        raise ValueError("this problem fails")
    print(json.dumps({"reward": right / 2, "metrics": {"right": right}}), flush=True)
"""
)

TASK = (
    *("task=program", "task.command='python my_agent.py'", "task.texts=['Which letter?','A B C']"),
    *(*SHORT, "trainer.warmup.steps=0", "trainer.warmup.rl_weight=0", "task.max_turns=2"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("programs")
    (folder / "my_agent.py").write_text(AGENT)
    return Home(folder)


def steps_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_recorded_replayed_and_continued(home: Home) -> None:
    run = home.made("agent", (*TASK, "trainer.max_steps=3", "+task.args.fails=2"))
    steps = [step for step in steps_of(run) if "bridge_break_rate" in step]
    assert [step["bridge_break_rate"] for step in steps] == [0.0] * 3
    assert max(step["mismatch_kl/mean"] for step in steps) < 1e-6

    rollouts = [rollout for path in sorted((run / "rollouts").glob("step_*")) for rollout in read_rollouts(path)]
    failed = [rollout for rollout in rollouts if rollout["problem_id"] == "train 2"]
    played = [rollout for rollout in rollouts if rollout["problem_id"] != "train 2"]
    assert {rollout["stop_reason"] for rollout in failed} == {"task_error"}
    assert all((rollout["error"] or "").endswith("ValueError: this problem fails") for rollout in failed)
    assert {len(rollout["turns"]) for rollout in rollouts} == {2}
    for rollout in played:
        assert json.loads(rollout["stdout"] or "") == {
            "reward": rollout["reward"],
            "metrics": {"right": int(rollout["metrics"]["right"])},
        }
        first, second = rollout["turns"]
        assert second["prompt_offset"] == len(first["prompt_token_ids"]) + len(first["completion_ids"])
        assert [len(turn["placeholders"]) for turn in rollout["turns"]] == [1, 2]

    ended = home.vlmrl("mode=replay", f"run={run}", "step=3")
    assert ended.code == 0, ended.out + ended.err
    replayed = json.loads((run / "replay/step_000003/replay.json").read_bytes())
    assert {line["name"]: line["verdict"] for line in replayed["lines"]}["completions"] == "same", replayed

    ended = home.vlmrl(f"resume={run}", "trainer.max_steps=4", "task.reuse=true", "task.processes=2")
    assert ended.code == 0, ended.out + ended.err
    assert max(step["step"] for step in steps_of(run)) == 4
    assert not [each for each in psutil.process_iter(["cmdline"]) if "my_agent.py" in (each.info["cmdline"] or [])]


def test_the_doctor_plays_the_program_as_it_is_and_in_noise(home: Home) -> None:
    ended = home.vlmrl(f"hydra.run.dir={home.path / 'outputs/doctor'}", "mode=doctor", *TASK, "task.reuse=true")
    assert ended.code == 0, ended.out + ended.err
    found = json.loads((home.path / "outputs/doctor/doctor.json").read_bytes())["checks"]
    assert {line["verdict"] for line in found} == {"ok"}, found
    assert "18 rollouts, 36 turns" in ended.out


def test_rows_are_handed_to_the_program_and_scored_by_terms(home: Home) -> None:
    (home.path / "rows.jsonl").write_text(
        "".join(json.dumps({"problem": f"Say {i % 3} in row {i}", "answer": str(i % 3)}) + "\n" for i in range(40))
    )
    (home.path / "asks.py").write_text(
        CLIENT + "problem = json.loads(sys.stdin.readline())\nask(problem, *problem['messages'])\n"
    )
    settings = ("task=program", "task.command='python asks.py'", "task.path=rows.jsonl", "reward=exact")
    more = ("task.result=none", "trainer.max_steps=1", "trainer.warmup.rl_weight=0")
    run = home.made("rows", (*settings, *SHORT, *more))
    (path,) = sorted((run / "rollouts").glob("step_*"))
    rollouts = list(read_rollouts(path))
    assert {rollout["reference"] for rollout in rollouts} <= {"0", "1", "2"}
    assert all(rollout["rewards"].keys() == {"exact"} for rollout in rollouts)
    for rollout in rollouts:
        (turn,) = rollout["turns"]
        assert rollout["reward"] == float(turn["text"].strip() == rollout["reference"])


def test_what_is_no_program_is_refused_before_a_run(home: Home) -> None:
    ended = home.vlmrl(*TASK, "task.command=no-such-program")
    assert ended.code == 2
    assert "task.command=no-such-program starts no-such-program, which is not found here" in ended.err
    ended = home.vlmrl(*TASK, "mode=check")
    assert ended.code == 2
    assert "mode=check calls the env of a task" in ended.err


def test_the_plan_of_a_program_is_printed(home: Home) -> None:
    ended = home.vlmrl(*TASK, "dry_run=true")
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert "ProgramTask" in ended.out
