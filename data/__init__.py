"""Training data: one record, the sources that yield it, its validator, shards and jobs.  Needs the extra `data`."""
