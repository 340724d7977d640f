#!/usr/bin/env bash
# A newcomer's path, with README.md and docs/ alone: from an empty virtual environment to a task of their own that learns.
#
#   docs/newcomer/path.sh | tee docs/newcomer/transcript.txt       about five minutes on two cores
#
# Each command is printed before it runs. The newcomer changes the task as docs/your_task.md explains: pictures get two
# disks instead of one, and the answer is which side has the red one.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../.." && pwd)
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cd "$home"
run() { # print a command, run it, and show its last lines without the paths of this machine
    printf '\n$ %s\n' "$1"
    bash -euo pipefail -c "$1" 2>&1 | sed -e "s#$checkout#vlmrl#g; s#$home#~#g" | tail -n "${2:-12}"
}

run 'python3 -m venv venv'
export PATH="$home/venv/bin:$PATH" VLMRL_CACHE="$home/cache"
run "git clone --quiet $checkout checkout && cd checkout && git log -1 --format='%s'"
run "pip install --quiet --disable-pip-version-check -e './checkout[test]' 2>&1 | grep -v WARNING || true"
run 'python -m vlmrl init two_disks'
cd two_disks
run 'ls -R'

echo
echo '# The newcomer edits two_disks.py:'
cat >change.py <<'PY'
text = open("two_disks.py").read()
text = text.replace('QUESTION = "Which colour is the disk?"', 'QUESTION = "On which side is the red disk?"')
text = text.replace('COLORS = ("red", "green", "blue", "orange", "black")', 'SIDES = ("left", "right")')
text = text.replace("    color: str", "    side: str")
start, end = text.index("        picture, draw"), text.index("        return (Message.of")
text = text[:start] + '''        picture, draw = PILImage.new("RGB", (64, 32), "white"), random.Random(self.disk.id)
        for side, x in (("left", 0), ("right", 32)):
            color = "red" if side == self.disk.side else draw.choice(("green", "blue", "black"))
            y, size = draw.randint(0, 8), draw.randint(16, 22)
            ImageDraw.Draw(picture).ellipse((x + 4, y, x + 4 + size, y + size), fill=color)
''' + text[end:]
text = text.replace("self.disk.color", "self.disk.side").replace("problem.color", "problem.side")
text = text.replace("        self.colors = COLORS[: config.args.get(\"level\", 3)]  # task.args.level=5 is harder\n", "")
text = text.replace("self.colors[index % len(self.colors)]", "SIDES[index % 2]").replace("self.colors", "SIDES")
open("two_disks.py", "w").write(text)
test = open("test_two_disks.py").read()
start = test.index("def test_only")
test = test[:start] + '''def test_only_the_right_side_is_rewarded():
    env = TASK.env(TASK.problem("train", 0))
    assert [env.step(answer).reward for answer in ("left", "right", "")] == [1.0, 0.0, 0.0]
'''
open("test_two_disks.py", "w").write(test)
PY
python change.py && rm change.py
run 'sed -n "/^QUESTION/,/^class/p" two_disks.py' 60
run 'python -m vlmrl.tasks.check two_disks:TwoDisks'
run 'python -m pytest -q'
run 'python -m vlmrl --config-dir conf experiment=two_disks dry_run=true' 40
run 'python -m vlmrl --config-dir conf experiment=two_disks' 25
run 'python - <<PY
import json
lines = [json.loads(line) for line in open("outputs/latest/metrics.jsonl")]
for line in lines:
    if "eval/reward" in line:
        print("step", line["step"], "held-out sampled", round(line["eval/reward"], 3), "greedy", round(line["eval/reward_greedy"], 3))
print("largest mismatch_kl/max:", max(line["mismatch_kl/max"] for line in lines[1:]))
print("vision gap, first and last:", *[round(line["vision_gap/shuffled"], 3) for line in lines if "vision_gap/shuffled" in line][::max(1, len(lines) // 10)])
PY' 40
run 'python -m vlmrl mode=report run=outputs/latest'
run 'ls outputs/latest'
