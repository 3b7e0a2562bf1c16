"""Training, evaluation and prediction driven by one typed YAML file."""
