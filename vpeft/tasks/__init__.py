"""Tasks: each package here is one, whole: data, model, loss and metric, prediction, pictures."""
