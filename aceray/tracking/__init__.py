"""MLflow: the runs of trainings and of studies. The only folder that imports it."""
