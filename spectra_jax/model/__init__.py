"""The one transformer."""
