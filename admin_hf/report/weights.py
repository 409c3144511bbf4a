"""The parts of the page that come from the run's weights: translations, ω, layer dependency, gradients, variances."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..analysis.dependency import LayerDependency
from ..analysis.drawing import by_sublayer
from ..analysis.gradients import GradientNorms
from ..analysis.omega import omega_history
from ..architecture import STACKS
from ..checkpoints import one_line
from ..run.folder import Run, predictions_name
from . import figures
from .measure import Moment, batch_of, measured, newest_model, starting_model
from .sections import Section
from .text import SENTENCES, first_target, load_tokenizer, predictions, read_pairs, translate


def translations(run: Run) -> Section:
    """The first lines of generated_predictions.txt, else translations of validation sentences."""
    section = Section("translations", "Translations")
    if samples := predictions(run, SENTENCES):
        name = predictions_name(first_target(run)[0])
        section.text.append(f"The first sentences of the test set, from {name}.")
        section.samples = samples
        return section
    with _explained(section):
        model, name = newest_model(run)
        if (tokenizer := load_tokenizer(run)) is None:
            raise ValueError("The run has no tokenizer that can be loaded.")
        pairs = read_pairs(run, "validation", SENTENCES)
        section.samples = translate(model, tokenizer, pairs, first_target(run)[1])
        section.text.append(f"The first sentences of the validation set, translated by {name}.")
    return section


def omega(run: Run) -> Section:
    """ω by sub-layer, from the profile over the checkpoints to the newest weights."""
    section = Section("omega", "ω by sub-layer")
    folders = run.checkpoints or ([run.weights] if run.weights else [])
    with _explained(section):
        if not folders and run.profile is not None:
            for stack in STACKS:
                profile = {"profiled": run.profile.stacks[stack].omega}
                section.pictures.append(_by_sublayer(f"ω as it was profiled, {stack}", profile, "ω", log=False))
        if not folders:
            raise FileNotFoundError("The run has saved no weights.")
        history = omega_history(folders, run.profile)
        if not (history.encoder.names or history.decoder.names):
            raise ValueError("The model has no ω: its residual systems are not Admin.")
        section.findings = [("expected", history.EXPECTATION), ("found", history.verdict())]
        if run.is_profiled is False:
            section.findings[0] = ("expected", "The model was not profiled, so its ω did not start as in Admin.")
        for stack in STACKS:
            if (part := getattr(history, stack)).names:
                caption = f"Mean of each ω, {stack}; grey: between, band: range of the entries at the end"
                section.pictures.append(figures.history(caption, history.updates, part))
    return section


def measurements(run: Run) -> list[Section]:
    """Layer dependency, gradients and variances at the start of the run and now."""
    sections = [Section("dependency", "Layer dependency β"), Section("layers", "Gradients and variances by sub-layer")]
    moments: list[Moment] = []
    with _explained(*sections):
        batch, text = batch_of(run)
        with _explained(*sections):
            start, how = starting_model(run, batch)
            text = f"{text} {how}"
            moments.append(measured(start, batch, "start"))
            del start
        model, name = newest_model(run)
        moments.append(measured(model, batch, name))
    if moments:
        for section, draw in zip(sections, (_draw_dependency, _draw_layers), strict=True):
            section.text.append(text)
            with _explained(section):
                draw(section, moments)
    return sections


def _draw_dependency(section: Section, moments: list[Moment]) -> None:
    section.findings = [("expected", LayerDependency.EXPECTATION)]
    section.findings += [(f"found, {moment.name}", moment.dependency.verdict()) for moment in moments]
    stacks = {(moment.name, stack): getattr(moment.dependency, stack) for moment in moments for stack in STACKS}
    # The embedding dominates the first outputs, and would give all branches one colour
    largest = max(beta for stack in stacks.values() for row in stack.beta for beta in row[1:])
    for (moment, stack), part in stacks.items():
        caption = f"β of the {stack} ({part.system}), {moment}"
        section.pictures.append(figures.heat_map(caption, part.beta, largest))


def _draw_layers(section: Section, moments: list[Moment]) -> None:
    section.findings = [("expected", GradientNorms.EXPECTATION)]
    section.findings += [(f"found, {moment.name}", moment.gradients.verdict()) for moment in moments]
    for stack in STACKS:
        norms = {moment.name: getattr(moment.gradients, stack).relative_norms for moment in moments}
        caption = f"Norm of the gradient at the sub-layers' outputs, {stack}; the largest is 1"
        section.pictures.append(_by_sublayer(caption, norms, "relative norm"))
    for stack in STACKS:
        variances = {
            f"{what}, {moment.name}": values
            for moment in moments
            for what, values in zip(("Var[f]", "Var[ω ⊙ x]"), moment.variances[stack], strict=True)
        }
        caption = f"Variance of branches, f, and of scaled shortcuts, ω ⊙ x, {stack}"
        section.pictures.append(_by_sublayer(caption, variances, "variance"))


def _by_sublayer(caption: str, values: dict[str, list[float]], label: str, log: bool = True) -> figures.Picture:
    return figures.lines(caption, by_sublayer(values), label, "sub-layer", log)


@contextmanager
def _explained(*sections: Section) -> Iterator[None]:
    """Put the reason on the page instead of the part: files may be damaged, from elsewhere, or deleted meanwhile."""
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        for section in sections:
            section.notes.append(reason[:1].upper() + reason[1:])
