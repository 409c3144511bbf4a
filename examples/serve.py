"""Serve a model of CTranslate2 over HTTP.

    MODEL=en-de-ct2 uvicorn --app-dir examples serve:app

It does not need PyTorch, Transformers or admin-hf.
"""

import os
from typing import Annotated

import ctranslate2
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from tokenizers import Tokenizer


TOKENS = 256  # limit for a line and its translation; at most max_position_embeddings of the model
translator = ctranslate2.Translator(os.environ["MODEL"], device="auto")
tokenizer = Tokenizer.from_file(os.path.join(os.environ["MODEL"], "tokenizer.json"))
tokenizer.no_truncation(), tokenizer.no_padding()
tokenizer.encode_special_tokens = True  # "</s>" in a line is text
app = FastAPI()


class Text(BaseModel):
    lines: list[Annotated[str, Field(max_length=4000)]] = Field(max_length=64)


@app.post("/translate")
def translate(text: Text) -> Text:  # no async: runs in a thread, and the server can still answer
    encoded = tokenizer.encode_batch(text.lines)
    if long := [row for row, line in enumerate(encoded, 1) if len(line) > TOKENS]:
        raise HTTPException(422, f"Some lines ({long}) have more than {TOKENS} tokens.")
    seen = ["".join(filter(str.isprintable, line)).strip() for line in text.lines]  # a blank line stays blank
    rows = [row for row, line in enumerate(encoded) if seen[row] and not all(line.special_tokens_mask)]
    search = {"beam_size": 5, "max_decoding_length": TOKENS, "min_decoding_length": 0, "max_batch_size": 32}
    results = translator.translate_batch([encoded[row].tokens for row in rows], max_input_length=0, **search)
    ids = [[tokenizer.token_to_id(token) for token in result.hypotheses[0]] for result in results]
    found = dict(zip(rows, tokenizer.decode_batch(ids), strict=True))
    return Text(lines=[found.get(row, "") for row in range(len(encoded))])
