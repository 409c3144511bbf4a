"""The scores of a run: computed, printed, and written into its folder beside the translations."""

import json
import logging
from datetime import UTC, datetime
from itertools import compress
from pathlib import Path

from datasets import Dataset

from admin_hf.checkpoints import write_whole
from admin_hf.paths import published
from admin_hf.run.folder import DECODES_NAME, RESULTS_NAME, predictions_name

from .arguments import Arguments
from .data import Splits
from .trainer import TranslationTrainer
from .vanilla import build_vanilla_trainer


logger = logging.getLogger(__name__)

SPLITS = ("train", "eval", "vanilla_eval", "test", "vanilla_test", "all")


def score(trainer: TranslationTrainer, arguments: Arguments, data: Splits, weights: list[str], exported: bool) -> dict:
    """Evaluate and translate as the arguments ask, and record it; by the vanilla model too, if it is `exported`."""
    vanilla = build_vanilla_trainer(trainer) if exported and trainer.args.predict_with_generate else None
    scores: dict = {}
    if trainer.args.do_eval:
        scores |= evaluate(trainer, vanilla)
    if trainer.args.do_predict:
        scores |= predict(trainer, vanilla, data["test"])
        log_decode(arguments, trainer, weights, scores)
    write_results(trainer, weights, scores)
    return scores


def evaluate(trainer: TranslationTrainer, vanilla: TranslationTrainer | None) -> dict:
    """Score the validation pairs, by the trained model and by the vanilla one."""
    metrics = trainer.evaluate()
    metrics |= {f"eval_{name}": value for name, value in trainer.signatures.items()}
    log_scores(trainer, "eval", metrics)
    if vanilla is not None:
        metrics |= compare(trainer, "eval", metrics, vanilla.evaluate(metric_key_prefix="vanilla_eval"))
    return metrics


def predict(trainer: TranslationTrainer, vanilla: TranslationTrainer | None, dataset: Dataset) -> dict:
    """Translate the test sentences, and score them if they can be.

    Line n of generated_predictions.txt is the translation of sentence n; of several target languages, each has a file
    of its own, such as generated_predictions.de.txt.
    """
    output = trainer.predict(dataset, metric_key_prefix="test")
    metrics = output.metrics | {f"test_{name}": value for name, value in trainer.signatures.items()}
    log_scores(trainer, "test", metrics)
    if vanilla is not None and "target" in dataset.column_names:
        metrics |= compare(
            trainer, "test", metrics, vanilla.predict(dataset, metric_key_prefix="vanilla_test").metrics
        )
    if not trainer.is_world_process_zero() or not trainer.args.predict_with_generate:
        return metrics
    lines = trainer.translations(output.predictions, dataset)
    if not any(lines):
        logger.warning("All translations are empty: the model has not learnt enough; train longer.")
    languages = dataset["language"][:] if "language" in dataset.column_names else [""] * len(lines)
    for language in dict.fromkeys(languages):
        is_in = [of_line == language for of_line in languages]
        rows = sorted(compress(zip(dataset["index"], dataset["source"], lines, strict=True), is_in))
        path = Path(trainer.args.output_dir, predictions_name(language))
        write_whole(path, "".join(f"{translation}\n" for _, _, translation in rows))
        for _, source, translation in rows[:3]:
            print(f"  {source}\n  -> {translation}")
        print(f"Translations: {path}")
    print(f"Model, tokenizer, scores: {trainer.args.output_dir}")
    return metrics


def remove_results(output_dir: str) -> None:
    """Remove the scores of an earlier session, before the weights change. decodes.jsonl stays."""
    for name in (RESULTS_NAME, *(f"{split}_results.json" for split in SPLITS)):
        Path(output_dir, name).unlink(missing_ok=True)


def log_scores(trainer: TranslationTrainer, split: str, metrics: dict) -> None:
    """Print the metrics and save them as `{split}_results.json` and in `all_results.json`."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def compare(trainer: TranslationTrainer, split: str, metrics: dict, vanilla_metrics: dict) -> dict:
    """Print the scores of the trained and of the vanilla model side by side; save and return the latter."""
    names = [name for name in (f"{split}_{name}" for name in trainer.metric.names) if name in metrics]
    scores = {f"vanilla_{name}": vanilla_metrics[f"vanilla_{name}"] for name in names}
    trainer.save_metrics(f"vanilla_{split}", scores)
    if trainer.is_world_process_zero():
        print(f"{'':20}{'trained':>10}{'vanilla':>10}")
        for name in names:
            print(f"{name:20}{metrics[name]:>10.2f}{scores[f'vanilla_{name}']:>10.2f}")
    return scores


def write_results(trainer: TranslationTrainer, weights: list[str], scores: dict) -> None:
    """Write results.json: which weights were scored and what they scored, in this session or an earlier one."""
    if not trainer.is_world_process_zero():
        return
    path = Path(trainer.args.output_dir, RESULTS_NAME)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    scores = before["scores"] | scores if before.get("weights") == weights else scores
    record = {"weights": weights, "parameters": trainer.model.num_parameters(), "scores": scores}
    write_whole(path, json.dumps(record, indent=1) + "\n")


def log_decode(arguments: Arguments, trainer: TranslationTrainer, weights: list[str], scores: dict) -> None:
    """Add a line to decodes.jsonl: a test set that was decoded many times has been tuned on."""
    if not trainer.is_world_process_zero() or not trainer.args.predict_with_generate:
        return
    generation = trainer.model.generation_config
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "test": published(arguments.data.test_file or arguments.data.dataset_name),
        "weights": published(weights),
        "num_beams": generation.num_beams,
        "length_penalty": generation.length_penalty,
        **{name: score for name, score in scores.items() if name.startswith("test_")},
    }
    with Path(trainer.args.output_dir, DECODES_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
