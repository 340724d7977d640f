"""Rollouts that a program plays: its turns, its reward, and every way in which it can fail."""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from support.agents import MANY, ONE, DirectEngine, ProgramResult, play
from support.chat import ChatRenderer
from support.lockstep import text_of
from vlmrl.config.program import ProgramConfig, ProgramSampling
from vlmrl.errors import EngineError, EngineLostError
from vlmrl.orchestrator.programs.programs import ProgramEnvs, environment
from vlmrl.orchestrator.rollout import sampling_seed
from vlmrl.orchestrator.samples import make_samples
from vlmrl.orchestrator.scoring import attempt_of
from vlmrl.rendering.data_urls import png_url
from vlmrl.rewards.base import Attempt
from vlmrl.types import ChatUse, Rollout, StopReason, TurnSampling

TWO_TURNS = """
first = user("How many?")
answer = ask(problem, first)
second = user("Sure?")
ask(problem, first, answer, second)
"""


def only(rollouts: list[Rollout]) -> Rollout:
    (rollout,) = rollouts
    return rollout


def reasons(rollouts: list[Rollout]) -> list[str]:
    return [rollout.stop_reason.value for rollout in rollouts]


def test_the_turns_are_the_requests_and_the_reward_is_the_last_line() -> None:
    engine = DirectEngine()
    script = ONE + TWO_TURNS + "print('note'); print(json.dumps({'reward': 0.5, 'metrics': {'asked': 2}}))"
    rollout = only(play(script, engine=engine))
    assert (rollout.stop_reason, rollout.error) == (StopReason.TERMINATED, None)
    assert (rollout.reward, rollout.metrics) == (0.5, {"asked": 2.0})
    assert [text_of(turn.prompt) for turn in rollout.turns] == ["user:How many?>", "user:How many?>yes$user:Sure?>"]
    assert [(turn.branch, turn.text) for turn in rollout.turns] == [(0, "yes"), (0, "yes")]
    assert rollout.problem_id == "train 0"
    assert rollout.chat_use == ChatUse(requests=2, bridged=1)
    assert rollout.printed is not None
    assert rollout.printed.stdout == 'note\n{"reward": 0.5, "metrics": {"asked": 2}}\n'
    assert engine.awaited == [False], "no batch waits for a program"
    assert rollout.env_time.resets == 1
    assert 0 < rollout.env_time.reset_s <= rollout.seconds


def test_a_number_is_enough_and_siblings_get_the_same_problem() -> None:
    script = ONE + "ask(problem, user(str(problem['seed']))); print(problem['seed'])"
    rollouts = play(script, [3, 4], group_size=2)
    seeds = [rollout.reward for rollout in rollouts]
    assert [rollout.stop_reason for rollout in rollouts] == [StopReason.TERMINATED] * 4
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert [text_of(rollout.turns[0].prompt) for rollout in rollouts] == [f"user:{int(seed)}>" for seed in seeds]


def test_the_address_stands_in_the_environment_and_in_the_problem() -> None:
    script = ONE + (
        "assert problem['base_url'] == os.environ['OPENAI_BASE_URL'], problem\n"
        "assert problem['api_key'] == os.environ['OPENAI_API_KEY']\n"
        "assert '127.0.0.1' in os.environ['NO_PROXY'].split(',')\n"
        "assert not sys.stdin.read()\n"
        "ask(problem, user('hi')); print(1)"
    )
    assert only(play(script)).reward == 1.0


def test_the_result_may_stand_in_a_file() -> None:
    script = ONE + "ask(problem, user('hi')); open(os.environ['VLMRL_RESULT_FILE'], 'w').write('0.25'); print('bye')"
    assert only(play(script, result=ProgramResult.file)).reward == 0.25
    missing = only(play(ONE + "ask(problem, user('hi'))", result=ProgramResult.file))
    assert missing.stop_reason is StopReason.TASK_ERROR
    assert missing.error is not None
    assert missing.error.startswith("reading VLMRL_RESULT_FILE raised FileNotFoundError")


