"""Seeded simulator of the pure parts, every run repeatable: ``tarragon simulate``."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from tarragon.config import Config
from tarragon.simulate.cluster import run, sweep
from tarragon.simulate.load import LOADS, Load
from tarragon.simulate.report import Report, Summary, render, summarise

__all__ = ["LOADS", "Load", "Report", "Summary", "main", "render", "run", "summarise", "sweep"]


def main(args: list[str]) -> int:
    """Run seeds 0, 1, ... on every load and print the figures; exit status 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="tarragon simulate", description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=24, help="runs of each load")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--load", choices=sorted(LOADS), help="only this one")
    parser.add_argument(
        "--join-wait-us",
        type=int,
        default=Config().batch_join_wait_us_max,
        help="bound of a batch's wait; 0 shows what waiting is worth",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's report")
    options = parser.parse_args(args)
    loads = {options.load: LOADS[options.load]} if options.load else LOADS
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    config = Config(batch_join_wait_us_max=options.join_wait_us).checked()
    reports = list(sweep(seeds, loads=loads, config=config, measure=True))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(reports)))
    print(render(reports))
    return 1 if any(report.violations for report in reports) else 0
