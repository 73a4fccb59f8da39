"""What the documents name is there: files, folders, links between documents, make targets. Their examples run."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))]
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="this is not a checkout")
TOP = ("seqkernels", "csrc", "tests", "benchmarks", "docs", "examples")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_documents_exist(document):
    named = re.findall(rf"`((?:{'|'.join(TOP)})/[\w./-]*)`", document.read_text())
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_documents_say_is_in_a_file_is_there(document):
    """`tile_of` in `csrc/cuda/plan.cpp`, or two names in two files."""
    listed = r"`[^`]+`(?: and `[^`]+`)*"
    for names, paths in re.findall(rf"({listed})(?: \w+)? in ({listed})", document.read_text()):
        files = [ROOT / path for path in re.findall(r"`([^`]+)`", paths)]
        if not all(file.is_file() for file in files):
            continue
        for name in re.findall(r"`(\w+)`", names):
            missing = [str(file) for file in files if name not in file.read_text()]
            assert len(missing) < len(files), (name, missing)


def test_the_diagrams_show_files_that_are_there():
    diagrams = "".join(re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.DOTALL))
    there = {str(path.relative_to(ROOT / top)) for top in ("seqkernels", "csrc") for path in (ROOT / top).rglob("*.*")}
    assert not set(re.findall(r"[\w/]+\.(?:py|h|cpp)\b", diagrams)) - there


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_documents_lead_somewhere(document):
    text = document.read_text()
    in_html = re.findall(r'(?:src|href)="(?!https?:)([^"]*)"', text)
    for target in [*re.findall(r"\]\((?!https?:)([^)]*)\)", text), *in_html]:
        path, _, heading = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_in_documents_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for names in re.findall(r"^([\w -]+):", makefile, re.MULTILINE) for name in names.split()}
    missing = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", document.read_text(), re.MULTILINE)) - targets
    assert not missing


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if "```python" in path.read_text()], ids=lambda path: path.name
)
def test_examples_in_documents_run(document, tmp_path, monkeypatch):
    """Those of one document one after the other, as a reader would type them in."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for match in re.finditer(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
        line = document.read_text()[: match.start()].count("\n") + 1
        code = compile("\n" * line + match[1], str(document), "exec")  # so that an error names the document's line
        try:
            with torch.device("cpu"):
                exec(code, names)
        except ModuleNotFoundError as error:
            assert error.name and error.name.partition(".")[0] not in ("torch", "seqkernels"), error
            pytest.skip(f"not installed: {error.name}")
