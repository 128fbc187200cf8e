#!/usr/bin/env bash
# Footage to shards on SLURM: N tasks a round share the rows of `sora prep run`, and a last job packs the shards.
#
#   launch/prep_array.sh 16 input=/shared/films output=/shared/prep --partition=cpu --cpus-per-task=8
#
# What begins with `--` goes to sbatch, the rest to `sora prep run`. Of the stages some need all rows (cut, dedup,
# shard): a round goes up to the next of them, the round after it begins there. Nothing is lost where a task dies: a
# later round, or the same command again, does what is missing.
set -euo pipefail

TASKS=${1:?is the number of tasks of a round}
shift
SBATCH=() SETTINGS=""
for argument in "$@"; do
  case $argument in
    --*) SBATCH+=("$argument") ;;
    *) SETTINGS+=" $(printf '%q' "$argument")" ;;
  esac
done

last=""
for round in scenes scores captions; do
  last=$(sbatch --parsable "${SBATCH[@]}" --job-name="prep-$round" --array="1-$TASKS" ${last:+--dependency=afterany:$last} \
    --wrap "sora prep run$SETTINGS part=\$SLURM_ARRAY_TASK_ID/$TASKS")
  last=${last%%;*}
  echo "round $round: job $last"
done
last=$(sbatch --parsable "${SBATCH[@]}" --job-name=prep-shards "--dependency=afterany:$last" --wrap "sora prep run$SETTINGS")
echo "shards: job ${last%%;*}"
