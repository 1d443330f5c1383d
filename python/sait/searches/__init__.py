"""The search for a plan within an accuracy budget, for parts that can be left out, and the file that holds them."""

from sait.searches.file import PlanFile, Score
from sait.searches.parts import Parts, leave_out
from sait.searches.search import Found, search

__all__ = ["Found", "Parts", "PlanFile", "Score", "leave_out", "search"]
