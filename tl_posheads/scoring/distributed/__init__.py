"""Ways to measure a corpus: Ray's actors, or processes that torchrun started."""
