"""What a run needs and how fast it can be on machines that are not here: `spectra plan`."""
