"""A plain transcription of the published algorithm, for tests and benchmarks to compare with."""
