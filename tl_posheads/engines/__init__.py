"""Ways to count a corpus: Ray's actors, or processes that torchrun started."""
