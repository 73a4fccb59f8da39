"""One file a task: its data, model, loss, metric and options."""

from benchmarks.tasks.charlm import CharacterModelling
from benchmarks.tasks.names import NameClassification

TASKS = {task.name: task for task in (NameClassification, CharacterModelling)}
