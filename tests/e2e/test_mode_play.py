"""mode=play: a person, random answers and a scripted policy play, and see and are paid what a policy would be."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from support.command_line import REPOSITORY, Home, summary, until
from support.counted_envs import counts
from vlmrl.record.rollouts import RolloutRecord, read_rollouts

pytestmark = pytest.mark.slow

LAKES = ("mode=play", "experiment=frozenlake_tiny")
EXPERT = "play.policy=vlmrl.tasks.environments.frozen_lake:shortest_way"
COUNTED = f"task={REPOSITORY}/tests/support/counted_envs.py:CountedTask"

TYPED = """
import os, sys
read, write = os.pipe()
os.write(write, sys.argv.pop(1).encode())
if sys.argv.pop(1) == "ends":
    os.close(write)
os.dup2(read, 0)
from vlmrl.cli.main import main
sys.exit(main())
"""
"""The command line, with a text on its standard input, which ends after it or stays open."""

TERMINAL = """
import os, sys, threading
shown, (keyboard, terminal) = os.dup(1), os.openpty()
os.dup2(terminal, 0), os.dup2(terminal, 1)
def show():
    while True:
        os.write(shown, os.read(keyboard, 4096))
threading.Thread(target=show, daemon=True).start()
os.write(keyboard, sys.argv.pop(1).encode())
from vlmrl.cli.main import main
sys.exit(main())
"""
"""The command line in a terminal of its own, in which a text was typed."""


def recorded(run: Path) -> list[RolloutRecord]:
    return [rollout for path in sorted((run / "rollouts").iterdir()) for rollout in read_rollouts(path)]


def counted(events: Path, *kinds: str) -> tuple[str, ...]:
    """Envs that count how often they are closed; see `counted_envs`."""
    events.mkdir()
    return (
        *("mode=play", "model=qwen3vl_tiny", COUNTED, f"+task.args.events={events}"),
        *(f"+task.args.kinds=[{','.join(kinds)}]", "task.max_turns=3", "monitor.report=false"),
        f"hydra.run.dir={events.with_name('run')}",
    )


@pytest.fixture(scope="module")
def games(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two games of the expert, on held-out lakes. The processor makes 96 pixels of the 100 of a frame."""
    run = tmp_path_factory.mktemp("games") / "run"
    chosen = ("play.split=eval", "play.episodes=2", "task.frame_size=100")
    ended = home.vlmrl(*LAKES, EXPERT, *chosen, f"hydra.run.dir={run}")
    assert (ended.code, ended.err) == (0, "")
    assert "2 episodes: reward 1.000 on average, from 1 to 1" in ended.out
    return run


def test_a_scripted_policy_is_paid_and_recorded(games: Path) -> None:
    rollouts = recorded(games)
    assert [rollout["rollout_id"] for rollout in rollouts] == ["eval/000001/00/00", "eval/000002/00/00"]
    assert [(rollout["reward"], rollout["stop_reason"]) for rollout in rollouts] == [(1.0, "terminated")] * 2
    assert {turn["text"] for rollout in rollouts for turn in rollout["turns"]} <= {"left", "down", "right", "up"}
    for turn in (turn for rollout in rollouts for turn in rollout["turns"]):
        assert set(turn["versions"]) == {-1}
        assert np.isnan(turn["logprobs"]).all()
    assert summary(games)["exit_reason"] == "finished"
    assert (games / "report.html").exists()


