"""A page to try a translation model: its translation, what the decoder looks at, and ω.

    python examples/space/app.py runs/en-de     # a folder or an id of the Hub; without it, the variable MODEL

A model with ω translates beside the folded one, which must say the same.
"""

import os
import sys
from html import escape
from pathlib import Path

import gradio as gr
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from admin_hf import AdminForConditionalGeneration, reparameterize, translate
from admin_hf.analysis.omega import trained_omega
from admin_hf.report.figures import lines


LONGEST = 500  # characters of a sentence
MEAN = 0  # stands for all layers or heads; the others are counted from 1

source = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MODEL")
if not source:
    sys.exit("No model: name its folder or Hub id as the argument, or in the environment variable MODEL.")
folder = Path(source if Path(source).is_dir() else snapshot_download(source))
tokenizer = AutoTokenizer.from_pretrained(folder)
models = {"Translation": AutoModelForSeq2SeqLM.from_pretrained(folder, use_safetensors=True, dtype="float32").eval()}
if isinstance(trained := models["Translation"], AdminForConditionalGeneration):
    models = {"With ω": trained, "Folded": reparameterize(trained, tokenizer=tokenizer).eval()}
shown = list(models.values())[-1]
shown.set_attn_implementation("eager")  # the one that returns attention


def encode(text, **options):
    limits = {"truncation": True, "max_length": shown.config.max_position_embeddings}
    return tokenizer(text, split_special_tokens=True, return_tensors="pt", **options, **limits)


@torch.no_grad()
def attend(sentence, translation):
    """Encoder-attention (layers, heads, target length, source length), the source's tokens and the target's."""
    ids = encode(sentence), encode(None, text_target=translation)["input_ids"]
    weights = torch.cat(shown(**ids[0], labels=ids[1], output_attentions=True).cross_attentions)
    tokens = (tokenizer.convert_ids_to_tokens(row[0]) for row in (ids[0]["input_ids"], ids[1]))
    return weights, *([token.replace(" ", "▁") for token in side] for side in tokens)


def compare(sentence, layer=MEAN, head=MEAN):
    """Every model's translation, whether they are equal, what the decoder looked at, and its heat map."""
    sentence = " ".join(sentence.split())
    if len(sentence) > LONGEST:
        raise gr.Error(f"The sentence has {len(sentence):,} characters, more than {LONGEST}.", print_exception=False)
    texts = [translate(model, tokenizer, [sentence])[0] for model in models.values()]
    equal = "Both are equal." if len(set(texts)) == 1 else "**They differ.**"
    seen = attend(sentence, texts[-1]) if texts[-1] else None
    return *texts, equal if texts[-1] else "", seen, heat_map(seen, layer, head)


def heat_map(seen, layer, head):
    """A table: a row for each token of the translation, a column for each of the source."""
    if seen is None:
        return ""
    weights, sources, targets = seen
    weights = weights if layer == MEAN else weights[layer - 1 : layer]
    weights = (weights if head == MEAN else weights[:, head - 1 : head]).mean((0, 1))
    columns = "".join(f'<th scope="col"><span>{escape(token)}</span></th>' for token in sources)
    rows = [f"<tr><td></td>{columns}</tr>"]
    for target, row in zip(targets, weights.tolist(), strict=True):
        cells = [
            f'<td style="background: rgb(0 114 178 / {weight / weights.max():.0%})" '
            f'title="{escape(target)}, {escape(token)}: {weight:.3f}"></td>'
            for token, weight in zip(sources, row, strict=True)
        ]
        rows.append(f'<tr><th scope="row">{escape(target)}</th>{"".join(cells)}</tr>')
    return f'<table class="attention">{"".join(rows)}</table><p>Darkest: {weights.max():.2f}. Every row sums to 1.</p>'


def omega():
    """ω by sub-layer, as SVG."""
    means = {stack: (part.places(), part.mean[-1]) for stack, part in trained_omega(folder).items() if part.names}
    return lines("ω by sub-layer", means, "mean of ω", "sub-layer").svg if means else ""


CSS = """
.attention, .attention td, .attention th {border: none; padding: 1px 4px; font-weight: normal; font-size: 13px}
.attention {border-collapse: separate; border-spacing: 1px; width: auto; margin: 0}
.attention th[scope=row] {text-align: right; white-space: nowrap}
.attention th[scope=col] {vertical-align: bottom; text-align: left}
.attention th span {writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap}
.attention td {min-width: 22px; height: 22px}
.map {overflow-x: auto}
.omega svg {max-width: 500px}
"""

with gr.Blocks(title="Translate", analytics_enabled=False) as page:
    gr.Markdown(f"# {folder.resolve().name if folder == Path(source) else source}")
    sentence = gr.Textbox(label="Sentence", max_length=LONGEST, autofocus=True)
    button = gr.Button("Translate", variant="primary")
    with gr.Row():
        outputs = [gr.Textbox(label=label, lines=2, buttons=["copy"], interactive=False) for label in models]
    equal = gr.Markdown(visible=len(models) > 1)
    gr.Markdown("## Attention\nRow: a token that the decoder writes. Column: a token of the source that it looks at.")
    with gr.Row():
        choices = {"Layer": shown.config.decoder_layers, "Head": shown.config.decoder_attention_heads}
        places = [
            gr.Dropdown([("mean of all", MEAN), *((f"{n}", n) for n in range(1, count + 1))], value=MEAN, label=label)
            for label, count in choices.items()
        ]
    seen, attention = gr.State(), gr.HTML(elem_classes="map")
    if len(models) > 1 and (figure := omega()):
        gr.Markdown("## ω\nWhat was trained, by sub-layer: the mean of its entries.")
        gr.HTML(figure, elem_classes="omega")
    gr.on([button.click, sentence.submit], compare, [sentence, *places], [*outputs, equal, seen, attention])
    gr.on([place.change for place in places], heat_map, [seen, *places], attention, api_visibility="private")

if __name__ == "__main__":
    page.launch(css=CSS, footer_links=["api"])
