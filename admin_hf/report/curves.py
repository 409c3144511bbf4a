"""The curves of the page: what the run logged, over its updates."""

from collections.abc import Sequence

from ..architecture import STACKS
from ..monitoring import perplexity
from ..run.folder import METRICS, STATE_NAME, Run
from .figures import Picture, bands, lines
from .sections import Section


def curves(run: Run) -> Section:
    """What was logged, over the updates."""
    section = Section("curves", "Curves")
    if not run.log:
        section.notes.append(f"There is no log: {STATE_NAME} is written with the first checkpoint.")
        return section
    if not run.curve("eval_loss")[0]:
        section.notes.append("No validation curve: the log contains no evaluation (--eval_strategy).")
    names = {"loss": "training", "nll": "training, unsmoothed", "eval_loss": "validation"}
    section.pictures += _lines(run, "Loss", names, "nats per target token")
    steps, losses = run.curve("eval_loss")
    if losses:
        values = {"validation": (steps, [perplexity(loss) for loss in losses])}
        section.pictures.append(lines("Validation perplexity", values, "perplexity", log=True))
    names = {f"eval_{name}": METRICS[name] for name in ("bleu", "moses_bleu", "chrf")}
    section.pictures += _lines(run, "Validation scores", names, "points of 100")
    section.pictures += _lines(run, "Learning rate", {"learning_rate": "rate"}, "learning rate")
    section.pictures += _lines(run, "Gradient norm", {"grad_norm": "norm"}, "norm of the gradient", log=True)
    section.pictures += _lines(run, "Loss scale of float16", {"loss_scale": "scale"}, "loss scale", log=True)
    section.pictures += _lines(run, "Speed", {"tokens_per_second": "speed"}, "target tokens per second")
    section.pictures += _bands(run, "Range of all entries of ω", "omega", "ω")
    caption = "Smallest and largest Var[f] / Var[ω ⊙ x] of the sub-layers"
    section.pictures += _bands(run, caption, "variance_ratio", "ratio of variances", log=True)
    return section


def _lines(run: Run, caption: str, names: dict[str, str], label: str, log: bool = False) -> list[Picture]:
    series = {text: curve for name, text in names.items() if (curve := run.curve(name))[0]}
    return [lines(caption, series, label, log=log)] if series else []


def _bands(run: Run, caption: str, name: str, label: str, log: bool = False) -> list[Picture]:
    series: dict[str, tuple[Sequence[float], ...]] = {}
    for stack in STACKS:
        (steps, low), (_, high) = (run.curve(f"{stack}_{name}_{end}") for end in ("min", "max"))
        if steps and len(low) == len(high):
            series[stack] = (steps, low, high)
    return [bands(caption, series, label, log)] if series else []
