"""A package, so that `tests.families` is ours where an installed wheel (verl, TransferQueue) brings a `tests` along."""
