# Read by the scripts beside it, one for each table of docs/results.md. Each of them gets its texts from Debian's packages,
# trains what the table compares and writes a file for each figure to benchmarks/results/$MACHINE/text/.
#
# A call works for PIECE seconds on a run, then goes on to the next; call a script again until it says that all is done.
# What is done is not done again.
#
#   PIECE     seconds of a piece of a run (480)      MACHINE   name of the machine, for results (h100)
#   PYTHON    the interpreter (python)               TEXTS     where texts and stores are kept (runs/texts)
#   DEVICES   GPUs that runs are spread over, as "0 1" (one run after the other, wherever PyTorch puts it); "0 0 1 1" works
#             on two runs at once on each, of which one computes while the other compiles: for tables of steps, not seconds

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PIECE=${PIECE:-480}
PYTHON=${PYTHON:-python}
MACHINE=${MACHINE:-h100}
TEXTS=${TEXTS:-runs/texts}
RESULTS=benchmarks/results/$MACHINE/text
read -ra devices <<< "${DEVICES:-}"
left=0
declare -A running=() # the process that a place in devices is busy with
mkdir -p "$TEXTS" "$RESULTS"

# package NAME: downloads a Debian package, and prints its file.
package() {
    if ! compgen -G "$TEXTS/$1_*.deb" > /dev/null; then
        (cd "$TEXTS" && apt-get download "$1" >&2)
    fi
    compgen -G "$TEXTS/$1_*.deb" | head -1
}

# 330 MB of C, of which 300 MB are trained on: directories of Debian's Linux.
c_sources() {
    if [ ! -f "$TEXTS/c-sources.zip" ]; then
        dpkg-deb --fsys-tarfile "$(package linux-source-6.1)" \
            | tar -x -C "$TEXTS" --strip-components=3 ./usr/src/linux-source-6.1.tar.xz
        "$PYTHON" benchmarks/c_sources.py "$TEXTS/linux-source-6.1.tar.xz" "$TEXTS/c-sources.part"
        mv "$TEXTS/c-sources.part" "$TEXTS/c-sources.zip"
    fi
    echo "$TEXTS/c-sources.zip"
}

# About 90 MB of manuals.
prose() {
    if [ ! -f "$TEXTS/prose.zip" ]; then
        local packages=() name
        for name in linux-doc-6.1 perl-doc anarchism python3.11-doc debian-handbook; do
            packages+=("$(package "$name")")
        done
        "$PYTHON" benchmarks/prose.py "${packages[@]}" "$TEXTS/prose.part" >&2
        mv "$TEXTS/prose.part" "$TEXTS/prose.zip"
    fi
    echo "$TEXTS/prose.zip"
}

# store TEXT NAME VOCABULARY: tokens of a text, with a vocabulary learned from it.
store() {
    if [ ! -f "$TEXTS/$2/store.json" ]; then
        "$PYTHON" -m memtrans tokenize "$1" --out "$TEXTS/$2" --train-vocabulary "$3" >&2
    fi
    echo "$TEXTS/$2"
}

# piece NAME OPTION...: trains for PIECE seconds at most, from the checkpoint on if there is one; fails if it did not end.
# Only the run itself is told to stop, not what compiles for it; it then ends with status 143.
piece() {
    local out=runs/$1 status=0 resume=()
    shift
    if [ -f "$out/checkpoint/checkpoint.json" ]; then resume=(--resume); fi
    timeout --preserve-status --signal=TERM --kill-after=120 "$PIECE" \
        setsid "$PYTHON" -m memtrans train --out "$out" --plain "${resume[@]}" "$@" >&2 || status=$?
    if [ "$status" != 0 ] && [ "$status" != 143 ]; then exit "$status"; fi
    return "$status"
}

# spread FUNCTION ARG...: calls it, on the next of the DEVICES that is free if there are any.
spread() {
    local place
    if [ "${#devices[@]}" = 0 ]; then
        "$@"
        return
    fi
    while true; do
        for place in "${!devices[@]}"; do
            if [ -z "${running[$place]:-}" ]; then
                start "$place" "$@"
                return
            elif ! kill -0 "${running[$place]}" 2> /dev/null; then
                await "$place"
            fi
        done
        sleep 0.2
    done
}

# start PLACE FUNCTION ARG...: beside this process, and ends with it.
start() {
    (
        trap : INT TERM # a signal to all processes of the script must leave this one, or nobody would know its run
        export CUDA_VISIBLE_DEVICES=${devices[$1]}
        shift
        "$@"
        [ "$left" = 0 ] || exit 124
    ) &
    running[$1]=$!
    trap stop_all EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# await PLACE: until it is free; counts what has not ended, and ends where a run failed.
await() {
    local status=0
    wait "${running[$1]}" || status=$?
    unset "running[$1]"
    case $status in
        0) ;;
        124) left=$((left + 1)) ;;
        *) exit "$status" ;;
    esac
}

# Stops what start began, by pkill; what trains writes a checkpoint first.
stop_all() {
    local process
    for process in "${running[@]}"; do pkill -TERM -P "$process" || true; done
}

# figure NAME OPTION...: a run to its end, and its evaluation on 4 MB of held-out text.
figure() { spread figure_here "$@"; }

figure_here() {
    if [ -f "$RESULTS/$1.json" ]; then return; fi
    if piece "$@"; then evaluated "$@"; else left=$((left + 1)); fi
}

# timed_figure SECONDS NAME OPTION...: the same for a run of so many steps as SECONDS hold, by what 400 steps take.
timed_figure() { spread timed_figure_here "$@"; }

timed_figure_here() {
    local seconds=$1 name=$2 steps=runs/$2.steps
    shift 2
    if [ -f "$RESULTS/$name.json" ]; then return; fi
    if [ ! -f "$steps" ]; then
        if ! piece "$name-pace" "$@" --steps 400; then
            left=$((left + 1))
            return
        fi
        pace "$name-pace" --seconds "$seconds" > "$steps.part"
        mv "$steps.part" "$steps"
    fi
    figure_here "$name" "$@" --steps "$(cat "$steps")"
}

# pace NAME [--seconds SECONDS]: the seconds that a run's steps took, or how many steps so many seconds hold.
pace() {
    local out=runs/$1
    shift
    "$PYTHON" benchmarks/pace.py "$out/metrics.jsonl" "$@"
}

# at_once: how many runs the GPU of this one may be working on.
at_once() {
    local device count=0
    for device in "${devices[@]}"; do
        if [ "$device" = "$CUDA_VISIBLE_DEVICES" ]; then count=$((count + 1)); fi
    done
    echo $((count > 1 ? count : 1))
}

# evaluated NAME OPTION...: writes the figures of a run that has ended, with the names of its texts, not where they lie.
evaluated() {
    local name=$1 report
    shift
    "$PYTHON" -m memtrans eval --out "runs/$name" --eval-bytes 4000000 > "runs/$name/eval.txt"
    report=$(tail -1 "runs/$name/eval.txt")
    printf '{"command": "%s", "seconds": %s, "runs_at_once": %s, "result": %s}\n' \
        "memtrans train ${*//"$TEXTS/"/}" "$(pace "$name")" "$(at_once)" "${report//"$TEXTS/"/}" > "$RESULTS/$name.part"
    mv "$RESULTS/$name.part" "$RESULTS/$name.json"
}

ended() {
    local place
    for place in "${!running[@]}"; do await "$place"; done
    if [ "$left" = 0 ]; then echo "all is done: $RESULTS"; else echo "$left runs have not ended: call this again"; fi
}