def test_without_a_result_of_its_own_the_output_is_not_read() -> None:
    rollout = only(play(ONE + "ask(problem, user('hi')); print('anything')", result=ProgramResult.none))
    assert (rollout.stop_reason, rollout.reward) == (StopReason.TERMINATED, 0.0)


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────

TALK = "ask(problem, user('hi'))\n"


@pytest.mark.parametrize(
    ("rest", "reason", "error"),
    [
        (
            "raise ValueError('no page')",
            "task_error",
            r"exit code 1; the end of its .*\n.*ValueError: no page",
        ),
        ("os.kill(os.getpid(), 9)", "task_error", r"the program ended with SIGKILL$"),
        ("sys.exit(3)", "task_error", r"the program ended with exit code 3$"),
        ("print('done')", "bad_reward", "the program's last line is 'done', which is neither a number"),
        ("", "bad_reward", "the program's last line is empty: print a number"),
        ("print('nan')", "bad_reward", "reward=nan, which is not a finite number"),
        ("print(json.dumps({'error': 'no page'}))", "task_error", "the program's last line reports an error: no page"),
    ],
)
def test_faults_of_the_program_cost_its_rollout(rest: str, reason: str, error: str) -> None:
    rollout = only(play(ONE + TALK + rest))
    assert (rollout.stop_reason.value, rollout.reward) == (reason, 0.0)
    assert rollout.error is not None
    assert re.search(error, rollout.error, re.DOTALL), rollout.error
    assert len(rollout.turns) == 1, "what was sampled before stays in the record"


def test_a_command_that_is_not_there_costs_its_rollout() -> None:
    rollout = only(play(ProgramConfig(command="no-such-program")))
    assert rollout.stop_reason is StopReason.TASK_ERROR
    assert rollout.error is not None
    assert "no-such-program cannot be started: No such file or directory" in rollout.error


def test_a_program_that_never_asks_has_no_turns() -> None:
    rollout = only(play(ONE + "print(1)"))
    assert (rollout.stop_reason, rollout.turns, rollout.reward) == (StopReason.TERMINATED, [], 1.0)


def test_a_program_that_takes_too_long_is_ended() -> None:
    script = ONE + TALK + "print('waiting', file=sys.stderr, flush=True)\nwhile True: time.sleep(60)"
    started = time.monotonic()
    rollout = only(play(script, timeout_s=1.5))
    assert time.monotonic() - started < 30
    assert rollout.stop_reason is StopReason.TASK_TIMEOUT
    assert rollout.error is not None
    assert "did not end within task.timeout_s=1.5, so its rollout is lost" in rollout.error
    assert rollout.error.endswith("the end of its standard error:\nwaiting")
    assert len(rollout.turns) == 1


def test_one_failure_costs_no_other_rollout() -> None:
    script = ONE + TALK + "assert problem['index'] != 1\nprint(1)"
    assert [rollout.stop_reason.value for rollout in play(script, [0, 1, 2])] == [
        "terminated",
        "task_error",
        "terminated",
    ]


# ── budgets and what is not the program's fault ─────────────────────────────────────────────────────────────


def test_a_request_beyond_the_turns_is_refused_and_the_rollout_is_cut() -> None:
    script = ONE + "for i in range(3): ask(problem, user(str(i)))\nprint(1)"
    rollout = only(play(script, max_turns=2))
    assert (rollout.stop_reason, rollout.error, len(rollout.turns)) == (StopReason.MAX_TURNS, None, 2)
    assert rollout.reward == 0.0
    handled = "try: ask(problem, user('c'))\nexcept urllib.error.HTTPError: print(0.75)"
    rollout = only(play(ONE + "ask(problem, user('a')); ask(problem, user('b'))\n" + handled, max_turns=2))
    assert (rollout.stop_reason, rollout.reward) == (StopReason.MAX_TURNS, 0.75)


def test_a_full_context_cuts_the_rollout() -> None:
    rollout = only(play(ONE + TALK + "ask(problem, user('x' * 100))", max_model_len=50))
    assert (rollout.stop_reason, len(rollout.turns)) == (StopReason.CONTEXT_FULL, 1)


