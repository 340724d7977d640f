"""my_task: look at a disk, name its colour. Each picture is drawn when it is asked for."""

import random
from dataclasses import dataclass

from PIL import Image as PILImage
from PIL import ImageDraw

from vlmrl import Image, Message, Reply, Task

QUESTION = "Which colour is the disk?"
COLORS = ("red", "green", "blue", "orange", "black")


@dataclass
class Disk:
    """A problem: any object with an `id`. Equal ids mean equal problems."""

    id: str
    color: str


@dataclass
class Env:
    """One episode about one problem. This one has a single turn."""

    disk: Disk

    def reset(self):
        picture, draw = PILImage.new("RGB", (32, 32), "white"), random.Random(self.disk.id)
        x, y, size = draw.randint(0, 8), draw.randint(0, 8), draw.randint(16, 22)
        ImageDraw.Draw(picture).ellipse((x, y, x + size, y + size), fill=self.disk.color)
        return (Message.of("user", QUESTION, Image(picture)),)

    def step(self, completion):
        return Reply(reward=float(completion.strip() == self.disk.color), done=True)


class MyTask(Task):
    def __init__(self, config, *, seed):
        self.seed = seed
        self.colors = COLORS[: config.args.get("level", 3)]  # task.args.level=5 is harder

    def problem(self, split, index):
        name = f"train, seed {self.seed}, {index}" if split == "train" else f"eval, {index}"
        return Disk(name, self.colors[index % len(self.colors)])

    def env(self, problem):
        return Env(problem)

    def demonstration(self, problem, *, random_answers, seed):  # for the supervised warm-up only
        answer = random.Random(seed).choice(self.colors) if random_answers else problem.color
        return (*Env(problem).reset(), Message.of("assistant", answer))

    def texts(self):  # the tiny model's tokenizer is trained on these
        return (QUESTION, *self.colors)
