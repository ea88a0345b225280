"""Speed and memory against peers: measuring, the benchmark suites, and the tables made of their results."""
