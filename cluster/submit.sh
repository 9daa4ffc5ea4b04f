#!/usr/bin/env bash
# Submit one journey to a Ray cluster, from the root of a checkout. Outputs need an absolute path that all nodes share.
#   export RAY_API_SERVER_ADDRESS=http://HEAD:8265 RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token
#   cluster/submit.sh pretrain configs/pretrain/demo_ce.yaml data.train=/shared/fashion out=/shared/runs/ce
# A cluster without authentication: RAY_AUTH_MODE=disabled cluster/submit.sh ...
set -euo pipefail

: "${RAY_API_SERVER_ADDRESS:?set it to the address of the dashboard, http://HEAD:8265}"
[ $# -ge 2 ] || { sed -n '2,5p' "$0"; exit 2; }
# Said explicitly: the client sends a token only in token mode, and Ray's default is about to change.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
exec ray job submit --working-dir . -- python -m nc_dist "$@"
