"""Language models whose bit-width is a value of their config."""
