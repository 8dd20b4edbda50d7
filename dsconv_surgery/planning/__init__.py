"""Planning: option tables, rules that choose from them, and the planner. Exports what rules of your own need, without torch."""

from dsconv_surgery.planning.rules import equal_error, least_damage, uniform
from dsconv_surgery.planning.tables import Choice, Option, Rule, Table

__all__ = ["Choice", "Option", "Rule", "Table", "equal_error", "least_damage", "uniform"]
