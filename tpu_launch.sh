#!/usr/bin/env bash
# Trains with keras_vit on a Cloud TPU VM, a TPU pod slice or a GPU VM of Google Cloud. `./tpu_launch.sh --help` says how.
#
# The commands that a person gives run here and call gcloud; what has to happen on the machine is `on-vm ACTION` of this same file,
# which `prepare` copies there.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: tpu_launch.sh COMMAND [OPTIONS] [-- ARGUMENTS of python -m keras_vit.main]

  create    make the machine, if it is not there
  prepare   copy this package to it and install it there
  run       start training in the background: python -m keras_vit.main --workdir=... ARGUMENTS
  status    what the machine and the training are doing
  logs      follow the training's output
  stop      SIGTERM: training saves and ends; the machine stays. With --now: SIGKILL, without saving
  resume    after a preemption or a stop: make the machine again if it is gone, prepare it, run the same command, which
            goes on from the checkpoints in WORKDIR
  delete    remove the machine and its disk

  export CLOUDSDK_CORE_PROJECT=my-project CLOUDSDK_COMPUTE_ZONE=us-central2-b
  ./tpu_launch.sh create --accelerator-type=v4-8 --spot
  ./tpu_launch.sh prepare
  ./tpu_launch.sh run --workdir=gs://my-bucket/run1 -- --config=vit.py:b16,cifar10 --config.strategy=data_parallel
  ./tpu_launch.sh logs
  ./tpu_launch.sh resume          # when it was preempted
  ./tpu_launch.sh delete

Where and what
  --project=ID          needed; or CLOUDSDK_CORE_PROJECT
  --zone=ZONE           needed; or CLOUDSDK_COMPUTE_ZONE
  --name=NAME           of the machine (keras-vit)
  --type=tpu|gpu        (tpu)
  --spot, --preemptible cheaper; the machine may be taken away at any time
  --create-flag=FLAG    one more flag for gcloud's create, as --create-flag=--network=my-net; may be repeated

TPU
  --accelerator-type=T  (v4-8). That is one host; larger ones, as v4-32, are pod slices, where every command goes to all hosts
  --version=V           TPU software version (the one for the accelerator: tpu-ubuntu2204-base, v2-alpha-tpuv5-lite, ...)
  --queued              as a queued resource: waits for capacity, up to --queue-minutes (60)

GPU
  --machine-type=M      (n1-standard-8)
  --accelerator-type=T  with its number, as nvidia-tesla-t4:2, or none for machine types that bring their own, as
                        g2-standard-8 (nvidia-tesla-t4:1)
  --image-family=F      (common-cu129-ubuntu-2204-nvidia-580); gcloud compute images list
                        --project=deeplearning-platform-release shows what there is
  --image-project=P     (deeplearning-platform-release)
  --disk-size=S         boot disk (200GB)

Training
  --workdir=DIR         needed by run. gs://BUCKET/PATH is copied to the machine, trained in there, and copied back every --sync
                        seconds (60) and at the end. Any other path is one on the machine, and is lost with it.
  --shared              says that WORKDIR is a path on a file system that all hosts see and that outlives the machine, as
                        Filestore. Needed in pod slices, whose hosts write one state together, and which take no gs://.
  --setup=FILE          a bash script that prepare copies and run starts on every host before training, as one that mounts such
                        a file system; it must bear being run again
  --backend=jax|tensorflow   (jax on TPU, tensorflow on GPU)
  --commit=REF          what prepare installs: a commit of this repository (HEAD); what is not committed stays here
  --source=FILE         install this wheel or source archive instead
  --upload=FILE         copied beside it, as a configuration of your own (-- --config=FILE); may be repeated

Everything else
  --dry-run             print every command, ready to paste, and run none
  --yes                 delete without asking
  --worker=N            whose output logs follows (0)
  --attempts=N          tries until ssh, a state or a GPU driver is there (20), --pause=SECONDS between them (15)
  --watch=SECONDS       how long run looks whether the training stays alive (20)
  --grace=SECONDS       how long stop waits for training to save, and hosts of a pod slice for each other (300)

Options given once can come from the environment instead: --accelerator-type from TPU_LAUNCH_ACCELERATOR_TYPE, and so on; flags need a 1
there, and --no-spot takes one back. What create, prepare and run were given is kept for each machine in
~/.local/state/keras_vit/launch, so that later commands need the project, zone and name only; an option given again replaces it.

TPUs up to v6e: Google makes newer ones in other ways than gcloud compute tpus, which this script uses.
On TPU the backend is JAX. The last TensorFlow for TPUs (the wheel tensorflow-tpu) is 2.20 and this package needs 2.21, so
TensorFlow runs there on the CPU, for the input pipeline only.
A machine costs money from create to delete, whether it trains or not.
This script was tested with a stand-in for gcloud only, never against Google Cloud.
EOF
}

say() { printf '%s\n' "$*" >&2; }

die() {
  local status=$1
  shift
  say "tpu_launch: $*"
  exit "$status"
}

# The words as one line that bash reads back as the same words
quote() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  die 2 "needs bash 4.4 or newer, this is $BASH_VERSION; on macOS: brew install bash."
fi

