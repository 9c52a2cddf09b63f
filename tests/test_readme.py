"""README.md: the code that it shows beside each equation is the code that runs."""

import re

from conftest import ROOT


def test_code_beside_the_equations_is_in_the_files():
    """A formula explained with lines that have since changed teaches what the code does not do."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\w+\.py), (\w+).*?\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 5
    for file, function, lines in blocks:
        source = (ROOT / file).read_text(encoding="utf-8")
        body = source[source.index(f"def {function}(") :]
        for line in lines.splitlines():
            assert line.strip() in body, f"{file}, {function}: {line}"


def test_no_figure_is_left_open():
    """A placeholder that no run has filled."""
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.findall(r"@[A-Z_]+@", path.read_text(encoding="utf-8")), path
