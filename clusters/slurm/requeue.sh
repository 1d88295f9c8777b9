#!/usr/bin/env bash
# Sourced by the job scripts: run aceray until it ends or the time limit comes near, then queue the job again.
#
# Slurm sends USR1 some time before the limit (`#SBATCH --signal=B:USR1@180`). The job then tells the run to end, which
# keeps a checkpoint of its present step, and goes back into the queue under its own number: nothing is done twice. A
# study is ended after one more checkpoint of any of its trials, so their train.checkpoint_every should be less than
# those seconds. A job in which no checkpoint was written since it began is not queued again: it would never end.

seconds_to_checkpoint=${ACERAY_SECONDS_TO_CHECKPOINT:-120} # less than those of --signal
limit_is_near=no

# await_port HOST:PORT
await_port() {
    local host=${1%:*} port=${1##*:}
    for _ in $(seq 300); do
        if (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; then return 0; fi
        sleep 1
    done
    echo "error: nothing answers at $1" >&2
    return 1
}

# newer_checkpoint FILE: whether a run or a trial below this folder has a checkpoint that is newer
newer_checkpoint() {
    [[ -n $(find runs studies -name 'step-*.safetensors' -newer "$1" -print -quit 2>/dev/null) ]]
}

# run_until_limit ADDRESS VERB ARGUMENTS...: `aceray VERB ARGUMENTS` on the cluster, from where it was. Where `aceray` is
# a function whose process is not the run's own, it writes that one's number to "$marks/driver".
run_until_limit() {
    local address=$1 verb=$2 driver code=0
    shift 2
    # marks beside the runs, so that all times are those of the same file system
    marks=$(mktemp -d .aceray-job-XXXXXX)
    touch "$marks/begun"
    trap 'rm -r "$marks"' EXIT
    trap 'limit_is_near=yes; touch "$marks/noticed"' USR1
    case $verb in
        train) aceray train "$@" resources.address="$address" --existing resume & ;;
        tune) aceray tune "$@" --address "$address" --resume & ;;
        *)
            echo "error: $verb: give train or tune, and its arguments" >&2
            return 2
            ;;
    esac
    driver=$!
    wait "$driver" || code=$? # a signal to this script ends the waiting, not the run
    if [[ $limit_is_near == no ]]; then return "$code"; fi

    if [[ $verb == tune ]]; then
        echo "The time limit is near; waiting for a checkpoint."
        for _ in $(seq "$seconds_to_checkpoint"); do
            if newer_checkpoint "$marks/noticed" || ! kill -0 "$driver" 2>/dev/null; then break; fi
            sleep 1
        done
    fi
    if ! kill -0 "$driver" 2>/dev/null; then # it came to its end meanwhile
        code=0
        wait "$driver" || code=$?
        return "$code"
    fi
    if [[ -e $marks/driver ]]; then driver=$(<"$marks/driver"); fi
    kill -TERM "$driver"
    while kill -0 "$driver" 2>/dev/null; do sleep 1; done
    if ! newer_checkpoint "$marks/begun"; then
        echo "error: no checkpoint since the job began; not queued again. Lower train.checkpoint_every" >&2
        return 1
    fi
    echo "Queued again; it goes on from its newest checkpoint."
    rm -r "$marks" && trap - EXIT
    scontrol requeue "$SLURM_JOB_ID" # which ends this script
    sleep 60
}