# Options of one call; options kept for each machine; options that only `resume` takes from there, since `prepare` installs what is
# there now
readonly HERE_FLAGS=(yes now dry-run) KEPT_FLAGS=(spot preemptible queued shared)
readonly HERE_OPTIONS=(project zone name worker attempts pause watch grace sync queue-minutes)
readonly KEPT_OPTIONS=(type accelerator-type version machine-type image-family image-project disk-size workdir setup backend)
readonly RESUME_OPTIONS=(commit source)

declare -A given=() kept=() option=()
declare -a uploads=() create_flags=() training=() place=()
has_training=false verb="" scratch="" state="" exists=false

among() {
  local word=$1 each
  shift
  for each; do
    if [[ $each == "$word" ]]; then return 0; fi
  done
  return 1
}

parse() {
  local name value
  while (($#)); do
    case $1 in
      --)
        shift
        training=("$@") has_training=true
        return
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --?*) ;;
      *) die 2 "expected options, got '$1'; --help lists them. Arguments of keras_vit.main go behind --." ;;
    esac
    name=${1%%=*} name=${name#--}
    if [[ $1 != *=* ]] && among "${name#no-}" "${HERE_FLAGS[@]}" "${KEPT_FLAGS[@]}"; then
      if [[ $name == no-* ]]; then given[${name#no-}]=0; else given[$name]=1; fi
      shift
      continue
    fi
    among "$name" "${HERE_OPTIONS[@]}" "${KEPT_OPTIONS[@]}" "${RESUME_OPTIONS[@]}" upload create-flag ||
      die 2 "there is no option $1; --help lists them. Arguments of keras_vit.main go behind --."
    if [[ $1 == *=* ]]; then
      value=${1#*=}
    else
      (($# > 1)) || die 2 "--$name needs a value; write --$name=VALUE."
      value=$2
      shift
    fi
    shift
    case $name in
      upload) uploads+=("$(absolute "$value")") ;;
      create-flag) create_flags+=("$value") ;;
      source | setup) given[$name]=$(absolute "$value") ;;
      *) given[$name]=$value ;;
    esac
  done
}

# The path of a file that may not be there, from the root: gcloud takes a colon before the first slash for a machine's name
absolute() {
  case $1 in
    "" | /*) printf '%s' "$1" ;;
    *) printf '%s/%s' "$PWD" "$1" ;;
  esac
}

# Sets option[NAME]: the command line's, what is kept of this machine, the environment's, the default
settle() {
  local variable=TPU_LAUNCH_${1^^}
  variable=${variable//-/_}
  option[$1]=${given[$1]-${kept[$1]-${!variable-$2}}}
}

on() { [[ ${option[$1]} == 1 ]]; }

in_bucket() { [[ ${option[workdir]} == gs://* ]]; }

settle_all() {
  local name
  for name in "${HERE_FLAGS[@]}" "${KEPT_FLAGS[@]}"; do settle "$name" 0; done
  for name in version workdir setup backend source; do settle "$name" ""; done
  settle type tpu
  case ${option[type]} in
    tpu) settle accelerator-type v4-8 ;;
    gpu) settle accelerator-type nvidia-tesla-t4:1 ;;
    *) die 2 "--type must be tpu or gpu, got '${option[type]}'." ;;
  esac
  settle machine-type n1-standard-8
  settle image-family common-cu129-ubuntu-2204-nvidia-580
  settle image-project deeplearning-platform-release
  settle disk-size 200GB
  settle commit HEAD
  settle worker 0
  settle attempts 20
  settle pause 15
  settle watch 20
  settle grace 300
  settle sync 60
  settle queue-minutes 60
  for name in worker attempts pause watch grace sync queue-minutes; do
    [[ ${option[$name]} =~ ^[0-9]{1,6}$ ]] || die 2 "--$name must be a whole number, got '${option[$name]}'."
  done
  option[workdir]=${option[workdir]%/}
  if [[ -z ${option[backend]} ]]; then
    if [[ ${option[type]} == tpu ]]; then option[backend]=jax; else option[backend]=tensorflow; fi
  fi
  case ${option[type]}/${option[backend]} in
    tpu/jax | gpu/jax | gpu/tensorflow) ;;
    tpu/tensorflow)
      die 2 "--backend=tensorflow cannot use a TPU: the last TensorFlow for TPUs is 2.20, this package needs 2.21. Leave it out: jax."
      ;;
    *) die 2 "--backend must be jax or tensorflow, got '${option[backend]}'." ;;
  esac
  if on shared && in_bucket; then die 2 "--shared is for a path on the machine, not for ${option[workdir]}; leave out one of them."; fi
  if on queued && [[ ${option[type]} == gpu ]]; then die 2 "--queued is for TPUs; leave it out."; fi
  if on queued && on preemptible; then die 2 "a queued resource can be --spot, not --preemptible; use that."; fi
  if on spot && on preemptible; then die 2 "--spot and --preemptible exclude each other; leave out one."; fi
}

# -------------------------------------------------------------------------------------------------- on the machine, in ~/launch

readonly HOST=${HOSTNAME:-machine}

running() {
  local process
  [[ -f pid ]] || return 1
  process=$(<pid)
  [[ -r /proc/$process/cmdline ]] || return 1
  tr '\0' ' ' 2>/dev/null <"/proc/$process/cmdline" | grep -q 'on-vm job '
}

on_vm_prepare() {
  local uv try packages=()
  case ${option[type]}/${option[backend]} in
    tpu/jax) packages=('jax[tpu]' orbax-checkpoint) ;;
    gpu/jax) packages=('jax[cuda12]' orbax-checkpoint) ;;
    gpu/tensorflow) packages=('tensorflow[and-cuda]') ;;
  esac
  if [[ ${option[type]} == gpu ]]; then # the image installs its driver after the first boot
    for ((try = 1; ; try++)); do
      if nvidia-smi; then break; fi
      ((try < option[attempts])) || die 1 "$HOST: nvidia-smi fails, so there is no GPU driver; take another --image-family."
      sleep "${option[pause]}"
    done
  fi
  uv=$(command -v uv || true)
  if [[ -z $uv ]]; then
    uv=$HOME/.local/bin/uv
    if [[ ! -x $uv ]]; then
      python3 -m pip install --user --quiet uv || curl --location --silent --show-error --fail https://astral.sh/uv/install.sh | sh
    fi
  fi
  if [[ ! -x venv/bin/python ]]; then "$uv" venv --python=3.11 venv; fi
  "$uv" pip install --python=venv/bin/python --reinstall-package=keras-vit "${option[source]}" "${packages[@]}"
  KERAS_BACKEND=${option[backend]} venv/bin/python -c \
    'import keras, keras_vit; print("keras_vit", keras_vit.__version__, "on Keras", keras.__version__, keras.config.backend())'
  touch prepared
  say "$HOST: prepared"
}

# Prints an attribute that Google gave this machine. Status 22: there is none of that name; others: no answer.
metadata() {
  curl --silent --fail --max-time 20 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# In a pod slice, sets what keras.distribution needs to make one run of all hosts' processes. The endpoints are names, or
# NAME:ID:ADDRESS, as jax/_src/clusters/cloud_tpu_cluster.py reads them.
join_pod() {
  local endpoints each addresses="" status=0
  local -a hosts
  if [[ ${option[type]} == gpu ]]; then return; fi
  endpoints=$(metadata worker-network-endpoints) || status=$?
  if ((status == 22)); then return; fi
  ((status == 0)) || die 1 "$HOST: the metadata server does not answer (curl: $status), so this host's place in the slice is unknown."
  IFS=, read -ra hosts <<<"$endpoints"
  if ((${#hosts[@]} < 2)); then return; fi
  on shared || die 1 "$HOST: the ${#hosts[@]} hosts of this TPU write one state together, so --workdir must be a folder that all see," \
    "such as one on Filestore that --setup=FILE mounts; say so by --shared."
  for each in "${hosts[@]}"; do addresses+=,${each##*:}:8482; done
  KERAS_DISTRIBUTION_PROCESS_ID=$(metadata agent-worker-number)
  export KERAS_DISTRIBUTION_PROCESS_ID KERAS_DISTRIBUTION_NUM_PROCESSES=${#hosts[@]} KERAS_DISTRIBUTION_JOB_ADDRESSES=${addresses#,}
}

# In a pod slice, waits until every host has left its mark in the folder: with folders of their own, hosts would wait for ever to save
meet() {
  local tick found=0 number=${KERAS_DISTRIBUTION_NUM_PROCESSES-1}
  if ((number == 1)); then return; fi
  mkdir -p "${option[workdir]}"
  date >"${option[workdir]}/.host-$KERAS_DISTRIBUTION_PROCESS_ID"
  for ((tick = 0; tick <= 5 * option[grace]; tick++)); do
    found=$(find "${option[workdir]}" -maxdepth 1 -name '.host-*' -mmin -10 | wc -l)
    if ((found == number)); then return; fi
    sleep 0.2
  done
  die 1 "$HOST: after ${option[grace]} s $found of $number hosts are seen in ${option[workdir]}; it must be one folder for all of them."
}

# Makes `work` a copy of the bucket's folder, which is made if needed
fetch() {
  date -u | gcloud storage cp - "${option[workdir]}/.launch-$HOST" --quiet ||
    die 1 "$HOST: cannot write to ${option[workdir]}; give the machine's service account that right (roles/storage.objectUser)."
  rm -rf work.part
  mkdir work.part
  gcloud storage rsync --recursive --quiet "${option[workdir]}" work.part
  rm -rf work
  mv work.part work
}

copy_back() {
  gcloud storage rsync --recursive --delete-unmatched-destination-objects --quiet work "$1"
}

# Copies back what an earlier run, now dead, left uncopied
on_vm_save() {
  if running || [[ ! -f unsaved ]]; then return; fi
  say "$HOST: copying back what the last run left"
  copy_back "$(<unsaved)"
  rm unsaved
}

on_vm_start() {
  local tick
  [[ -f prepared ]] || die 1 "$HOST is not prepared: run prepare first."
  printf '%s\0' "${option[backend]}" "${option[workdir]}" "${training[@]}" >command.new
  if running; then
    cmp --silent command command.new || die 1 "$HOST: another training runs here (pid $(<pid)); stop it first."
    say "$HOST: runs already (pid $(<pid))"
    return
  fi
  join_pod # refuses now, if at all
  if [[ -n ${option[setup]} ]]; then bash "${option[setup]}" || die 1 "$HOST: ${option[setup]} failed (exit status $?)."; fi
  mv command.new command
  rm -f status stopping
  setsid bash tpu_launch.sh on-vm job "${words[@]}" -- "${training[@]}" >>run.log 2>&1 </dev/null &
  printf '%s\n' "$!" >pid
  for ((tick = 0; tick < 5 * option[watch]; tick++)); do
    sleep 0.2
    running || break
  done
  if [[ -f status && $(<status) != 0 ]]; then
    tail -n 30 run.log
    die 1 "$HOST: training ended at once, with exit status $(<status); the end of its output is above."
  fi
  say "$HOST: training"
}

# What `start` leaves behind in the background: the training, copied back to the bucket every now and then. Training takes a second
# SIGTERM to mean at once, and a machine that shuts down sends one to every process: so none is handed on here, and `stop` asks by file.
on_vm_job() {
  local folder=${option[workdir]} child copier="" next status=0 asked="" sent=""
  trap 'printf "%s\n" "$?" >status' EXIT
  trap : TERM
  say "--- $(date -u '+%F %T') UTC: $(quote python -m keras_vit.main --workdir="$folder" "${training[@]}")"
  join_pod
  meet
  if in_bucket; then
    folder=$PWD/work
    fetch
    printf '%s\n' "${option[workdir]}" >unsaved
  fi
  if [[ -f stopping ]]; then exit 143; fi
  KERAS_BACKEND=${option[backend]} venv/bin/python -u -m keras_vit.main --workdir="$folder" "${training[@]}" &
  child=$!
  next=$((SECONDS + option[sync]))
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.2 &
    wait "$!" || true
    if [[ -f stopping ]]; then asked=$(<stopping); fi
    if [[ $asked != "$sent" ]]; then
      kill -"$asked" "$child" 2>/dev/null || true
      sent=$asked
    fi
    if [[ -n $copier ]] && ! kill -0 "$copier" 2>/dev/null; then
      wait "$copier" || say "$HOST: not all could be copied back; trying again in ${option[sync]} s"
      copier=""
    fi
    if [[ -f unsaved && -z $copier ]] && ((SECONDS >= next)); then
      copy_back "${option[workdir]}" &
      copier=$! next=$((SECONDS + option[sync]))
    fi
  done
  wait "$child" || status=$?
  if [[ -n $copier ]]; then wait "$copier" || true; fi
  if [[ -f unsaved ]]; then
    if copy_back "${option[workdir]}"; then
      rm unsaved
    else
      say "$HOST: what is new is in ~/launch/work only, not in ${option[workdir]}; the next run copies it before it starts."
      if ((status == 0 || status == 143)); then status=74; fi
    fi
  fi
  exit "$status"
}

on_vm_status() {
  if running; then
    say "$HOST: training (pid $(<pid), for $(ps -o etime= -p "$(<pid)" | tr -d ' '))"
  elif [[ -f status ]]; then
    case $(<status) in
      0) say "$HOST: done" ;;
      137 | 143) say "$HOST: stopped; resume goes on" ;;
      *) say "$HOST: ended with exit status $(<status); logs says why" ;;
    esac
  elif [[ -f pid ]]; then
    say "$HOST: cut off, the machine was restarted or the process killed; resume goes on"
  elif [[ -f prepared ]]; then
    say "$HOST: prepared, nothing was run"
  else
    say "$HOST: not prepared"
  fi
  if [[ -f run.log ]]; then tail -c 2000 run.log | tr '\r' '\n' | tail -n 1; fi
}

on_vm_logs() {
  [[ -f run.log ]] || die 1 "$HOST: nothing was run here yet."
  if running; then tail -n 100 -F --pid="$(<pid)" run.log; else tail -n 100 run.log; fi
}

on_vm_stop() {
  local tick outcome=unknown
  if ! running; then
    say "$HOST: nothing runs"
    return
  fi
  if on now; then
    printf KILL >stopping
  elif [[ ! -f stopping ]]; then
    printf TERM >stopping
  fi
  for ((tick = 0; tick <= 5 * option[grace]; tick++)); do
    sleep 0.2
    running || break
  done
  if running; then
    die 1 "$HOST: not ended after ${option[grace]} s; it may be saving: stop again waits on, stop --now ends it unsaved."
  fi
  if [[ -f status ]]; then outcome=$(<status); fi
  if [[ $outcome == 0 || $outcome == 143 ]] || { on now && [[ $outcome == 137 ]]; }; then
    say "$HOST: stopped (exit status $outcome)"
  else
    tail -n 30 run.log
    die 1 "$HOST: ended with exit status $outcome instead of 143; the end of its output is above."
  fi
}

on_vm() {
  local action=${1-} index
  local -a words # the options as given, for `start` to hand on
  shift || true
  among "$action" prepare save start job status logs stop || die 2 "on-vm is for the other commands' use on the machine; see --help."
  cd "$HOME/launch"
  words=("$@")
  for index in "${!words[@]}"; do
    if [[ ${words[index]} == -- ]]; then
      words=("${words[@]:0:index}")
      break
    fi
  done
  parse "$@"
  settle_all
  "on_vm_$action"
}

# ---------------------------------------------------------------------------------------------- what is kept of each machine, here

memory() { printf '%s' "${XDG_STATE_HOME:-$HOME/.local/state}/keras_vit/launch"; }

memory_file() { printf '%s/%s.%s.%s' "$(memory)" "${option[project]}" "${option[zone]}" "${option[name]}"; }

remember() {
  local each
  if on dry-run; then return; fi
  mkdir -p "$(memory)"
  {
    for each in "${KEPT_OPTIONS[@]}" "${KEPT_FLAGS[@]}" "${RESUME_OPTIONS[@]}"; do printf '%s=%s\0' "$each" "${option[$each]}"; done
    for each in "${uploads[@]}"; do printf 'upload=%s\0' "$each"; done
    for each in "${create_flags[@]}"; do printf 'create-flag=%s\0' "$each"; done
    if $has_training; then
      printf '%s\0' -- "${training[@]}"
    fi
  } >"$(memory_file)"
}

recall() {
  local index line name value
  local -a lines old_uploads=() old_flags=()
  if [[ ! -f $(memory_file) ]]; then return; fi
  mapfile -d '' -t lines <"$(memory_file)"
  for index in "${!lines[@]}"; do
    line=${lines[index]} name=${lines[index]%%=*} value=${lines[index]#*=}
    case $name in
      --)
        if ! $has_training; then training=("${lines[@]:index+1}") has_training=true; fi
        break
        ;;
      upload) old_uploads+=("$value") ;;
      create-flag) old_flags+=("$value") ;;
      *)
        if [[ $verb == resume ]] || ! among "$name" "${RESUME_OPTIONS[@]}"; then kept[$name]=$value; fi
        ;;
    esac
  done
  if ((${#uploads[@]} == 0)); then uploads=("${old_uploads[@]}"); fi
  if ((${#create_flags[@]} == 0)); then create_flags=("${old_flags[@]}"); fi
}

# ------------------------------------------------------------------------------------------------------------------- gcloud

# Runs a command, shows its output and keeps it in $scratch; a dry run prints the command instead
perform() {
  local status=0
  if on dry-run; then
    printf '%s\n' "$(quote "$@")"
    return
  fi
  say "+ $(quote "$@")"
  "$@" </dev/null 2>&1 | tee "$scratch" || status=$?
  # gcloud before 2023 ended with 0 though the command had failed on a host
  if ((status == 0)) && grep -q '^##### Command execution on worker .* failed' "$scratch"; then status=1; fi
  return "$status"
}

# Why gcloud failed, from what it wrote
reason() {
  local hosts
  hosts=$(sed -n 's/^##### Command execution on worker \([0-9]*\) failed with exit status \([0-9]*\).*/host \1 (exit status \2)/p' \
    "$scratch" | paste -s -d, - | sed 's/,/, /g')
  if grep -qiE 'no more capacity|stockout|ZONE_RESOURCE_POOL_EXHAUSTED|not have enough resources|insufficient capacity' "$scratch"; then
    printf '%s' "the zone has no such machine free now. Try later, another --zone, or --queued for a TPU"
  elif grep -qiE 'quota|RESOURCE_EXHAUSTED' "$scratch"; then
    printf '%s' "the project's quota does not allow it. Ask for more (Cloud console, Quotas), or take a smaller machine or other --zone"
  elif grep -qiE 'ALREADY_EXISTS|already exists' "$scratch"; then
    printf '%s' "something of that name is there already. See status, or take another --name"
  elif grep -qiE 'auth login|active account|reauthentication' "$scratch"; then
    printf '%s' "gcloud is not logged in. Run: gcloud auth login"
  elif grep -qiE 'PERMISSION_DENIED|permission|has not been used|SERVICE_DISABLED' "$scratch"; then
    printf '%s' "this account may not do that in ${option[project]}. Enable the TPU or Compute Engine API, check its role and --zone"
  elif grep -q 'launch/tpu_launch.sh: No such file' "$scratch"; then
    printf '%s' "the machine is not prepared. Run prepare first"
  elif [[ -n $hosts ]]; then
    printf '%s' "it failed on $hosts, and may have succeeded on the other hosts"
  else
    printf '%s' "the output above says why"
  fi
}

# Sets `state` to what a describe command prints; ABSENT if it finds nothing. A dry run takes it to be $1.
describe() {
  local assumed=$1
  shift
  if on dry-run; then
    printf '%s\n' "$(quote "$@")"
    say "# taking it to print ${assumed/ABSENT/that there is no such machine}"
    state=$assumed
    return
  fi
  say "+ $(quote "$@")"
  if state=$("$@" 2>"$scratch" </dev/null); then
    exists=true
  elif grep -E 'NOT_FOUND|not found' "$scratch" | grep -qF "/${option[name]}"; then
    state=ABSENT exists=false
  else
    cat "$scratch" >&2
    die 1 "cannot tell whether the machine ${option[name]} is there: $(reason)."
  fi
}

# Sets `state`: Google's word for the machine's, ABSENT if there is none. A dry run takes it to be as said: ready, absent or lost
look() {
  local -A assumed=([ready]=READY [absent]=ABSENT [lost]=PREEMPTED)
  if [[ ${option[type]} == gpu ]]; then
    assumed=([ready]=RUNNING [absent]=ABSENT [lost]=TERMINATED)
    describe "${assumed[$1]}" gcloud compute instances describe "${option[name]}" "${place[@]}" '--format=value(status)'
    return
  fi
  describe "${assumed[$1]}" gcloud compute tpus tpu-vm describe "${option[name]}" "${place[@]}" '--format=value(state)'
  if on queued && [[ $state == ABSENT ]]; then
    describe ABSENT gcloud compute tpus queued-resources describe "${option[name]}" "${place[@]}" '--format=value(state.state)'
  fi
}

# What `state` means. A TPU that was preempted or ended is lost with its disk; a GPU machine is stopped and keeps its disk.
phase() {
  case ${option[type]}/$state in
    */ABSENT) echo absent ;;
    tpu/READY | gpu/RUNNING) echo ready ;;
    tpu/CREATING | tpu/STARTING | tpu/RESTARTING | tpu/REIMAGING | tpu/UNHIDING) echo coming ;;
    tpu/ACCEPTED | tpu/WAITING_FOR_RESOURCES | tpu/ACTIVE) echo coming ;; # of a queued resource
    */PROVISIONING | */STAGING | */REPAIRING) echo coming ;;
    */STOPPING | */DELETING | */SUSPENDING | tpu/HIDING) echo leaving ;;
    tpu/PREEMPTED | tpu/TERMINATED | tpu/SUSPENDED | tpu/FAILED) echo lost ;;
    tpu/STOPPED | gpu/TERMINATED | gpu/STOPPED) echo stopped ;;
    *) echo unknown ;;
  esac
}

