# SPDX-License-Identifier: MIT
"""What the documents quote is what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_example_of_adding_a_model_is_the_file() -> None:
    quoted = re.search(r"```python\n# (\S+)\n(.*?)```", (ROOT / "docs" / "adding-a-model.md").read_text(), re.S)
    assert quoted
    assert quoted[2].strip() in (ROOT / quoted[1]).read_text()


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
