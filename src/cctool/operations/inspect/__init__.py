"""The verbs that write no checkpoint: analyze, compare, evaluate, export, decode."""