# Sleeps --pause seconds, in the background so that a signal is heard at once
rest() {
  sleep "${option[pause]}" >/dev/null 2>&1 &
  wait "$!"
}

await() {
  local try tries=${option[attempts]} now
  if on queued; then tries=$((60 * option[queue-minutes] / (option[pause] + 1) + 1)); fi
  for ((try = 1; ; try++)); do
    look ready
    now=$(phase)
    if [[ $now == ready ]]; then return; fi
    [[ $now == coming ]] || die 1 "${option[name]} is $state, not ready; resume or delete it."
    ((try < tries)) || die 75 "${option[name]} is still $state. The same command again waits on; delete gives up."
    say "${option[name]} is $state; looking again in ${option[pause]} s"
    rest
  done
}

make() {
  local version=${option[version]} count
  local -a words
  if [[ ${option[type]} == gpu ]]; then
    words=(gcloud compute instances create "${option[name]}" "${place[@]}" --machine-type="${option[machine-type]}")
    if [[ ${option[accelerator-type]} != none ]]; then
      count=${option[accelerator-type]#*:}
      if [[ ${option[accelerator-type]} != *:* ]]; then count=1; fi
      words+=(--accelerator="type=${option[accelerator-type]%%:*},count=$count")
    fi
    words+=(--image-family="${option[image-family]}" --image-project="${option[image-project]}" --maintenance-policy=TERMINATE)
    words+=(--boot-disk-size="${option[disk-size]}" --metadata=install-nvidia-driver=True)
    if on spot; then words+=(--provisioning-model=SPOT --instance-termination-action=STOP); fi
  else
    if [[ -z $version ]]; then # docs.cloud.google.com/tpu/docs/runtimes
      case ${option[accelerator-type]} in
        v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
        v5litepod-*) version=v2-alpha-tpuv5-lite ;;
        v5p-*) version=v2-alpha-tpuv5 ;;
        v6e-*) version=v2-alpha-tpuv6e ;;
        *) die 2 "which TPU software --accelerator-type=${option[accelerator-type]} needs is not known here; pass --version=." ;;
      esac
    fi
    if on queued; then
      words=(gcloud compute tpus queued-resources create "${option[name]}" "${place[@]}" --node-id="${option[name]}")
      words+=(--accelerator-type="${option[accelerator-type]}" --runtime-version="$version")
    else
      words=(gcloud compute tpus tpu-vm create "${option[name]}" "${place[@]}")
      words+=(--accelerator-type="${option[accelerator-type]}" --version="$version")
    fi
    if on spot; then words+=(--spot); fi
  fi
  if on preemptible; then words+=(--preemptible); fi
  words+=(--scopes=https://www.googleapis.com/auth/cloud-platform "${create_flags[@]}" --quiet)
  if ! on dry-run; then exists=true; fi # until it is known better
  if ! perform "${words[@]}"; then
    say "tpu_launch: create failed: $(reason)."
    look absent
    exit 1
  fi
  remember
  if on queued; then await; fi
}

