"""The edits that `checkpoint` itself knows: thinned widths, masks and fresh last layers."""
