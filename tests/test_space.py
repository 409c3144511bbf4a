"""The page to try a model, examples/space: what it computes, and that a browser shows it."""

import asyncio
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
import torch
import yaml
from test_report import CHROMIUM, FLAGS
from test_translation import PAIRS, SOURCES, new_model

from training.tokenization import train_tokenizer


SPACE = Path(__file__).parents[1] / "examples" / "space"
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs admin-hf[space]")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model with ω, and what it is folded to."""
    folder = tmp_path_factory.mktemp("space")
    tokenizer = train_tokenizer([[*PAIRS, *PAIRS.values()]], vocab_size=90)
    model = new_model(tokenizer, seed=0)
    for name in ("omega", "vanilla"):
        model.save_pretrained(folder / name, reparameterize=name == "vanilla")
        tokenizer.save_pretrained(folder / name)
    return {"omega": folder / "omega", "vanilla": folder / "vanilla"}


# --- without a browser ----------------------------------------------------------------------------


@pytest.fixture
def app(folders, monkeypatch) -> dict:
    """What app.py defines, for the model with ω."""
    monkeypatch.setattr(sys, "argv", [str(SPACE / "app.py"), str(folders["omega"])])
    return runpy.run_path(str(SPACE / "app.py"))


def cells(table: str) -> list[list[float]]:
    """The weights in the cells' titles."""
    return [
        [float(weight) for weight in re.findall(r'title="[^"]*: ([\d.]+)"', row)] for row in table.split("<tr>")[2:]
    ]


@needs_gradio
def test_attention_is_that_of_the_model_with_omega(app):
    """Of the chosen layer and head, as softmax(q kᵀ) by hand."""
    *texts, equal, seen, table = app["compare"](SOURCES[1], layer=2, head=1)
    assert texts == [PAIRS[SOURCES[1]]] * 2 and equal == "Both are equal."
    model, tokenizer, inputs = app["trained"], app["tokenizer"], {}
    attention = model.model.decoder.layers[1].encoder_attn
    hook = attention.register_forward_hook(
        lambda module, arguments, options, output: inputs.update(arguments=arguments, **options), with_kwargs=True
    )
    batch = tokenizer(SOURCES[1], text_target=texts[0], return_tensors="pt")
    with torch.no_grad():
        model(**batch)
        memory = model.get_encoder()(batch["input_ids"])[0]
        states = inputs["hidden_states"] if "hidden_states" in inputs else inputs["arguments"][0]
        query, key = attention.q_proj(states)[0, :, :16], attention.k_proj(memory)[0, :, :16]
        expected = (query @ key.T / 4).softmax(-1)
    hook.remove()
    torch.testing.assert_close(torch.tensor(cells(table)), expected, rtol=0, atol=6e-4)
    assert cells(app["heat_map"](seen, 2, 1)) == cells(table) != cells(app["heat_map"](seen, 2, 2))
    mean = torch.tensor(cells(app["heat_map"](seen, 0, 0)))
    assert mean.shape == (len(seen[2]), len(seen[1])) and mean.sum(1).allclose(torch.ones(len(mean)), atol=0.01)
    each = [torch.tensor(cells(app["heat_map"](seen, layer, head))) for layer in (1, 2) for head in (1, 2)]
    torch.testing.assert_close(torch.stack(each).mean(0), mean, rtol=0, atol=1e-3)


@needs_gradio
def test_sentences_that_are_blank_hostile_or_long(app):
    assert app["compare"](" \n") == ("", "", "", None, "")
    table = app["heat_map"]((torch.ones(1, 1, 1, 1), ["<b>"], ["\">'<i>"]), 0, 0)
    assert not {"<b>", "<i>"} & set(re.findall("<[a-z]>", table)) and 'title=""' not in table
    with pytest.raises(sys.modules["gradio"].Error, match="501 characters, more than 500"):
        app["compare"]("a" * 501)


@needs_gradio
def test_omega_is_drawn_for_both_stacks(app):
    drawn = app["omega"]()
    assert drawn.startswith("<svg") and "encoder" in drawn and "decoder" in drawn


