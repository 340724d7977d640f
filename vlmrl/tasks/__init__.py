"""What a task of your own needs; the contract is in `vlmrl.tasks.base`, its check is `python -m vlmrl.tasks.check`."""

from vlmrl.tasks.base import Env, Problem, Reply, Split, Task
from vlmrl.tasks.loading import load_task
from vlmrl.types import Image, Message, Text

__all__ = ["Env", "Image", "Message", "Problem", "Reply", "Split", "Task", "Text", "load_task"]
