#!/usr/bin/env bash
# docker-compose.yml for real: build, bring everything up, feed it, read it through SQL, take it down.
#
# Needs a Docker engine that runs already, or ENGINE=SCRIPT, where `SCRIPT up`, `SCRIPT images FILE…` and `SCRIPT down`
# start an engine, provide the images that the files name, and stop it; such an engine needs no bridge network.
# PYTHON is the interpreter of the environment (`make test-compose` sets it).
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-innerloop-test} RATE=${RATE:-1000}
files=(-f docker-compose.yml)
flat=

if [ -n "${ENGINE:-}" ]; then
    export ENGINE_HOME=${ENGINE_HOME:-${TMPDIR:-/tmp}/innerloop-engine}
    "$ENGINE" up
    export DOCKER_HOST=unix://$ENGINE_HOME/docker.sock DOCKER_BUILDKIT=0 COMPOSE_DOCKER_CLI_BUILD=0
    "$ENGINE" images docker-compose.yml Dockerfile
    files+=(-f tests/compose/host-network.yml)
elif ! docker info >/dev/null 2>&1; then
    echo "no Docker engine is running: start one, or set ENGINE to a script that does" >&2
    exit 2
fi
if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi

if [ -n "${ENGINE:-}" ]; then
    # Some versions of compose refuse published ports on the host's network, where they mean nothing.
    flat=$(mktemp --suffix .yml)
    "${compose[@]}" --project-directory . "${files[@]}" config | "$PYTHON" tests/compose/without_ports.py >"$flat"
    files=(-f "$flat")
fi
stack() { "${compose[@]}" --project-directory . "${files[@]}" "$@"; }

finish() {
    code=$?
    [ "$code" = 0 ] || stack logs --tail 40 || true
    stack down --volumes --timeout 30 || true
    [ -z "$flat" ] || rm -f "$flat"
    [ -z "${ENGINE:-}" ] || [ -n "${KEEP_ENGINE:-}" ] || "$ENGINE" down
    exit "$code"
}
trap finish EXIT

stack build --build-arg TORCH_INDEX="${TORCH_INDEX:-}"
stack down --volumes
stack up --detach
stack ps
"$PYTHON" -m tests.compose.check

echo "who runs on is healthy, as a normal user on a read-only root"
for service in worker monitor trainer metrics; do
    for _ in $(seq 60); do
        health=$(docker inspect --format '{{.State.Health.Status}}' "$(stack ps --quiet $service)")
        [ "$health" != starting ] && break
        sleep 3
    done
    echo "$service is $health"
    if [ "$health" != healthy ]; then
        docker inspect --format '{{json .State.Health.Log}}' "$(stack ps --quiet $service)" >&2
        exit 1
    fi
    test "$(stack exec -T $service id -u)" = 10001
    if stack exec -T $service touch /opt/innerloop/written 2>/dev/null; then
        echo "the root of the container of $service can be written to" >&2
        exit 1
    fi
done

echo "operators' commands answer in a container"
stack exec -T worker innerloop status
stack exec -T monitor innerloop drift status
stack exec -T monitor innerloop drift explain
stack exec -T trainer innerloop models list
stack exec -T trainer innerloop models show 1
stack exec -T worker innerloop dead-letters list
stack exec -T worker innerloop config >/dev/null
stack exec -T metrics innerloop metrics --once | grep -x 'innerloop_law_broken{partition="0"} 0.0'

echo "who is told to stop drains and ends with 0"
for service in worker monitor trainer metrics; do
    test "$(docker inspect --format '{{.State.Running}} {{.RestartCount}}' "$(stack ps --quiet $service)")" = "true 0"
    stack stop --timeout 60 $service
    test "$(docker inspect --format '{{.State.ExitCode}}' "$(stack ps --all --quiet $service)")" = 0
done
echo "compose: everything held"
