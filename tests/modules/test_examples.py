"""Each example runs, and what it prints is what it claims: examples assert that themselves."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not beside the tests")


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["swap_in", "packed", "streaming"])
def test_example_runs_and_its_assertions_hold(name, capsys):
    load(name).main()
    assert "differ" in capsys.readouterr().out


def test_training_loop_learns(capsys):
    assert load("training_loop").main(["--steps", "250"]) > 0.9
    assert "accuracy" in capsys.readouterr().out


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"swap_in", "packed", "streaming", "training_loop"}