remove() {
  if [[ ${option[type]} == gpu ]]; then
    perform gcloud compute instances delete "${option[name]}" "${place[@]}" --quiet
  elif on queued; then
    perform gcloud compute tpus queued-resources delete "${option[name]}" "${place[@]}" --force --quiet
  else
    perform gcloud compute tpus tpu-vm delete "${option[name]}" "${place[@]}" --quiet
  fi || die 1 "delete failed: $(reason)."
  exists=false
}

# Runs words on a host of the machine, or on `all`
remote() {
  local host=$1
  shift
  if [[ ${option[type]} == gpu ]]; then
    perform gcloud compute ssh "${option[name]}" "${place[@]}" --quiet --command="$(quote "$@")"
  else
    perform gcloud compute tpus tpu-vm ssh "${option[name]}" "${place[@]}" --worker="$host" --quiet --command="$(quote "$@")"
  fi
}

# Waits until ssh works on all hosts
reach() {
  local try
  for ((try = 1; ; try++)); do
    if remote all mkdir -p launch; then return; fi
    ((try < option[attempts])) || die 1 "ssh does not work after ${option[attempts]} tries: $(reason)."
    say "ssh is not ready (try $try of ${option[attempts]}); again in ${option[pause]} s"
    rest
  done
}

need_ready() {
  look ready
  case $(phase) in
    ready) ;;
    coming) await ;;
    absent) die 1 "there is no machine ${option[name]} in ${option[zone]}; run create first." ;;
    *) die 1 "${option[name]} is $state; run resume." ;;
  esac
}

