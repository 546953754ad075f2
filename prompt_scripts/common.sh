# Functions for the scripts here and in architecture_scripts: reading arguments, running `jrt eval`, printing the table.
# Options after OUTPUT_DIR: --models A,B  --tasks A,B  --limit N  --batch-size B  --device D  --workers W  --dry-run  -- MORE OPTIONS OF jrt eval

read_arguments() {
  usage="usage: $(basename "$0") OUTPUT_DIR [--models A,B] [--tasks A,B] [--limit N] [--batch-size B] [--device D] [--workers W] [--dry-run] [-- OPTIONS]"
  case ${1:-} in
    --help) echo "$usage"; exit 0 ;;
    ""|-*) echo "$usage" >&2; exit 2 ;;
  esac
  output=$1; shift
  options=(); more=(); dry_run=; tasks=; workers=
  device=cuda
  while [ $# -gt 0 ]; do
    case $1 in
      --models|--tasks|--limit|--batch-size|--device|--workers)
        case ${2:-} in ""|--*) echo "$(basename "$0"): $1 needs a value" >&2; exit 2 ;; esac
        case $1 in
          --limit|--batch-size|--workers)
            if ! [[ $2 =~ ^[1-9][0-9]*$ || "$1 $2" == "--batch-size auto" ]]; then
              echo "$(basename "$0"): $1: expected a whole number of at least 1, not $2" >&2; exit 2
            fi ;;
        esac
        case $1 in
          --models) models=$2 ;;
          --tasks) tasks=$2 ;;
          --device) device=$2 ;;
          --batch-size) batch_size=$2 ;;
          --limit) options+=(--limit "$2") ;;
          --workers) workers=$2 ;;
        esac
        shift 2 ;;
      --dry-run) dry_run=1; shift ;;
      --) shift; more=("$@"); break ;;
      *) echo "$(basename "$0"): unknown option $1; $usage" >&2; exit 2 ;;
    esac
  done
}

# Prints a command; runs it as well unless this is a dry run.
step() {
  printf '%q ' "$@"; echo
  if [ -z "$dry_run" ]; then "$@"; fi
}

# Notes that some cells were not run (code 1), so that the others still get their table. Any other code ends the script.
status=0
not_all_ran() {
  if [ "$1" -ne 1 ]; then exit "$1"; fi
  status=1
}

# Runs `jrt eval` with results in $output/NAME, and resumes a run that is there: evaluate NAME TASKS STRATEGIES PROTOCOL
evaluate() {
  step jrt eval --model "$models" --tasks "${tasks:-$2}" --strategy "$3" --protocol "$4" --batch-size "$batch_size" \
    --device "$device" --output "$output/$1" --resume ${workers:+--workers "$workers"} ${options[@]+"${options[@]}"} ${more[@]+"${more[@]}"} || not_all_ran $?
}

# Prints the paper's table of the runs in $output, or a plain report if --tasks chose other tasks, and ends the script:
# collect [--layout NAME]
collect() {
  if [ -z "$tasks" ]; then step python "$(dirname "$0")/collect_results.py" "$output" "$@"; else step jrt report "$output"; fi
  exit $status
}

# Runs a command in the background, at most $workers (1 if not given) at once. `await_all` waits for all that still run.
# If one fails, the others go on, and $status is 1.
jobs_running=()
beside() {
  if [ -n "$dry_run" ]; then step "$@"; return; fi
  if [ "${#jobs_running[@]}" -ge "${workers:-1}" ]; then wait "${jobs_running[0]}" || status=1; jobs_running=("${jobs_running[@]:1}"); fi
  step "$@" & jobs_running+=($!)
}
await_all() {
  for job in ${jobs_running[@]+"${jobs_running[@]}"}; do wait "$job" || status=1; done
  jobs_running=()
}
