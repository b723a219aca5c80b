"""What a network costs: layer tables, sparsity and workbooks."""
