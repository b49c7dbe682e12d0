"""The documentation matches the package: its code runs, its outputs and tables are the real ones.

Marks in HTML comments, which readers do not see, say more about the block that follows:

- ``<!-- raises: SomeError -->``: the block raises it, and the next ``text`` block is its message;
- ``<!-- prints -->``: the next ``text`` block is what the block prints;
- ``…`` in such a ``text`` block stands for any text.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import pkgutil
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from jsonargparse._deprecated import JsonargparseDeprecationWarning
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import distributions

import lightning_kfc
import lightning_kfc.analysis
import lightning_kfc.pictures
from lightning_kfc.losses.readers import LOSS_FUNCTIONS
from lightning_kfc.losses.readers.distributions import DISTRIBUTIONS
from lightning_kfc.monitoring.advice import RULES
from lightning_kfc.monitoring.events import Events, StepNumbers
from lightning_kfc.reporting.diagnostics import LOGGED
from lightning_kfc.settings import FORMER, MOVED
from tests.reporting.test_diagnostics import OF_ALL, PER_LAYER

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: The names in the Python code of the repository.
WORDS = {
    word
    for folder in ("lightning_kfc", "tests", "benchmarks", "examples")
    for file in (ROOT / folder).rglob("*.py")
    for word in re.findall(r"\w+", file.read_text("utf-8"))
}
FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>.*?) -->\n)?^(?P<indent> *)```(?P<language>[\w{}-]+)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    mark: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], textwrap.dedent(m["code"]), m["mark"] or "", text[: m.start("code")].count("\n") + 1)
        for m in FENCE.finditer(text)
    ]


def having(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


def page_id(page: Path) -> str:
    return page.stem


def words(text: str) -> str:
    return " ".join(text.split())


def assert_shown(shown: str, real: str, where: str) -> None:
    pattern = ".*".join(re.escape(words(part)) for part in shown.split("…"))
    # Where an ellipsis stands between two words, the blanks around it belong to what it stands for.
    assert re.fullmatch(pattern, words(real), re.DOTALL), f"{where} shows\n{shown}\nbut it is really\n{real}"


def raised_by(code: CodeType, namespace: dict[str, Any]) -> Exception | None:
    try:
        exec(code, namespace)
    except Exception as error:
        return error
    return None


@contextlib.contextmanager
def lightning_silenced() -> Iterator[None]:
    """Without Lightning's warnings about toy data (no workers, few batches) and its own dependencies."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")
        warnings.filterwarnings("ignore", category=JsonargparseDeprecationWarning)
        yield


