"""Pages of the documentation site that are no files of docs/, and links that leave it. MkDocs calls the functions."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter


REPO = Path(__file__).parents[1]
DOCS = REPO / "docs"
LINK = re.compile(r"\[(?P<text>(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the first page, and the tutorial with its pictures."""
    files.append(File.generated(config, "index.md", content=(REPO / "README.md").read_text(encoding="utf-8")))
    text, resources = MarkdownExporter().from_filename(
        str(DOCS / "tutorial.ipynb"), resources={"output_files_dir": "tutorial"}
    )
    files.append(File.generated(config, "tutorial.md", content=text))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files that the site lacks to the repository, and make them text where its address is not known."""
    home = page.file.src_uri == "index.md"
    folder = REPO if home else (DOCS / page.file.src_uri).parent

    def led(link: re.Match[str]) -> str:
        text, path, anchor = link["text"], link["path"], link["anchor"] or ""
        target = (folder / path).resolve()
        if not target.exists() or not target.is_relative_to(REPO):
            return link[0]  # which MkDocs warns of, if it is no page either
        if target == REPO / "README.md":
            return f"[{text}]({'../' * page.file.src_uri.count('/')}index.md{anchor})"
        file = files.get_file_from_path(target.relative_to(DOCS).as_posix()) if target.is_relative_to(DOCS) else None
        if file and not file.inclusion.is_excluded():
            return f"[{text}]({target.relative_to(DOCS)}{anchor})" if home else link[0]
        kind = "tree" if target.is_dir() else "blob"
        address = f"{config.repo_url}/{kind}/{config.extra['ref']}/{target.relative_to(REPO)}{anchor}"
        return f"[{text}]({address})" if config.repo_url else text

    return LINK.sub(led, markdown)
