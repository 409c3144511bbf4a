"""The documentation site, built as `make docs` builds it: what it has, where its links lead, and how it looks."""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from test_report import CHROMIUM, browse


for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "mkdocs_awesome_nav", "nbconvert"):
    pytest.importorskip(package, reason="the site needs admin-hf[docs]")

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[1]
REPOSITORY = "https://example.org/repository"
# Each module, and the page that has its public names
REFERENCE = {"": "index", "analysis": "analysis/index", "run": "runs/index", "report": "runs/index"}


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.navigation: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
            if "md-nav__link" in (values.get("class") or "").split():
                self.navigation.add(values["href"])
        elif values.get("rel") not in ("canonical", "prev", "next"):
            self.loaded |= {values[name] for name in ("href", "src") if values.get(name)}


def build(folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPO)} | environment
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("site"), REPOSITORY_URL=REPOSITORY, GITHUB_REF_NAME="v1")


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


@pytest.mark.parametrize("module", REFERENCE)
def test_every_public_name_is_in_the_reference(site, pages, module):
    path = f"admin_hf.{module}".strip(".")
    names = getattr(importlib.import_module(path), "__all__", ["write_report"])
    anchors = pages[site / "reference" / f"{REFERENCE[module]}.html"].anchors
    # A function of the same name as its module stands below that
    assert [name for name in names if not {f"{path}.{name}", f"{path}.{name}.{name}"} & anchors] == []


def test_the_search_finds_guides_and_names(site):
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"] for entry in index["docs"]}
    assert {"", "tutorial/", "training/#divergence", "reference/#admin_hf.reparameterize"} <= found


def test_every_page_is_in_the_navigation(site, pages):
    names = [path.stem for path in (REPO / "docs").glob("*.md") if not path.stem.endswith("_intro")]
    assert len(names) > 10
    assert [
        name for name in [*names, "tutorial", "reference"] if f"{name}/" not in pages[site / "index.html"].links
    ] == []


def test_no_link_within_the_site_is_dead(site, pages):
    dead, followed = [], 0
    for path, page in pages.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            followed += 1
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == [] and followed > 500


def test_links_that_leave_the_documentation_lead_to_files_of_the_repository(pages):
    links = {link for page in pages.values() for link in page.links if link.startswith(REPOSITORY)} - {REPOSITORY}
    files = {re.fullmatch(rf"{REPOSITORY}/(blob|tree)/v1/([^#]+)(?:#.*)?", link).groups() for link in links}
    assert {("blob", "admin_hf/loss.py"), ("tree", "docs/results"), ("blob", "hub_configs/README.md")} <= files
    for kind, file in files:
        assert (REPO / file).is_dir() == (kind == "tree") and (REPO / file).exists(), file


def test_nothing_is_loaded_from_another_server(site, pages):
    for page in pages.values():
        assert [link for link in page.loaded if urlsplit(link).scheme] == []
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path
    assert not any('data-md-component="source"' in path.read_text(encoding="utf-8") for path in pages)  # asks GitHub


def test_a_build_that_does_not_know_the_repository_has_text_in_place_of_links(tmp_path):
    page = Page(build(tmp_path / "site", REPOSITORY_URL="") / "tour/index.html")
    assert [link for link in page.links if "admin_hf/" in link] == []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


FRAMES = """<!doctype html><pre id="wide"></pre><script>
(async () => {
  for (const page of PAGES) {
    const frame = document.createElement("iframe")
    Object.assign(frame, {src: page, style: "width: WIDTHpx; height: 900px; border: 0"})
    document.body.append(frame)
    await new Promise(loaded => { frame.onload = loaded })
    await new Promise(drawn => setTimeout(drawn, 300))
    const root = frame.contentDocument.documentElement
    wide.textContent += `${page} ${root.scrollWidth}\\n`
    frame.remove()
  }
  wide.textContent += "done"
})()
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_screen(site, pages, tmp_path, width):
    """Of a phone and of a desktop: what is wider, a table or code, scrolls by itself."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        names = [f"/{path.parent.relative_to(site)}/".replace("/./", "/") for path in pages]
        frames = site / f"frames-{width}.html"
        frames.write_text(FRAMES.replace("PAGES", json.dumps(names)).replace("WIDTH", str(width)))
        address = f"http://127.0.0.1:{server.server_port}/{frames.name}"
        shown = browse(
            address, tmp_path, "--window-size=1400,1000", "--virtual-time-budget=60000", "--dump-dom"
        ).stdout
    finally:
        server.shutdown()
        server.server_close()
        frames.unlink()
    *measured, end = re.search(r'<pre id="wide">(.*?)</pre>', shown, re.DOTALL)[1].splitlines()
    assert end == "done" and len(measured) == len(pages)
    assert [line for line in measured if int(line.split()[1]) > width] == []
