"""Training and evaluation; knows nothing of Ray, MLflow or files."""