@needs_gradio
def test_a_model_must_be_named():
    environment = {name: value for name, value in os.environ.items() if name != "MODEL"}
    done = subprocess.run([sys.executable, SPACE / "app.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("No model: ") and done.stderr.count("\n") == 1


def test_the_front_matter_is_what_a_space_needs():
    extras = tomllib.loads((SPACE.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    assert f"gradio>={front['sdk_version'].rpartition('.')[0]}" in extras["space"]
    assert (SPACE / "requirements.txt").read_text() == "admin-hf[space]\n"


# --- in a browser ---------------------------------------------------------------------------------


@contextmanager
def started(command: list, pattern: str, **environment: str):
    """A process, and what the pattern finds in what it says first."""
    with subprocess.Popen(
        list(map(str, command)),
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        said = ""
        while not (found := re.search(pattern, said)):
            assert (line := process.stdout.readline()), said
            said += line
        try:
            yield found[1]
        finally:
            process.terminate()
            process.communicate()


class Browser:
    """A tab of Chromium, by its remote debugging protocol."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        self.connection, self.numbers, self.events = connection, count(1), []

    async def send(self, method: str, **parameters) -> dict:
        number = next(self.numbers)
        await self.connection.send_json({"id": number, "method": method, "params": parameters})
        while (answer := await self.connection.receive_json(timeout=120)).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    async def evaluate(self, expression: str):
        answer = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def wait(self, condition: str) -> None:
        """Until the condition holds in the page, a minute at most."""
        assert await self.evaluate(
            "new Promise(done => {const end = Date.now() + 60000, look = () =>"
            f" ({condition}) ? done(true) : Date.now() > end ? done(false) : setTimeout(look, 50); look()}})"
        ), f"{condition} in: {await self.evaluate('document.body.innerText')}"

    async def click(self, element: str) -> None:
        x, y = await self.evaluate(
            f"(() => {{const e = {element}; e.scrollIntoView({{block: 'center'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def visit(folder: Path, tmp_path: Path, width: int, work) -> list[dict]:
    """Do the work on the page of a model, and return the events of the browser."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    model = {"GRADIO_SERVER_PORT": port, "MODEL": str(folder)}
    flags = [*FLAGS, f"--window-size={width},1300", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--remote-debugging-port=0", "about:blank"]

    async def look(address: str, debugger: str) -> list[dict]:
        async with aiohttp.ClientSession() as session:
            pages = await (await session.get(f"http://{debugger}/json/list")).json()
            (target,) = (page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            async with session.ws_connect(target, max_msg_size=0) as connection:
                browser = Browser(connection)
                for domain in ("Network", "Runtime", "Page"):
                    await browser.send(f"{domain}.enable")
                size = {"width": width, "height": 1300, "deviceScaleFactor": 1, "mobile": False}
                await browser.send("Emulation.setDeviceMetricsOverride", **size)
                await browser.send("Page.navigate", url=address)
                await work(browser)
                return browser.events

    with (
        started([sys.executable, SPACE / "app.py"], r"local URL: +(http://\S+)", **model) as address,
        started([CHROMIUM, *flags], r"DevTools listening on ws://([^/]+)/") as debugger,
    ):
        return asyncio.run(look(address, debugger))


# Fields of the page by their labels, and what the table of attention says
FIELD = (
    "[...document.querySelectorAll('label')].find(l => l.innerText.trim() == '{}')?.querySelector('textarea, input')"
)
TITLES = "[...document.querySelectorAll('.attention td[title]')].map(cell => cell.title)"
# How what surrounds the table and is narrower shows the rest
OVERFLOW = """(() => {
    const found = [];
    for (let e = document.querySelector('.attention').parentElement; e; e = e.parentElement)
        if (e.scrollWidth > e.clientWidth) found.push(getComputedStyle(e).overflowX);
    return found
})()"""
BUTTON = "[...document.querySelectorAll('button')].find(b => b.innerText.trim() == 'Translate')"


@needs_gradio
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "kind"), [(1280, "omega"), (390, "omega"), (1280, "vanilla")])
def test_a_browser_shows_translations_and_attention(folders, tmp_path, width, kind):
    labels = ["With ω", "Folded"] if kind == "omega" else ["Translation"]
    source, found = SOURCES[1], {}

    async def work(browser: Browser) -> None:
        await browser.wait(f"{FIELD.format('Sentence')} && {BUTTON}")
        await browser.click(FIELD.format("Sentence"))
        await browser.send("Input.insertText", text=source)
        await browser.click(BUTTON)
        await browser.wait(f"{TITLES}.length")
        found["texts"] = [await browser.evaluate(f"{FIELD.format(label)}.value") for label in labels]
        found["all"] = await browser.evaluate("[...document.querySelectorAll('textarea')].map(t => t.value)")
        found["before"] = await browser.evaluate(TITLES)
        found["page"] = await browser.evaluate("document.body.innerText")
        found["figures"] = await browser.evaluate("document.querySelectorAll('.omega svg').length")
        found["overflow"] = await browser.evaluate(OVERFLOW)
        found["width"] = await browser.evaluate("document.documentElement.scrollWidth")
        await browser.click("document.querySelector('input[aria-label=Layer]')")
        await browser.wait("document.querySelectorAll('[role=option]').length == 3")
        await browser.click("document.querySelectorAll('[role=option]')[2]")
        await browser.wait(f"{TITLES}.join() != {json.dumps(','.join(found['before']))}")
        found["after"] = await browser.evaluate(TITLES)

    events = visit(folders[kind], tmp_path, width, work)
    assert found["texts"] == [PAIRS[source]] * len(labels) and found["all"] == [source, *found["texts"]]
    assert ("Both are equal." in found["page"]) == (kind == "omega") == (found["figures"] == 1)
    assert len(found["after"]) == len(found["before"]) > 50
    assert found["width"] <= width and found["overflow"] == ["auto"] * (width < 500), "what is wider scrolls by itself"
    asked = [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]
    hosts = {urlsplit(request["url"]).hostname for request in asked if request["url"].startswith("http")}
    assert hosts == {"127.0.0.1"}, "nothing comes from another server"
    assert not [event for event in events if event["method"] == "Runtime.exceptionThrown"]