# ------------------------------------------------------------------------------------------------------------------ commands

do_create() {
  look absent
  case $(phase) in
    ready) say "${option[name]} is there already ($state)." ;;
    coming) await ;;
    absent) make ;;
    *) die 1 "${option[name]} is there and is $state; resume makes it anew, delete removes it." ;;
  esac
}

install() {
  local root package each
  if [[ -n ${option[source]} ]]; then
    package=${option[source]}
    [[ -f $package ]] || die 2 "--source=$package: there is no such file."
  else
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    option[commit]=$(git -C "$root" rev-parse --verify --quiet "${option[commit]}^{commit}") ||
      die 2 "$root is no git clone with the commit that --commit names; name it, or pass a wheel as --source=FILE."
    if [[ -n $(git -C "$root" status --porcelain -- keras_vit) ]]; then
      say "tpu_launch: keras_vit has changes that are not committed; the machine gets commit ${option[commit]:0:12} without them."
    fi
    package=$(memory)/keras_vit-${option[commit]:0:12}.tar.gz
    perform mkdir -p "$(memory)"
    perform git -C "$root" archive --format=tar.gz --prefix=keras_vit/ --output="$package" "${option[commit]}" \
      keras_vit setup.cfg pyproject.toml README.md LICENSE
  fi
  local -a files=("$package" "$(absolute "${BASH_SOURCE[0]}")" "${uploads[@]}")
  if [[ -n ${option[setup]} ]]; then files+=("${option[setup]}"); fi
  for each in "${files[@]:1}"; do [[ -f $each ]] || die 2 "$each: there is no such file to copy."; done
  if [[ ${option[type]} == gpu ]]; then
    perform gcloud compute scp "${files[@]}" "${option[name]}:launch/" "${place[@]}" --quiet
  else
    perform gcloud compute tpus tpu-vm scp "${files[@]}" "${option[name]}:launch/" "${place[@]}" --worker=all --quiet
  fi || die 1 "copying failed: $(reason)."
  remote all bash launch/tpu_launch.sh on-vm prepare --type="${option[type]}" --backend="${option[backend]}" \
    --source="${package##*/}" --attempts="${option[attempts]}" --pause="${option[pause]}" || die 1 "prepare failed: $(reason)."
  remember
}

