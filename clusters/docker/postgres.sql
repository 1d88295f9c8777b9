-- Run once, by PostgreSQL's own start: the users of MLflow lie in a database of their own.
CREATE DATABASE users OWNER mlflow;
