"""Code blocks of the documents, which tests run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document, language):
    """Return the blocks of one language, in their order."""
    found = BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
    return [code for name, code in found if name == language]