do_prepare() {
  need_ready
  reach
  install
}

check_training() {
  local each
  [[ -n ${option[workdir]} ]] || die 2 "run needs --workdir=gs://BUCKET/PATH, or a path on the machine."
  for each in "${training[@]}"; do
    if [[ $each == --workdir* || $each == -workdir* ]]; then die 2 "--workdir is an option of this script: put it before --."; fi
  done
}

start() {
  local -a words=(--type="${option[type]}" --backend="${option[backend]}" --workdir="${option[workdir]}")
  words+=(--sync="${option[sync]}" --watch="${option[watch]}" --grace="${option[grace]}")
  if on shared; then words+=(--shared); fi
  if [[ -n ${option[setup]} ]]; then words+=(--setup="${option[setup]##*/}"); fi
  has_training=true
  remember
  if in_bucket; then
    remote all bash launch/tpu_launch.sh on-vm save || die 1 "copying back what the last run left failed: $(reason)."
  fi
  remote all bash launch/tpu_launch.sh on-vm start "${words[@]}" -- "${training[@]}" ||
    die 1 "run failed: $(reason). Where it did start, stop ends it."
}

do_run() {
  check_training
  if ! in_bucket && ! on shared && [[ ${option[type]} == tpu ]] && { on spot || on preemptible; }; then
    say "tpu_launch: a TPU that is taken away loses its disk, --workdir=${option[workdir]} included; better one that begins with gs://."
  fi
  need_ready
  start
}

