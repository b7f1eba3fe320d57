"""Do the math before a job starts: shapes, FLOPs, memory, time, money, failures, layouts."""

import megalm.plan.answers

from ._answer import AnswerCommand

ELSEWHERE = {megalm.plan.answers: AnswerCommand}
"""Modules of the planner's answers are subcommands, too, each in this class' hands."""
