"""The task hello: every way of writing the model learns to spell."""

from training import rows, run

from benchmarks.tasks import hello


def test_every_way_learns_to_spell(tmp_path, capsys):
    assert run("train", "hello", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    last = [line for line in printed.splitlines() if "epoch [15/15]" in line]
    assert len(last) == 2 * len(hello.VARIANTS) and all(" ohlol " in line for line in last)
    assert {row["variant"]: row["options"]["lr"] for row in rows(tmp_path)} == {
        "cell": 0.1,
        "rnn": 0.05,
        "rnn2": 0.05,
        "lstm2": 0.05,
        "gru2": 0.05,
    }
    assert all(row["gap"] < 1e-4 for row in rows(tmp_path))
