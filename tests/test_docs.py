"""Tests of the documentation: links resolve, and the README stays short."""

import re
from pathlib import Path

import pytest

from bench.__main__ import TOOLS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "reference" / "train" / "README.md"]
NAMED = re.compile(r"`((?:voxkern|kernels|reference|tests|bench|docs|examples)/[\w/]+\.\w+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}, but there is no such heading"


def test_paths_in_code_style_exist() -> None:
    """A path such as `bench/ops/linear.py` in the text names a file of the repository."""
    for page in PAGES[:-1]:
        if page.name == "CHANGELOG.md":
            continue
        for path in NAMED.findall(page.read_text()):
            assert "NAME" in path or (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading, here\n[a](other.md) [b](#a-heading-here) [c](#nowhere)\n")
    assert anchors(page) == {"a-heading-here"}
    with pytest.raises(AssertionError, match=r"page.md links to other.md, which does not exist"):
        test_links_resolve(page)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_named_tools_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"python -m bench (\w+)", page.read_text()):
            assert name in TOOLS or name == "NAME", f"{page.name} names the tool {name}"
        assert not re.search(r"python -m bench\.\w", page.read_text())
