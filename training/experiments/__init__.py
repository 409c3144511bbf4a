"""The paper's tables and grids: `python -m training.experiments --help`.

plan.py says which experiments there are and what the paper claims of them, scales.py with which recipes they run.
runner.py runs them as processes of run_translation.py, records.py collects what these recorded, translations.py keeps
and compares what they translated, claims.py judges it, and page.py makes docs/experiments.md.
architectures.py plans the trainings of stock models with an injected ω, which are processes of stock_models.py.
"""
