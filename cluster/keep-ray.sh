#!/usr/bin/env bash
# bash cluster/keep-ray.sh --address=HEAD_ADDRESS:6379 [options of `ray start`]
# Keeps Ray running on this machine. Without it a machine that was cut off for longer than the head
# waits is lost for good: its raylet ends, and `ray start --block` with it. SIGTERM and SIGINT end
# Ray (a drain, of which the run hears) and this script; `ray stop` alone does not.
# KEEP_RAY_SECONDS (5) is the pause before another start.
set -uo pipefail

ray=
ending=
end() {
    ending=yes
    if [ -n "$ray" ]; then kill -TERM "$ray" 2>/dev/null; fi
}
trap end TERM INT

while [ -z "$ending" ]; do
    ray start --block "$@" &
    ray=$!
    wait "$ray"
    status=$?
    while kill -0 "$ray" 2>/dev/null; do  # a signal ends `wait`, but Ray takes its time
        wait "$ray"
        status=$?
    done
    ray=
    if [ -z "$ending" ]; then
        echo "$(date '+%F %T') $(hostname): Ray ended (status $status), starting it again" >&2
        sleep "${KEEP_RAY_SECONDS:-5}" &
        wait $!
    fi
done
exit 0
