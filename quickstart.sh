#!/usr/bin/env bash
# From nothing to a new story: creates a virtual environment, installs packages, runs all six steps with a small model.
#   bash quickstart.sh                               the built-in stories
#   bash quickstart.sh --source FILES...             your own (.txt, .jsonl, .json, .csv, .parquet; folders, globs)
#   bash quickstart.sh --max-steps 5000 --kind char  each flag is passed to one step, --seed to train.py
set -euo pipefail
here=$PWD
cd "$(dirname "$0")"
at="" # what leads from the caller's folder to this one
[ "$here" = "$PWD" ] || at=$PWD/
source ./environment.sh
LOCK="
import fcntl, os
try:
    fcntl.flock(os.open('checkpoints', os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    raise SystemExit(1)
except OSError:  # a disk without locks
    pass"
trap 'echo; echo "stopped; run the same command again to continue" >&2; exit 130' INT

ingestion=() tokenizer=() packing=() training=()
step=ingestion
for word in "$@"; do
  case "$word" in
    --help | -h) sed -n '2,5s/^# *//p' quickstart.sh && exit ;;
    --data[-_]dir* | --checkpoint[-_]dir* | --out[-_]dir* | --output[-_]dir*) fail "quickstart.sh uses data and checkpoints; for other folders, run the six steps yourself" ;;
    --kind* | --gpt2* | --vocab[-_]size*) step=tokenizer ;;
    --workers*) step=packing ;;
    --source* | --story[-_]* | --validation[-_]* | --text[-_]* | --max[-_]stories*) step=ingestion ;;
    --*) step=training ;;
  esac
  case "$step" in
    ingestion) ingestion+=("$word") ;;
    tokenizer) tokenizer+=("$word") ;;
    packing) packing+=("$word") ;;
    training) training+=("$word") ;;
  esac
done
case " ${ingestion[*]-} " in *" --source"*) ;; *) ingestion=(--source sample ${ingestion[@]+"${ingestion[@]}"}) ;; esac
case " ${tokenizer[*]-} " in *" --vocab"* | *" --kind"*) ;; *) tokenizer+=(--vocab-size 2048) ;; esac
case " ${training[*]-} " in *" --preset"*) ;; *) training=(--preset quickstart ${training[@]+"${training[@]}"}) ;; esac

run() { # run NUMBER TITLE SCRIPT [FLAGS...]
  local number=$1 title=$2 script=$3
  shift 3
  printf '\n== step %s of 6: %s ==\n$ python %s\n' "$number" "$title" "$at$script $*"
  # in the caller's folder, because flags may name files in it
  (cd "$here" && "$PYTHON" "$at$script" "$@") || {
    status=$?
    [ "$status" = 130 ] && exit 130
    echo "error: step $number ($script) failed; its message is above" >&2
    exit 2
  }
}

check() { # check SCRIPT [FLAGS...]: a misspelt flag must be found before step 1 replaces any stories
  "$PYTHON" -c "$CHECK" "$@"
}
CHECK="
import sys
from model.errors import UserError
from model.script import fail
from model.settings import read_settings
from model.train_flags import ALIASES, CHOICES, HINTS
script, *flags = sys.argv[1:]
known = dict(choices=CHOICES, aliases=ALIASES, hints=HINTS) if script == 'train.py' else {}
try:
    read_settings(script, flags, **known)
except UserError as error:
    fail(str(error))"

use_environment requirements.txt
check data/ingestion.py "${ingestion[@]}"
check data/train_tokenizer.py ${tokenizer[@]+"${tokenizer[@]}"}
check data/prepare_data.py ${packing[@]+"${packing[@]}"}
check train.py "${training[@]}"
run 1 "collect the stories" data/ingestion.py "${ingestion[@]}"
run 2 "train the tokenizer" data/train_tokenizer.py ${tokenizer[@]+"${tokenizer[@]}"}
run 3 "tokenize the stories" data/prepare_data.py ${packing[@]+"${packing[@]}"}
# Other stories need a new run; the earlier one is kept next to it, and so is one that was not started from here.
if ls checkpoints/*.pt >/dev/null 2>&1 && ! cmp -s data/processed/meta.json checkpoints/quickstart.json; then
  "$PYTHON" -c "$LOCK" || fail "a train.py is running in checkpoints: wait for it, or stop it"
  kept="checkpoints-before-$(date +%Y%m%d-%H%M%S)"
  mv checkpoints "$kept"
  printf '\nthe checkpoints there are of other stories, or not of quickstart.sh: moved them to %s\n' "$kept"
fi
mkdir -p checkpoints
mark() { cp data/processed/meta.json checkpoints/quickstart.json; }
mark
trap mark EXIT # train.py --fresh moves the mark away with the run that it was for
run 4 "train the model" train.py "${training[@]}"
run 5 "write a new story" generate.py
run 6 "score the model on unseen stories" evaluate.py --checkpoint best --max-samples 300
cat <<END

done. The loss curve is ${at}checkpoints/loss_curve.png, the model is ${at}checkpoints/best.pt.
Another story:  ${at}.venv/bin/python ${at}generate.py --prompt "Once upon a time"
END
