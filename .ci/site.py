"""Put the Markdown files of the repository's root into the site: a hook of MkDocs (`make docs`)."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; their links are made relative to `docs/`."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, target in PAGES.items():
            text = re.sub(rf"\]\({re.escape(other)}(#[\w-]+)?\)", rf"]({target}\1)", text)
        files.append(File.generated(config, page, content=text))
    return files
