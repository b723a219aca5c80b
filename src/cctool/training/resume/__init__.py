"""What training needs to continue bit for bit."""
