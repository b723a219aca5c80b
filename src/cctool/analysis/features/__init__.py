"""Sheets and pictures of coded feature maps."""
