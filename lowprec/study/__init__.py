"""A grid of methods, batch sizes, precisions and seeds, trained alike, and what it shows.

`config.py` says what a study is, `cells.py` which runs it consists of, `runner.py` makes those that are missing,
`summary.py` draws the conclusions, `page.py` and `figures.py` show them.
"""

from __future__ import annotations

from lowprec.study.config import StudyConfig, load_study
from lowprec.study.page import write_report
from lowprec.study.runner import run_study
from lowprec.study.summary import Summary, summarise

__all__ = ["StudyConfig", "Summary", "load_study", "run_study", "summarise", "write_report"]
