"""Writes docs/reference from the code: models.yaml keys, API fields, errors, commands. Run it after changing one.

    python docs/generate.py                        # all but families.md
    python docs/generate.py --templates FOLDER     # families.md too, from the chat templates (*.jinja) in a folder

The templates of the families are their publishers' and not part of this repository.

Says nothing of its own about a field: every word comes from a docstring, a range or a description in the code. A test
holds that what lies in docs/reference is what this script writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from docs.pages.api import api
from docs.pages.cli import cli
from docs.pages.families import families
from docs.pages.models_yaml import models_yaml

REFERENCE = Path(__file__).resolve().parent / "reference"


def generate() -> dict[str, str]:
    """File name in docs/reference → text."""
    return {"models-yaml.md": models_yaml(), "api.md": api(), "cli.md": cli()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/reference from the code.")
    parser.add_argument("--templates", type=Path, help="folder of chat templates, for families.md")
    options = parser.parse_args()
    REFERENCE.mkdir(parents=True, exist_ok=True)
    pages = generate()
    if options.templates is not None:
        pages["families.md"] = families(options.templates)
    for name, text in pages.items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/reference/{name}")


if __name__ == "__main__":
    main()
