#!/usr/bin/env python
"""Train, evaluate and run a translation model with Admin's residual connections.

    python run_translation.py --do_train --do_eval --train_file DIR/train --validation_file DIR/validation \
        --source_lang en --target_lang de --output_dir runs/my-model

or `python run_translation.py recipe.json`, where the file contains the same arguments. If a run was stopped, the same
command with the same output_dir continues it. The trained model is also exported to output_dir/vanilla. This is the
vanilla model, without ω, and `--push_to_hub` publishes it. Exit codes: 0 done, 2 an input cannot be used (or the Hub
cannot be reached), 3 training diverged (output_dir/divergence.json says how), 130 and 143 stopped by Ctrl-C and
SIGTERM with a checkpoint.
"""

import os
import sys
from collections.abc import Sequence


# Must come before PyTorch is imported, because its OpenMP reads this only once. Threads that wait then spin for less
# time, which leaves more for other work on the same cores. Not if a process imports this file as a module
if __name__ == "__main__" and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"

import training.aligned  # noqa: F401  isort: skip

from accelerate import PartialState
from transformers import set_seed

from admin_hf.checkpoints import one_line
from admin_hf.terminal import spell_out
from training.arguments import Arguments, parse_arguments
from training.divergence import Divergence
from training.errors import InputError
from training.hub import check_access
from training.model import build_model, check_model
from training.processes import end_process_group, set_up_logging
from training.rehearsal import rehearse
from training.runs import check_output_dir
from training.scores import score
from training.session import build_trainer, load_result, train
from training.signals import StopOnSignal
from training.tokenized_data import prepare_data
from training.vanilla import export, finish_vanilla


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code."""
    spell_out()
    try:
        arguments = parse_arguments(argv)
        set_up_logging(arguments.training.process_index)
        code = run(arguments)
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except Divergence as error:
        if PartialState().is_main_process:
            print(f"{error} Checkpoints from before are kept.", file=sys.stderr)
        code = 3
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    end_process_group()
    return code


def run(arguments: Arguments) -> int:
    """What the script does, step by step."""
    training = arguments.training
    check_model(arguments)
    rehearse(training)
    check_output_dir(arguments)
    check_access(training)
    set_seed(training.seed)

    raw, tokenizer, data = prepare_data(arguments)
    model, stop = build_model(arguments, tokenizer), StopOnSignal()
    trainer = build_trainer(arguments, model, tokenizer, data, stop)
    if training.do_train:
        train(trainer, arguments, raw)
    if stop.received is not None:
        print(f"Stopped at update {trainer.state.global_step}. The same command continues from there.")
        return 128 + stop.received

    weights = load_result(trainer, arguments)
    problem = export(trainer) if training.do_train else None
    exported = training.do_train and problem is None
    scores = score(trainer, arguments, data, weights, exported)
    if exported:
        finish_vanilla(trainer, arguments, scores)
    elif problem is not None and training.push_to_hub:
        raise InputError(f"Nothing was pushed, because there is no vanilla model: {problem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
