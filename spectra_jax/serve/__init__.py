"""Running a trained model."""
