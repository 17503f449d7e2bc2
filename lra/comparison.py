"""Methods against standard attention on the same seeds, and the mix of protocols that FlashAttention's table has.

Called by the report. Pure, as lra/summary.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lra import statistics
from lra.summary import BASELINE, Group, Method, Section, group_order

# The published settings that come closest to the rows of FlashAttention's Table 3, task by task.
TABLE_3 = {
    "listops": "nystrom",
    "text": "nystrom",
    "retrieval": "nystrom",
    "image": "google",
    "pathfinder": "nystrom",
}
TABLE_3_PROTOCOL = "Table 3"


def table_3(sections: Sequence[Section]) -> Section | None:
    """Return the groups that stand for FlashAttention's Table 3 as one section; None unless both protocols are there.

    Official data only: a stand-in is in no mean.
    """
    groups = [
        group
        for section in sections
        if section.track == "paper" and section.official
        for group in section.groups
        if TABLE_3.get(group.setting.task) == section.protocol
    ]
    if len({group.protocol for group in groups}) < 2:
        return None
    return Section("paper", TABLE_3_PROTOCOL, True, tuple(sorted(groups, key=group_order)))


def paired(section: Section, group: Group) -> statistics.Summary | None:
    """Return mean and interval of this group's accuracy minus standard attention's, over the seeds that both have.

    None for standard attention itself and where no seed is common. With one seed there is no interval.
    """
    base = section.group(Method(BASELINE), group.setting)
    if base is None or base is group:
        return None
    own, other = accuracies(group), accuracies(base)
    differences = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
    return statistics.mean_interval(differences) if differences else None


def accuracies(group: Group) -> dict[int, float]:
    """Return the accuracy of each seed; several runs of one seed are averaged."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for run in group.counted:
        if run.seed is not None and run.chosen is not None:
            by_seed[run.seed].append(run.chosen.accuracy)
    return {seed: sum(values) / len(values) for seed, values in by_seed.items()}


def step_speed_up(section: Section, group: Group) -> float | None:
    """Return a step's time under standard attention over this group's, compilation and evaluation apart."""
    base = section.group(Method(BASELINE), group.setting)
    if base is None or base.device is None or base.device != group.device:
        return None
    own, other = group.mean("steady_steps_per_s"), base.mean("steady_steps_per_s")
    return own / other if own and other else None


def whole_rows(section: Section) -> list[tuple[Method, list[Group]]]:
    """Return the methods that have a counted group in every setting of the section's mean, with those groups."""
    settings = section.mean_settings()
    rows = []
    for method in section.methods:
        groups = [g for s in settings if (g := section.group(method, s)) is not None and g.counted]
        if settings and len(groups) == len(settings):
            rows.append((method, groups))
    return rows