def test_an_answer_that_is_cut_is_the_reason_of_the_end() -> None:
    rollout = only(play(ONE + TALK + "print(1)", engine=DirectEngine(lambda prompt: "a long answer")))
    assert (rollout.stop_reason, rollout.reward) == (StopReason.MAX_NEW_TOKENS, 1.0)
    assert rollout.is_cut
    failed = only(play(ONE + TALK + "sys.exit(1)", engine=DirectEngine(lambda prompt: "a long answer")))
    assert failed.stop_reason is StopReason.TASK_ERROR, "a cut answer was given, so it is no excuse"


def test_an_image_that_cannot_be_read_is_named_where_the_program_fails_by_it() -> None:
    bad = "ask(problem, user('see', 'data:image/png;base64,aGVsbG8='))"
    rollout = only(play(ONE + TALK + bad))
    assert rollout.stop_reason is StopReason.IMAGE_ERROR
    handled = ONE + f"try: {bad}\nexcept urllib.error.HTTPError: pass\nask(problem, user('blind')); print(1)"
    assert only(play(handled)).stop_reason is StopReason.TERMINATED


def test_an_engine_that_fails_is_no_fault_of_the_program() -> None:
    rollout = only(play(ONE + TALK + "print(1)", engine=DirectEngine(lambda prompt: "engine error")))
    assert (rollout.stop_reason, rollout.error) == (StopReason.ENGINE_ERROR, "the server of replica 0 has died")


def test_a_rollout_whose_server_was_lost_is_played_again() -> None:
    asked: list[str] = []

    def lost_once(prompt: str) -> str:
        asked.append(prompt)
        if len(asked) == 1:
            raise EngineLostError("the server of replica 0 has died")
        return "yes"

    rollout = only(play(ONE + TALK + "print(1)", engine=DirectEngine(lost_once)))
    assert (rollout.stop_reason, rollout.reward, rollout.replayed, len(asked)) == (StopReason.TERMINATED, 1.0, 1, 2)
    assert issubclass(EngineLostError, EngineError)


def test_a_bug_of_ours_ends_the_run() -> None:
    def broken(prompt: str) -> str:
        raise AssertionError("a bug")

    with pytest.raises(AssertionError, match="a bug"):
        play(ONE + TALK + "print(1)", engine=DirectEngine(broken))


def test_stop_strings_of_the_program_end_answers_and_broken_ones_are_refused() -> None:
    engine = DirectEngine()
    script = ONE + (
        "ask(problem, user('a'), stop=['END'])\n"
        "try: ask(problem, user('b'), stop=[chr(0xfffd)])\n"
        "except urllib.error.HTTPError as error: print(error.code / 1000)"
    )
    rollout = only(play(script, engine=engine))
    assert (rollout.stop_reason, rollout.reward) == (StopReason.TERMINATED, 0.4)
    (session,) = engine.sessions
    assert [sampling.stop for _, sampling in session.asked] == [("END",)]


OWN_SAMPLING = (
    ONE
    + """
answer = ask(problem, user('a'), temperature=0.5, seed=7)
ask(problem, user('a'), answer, user('b'), temperature=1, top_p=0.9)
print(1)
"""
)


def test_a_program_may_choose_how_its_turns_are_sampled() -> None:
    """The first turn is learned at its own temperature, the second one has no loss."""
    engine = DirectEngine()
    rollout = only(play(OWN_SAMPLING, engine=engine, sampling=ProgramSampling.client))
    (session,) = engine.sessions
    asked = [(params.temperature, params.top_p, params.seed) for _, params in session.asked]
    assert asked == [(0.5, 1.0, 7), (1.0, 0.9, sampling_seed(0, "train/000001/00/00", 1))]
    assert [turn.sampling for turn in rollout.turns] == [TurnSampling(0.5, seed=7), TurnSampling(top_p=0.9)]
    (sample,) = make_samples(rollout)
    assert sample.temperatures is not None
    assert set(sample.temperatures[sample.loss_mask].tolist()) == {0.5}
    assert sample.loss_mask.sum() == len(rollout.turns[0].completion.token_ids)


