"""README, CONTRIBUTING and docs/: what they name is there, and the code they show runs."""

import dataclasses
import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest

from titans_scale.config import TitansConfig, config_parser

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
OURS = re.compile(r"(?<![\w/.-])(?:titans_scale|tools|tests|configs|docs|launch|slurm|\.ci)/[\w./-]*")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Every command of the page's sh blocks, as words."""
    lines = [line for block in code_blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def setting_keys(section: type = TitansConfig, prefix: str = "") -> set[str]:
    keys = set()
    for field in dataclasses.fields(section):
        keys.add(f"{prefix}{field.name}")
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            keys |= setting_keys(field.type, f"{prefix}{field.name}.")
    return keys


@cache
def options_of_tool(tool: str) -> frozenset[str]:
    """The options a tool's --help shows."""
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("argparse.ArgumentParser._print_message", lambda self, message, file=None: shown.append(message))
        runpy.run_path(str(ROOT / tool))["main"](["--help"])
    return frozenset(re.findall(r"--[\w.-]+", "".join(shown)))


@every_page
def test_every_file_it_names_is_there(page):
    named = {path.rstrip(".") for path in OURS.findall(page.read_text())}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@every_page
def test_every_link_leads_somewhere(page):
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@every_page
def test_every_setting_it_names_exists(page):
    sections = "|".join(field.name for field in dataclasses.fields(TitansConfig))
    named = re.findall(rf"`(?:--)?((?:{sections})\.[\w.]*\w)", page.read_text())
    files = {"data.md", "training.md", "memory.md"}  # links to pages named like sections
    assert sorted({key for key in named if key not in setting_keys() | files}) == []


@every_page
def test_every_option_of_its_commands_is_known(page):
    for words in commands(page):
        target = next((word for word in words if word.startswith("tools/") or word == "titans_scale.train"), None)
        if target is None or target.endswith(".sh"):
            continue
        ours = words[words.index(target) + 1 :]
        named = {word.split("=")[0] for word in ours if word.startswith("--")}
        known = {f"--{action.dest}" for action in config_parser()._actions} if target == "titans_scale.train" else options_of_tool(target)
        assert named - known == set(), " ".join(words)


@every_page
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {words[1] for words in commands(page) if words[0] == "make"} | set(re.findall(r"`make ([a-z-]+)", page.read_text()))
    assert named - targets == set()


def test_the_commands_are_found_at_all():
    """The tests above hold for a page without commands, too."""
    found = [words for page in PAGES for words in commands(page)]
    assert {"tools/make_shards.py", "tools/estimate.py", "titans_scale.train", "quickstart", "test"} <= {
        word for words in found for word in words
    }


@pytest.mark.parametrize("code", code_blocks(ROOT / "README.md", "python"))
def test_the_readme_s_python_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_metrics_in_the_table_are_those_the_trainer_writes():
    sources = "".join(file.read_text() for file in (ROOT / "titans_scale").rglob("*.py"))
    table = re.search(r"## Metrics\n(.*?)\n## ", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL)
    assert table is not None
    names = re.findall(r"`([^`]+)`", " ".join(line.split("|")[1] for line in table[1].splitlines() if line.startswith("| `")))
    assert len(names) > 15
    assert [name for name in names if name.removeprefix("titans/") not in sources] == []
