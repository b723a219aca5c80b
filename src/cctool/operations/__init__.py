"""One file per verb, and the pipeline that loads, runs, records and writes."""
