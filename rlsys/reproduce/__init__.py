"""Papers in miniature: an experiment's claim rerun in small, with seeds, intervals and the paper's numbers beside it.

An experiment is a YAML file (`experiment.py`); `runner.py` makes its runs by the ordinary `train`, `results.py` reads
what they measured, `statistics.py` says what of it is certain, `report.py` shows it.
"""
