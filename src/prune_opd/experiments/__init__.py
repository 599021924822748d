"""What is asked about runs: arms against each other, what-ifs, scores on benchmarks."""
