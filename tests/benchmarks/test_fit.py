"""`python -m benchmarks fit`: constants from rows."""

import re

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import fit
from seqkernels.backends.measured import MEASURED


@pytest.mark.parametrize("gpu", sorted(MEASURED))
def test_the_constants_are_those_of_the_rows(gpu, capsys):
    found = fit_of(gpu, capsys)
    assert found.keys() == MEASURED[gpu].keys()
    for key, constants in MEASURED[gpu].items():
        assert found[key] == pytest.approx(constants, rel=1e-3, abs=1e-3), key


def test_the_table_is_written_for_one_gpu(tmp_path):
    constants = {"cuda stepwise forward": (15.5,), "cuda cluster forward": (0.5, 1.25)}
    fit.write(tmp_path / "measured.py", "a GPU", constants)
    written: dict = {}
    exec((tmp_path / "measured.py").read_text(), written)
    assert written["MEASURED"] == {**MEASURED, "a GPU": constants}


def fit_of(gpu, capsys):
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "write", lambda path, name, constants: found.update(constants))
        assert command.main(["fit", "--gpu", gpu, "--write"]) == 0
    said = capsys.readouterr().out
    assert "held out: the chosen path beside the best one" in said
    medians = [float(line.split()[-2].rstrip("%")) for line in said.splitlines() if line.startswith("  cu")]
    assert len(medians) >= 12 and max(medians) < 25
    mean, most = re.search(r"layers: (\S+) times as long in the mean, (\S+) at most", said).groups()
    assert float(mean) < 1.02 and float(most) < 1.1
    return found


def test_no_constant_is_negative():
    terms = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    assert np.allclose(fit.least_squares(terms, terms @ [2.0, 3.0]), [2, 3])
    assert np.allclose(fit.least_squares(terms, np.array([3.0, 2.0, 1.0])), [2, 0])


def test_a_gpu_without_rows_is_named(capsys):
    assert command.main(["fit", "--gpu", "a GPU"]) == 2
    assert "steps.jsonl has no row of a GPU" in capsys.readouterr().err
