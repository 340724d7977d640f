#!/usr/bin/env bash
# A newcomer's path, with README.md and docs/ alone: from an empty virtual environment to a task of their own that learns.
#
#   docs/newcomer/path.sh | tee docs/newcomer/transcript.txt       about five minutes on two cores
#
# Each command is printed before it runs. The newcomer changes the task as docs/your_task.md explains: the picture shows
# dots, and the answer is how many.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../.." && pwd)
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cd "$home"
run() { # print a command, run it, and show its last lines without the paths of this machine
    printf '\n$ %s\n' "${1//$checkout/vlmrl}"
    bash -euo pipefail -c "$1" 2>&1 | sed -e "s#$checkout#vlmrl#g; s#$home#~#g" | tail -n "${2:-12}"
}

run 'python3 -m venv venv'
export PATH="$home/venv/bin:$PATH" VLMRL_CACHE="$home/cache"
run "git clone --quiet $checkout checkout && cd checkout && git log -1 --format='%s'"
run "pip install --quiet --disable-pip-version-check -e './checkout[test]' 2>&1 | grep -v WARNING || true"
run 'python -m vlmrl init count_dots'
cd count_dots
run 'ls -R'

echo
echo '# The newcomer edits count_dots.py:'
cat >change.py <<'PY'
text = open("count_dots.py").read()
text = text.replace('QUESTION = "Which colour is the disk?"', 'QUESTION = "How many dots are there?"')
text = text.replace('COLORS = ("red", "green", "blue", "orange", "black")', 'NUMBERS = ("one", "two", "three", "four")')
text = text.replace("    color: str", "    number: str")
start, end = text.index("        x, y, size"), text.index("        return (Message.of")
text = text[:start] + '''        for cell in draw.sample(range(9), 1 + NUMBERS.index(self.disk.number)):
            x, y = 2 + 10 * (cell % 3), 2 + 10 * (cell // 3)
            ImageDraw.Draw(picture).ellipse((x, y, x + 8, y + 8), fill="black")
''' + text[end:]
text = text.replace("self.disk.color", "self.disk.number").replace("problem.color", "problem.number")
text = text.replace("COLORS", "NUMBERS").replace("self.colors", "self.numbers")
open("count_dots.py", "w").write(text)
test = open("test_count_dots.py").read()
start = test.index("def test_only")
test = test[:start] + '''def test_only_the_right_number_is_rewarded():
    env = TASK.env(TASK.problem("train", 0))
    assert [env.step(answer).reward for answer in ("one", "two", "")] == [1.0, 0.0, 0.0]
'''
open("test_count_dots.py", "w").write(test)
PY
python change.py && rm change.py
run 'sed -n "/^QUESTION/,/^class/p" count_dots.py' 60
run 'python -m vlmrl.tasks.check count_dots:CountDots args.level=3'
run 'python -m pytest -q'
run 'python -m vlmrl --config-dir conf experiment=count_dots dry_run=true' 40
run 'python -m vlmrl --config-dir conf experiment=count_dots' 25
run 'python - <<PY
import json
lines = [json.loads(line) for line in open("outputs/latest/metrics.jsonl")]
for line in lines:
    if "eval/reward" in line:
        print("step", line["step"], "held-out sampled", round(line["eval/reward"], 3), "greedy", round(line["eval/reward_greedy"], 3))
print("largest mismatch_kl/max:", max(line["mismatch_kl/max"] for line in lines[1:]))
gaps = [line["vision_gap/shuffled"] for line in lines if "vision_gap/shuffled" in line]
print("vision_gap/shuffled, first and last:", round(gaps[0], 3), round(gaps[-1], 3))
PY' 40
run 'python -m vlmrl mode=report run=outputs/latest'
run 'ls outputs/latest'
