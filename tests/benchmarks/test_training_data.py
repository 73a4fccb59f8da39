"""Data of the training tasks: batches, downloads, and files that cannot be used."""

import gzip
import hashlib
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from training import LETTERS, options, refused, run, write_csv

from benchmarks import data
from benchmarks.tasks import TASKS
from benchmarks.tasks.charlm import chunks, streams


def test_batches_keep_names_and_countries_together(folder):
    task = TASKS["names"](options("names", "--data", folder, "--batch-size", 7))
    seen = 0
    for (codes, lengths), countries, _ in task.batches(0):
        for row, length, country in zip(codes, lengths, countries, strict=True):
            name = bytes(row[:length].tolist()).decode()
            assert set(name.lower()) <= set(LETTERS[task.countries[country]])
            seen += 1
    assert seen == 150


def test_order_depends_on_seed_and_epoch_alone(folder):
    task = TASKS["names"](options("names", "--data", folder))
    first, again, next_epoch = (next(iter(task.batches(epoch))).input[0] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_epoch)


def test_limit_takes_rows_of_every_country(folder):
    task = TASKS["names"](options("names", "--data", folder, "--limit", 10))
    assert len(task.train.lengths) <= 10 and set(task.train.countries.tolist()) == {0, 1, 2}


def test_chunks_cover_every_stream():
    text = streams(torch.arange(103), 4)
    assert text.shape == (25, 4)
    assert torch.equal(text.t().flatten(), torch.arange(100))
    parts = list(chunks(text, 10))
    assert [len(codes) for codes, _ in parts] == [10, 10, 4]
    assert all(torch.equal(codes + 1, following) for codes, following in parts)
    assert torch.equal(torch.cat([codes for codes, _ in parts]), text[:-1])


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """The public originals' stand-in on this machine, with an empty cache."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder / "names"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setattr(data, "NAMES_URL", f"http://127.0.0.1:{server.server_port}/")
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    yield folder / "names"
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_is_cached(server, tmp_path, monkeypatch, capsys):
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in server.iterdir()}
    monkeypatch.setattr(data, "NAMES_SHA256", {file: sums[file] for file in data.NAMES_SHA256})
    arguments = ("train", "names", "--module", "torch", "--epochs", 1, "--limit", 20, "--out", tmp_path / "out")
    assert run(*arguments) == 0
    assert capsys.readouterr().err.count("Downloading") == 2
    monkeypatch.setattr(data, "NAMES_URL", "http://127.0.0.1:9/")
    assert run(*arguments) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("fault", ["checksum", "missing file", "no server"])
def test_failed_download_names_the_way_out(fault, server, capsys, monkeypatch, tmp_path):
    if fault == "missing file":
        (server / "names_train.csv.gz").unlink()
    if fault == "no server":
        monkeypatch.setattr(data, "NAMES_URL", "http://127.0.0.1:9/")
    assert run("train", "names", "--module", "torch", "--out", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("Downloading")
    assert "--data DIR" in lines[1] and "SEQKERNELS_DATA=DIR" in lines[1]
    assert not list((tmp_path / "cache").rglob("*.gz"))


def spoil(folder: Path, fault: str) -> None:
    train_file, test_file = folder / "names" / "names_train.csv.gz", folder / "names" / "names_test.csv.gz"
    match fault:
        case "no folder":
            shutil.rmtree(folder)
        case "no test file":
            test_file.unlink()
        case "no rows":
            write_csv(train_file, [])
        case "three columns":
            write_csv(train_file, [("Ada", "Aland"), ("Kim", "Bland", "?")])
        case "one column":
            write_csv(test_file, [("Ada",)])
        case "empty name":
            write_csv(train_file, [("", "Aland")])
        case "unknown letter":
            write_csv(train_file, [("Åda", "Aland")])
        case "unknown country":
            write_csv(test_file, [("Ada", "Atlantis")])
        case "not gzip":
            train_file.write_text('"Ada","Aland"\n')
        case "cut gzip":
            train_file.write_bytes(train_file.read_bytes()[:-20])
        case "spoilt gzip":
            content = bytearray(train_file.read_bytes())
            content[30:60] = bytes(30)
            train_file.write_bytes(content)
        case "not UTF-8":
            with gzip.open(train_file, "wb") as file:
                file.write(b'"\xff\xfe","Aland"\n')


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no folder", "is not a folder"),
        ("no test file", "holds no names/names_test.csv.gz"),
        ("no rows", "has no rows"),
        ("three columns", "line 2: expected"),
        ("one column", "line 1: expected"),
        ("empty name", "line 1: expected"),
        ("unknown letter", "letters outside ASCII"),
        ("unknown country", "Atlantis"),
        ("not gzip", "cannot be read"),
        ("cut gzip", "cannot be read"),
        ("spoilt gzip", "cannot be read"),
        ("not UTF-8", "cannot be read"),
    ],
)
def test_bad_names(fault, says, folder, tmp_path, capsys):
    spoil(folder, fault)
    refused(capsys, tmp_path, says, "train", "names", "--data", folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b"", "gives 0 characters"),
        (b"short", "gives 5 characters"),
        (b"\xff" * 9999, "UTF-8"),
    ],
)
def test_bad_text(content, says, tmp_path, capsys):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    refused(capsys, tmp_path, says, "train", "charlm", "--text", text)
