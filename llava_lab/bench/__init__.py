"""Speed and memory beside a floor and beside the peers' way, measured in one run on one machine."""

from llava_lab.bench.harness import BENCHES, run

__all__ = ["BENCHES", "run"]
