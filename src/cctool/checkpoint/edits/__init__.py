"""The edits that `checkpoint` itself knows: thinned widths and masks."""
