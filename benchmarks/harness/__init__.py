"""What the benchmarks share: contenders taken in turn, the machine's limits beside them, peers, and the report."""