def command_line() -> LightningCLI:
    with lightning_silenced():
        return LightningCLI(BoringModel, run=False, save_config_callback=None, seed_everything_default=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", having("python"), ids=page_id)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    page_blocks = blocks(page)
    with lightning_silenced():
        for number, block in enumerate(page_blocks):
            if block.language != "python":
                continue
            where = f"{page.name}:{block.line}"
            code = compile("\n" * block.line + block.code, str(page), "exec")
            printed = io.StringIO()
            kind, _, argument = block.mark.partition(": ")
            if kind == "raises":
                error = raised_by(code, namespace)
                assert type(error).__name__ == argument, f"{where} raised {error!r}"
                assert_shown(page_blocks[number + 1].code, str(error), where)
            elif kind == "prints":
                with contextlib.redirect_stdout(printed):
                    exec(code, namespace)
                assert_shown(page_blocks[number + 1].code, printed.getvalue(), where)
            else:
                exec(code, namespace)


@pytest.mark.parametrize("page", having("diff"), ids=page_id)
def test_both_sides_of_a_change_on_a_page_are_python_and_the_new_one_runs(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    with lightning_silenced():
        for block in blocks(page):
            if block.language == "python" and "import " in block.code and not block.mark:
                exec("\n".join(re.findall(r"^(?:from \S+ )?import [\w, ]+$", block.code, re.MULTILINE)), namespace)
            if block.language == "diff":
                lines = block.code.splitlines()
                old, new = (textwrap.dedent("\n".join(x[1:] for x in lines if x[:1] != sign)) for sign in "+-")
                compile(old, f"{page.name}:{block.line}", "exec")
                exec(compile(new, f"{page.name}:{block.line}", "exec"), namespace)
                assert isinstance(namespace["trainer"].callbacks[0], lightning_kfc.KFCCallback)


@pytest.mark.parametrize("page", having("yaml"), ids=page_id)
def test_the_yaml_of_a_page_makes_a_trainer_with_the_callback(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language != "yaml":
            continue
        (tmp_path / "config.yaml").write_text(block.code, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", "config.yaml"])
        cli = command_line()
        assert isinstance(cli.trainer, Trainer)
        found = [c for c in cli.trainer.callbacks if isinstance(c, lightning_kfc.KFCCallback)]
        assert found, f"{page.name}:{block.line} makes no KFCCallback"


@pytest.mark.parametrize("page", having("console"), ids=page_id)
def test_the_command_lines_of_a_page_make_a_trainer_with_the_callback(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "".join(block.code for block in blocks(page) if block.language == "console")
    for arguments in re.findall(r"^python train.py fit (.*)$", text, re.MULTILINE):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments.split()])
        cli = command_line()
        assert any(isinstance(c, lightning_kfc.KFCCallback) for c in cli.trainer.callbacks), arguments


def callback_options() -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(lightning_kfc.KFCCallback).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind != parameter.VAR_KEYWORD}


def test_the_settings_page_lists_every_option_with_its_default() -> None:
    rows = re.findall(r"^\| \[?`(\w+)`.*?\| `(.+?)` \|", (ROOT / "docs/settings.md").read_text("utf-8"), re.MULTILINE)
    real = {name: repr(p.default).replace("'", '"') for name, p in callback_options().items()}
    assert dict(rows) == real


def test_the_settings_page_explains_every_option_under_a_heading_of_its_own() -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs/settings.md").read_text("utf-8"), re.MULTILINE)
    explained = {name for heading in headings for name in re.findall(r"`(\w+)`", heading)}
    assert set(callback_options()) <= explained


def test_the_settings_page_names_every_option_of_earlier_versions() -> None:
    _, _, section = (ROOT / "docs/settings.md").read_text("utf-8").partition("## Options of earlier versions")
    assert set(FORMER) <= set(re.findall(r"`(\w+)`", section))
    for name, (kind, group, option) in MOVED.items():
        now = f"| [`{group}`](#{group})`={kind}({option}=...)` | [`{group}`](#{group})`.{option}` |"
        assert f"| `{name}` {now}" in section


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs/api.md").read_text("utf-8")
    described = {name.rpartition(".")[2] for name in re.findall(r"auto\w+:: ([\w.]+)", text)}
    assert set(lightning_kfc.__all__) - {"__version__"} <= described
    assert set(lightning_kfc.analysis.__all__) <= described
    listed = re.search(r"automodule:: lightning_kfc.pictures\n +:members: (.*)", text)
    assert listed is not None
    assert set(lightning_kfc.pictures.__all__) <= set(listed[1].split(", "))


def test_the_loss_page_has_the_recognised_loss_functions_and_distributions_and_no_others() -> None:
    _, _, text = (ROOT / "docs/loss.md").read_text("utf-8").partition("## Loss functions and options")
    first = "\n".join(line.split("|")[1].partition("after")[0] for line in text.splitlines() if line.startswith("| `"))
    named = {name for name in re.findall(r"`([A-Za-z_0-9]+)`", first) if not name.endswith("Loss")}
    functions, kinds = {f.__name__ for f in LOSS_FUNCTIONS}, {kind.__name__ for kind in DISTRIBUTIONS}
    assert named == functions | kinds | {"OneHotCategorical"}


def test_the_loss_page_has_what_the_code_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import generate_loss_table as generator

    assert generator.PAGE.read_text("utf-8") == generator.page(), "run: python docs/generate_loss_table.py"


def test_the_logged_keys_and_counted_events_are_documented() -> None:
    text = (ROOT / "docs/settings.md").read_text("utf-8") + (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    names = [*StepNumbers(0, 1.0, 1.0, 0.0).as_metrics(), *Events().state_dict(), *OF_ALL]
    names += [f"kfc/{key}" for key in PER_LAYER]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_the_table_of_what_is_logged_by_default_has_these_keys_and_no_others() -> None:
    _, _, text = (ROOT / "docs/settings.md").read_text("utf-8").partition("## Numbers in the log")
    table, _, _ = text.partition("With [`logging.layers`]")
    assert re.findall(r"^\| `([^`]+)`", table, re.MULTILINE) == list(LOGGED)


def test_the_diagnostics_page_has_all_rules_of_advice_and_all_numbers() -> None:
    text = (ROOT / "docs/diagnostics.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [rule.__name__ for rule in RULES]
    keys = [*OF_ALL, *(f"kfc/{key}" for key in PER_LAYER)]
    assert [key for key in keys if f"`{key}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_of_the_package_on_a_page_exist(page: Path) -> None:
    for name in re.findall(r"`(lightning_kfc(?:\.\w+)+)`", page.read_text("utf-8")):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    rules = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    assert set(re.findall(r"(?:`|^)make ([a-z]+)\b", text, re.MULTILINE)) <= targets
    modules = re.findall(r"python -m (benchmarks[.\w]+)", text)
    paths = [ROOT / module.replace(".", "/") for module in modules]
    assert [p for p in paths if not (p.with_suffix(".py").exists() or (p / "__main__.py").exists())] == []
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", FENCE.sub("", text))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    "text",
    [
        *PAGES,
        *sorted((ROOT / "docs" / "decisions").glob("*.md")),
        ROOT / "CONTRIBUTING.md",
        ROOT / "benchmarks/README.md",
    ],
    ids=page_id,
)
def test_classes_files_and_tests_that_a_text_names_exist(text: Path) -> None:
    names = set(re.findall(r"`([^`\n]+)`", FENCE.sub("", text.read_text("utf-8"))))
    classes = {name for name in names if re.fullmatch(r"(?:[A-Z][a-z]+){2,}", name)}
    assert sorted(classes - WORDS - set(dir(distributions))) == []
    for name in names:
        path, _, test = re.sub(r"^results/", "benchmarks/results/", name).partition("::")
        # TASK stands for any.
        if re.fullmatch(r"(?:lightning_kfc|tests|docs|examples|benchmarks)/[\w./*]+", path):
            found = list(ROOT.glob(re.sub(r"[A-Z]+", "*", path).rstrip("/")))
            assert found, name
            assert not test or re.search(rf"def {test}\b", found[0].read_text("utf-8")), name


def test_readme_and_first_page_show_the_same_ten_lines() -> None:
    first, second = (
        next(block.code for block in blocks(ROOT / name) if block.language == "python")
        for name in ("README.md", "docs/index.md")
    )
    assert first == second
    assert len([line for line in first.splitlines() if line]) <= 10


@pytest.mark.parametrize("name", ["tutorial_classify", "tutorial_layer", "tutorial_ranks"])
def test_each_tutorial_is_a_notebook_with_the_page_s_cells_and_what_they_print(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The page's own test runs its blocks, and compares the texts with what they print.
    monkeypatch.syspath_prepend(ROOT / "docs")
    import generate_notebooks as generator

    path = generator.NOTEBOOKS / f"{name}.ipynb"
    found = json.loads(path.read_text("utf-8"))
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    outputs = ["".join(text for output in cell["outputs"] for text in output["text"]) for cell in code]
    assert found == generator.notebook(name, outputs), "run: python docs/generate_notebooks.py"
    page = (ROOT / "docs" / f"{name}.md").read_text("utf-8")
    python = [block.code for block in blocks(ROOT / "docs" / f"{name}.md") if block.language == "python"]
    assert ["".join(cell["source"]) + "\n" for cell in code] == python
    texts = [block.code for block in blocks(ROOT / "docs" / f"{name}.md") if block.language == "text"]
    printed = [output for output in outputs if output]
    assert len(printed) == len(texts)
    for text, output in zip(texts, printed, strict=True):
        assert_shown(text, output, name)
    markdown = "".join(line for cell in found["cells"] if cell["cell_type"] == "markdown" for line in cell["source"])
    assert ".md" not in markdown
    assert f"<notebooks/{name}.ipynb>" in page
