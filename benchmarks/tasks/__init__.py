"""One file a task: its data, model, loss, metric and options."""

from benchmarks.tasks.charlm import CharacterModelling
from benchmarks.tasks.hello import Hello
from benchmarks.tasks.names import NameClassification
from benchmarks.tasks.news import NewsClassification

TASKS = {task.name: task for task in (Hello, NameClassification, NewsClassification, CharacterModelling)}
