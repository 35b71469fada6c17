"""What the benchmarks share: workloads, arms, the clock, the parity gate, rounds, and figures from them."""