def test_a_greedy_evaluation_stays_greedy() -> None:
    engine = DirectEngine()
    rollout = only(play(OWN_SAMPLING, engine=engine, temperature=0.0, sampling=ProgramSampling.client))
    (session,) = engine.sessions
    assert [(params.temperature, params.top_p) for _, params in session.asked] == [(0.0, 1.0)] * 2
    assert [turn.sampling for turn in rollout.turns] == [None, None]


def test_by_default_a_program_that_chooses_how_to_sample_is_refused() -> None:
    rollout = only(play(OWN_SAMPLING))
    assert (rollout.turns, rollout.stop_reason) == ([], StopReason.TASK_ERROR)
    assert "400" in str(rollout.error)


# ── processes that are used again ───────────────────────────────────────────────────────────────────────────

LOOP = (
    MANY
    + """
for problem in problems:
    print("thinking about", problem["index"])
    print(os.getpid(), file=sys.stderr)
    ask(problem, user(str(problem["index"])))
"""
)


def pids(rollouts: list[Rollout]) -> list[str]:
    return [rollout.printed.stderr.strip() for rollout in rollouts if rollout.printed is not None]


def test_a_process_plays_one_problem_after_another() -> None:
    rollouts = play(LOOP + "    print(json.dumps({'reward': problem['index']}))", range(5), reuse=True, processes=1)
    assert [rollout.reward for rollout in rollouts] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [text_of(rollout.turns[0].prompt) for rollout in rollouts] == [f"user:{i}>" for i in range(5)]
    assert len(set(pids(rollouts))) == 1
    assert [rollout.printed.stdout.splitlines()[0] for rollout in rollouts if rollout.printed is not None] == [
        f"thinking about {i}" for i in range(5)
    ], "each rollout has its own output"


def test_several_processes_share_the_problems() -> None:
    """The second problem ends before the first, which waits for it."""
    script = LOOP + (
        "    mark = os.path.join(problem['args']['folder'], 'second')\n"
        "    if problem['index'] == 1: open(mark, 'w')\n"
        "    while not os.path.exists(mark): time.sleep(0.01)\n"
        "    print(json.dumps({'reward': 1}))"
    )
    with tempfile.TemporaryDirectory() as folder:
        rollouts = play(script, range(4), reuse=True, processes=2, args={"folder": folder})
    assert [rollout.reward for rollout in rollouts] == [1.0] * 4
    assert len(set(pids(rollouts))) == 2


def test_a_process_that_dies_is_replaced() -> None:
    script = LOOP + "    if problem['index'] == 1: sys.exit(5)\n    print(json.dumps({'reward': 1}))"
    rollouts = play(script, range(4), reuse=True, processes=1)
    assert reasons(rollouts) == [
        "terminated",
        "task_error",
        "terminated",
        "terminated",
    ]
    assert rollouts[1].error is not None
    assert "ended with exit code 5 before it printed a result, although task.reuse=true" in rollouts[1].error
    found = pids(rollouts)
    assert found[0] == found[1] != found[2] == found[3]


def test_an_error_that_a_program_reports_keeps_its_process() -> None:
    script = LOOP + "    print(json.dumps({'error': 'no page'} if problem['index'] == 1 else {'reward': 1}))"
    rollouts = play(script, range(3), reuse=True, processes=1)
    assert reasons(rollouts) == ["terminated", "task_error", "terminated"]
    assert rollouts[1].error == "the program reports an error: no page"
    assert len(set(pids(rollouts))) == 1


def test_a_process_that_hangs_is_ended_and_replaced() -> None:
    script = LOOP + "    while problem['index'] == 1: time.sleep(60)\n    print(json.dumps({'reward': 1}))"
    rollouts = play(script, range(3), reuse=True, processes=1, timeout_s=1.5)
    assert reasons(rollouts) == ["terminated", "task_timeout", "terminated"]
    assert len(set(pids(rollouts))) == 2


def test_with_reward_terms_alone_done_ends_a_problem() -> None:
    script = LOOP + "    print(json.dumps({'done': True}))"
    rollouts = play(script, range(2), reuse=True, processes=1, result=ProgramResult.none)
    assert [rollout.stop_reason for rollout in rollouts] == [StopReason.TERMINATED] * 2


