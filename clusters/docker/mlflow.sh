#!/usr/bin/env bash
# The MLflow server of compose.yaml: its secrets come from files that Docker mounts, never from the environment.
#
#   ACERAY_ARTIFACTS      a folder or a bucket (s3://..., gs://...)   (/artifacts)
#   ACERAY_MLFLOW_HOSTS   names under which it is asked for, with ports, separated by commas
set -euo pipefail

database_password=$(</run/secrets/postgres_password)
admin_password=$(</run/secrets/mlflow_password)
MLFLOW_FLASK_SERVER_SECRET_KEY=$(</run/secrets/mlflow_key)
export MLFLOW_FLASK_SERVER_SECRET_KEY
store="postgresql+psycopg2://mlflow:${database_password}@postgres/mlflow"
umask 077
MLFLOW_AUTH_CONFIG_PATH=$(mktemp --suffix=.ini)
cat >"$MLFLOW_AUTH_CONFIG_PATH" <<INI
[mlflow]
default_permission = READ
database_uri = postgresql+psycopg2://mlflow:${database_password}@postgres/users
admin_username = admin
admin_password = ${admin_password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
export MLFLOW_AUTH_CONFIG_PATH MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_BACKEND_STORE_URI=$store # not an argument, which `ps` would show
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 \
    --artifacts-destination "${ACERAY_ARTIFACTS:-/artifacts}" --allowed-hosts "${ACERAY_MLFLOW_HOSTS:?names and ports}"
