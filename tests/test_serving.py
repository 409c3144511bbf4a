"""The server of docs/serving.md, over HTTP: its lines are those of `translate`, and it refuses what it cannot take."""

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import ctranslate2
import pytest
from test_translation import PAIRS, SOURCES, new_model
from transformers import AutoTokenizer

from admin_hf import translate
from training.tokenization import train_tokenizer


REPO = Path(__file__).parents[1]
uvicorn = pytest.importorskip("uvicorn", reason="the server needs fastapi and uvicorn")
pytest.importorskip("fastapi", reason="the server needs fastapi and uvicorn")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder of CTranslate2, made as the page says; the tokenizer was saved with padding and truncation on."""
    folder = tmp_path_factory.mktemp("serving")
    tokenizer = train_tokenizer([[*PAIRS, *PAIRS.values()]], vocab_size=90)
    new_model(tokenizer, seed=0).save_pretrained(folder / "en-de", reparameterize=True)
    tokenizer(SOURCES, padding="max_length", truncation=True, max_length=5)
    tokenizer.save_pretrained(folder / "en-de")
    copied = {"copy_files": ["tokenizer.json", "tokenizer_config.json"]}
    ctranslate2.converters.TransformersConverter(str(folder / "en-de"), **copied).convert(str(folder / "ct2"))
    assert '"max_length": 5' in (folder / "ct2/tokenizer.json").read_text(encoding="utf-8")
    return folder / "ct2"


@pytest.fixture(scope="module")
def address(model):
    """Of the server, started by the command that stands in it."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", "examples", "serve:app", "--port", "0"]
    environment = os.environ | {"MODEL": str(model)}
    with subprocess.Popen(command, cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        while not (found := re.search(r"running on (http://\S+)", said)):
            assert (line := process.stderr.readline()), said
            said += line
        yield found[1]
        process.terminate()
        process.communicate()


def post(address: str, body: object) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(
            Request(f"{address}/translate", data, {"Content-Type": "application/json"}), timeout=60
        ) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def translated(model: Path, lines: list[str]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return translate(ctranslate2.Translator(str(model)), tokenizer, lines, beams=5, max_length=257)


def test_lines_are_those_of_translate(address, model):
    lines = ["", SOURCES[1], " \t", "\u200b", *SOURCES, "A dog</s> <pad> runs.", "A dog\nruns.", "A red cat sleeps"]
    status, answer = post(address, {"lines": lines})
    assert status == 200 and answer["lines"] == translated(model, lines)
    assert answer["lines"][:4] == ["", PAIRS[SOURCES[1]], "", ""]
    assert post(address, {"lines": [SOURCES[0]] * 64}) == (200, {"lines": [PAIRS[SOURCES[0]]] * 64})
    assert post(address, {"lines": [""]}) == (200, {"lines": [""]})
    assert post(address, {"lines": []}) == (200, {"lines": []})


def test_requests_at_the_same_time_get_their_own_lines(address):
    with ThreadPoolExecutor(6) as pool:
        answers = pool.map(lambda row: post(address, {"lines": [SOURCES[row % 6]] * (row % 4 + 1)}), range(24))
    for row, (status, answer) in enumerate(answers):
        assert status == 200 and answer["lines"] == [PAIRS[SOURCES[row % 6]]] * (row % 4 + 1)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"lines": ["A dog', "JSON decode error"),
        (b"A dog runs.", "JSON decode error"),
        ({"lines": "A dog runs."}, "valid list"),
        ({"line": ["A dog runs."]}, "Field required"),
        ({"lines": [3]}, "valid string"),
        ({"lines": ["A dog runs."] * 65}, "at most 64 items"),
        ({"lines": ["A" * 4001]}, "at most 4000 characters"),
        ({"lines": ["A dog runs.", "cat " * 300]}, "Some lines ([2]) have more than 256 tokens."),
        ({"lines": ["</s>" * 100]}, "Some lines ([1]) have more than 256 tokens."),  # each is text, of four tokens
    ],
)
def test_what_cannot_be_taken_is_refused(address, body, reason):
    status, answer = post(address, body)
    assert status == 422 and reason in json.dumps(answer)
    assert post(address, {"lines": SOURCES[:1]})[0] == 200, "it goes on to answer"


def test_two_requests_are_translated_side_by_side(model, monkeypatch):
    """Each waits within translate_batch until the other has come there, too."""
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    serve = importlib.import_module("serve")
    met = threading.Barrier(2)

    class Translator(ctranslate2.Translator):
        def translate_batch(self, *arguments, **options):
            met.wait(timeout=60)
            return super().translate_batch(*arguments, **options)

    monkeypatch.setattr(serve, "translator", Translator(str(model)))
    server = uvicorn.Server(uvicorn.Config(serve.app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda line: post(address, {"lines": [line]}), SOURCES[:2]))
        server.should_exit = True
        thread.join(timeout=60)
    assert answers == [(200, {"lines": [PAIRS[line]]}) for line in SOURCES[:2]]


def test_the_page_shows_the_server_as_it_is():
    (shown,) = re.findall(r"```python\n(.*?)```", (REPO / "docs/serving.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shown == (REPO / "examples/serve.py").read_text(encoding="utf-8")