# ── processes in all ────────────────────────────────────────────────────────────────────────────────────────


def test_no_more_processes_run_than_are_allowed_and_none_is_left() -> None:
    script = ONE + (
        "here = os.path.join(problem['args']['folder'], str(os.getpid()))\n"
        "open(here, 'w'); ask(problem, user('hi'))\n"
        "print(len(os.listdir(problem['args']['folder']))); os.remove(here)"
    )
    with tempfile.TemporaryDirectory() as folder:
        rollouts = play(script, range(8), processes=2, args={"folder": folder})
    assert {rollout.reward for rollout in rollouts} <= {1.0, 2.0}
    assert max(rollout.env_time.queue_s for rollout in rollouts) > 0


def test_a_run_that_is_cancelled_ends_its_programs(tmp_path: Path) -> None:
    script = ONE + "open(os.path.join(problem['args']['folder'], str(os.getpid())), 'w'); time.sleep(600)"

    async def cancel(envs: ProgramEnvs) -> None:
        while len(os.listdir(tmp_path)) < 2:
            await asyncio.sleep(0.01)
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        play(script, [0, 1], during=cancel, args={"folder": str(tmp_path)})
    until = time.monotonic() + 30
    while any(psutil.pid_exists(int(name)) for name in os.listdir(tmp_path)):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_environment_keeps_what_the_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("OPENAI_API_KEY", "someone's")
    env = environment({"OPENAI_API_KEY": "the session's"})
    assert env["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert (env["OPENAI_API_KEY"], env["PATH"], env["PYTHONUNBUFFERED"]) == ("the session's", os.environ["PATH"], "1")


# ── images ──────────────────────────────────────────────────────────────────────────────────────────────────

PICTURES = [png_url(np.full((2, 3, 3), value, np.uint8)) for value in (10, 200)]
SEES = (
    ONE
    + f"""
pictures = {json.dumps(PICTURES)}
first = user("Which?", pictures[0])
answer = ask(problem, first)
ask(problem, first, answer, user("And this?", pictures[1], pictures[0]))
print(1)
"""
)


def pixels(rollout: Rollout) -> list[list[int]]:
    return [[int(image.pixels[0, 0, 0]) for image in turn.prompt.images] for turn in rollout.turns]


def test_the_policy_sees_the_pictures_of_the_program() -> None:
    assert pixels(only(play(SEES))) == [[10], [10, 200, 10]]


def test_with_noise_it_sees_noise_of_their_size_that_says_nothing_of_them() -> None:
    first, second = play(SEES, group_size=2, noise=True)
    for rollout in (first, second):
        shown = [image for turn in rollout.turns for image in turn.prompt.images]
        assert {image.pixels.shape for image in shown} == {(2, 3, 3)}
        assert len({image.hash for image in shown}) == 2, "an image that is shown again is the same noise"
        assert shown[0].hash == shown[1].hash == shown[3].hash
        assert rollout.num_branches == 1, "the second request extends the first"
    assert first.turns[0].prompt.images[0].hash != second.turns[0].prompt.images[0].hash
    assert pixels(first) != [[10], [10, 200, 10]]


def test_noise_does_not_hide_an_image_that_cannot_be_read() -> None:
    bad = "ask(problem, user('see', 'data:image/png;base64,aGVsbG8='))"
    assert only(play(ONE + bad, noise=True)).stop_reason is StopReason.IMAGE_ERROR


def test_a_bridge_that_is_impossible_is_a_branch() -> None:
    rollout = only(play(ONE + TWO_TURNS + "print(1)", renderer=ChatRenderer(bridges=False)))
    assert [turn.branch for turn in rollout.turns] == [0, 1]


def test_reward_terms_see_the_last_answer(tmp_path: Path) -> None:
    rollout = only(play(ONE + TWO_TURNS + "print(1)"))
    attempt = attempt_of(rollout, None)
    assert isinstance(attempt, Attempt)
    assert attempt.completion == "yes"
    assert [message.role for message in attempt.prompt] == ["user", "assistant", "user"]
