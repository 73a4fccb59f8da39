"""Files with damage: checkpoints and data are read as they were, or one sentence says why not.

Each subject is a function of a seed, as in fuzz.py.
"""

import gzip
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import InputError, checkpoint, data


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Bits flipped, an end cut off, bytes added."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.3:
        del changed[draw.randrange(len(changed)) :]
    if draw.random() < 0.1:
        changed += bytes(draw.randrange(1, 40))
    return bytes(changed)


def checkpoints(seed: int) -> None:
    """The whole content comes back, or one error that says it does not."""
    draw = random.Random(seed)
    content = {
        "task": "names",
        "options": {"seed": seed},
        "runs": [{"weights": torch.arange(40.0), "loss": [0.5, 0.25]}],
    }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint.pt"
        checkpoint.save(path, content)
        path.write_bytes(damaged(draw, path.read_bytes()))
        try:
            loaded = checkpoint.load(path)
        except InputError:
            return
        assert str(loaded) == str(content)


NAMES = b'"Abel","Aland"\n"Kim, ""K""","Bland"\n"Uwe","Cland"\n'
READERS: dict[str, tuple[bytes, Callable[[Path], object]]] = {
    "names.csv.gz": (gzip.compress(NAMES, mtime=0), data.read_names),
    "news.csv": (b'"3","Stocks rise","By 1,5 ""percent"""\n"1","War","Peace\nfollows"\n', data.read_news),
    "glove.txt": (b"the 0.5 -1.25e-3 3\n. . 1 2 3\n", lambda path: data.read_glove(path, 3, {"the", ". ."})),
    "Aish.txt": ("Ábel\nŁoś\nO’Neill\nUwe\n".encode(), lambda path: data.read_language_files(path.parent)),  # noqa: RUF001
    "text.txt": ("Ábel,\r\nŁoś\n".encode(), data.read_text),
}


def data_files(seed: int) -> None:
    """Something is read, or one error says why not; what carries a checksum is read as it was."""
    draw = random.Random(seed)
    name, (content, read) = draw.choice(list(READERS.items()))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(content)
        expected = read(path)
        path.write_bytes(damaged(draw, content))
        try:
            found = read(path)
        except InputError as error:
            assert str(error) and "\n" not in str(error), str(error)
            return
        assert not name.endswith(".gz") or found == expected, (name, found)


SUBJECTS: dict[str, Callable[[int], None]] = {"checkpoints": checkpoints, "data": data_files}