# Refuses to go on from checkpoints that are gone
check_kept() {
  if ! in_bucket && ! on shared; then
    die 1 "${option[name]} is $state, and --workdir=${option[workdir]} with its checkpoints was on its disk: nothing to resume." \
      "Start anew: delete, create, prepare, run."
  fi
}

do_resume() {
  local try fresh=false
  $has_training || die 2 "what to resume is not known here: pass the options and arguments that run had."
  check_training
  look lost
  for ((try = 1; try < option[attempts]; try++)); do
    if [[ $(phase) != leaving ]]; then break; fi
    say "${option[name]} is $state; looking again in ${option[pause]} s"
    rest
    look lost
  done
  case $(phase) in
    ready) ;;
    coming) await ;;
    stopped)
      if [[ ${option[type]} == gpu ]]; then
        perform gcloud compute instances start "${option[name]}" "${place[@]}" --quiet
      else
        perform gcloud compute tpus tpu-vm start "${option[name]}" "${place[@]}" --quiet
      fi || die 1 "start failed: $(reason)."
      ;;
    lost | absent)
      fresh=true
      check_kept
      if [[ $(phase) == lost ]]; then remove; fi
      make
      ;;
    *) die 1 "${option[name]} is $state; try again later, or delete it." ;;
  esac
  reach
  if $fresh || ! remote all test -f launch/prepared; then install; fi
  start
}