def test_images_are_written_as_the_processor_made_them(games: Path) -> None:
    rollout = recorded(games)[0]
    for number, turn in enumerate(rollout["turns"], 1):
        (_, _, hash, _) = turn["placeholders"][-1]
        frame = PIL.Image.open(games / f"images/{hash}.png")
        seen = PIL.Image.open(games / f"seen/episode_001_turn_{number:03d}_image_1.png")
        assert (frame.size, seen.size) == ((100, 100), (96, 96))
        expected = np.array(frame.resize(seen.size, PIL.Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(np.array(seen) - expected).mean() < 2


def test_a_replay_renders_the_same_prompts(home: Home, games: Path) -> None:
    ended = home.vlmrl("mode=replay", f"run={games}", "step=2")
    assert ended.code == 0, ended.out + ended.err
    lines = json.loads((games / "replay/step_000002/replay.json").read_bytes())["lines"]
    assert [line["verdict"] for line in lines] == ["same"] * 3 + ["not visible"] * 3


def test_a_person_types_answers(home: Home, tmp_path: Path) -> None:
    """The second answer names no move; the third is cut, so it ends the episode."""
    run = tmp_path / "run"
    typed = "down\nno <|im_end|> idea\n" + "right " * 20
    limits = ("orchestrator.max_new_tokens=24", "task.history=null", f"hydra.run.dir={run}")
    ended = home.vlmrl(typed, "ends", *LAKES, *limits, code=("-c", TYPED))
    assert (ended.code, ended.err) == (0, "")
    (rollout,) = recorded(run)
    first, second, third = rollout["turns"]
    assert (first["text"], second["text"]) == ("down", "no <|im_end|> idea")
    assert second["prompt_offset"] == len(first["prompt_token_ids"]) + len(first["completion_ids"]), "bridged"
    assert (third["finish_reason"], len(third["completion_ids"])) == ("length", 24)
    assert rollout["stop_reason"] == "max_new_tokens"
    assert rollout["metrics"]["invalid"] == pytest.approx(1 / 3)
    assert "answered 'down' (" in ended.out
    assert "This was none of: left, down, right, up" in ended.out, "the env's words in the third prompt"
    assert re.search(r"turn 3 of at most 10: (\d+) tokens, \d+ of them new", ended.out)
    assert "training pays 0" not in ended.out, "its reward is 0 already"


def test_a_cut_answer_is_not_paid_in_training(home: Home, tmp_path: Path) -> None:
    """The env pays each turn 1."""
    settings = (*counted(tmp_path / "events", "done"), "orchestrator.max_new_tokens=4")
    ended = home.vlmrl("and now? and now?\n", "ends", *settings, code=("-c", TYPED))
    assert (ended.code, ended.err) == (0, "")
    assert "(4 tokens, cut by the budget of tokens)" in ended.out
    assert "reward 1 (the last answer is cut, so training pays 0: algorithm.truncated=zero)" in ended.out


def test_the_end_of_the_input_leaves_and_closes_the_env(home: Home, tmp_path: Path) -> None:
    ended = home.vlmrl("a\n", "ends", *counted(tmp_path / "events", "done"), code=("-c", TYPED))
    assert (ended.code, ended.err) == (0, "")
    assert "the player left after 1 turn, so the episode has no reward" in ended.out
    opened, closed = counts(tmp_path / "events")
    assert list(opened.values()) == [1]
    assert opened == closed
    assert [len(rollout["turns"]) for rollout in recorded(tmp_path / "run")] == [1]
    assert summary(tmp_path / "run")["exit_reason"] == "interrupted"
    assert not (tmp_path / "run/faults.jsonl").exists()


def test_nothing_typed_leaves_no_rollout_and_cannot_be_resumed(home: Home, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = home.vlmrl(*counted(tmp_path / "events", "done", "max_turns"), "play.episodes=5")
    assert (ended.code, ended.err) == (0, "")
    assert "the player left after 0 turns" in ended.out
    assert list((run / "rollouts").iterdir()) == []
    opened, closed = counts(tmp_path / "events")
    assert opened == closed
    again = home.vlmrl(f"resume={run}")
    assert (again.code, "whose episodes are over" in again.err) == (2, True)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_and_closes_the_env(home: Home, tmp_path: Path, sent: signal.Signals) -> None:
    """The standard input stays open, so a second answer is waited for."""
    events = tmp_path / "events"
    process = home.start("a\n", "stays", *counted(events, "slow"), code=("-c", TYPED))
    until(lambda: bool(list(events.glob("stepping*"))) or process.poll() is not None, "the env steps")
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "the player left after 1 turn" in out
    opened, closed = counts(events)
    assert list(opened.values()) == [1]
    assert opened == closed


def test_a_fault_of_the_task_is_shown_and_can_be_played_again(home: Home, tmp_path: Path) -> None:
    kinds = counted(tmp_path / "events", "raises", "async")
    ended = home.vlmrl("a\nb\nc\n", "ends", *kinds, "play.episodes=2", code=("-c", TYPED))
    assert (ended.code, ended.err) == (1, "")
    assert "| KeyError: 'step'" in ended.out
    assert [rollout["stop_reason"] for rollout in recorded(tmp_path / "run")] == ["task_error", "terminated"]
    again = home.vlmrl("mode=faults", f"run={tmp_path / 'run'}", "rollout=train/000001/00/00")
    assert (again.code, "it happens again: task_error: step() raised KeyError" in again.out) == (1, True)


def test_random_answers_have_the_form_of_the_tasks_own(home: Home, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = ("play.policy=random", "play.episodes=4", "play.problem=7", f"hydra.run.dir={run}")
    ended = home.vlmrl("mode=play", "experiment=color_codeword_tiny", *chosen, "monitor.report=false")
    assert (ended.code, ended.err) == (0, "")
    answers = [[turn["text"] for turn in rollout["turns"]] for rollout in recorded(run)]
    assert all(re.fullmatch("[A-I]{2}", first) and re.fullmatch("[A-I]{4}", second) for first, second in answers)
    assert len(set(map(tuple, answers))) > 1
    assert 'problem("train", 7)' in ended.out
    assert "4 episodes: reward" in ended.out


def test_random_answers_need_demonstrations(home: Home, tmp_path: Path) -> None:
    ended = home.vlmrl(*counted(tmp_path / "events", "done"), "play.policy=random")
    assert ended.code == 1
    assert "play.policy=random: it has no answers." in ended.err
    opened, closed = counts(tmp_path / "events")
    assert opened == closed


def test_a_scripted_policy_sees_the_conversation_and_may_fail(home: Home, tmp_path: Path) -> None:
    policy = tmp_path / "policies.py"
    policy.write_text("def echo(messages):\n    assert len(messages) < 3, 'too long'\n    return messages[-1].role\n")
    kinds = counted(tmp_path / "events", "done")
    ended = home.vlmrl(*kinds, f"play.policy={policy}:echo")
    assert (ended.code, ended.err) == (1, "")
    (rollout,) = recorded(tmp_path / "run")
    assert [turn["text"] for turn in rollout["turns"]] == ["user"]
    assert (rollout["stop_reason"], "too long" in (rollout["error"] or "")) == ("task_error", True)


def test_a_reward_with_the_wrong_sign_is_seen_at_once(home: Home, tmp_path: Path) -> None:
    """The example of docs/environments.md, and the same without its mistake."""
    (tmp_path / "signs.py").write_text(
        "from vlmrl.tasks.environments import frozen_lake\ndef wrong(env): return -frozen_lake.nearness(env)\n"
    )
    paid = {}
    for name, own in {"wrong": (f"task.shaping={tmp_path}/signs.py:wrong",), "right": ()}.items():
        settings = (*LAKES, *own, "play.policy=${task.expert}", f"hydra.run.dir={tmp_path / name}")
        ended = home.vlmrl(*settings, "monitor.report=false")
        assert (ended.code, ended.err) == (0, "")
        paid[name] = [float(reward) for reward in re.findall(r"^  turn reward (\S+),", ended.out, re.MULTILINE)]
    assert set(paid["wrong"][:-1]) == {-1.0}
    assert set(paid["right"][:-1]) == {1.0}


def test_a_terminal_shows_the_images(home: Home, tmp_path: Path) -> None:
    settings = (*LAKES, f"hydra.run.dir={tmp_path / 'run'}", "monitor.report=false", "task.frame_size=64")
    ended = home.vlmrl("down\n\x04", *settings, code=("-c", TERMINAL))
    assert ended.code == 0, ended.out + ended.err
    rows = [line for line in ended.out.splitlines() if "▀" in line]
    assert len(rows) == 2 * 32, "two frames of 64 lines of pixels"
    assert rows[0].count("▀") == 64
    assert "Ctrl-D leaves" in ended.out
    assert "the player left after 1 turn" in ended.out
