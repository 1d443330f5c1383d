"""The pages of docs: their examples run, their links lead somewhere, and refusals are what is said."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from helpers import run_python
from sait_cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
RUN = ("index.md", "start.md", "hour.md", "density.md", "models.md", "ops.md")  # whose examples are whole
EXAMPLES = [
    (page, example)
    for page in RUN
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=lambda text: text.split("\n")[0])
def test_example_runs(page: str, example: str) -> None:
    # No test may depend on a download; the smallest DeiT says the same in a fifth of the time.
    example = example.replace("pretrained=True", "pretrained=False").replace("deit_small", "deit_tiny")
    exec(compile(example, page, "exec"), {})


def commands() -> list[tuple[str, str]]:
    """(page, line) of each command of ours in a block."""
    found = []
    for page in (ROOT / "README.md", *PAGES):
        blocks = page.read_text(encoding="utf-8").split("\n```")[1::2]  # every other fence opens one
        lines = (line for block in blocks for line in block.split("\n"))
        found += [(page.name, line) for line in lines if line.startswith("sait ")]
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda text: text.split("  ")[0])
def test_commands_have_their_options(page: str, line: str) -> None:
    name, *words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app).commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= known | {"--help"}, page


def test_every_page_is_in_the_menu() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["strict"] is True
    in_menu = re.findall(r": (\S+\.md)$", text, re.MULTILINE)
    assert sorted(in_menu) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES)


def headings(page: Path) -> set[str]:
    """Anchors of a page, as a browser has them in its address."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def test_what_is_refused_is_said_so() -> None:
    done = run_python(str(ROOT / "tools" / "refusals.py"), "--check")
    assert done.returncode == 0, f"run `python tools/refusals.py`\n{done.stdout}{done.stderr}"