do_status() {
  look ready
  say "${option[name]} (${option[type]} in ${option[zone]}): $state"
  if [[ $(phase) == ready ]] && ! remote all bash launch/tpu_launch.sh on-vm status; then
    grep -q 'launch/tpu_launch.sh: No such file' "$scratch" || die 1 "the training's state is not known: $(reason)."
    say "It is not prepared. Next: $(me prepare)"
  fi
}

do_logs() {
  need_ready
  remote "${option[worker]}" bash launch/tpu_launch.sh on-vm logs || die 1 "logs failed: $(reason)."
}

do_stop() {
  look ready
  if [[ $(phase) != ready ]]; then
    say "${option[name]} is $state: nothing runs there."
    return
  fi
  local -a words=(--grace="${option[grace]}")
  if on now; then words+=(--now); fi
  remote all bash launch/tpu_launch.sh on-vm stop "${words[@]}" || die 1 "stop failed: $(reason)."
}

do_delete() {
  local answer=""
  look ready
  if [[ $state == ABSENT ]]; then
    say "there is no machine ${option[name]} in ${option[zone]}: nothing to delete."
  else
    if ! on yes && ! on dry-run; then
      printf 'Delete %s (%s, %s) in %s of %s with its disk? A training there is not stopped first. [y/N] ' \
        "${option[name]}" "${option[type]}" "$state" "${option[zone]}" "${option[project]}" >&2
      read -r answer || true
      [[ $answer == [yY] || $answer == [yY][eE][sS] ]] || die 1 "not deleted."
    fi
    remove
  fi
  if ! on dry-run; then rm -f "$(memory_file)"; fi
}

# The command line of another command for the same machine
me() {
  quote "$0" "$1" --project="${option[project]}" --zone="${option[zone]}" --name="${option[name]}"
}

next_step() {
  case $verb/$(phase) in
    create/*) say "Next: $(me prepare)" ;;
    prepare/*) say "Next: $(me run) --workdir=gs://BUCKET/PATH -- --config=NAME" ;;
    run/* | resume/*) say "Next: $(me logs)" ;;
    stop/ready) say "The machine is still there and costs money. Next: $(me resume), or $(me delete)" ;;
    status/absent) say "Next: $(me create)" ;;
    status/lost | status/stopped | stop/lost | stop/stopped) say "Next: $(me resume), or $(me delete)" ;;
    status/* | stop/* | logs/* | delete/*) ;;
  esac
}

finish() {
  local status=$?
  if [[ -n $scratch ]]; then rm -f "$scratch"; fi
  if ((status)) && $exists; then
    say "The machine ${option[name]} is still there and costs money until it is deleted: $(me delete)"
  fi
}

main() {
  verb=${1-}
  shift || true
  case $verb in
    "" | -h | --help | help)
      usage
      if [[ -n $verb ]]; then return; fi
      exit 2
      ;;
    on-vm)
      on_vm "$@"
      return
      ;;
    create | prepare | run | resume | status | logs | stop | delete) ;;
    *) die 2 "there is no command '$verb'; --help lists them." ;;
  esac
  parse "$@"
  settle project "${CLOUDSDK_CORE_PROJECT-}"
  settle zone "${CLOUDSDK_COMPUTE_ZONE-}"
  settle name keras-vit
  [[ -n ${option[project]} ]] || die 2 "no project: pass --project=ID or export CLOUDSDK_CORE_PROJECT=ID."
  [[ -n ${option[zone]} ]] || die 2 "no zone: pass --zone=ZONE, such as us-central2-b, or export CLOUDSDK_COMPUTE_ZONE=ZONE."
  [[ ${option[name]} =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die 2 "--name must be small letters, digits and hyphens, beginning with a letter, got '${option[name]}'."
  if [[ $verb != create ]]; then recall; fi
  settle_all
  place=(--project="${option[project]}" --zone="${option[zone]}")
  trap finish EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  if ! on dry-run; then
    command -v gcloud >/dev/null || die 2 "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
    scratch=$(mktemp)
  fi
  "do_$verb"
  if ! on dry-run; then next_step; fi
}

main "$@"
