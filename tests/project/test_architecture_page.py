"""The page on the architecture describes the tree that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_kfc"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
#: Changes that the last table answers, whatever others it has.
ASKED = (
    "add a loss function",
    "log one more number",
    "use another damping split",
    "refuse a strategy",
    "add a kind of layer",
    "add an inverse",
    "change when inverses are due",
    "change what ranks send",
    "add a warning about optimizers",
    "change how a bad step is shortened",
    "change what of a step is recorded and replayed",
    "add an option",
)


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of the tables of a section, without the lines of their heads."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    rules = {number for number, line in enumerate(lines) if set(line) <= set("|- ")}
    kept = [line for number, line in enumerate(lines) if not {number, number + 1} & rules]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


def paths(text: str) -> list[str]:
    return re.findall(r"`((?:lightning_kfc|tests|docs|benchmarks)/[\w./]*)`", text)


def rooms() -> list[str]:
    return sorted(init.parent.name for init in PACKAGE.glob("*/__init__.py"))


def code_of(files: list[str]) -> str:
    return "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)


def test_every_path_on_the_page_exists() -> None:
    named = paths(PAGE) + re.findall(r"\blightning_kfc/[\w./]*\w", PAGE)
    assert len(named) > 50
    assert sorted({path for path in named if not (ROOT / path).exists()}) == []


def test_every_room_is_in_the_picture_and_in_the_table() -> None:
    picture = re.search(r"```text\n(.*?)```", section("The rooms"), re.DOTALL)
    assert picture is not None
    assert sorted(set(re.findall(r"(\w+)/", picture[1]))) == rooms()
    assert sorted(Path(path).name for row in rows("The rooms") for path in paths(row[0])) == rooms()


def test_every_file_beside_the_rooms_is_named() -> None:
    files = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert [name for name in files if f"`lightning_kfc/{name}`" not in section("The rooms")] == []


def test_the_layers_of_the_picture_are_those_of_the_import_contract() -> None:
    contract = (ROOT / ".importlinter").read_text(encoding="utf-8")
    found = re.search(r"^layers =\n((?: +\S.*\n)+)", contract, re.MULTILINE)
    assert found is not None
    layers = [sorted(re.findall(r"\w+", line)) for line in found[1].splitlines()]
    picture = re.search(r"```text\n(.*?)```", section("The rooms"), re.DOTALL)
    assert picture is not None
    stages = next(names for names in layers if "estimation" in names)
    shown: list[list[str]] = []
    for line in picture[1].splitlines():
        names = re.findall(r"(\w+)(?:/|\.py)", line)
        if "──" in line and shown and shown[-1][0] in stages:
            shown[-1] += names
        elif names:
            shown.append(names)
    assert [sorted(names) for names in shown] == layers


@pytest.mark.parametrize("wish", ASKED)
def test_the_table_lists_where_to_make_a_change(wish: str) -> None:
    found = [row for row in rows("I want to …") if row[0] == wish]
    assert len(found) == 1
    assert [path for path in paths(found[0][1]) if path.startswith("lightning_kfc/")]


def test_every_row_of_the_table_has_files_and_tests_that_exist() -> None:
    for wish, files, _, tests in rows("I want to …"):
        assert paths(files), wish
        assert paths(tests), wish
        assert [path for path in paths(files) + paths(tests) if not (ROOT / path).exists()] == [], wish


def test_every_name_of_the_table_is_in_a_file_of_its_row() -> None:
    for wish, files, what, _ in rows("I want to …"):
        named = [path for path in paths(files + what) if path.startswith("lightning_kfc/")]
        sources = [str(p.relative_to(ROOT)) for path in named for p in [ROOT / path, *(ROOT / path).glob("*.py")]]
        text = code_of([path for path in sources if path.endswith(".py")])
        names = [name for name in re.findall(r"`@?([A-Za-z_.]+)`", what) if name != "auto"]
        missing = [name for name in names for part in name.split(".") if not re.search(rf"\b{part}\b", text)]
        assert missing == [], wish


def test_the_methods_of_the_step_are_methods_of_the_package() -> None:
    methods: dict[str, set[str]] = {}
    functions: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                methods.setdefault(node.name, set()).update(d.name for d in node.body if isinstance(d, ast.FunctionDef))
            elif isinstance(node, ast.FunctionDef):
                functions.add(node.name)
    steps = [row for row in rows("One training step") if len(row) == 4]
    assert [row[1].strip("`") for row in steps if row[0]] == [
        "capture",
        "back_propagate",
        "refresh",
        "precondition",
        "review",
    ]
    named = re.findall(r"`(?:(\w+)\.)?(\w+)`", " ".join(row[2] for row in steps))
    known = functions | set(methods)
    wrong = [f"{owner}.{name}" for owner, name in named if owner and name not in methods.get(owner, set())]
    wrong += [name for owner, name in named if not owner and name not in known | {"step", "update"}]
    assert wrong == []
    hooks = [row for row in rows("One training step") if len(row) == 2]
    calls = [call for row in hooks for call in re.findall(r"`(?:(\w+)\.)?(\w+)`", row[1])]
    owners = {"": "KFC", "batches": "Batches", "refreshes": "Refreshes"}
    assert calls
    assert [name for part, name in calls if name not in methods[owners[part]]] == []


def test_the_rooms_of_the_step_exist() -> None:
    steps = [row for row in rows("One training step") if len(row) == 4]
    named = {name for row in steps for name in re.findall(r"`(\w+)(?:\.py)?`", row[3])}
    assert named <= {*rooms(), "kfc"}


def test_every_owner_of_state_is_a_class_of_its_file() -> None:
    for owners, files, *_ in rows("Who owns which state"):
        text = code_of(paths(files))
        for name in re.findall(r"`(\w+)`", owners):
            assert re.search(rf"^class {name}\b", text, re.MULTILINE), name


DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


def page_id(page: Path) -> str:
    return page.stem


def test_the_index_of_decisions_links_every_page() -> None:
    index = (ROOT / "docs" / "decisions" / "index.md").read_text(encoding="utf-8")
    pages = {page.name for page in DECISIONS} - {"index.md"}
    assert pages
    assert set(re.findall(r"^\| \[.+?\]\((\w+\.md)\) \|", index, re.MULTILINE)) == pages


@pytest.mark.parametrize("page", DECISIONS, ids=page_id)
def test_what_a_decision_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [path for path in paths(text) if not (ROOT / path).exists()] == []
    scripts = re.findall(r"python -m (benchmarks[.\w]+)", text)
    assert [name for name in scripts if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists()] == []
    shown = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert shown or page.name == "index.md"
    missing = [name for file, name in shown if not re.search(rf"^def {name}\(", code_of([file]), re.MULTILINE)]
    assert missing == []
    if page.name != "index.md":
        code = re.search(r"\*\*Code\.\*\*(.*?)\n\n", text, re.DOTALL)
        assert code is not None
        names = [part for name in re.findall(r"`([\w.]+)`", code[1]) for part in name.split(".")]
        files = [file for file in paths(code[1]) if file.startswith("lightning_kfc/")]
        assert files
        assert [name for name in names if not re.search(rf"\b{name}\b", code_of(files))] == []
