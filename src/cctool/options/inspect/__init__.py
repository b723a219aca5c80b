"""Options of the verbs that write no checkpoint."""
