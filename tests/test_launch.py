"""tpu_launch.sh against a stand-in for gcloud, which keeps a machine's state, does here what ssh does there, fails when told."""

import os
import pathlib
import shutil
import signal
import subprocess
import sysconfig
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "tpu_launch.sh"

# gcloud: refuses flags that the reference of a command does not have; knows one machine, its hosts' homes and a bucket. It is
# written in bash, since Python would take most of these tests' time to start.
GCLOUD = r"""#!/usr/bin/env bash
set -euo pipefail
declare -A flags=( # docs.cloud.google.com/sdk/gcloud/reference, as far as used
  ["compute tpus tpu-vm create"]="accelerator-type version spot preemptible scopes network"
  ["compute tpus tpu-vm describe"]="format"
  ["compute tpus tpu-vm start"]=""
  ["compute tpus tpu-vm delete"]=""
  ["compute tpus tpu-vm ssh"]="worker command"
  ["compute tpus tpu-vm scp"]="worker"
  ["compute tpus queued-resources create"]="node-id accelerator-type runtime-version spot scopes network"
  ["compute tpus queued-resources describe"]="format"
  ["compute tpus queued-resources delete"]="force"
  ["compute instances create"]="machine-type accelerator image-family image-project maintenance-policy boot-disk-size metadata
    provisioning-model instance-termination-action preemptible scopes network"
  ["compute instances describe"]="format"
  ["compute instances start"]=""
  ["compute instances delete"]=""
  ["compute ssh"]="command"
  ["compute scp"]=""
  ["storage cp"]=""
  ["storage rsync"]="recursive delete-unmatched-destination-objects"
)
declare -A given=()
printf '%s\0' "$@" $'\n' >>"$FAKE_WORLD/calls"

fail() {
  printf '%s\n' "$2" >&2
  exit "$1"
}

inside() { case $1 in gs://*) printf '%s' "$FAKE_WORLD/bucket/${1#gs://}" ;; *) printf '%s' "$1" ;; esac; }

if [[ -f $FAKE_WORLD/rule ]]; then
  mapfile -t rule <"$FAKE_WORLD/rule" # part of the command, how often, status, the machine's state then, message
  if [[ "$*" == *"${rule[0]}"* ]] && ((rule[1] > 0)); then
    printf '%s\n' "${rule[0]}" $((rule[1] - 1)) "${rule[@]:2}" >"$FAKE_WORLD/rule"
    if [[ -n ${rule[3]} ]]; then printf '%s' "${rule[3]}" >"$FAKE_WORLD/state"; fi
    fail "${rule[2]}" "${rule[4]}"
  fi
fi
for name in "${!flags[@]}" none; do if [[ "$*" == "$name "* ]]; then break; fi; done
[[ $name != none ]] || fail 2 "ERROR: (gcloud) Invalid choice: $*"
for word in $name; do shift; done
positional=()
for word; do
  if [[ $word != --* ]]; then
    positional+=("$word")
    continue
  fi
  flag=${word#--} flag=${flag%%=*}
  given[$flag]=${word#*=}
  [[ " project zone quiet ${flags[$name]} " == *[[:space:]]"$flag"[[:space:]]* ]] || fail 2 "ERROR: unrecognized arguments: $word"
done
[[ $name == storage* || -n ${given[project]-} && -n ${given[zone]-} ]] || fail 1 "ERROR: no project or zone"
homes=("$FAKE_WORLD"/hosts/*)
if [[ ${given[worker]-all} != all ]]; then homes=("$FAKE_WORLD/hosts/${given[worker]}"); fi
case $name in
  *describe)
    list=states
    if [[ $name == *queued* ]]; then list=queue; fi
    mapfile -t states <"$FAKE_WORLD/$list"
    state=$(<"$FAKE_WORLD/state")
    if ((${#states[@]})); then
      state=${states[0]}
      printf '%s\n' "${states[@]:1}" | sed '/^$/d' >"$FAKE_WORLD/$list"
    fi
    if [[ $state == ACTIVE ]]; then printf READY >"$FAKE_WORLD/state"; fi
    [[ $state != ABSENT ]] || fail 1 "ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/.../${positional[0]}' was not found"
    printf '%s\n' "$state"
    ;;
  *create | *start)
    state=READY
    if [[ $name == *instances* ]]; then state=RUNNING; fi
    if [[ $name == *queued* ]]; then state=ABSENT; fi
    printf '%s' "$state" >"$FAKE_WORLD/state"
    for ((host = 0; host < $(<"$FAKE_WORLD/number"); host++)); do mkdir -p "$FAKE_WORLD/hosts/$host"; done
    ;;
  *delete)
    printf ABSENT >"$FAKE_WORLD/state"
    rm -rf "$FAKE_WORLD/hosts"
    ;;
  *ssh)
    status=0 processes=()
    for home in "${homes[@]}"; do
      (cd "$home" && HOME=$home HOSTNAME=host-${home##*/} exec bash -c "${given[command]}") &
      processes+=("$!")
    done
    for index in "${!homes[@]}"; do
      code=0
      wait "${processes[index]}" || code=$?
      if ((code && ${#homes[@]} > 1)); then
        printf '##### Command execution on worker %s failed with exit status %s. Continuing.\n' "${homes[index]##*/}" "$code"
        if [[ -f $FAKE_WORLD/hides ]]; then code=0; fi
      fi
      if ((code)); then status=$code; fi
    done
    exit "$status"
    ;;
  *scp)
    for home in "${homes[@]}"; do cp "${positional[@]:0:${#positional[@]}-1}" "$home/${positional[-1]#*:}"; done
    ;;
  *"storage cp")
    target=$(inside "${positional[1]}")
    mkdir -p "${target%/*}"
    cat >"$target"
    ;;
  *rsync)
    source=$(inside "${positional[0]}") target=$(inside "${positional[1]}")
    cp -r "$source/." "$target/"
    if [[ -v given[delete-unmatched-destination-objects] ]]; then
      for path in "$target"/*; do if [[ -e $path && ! -e $source/${path##*/} ]]; then rm -r "$path"; fi; done
    fi
    ;;
esac
"""

# The machine's Python: a training that goes on from the step in its folder, ten steps on when SIGTERM comes
TRAINER = r"""#!/usr/bin/env bash
if [[ $1 == -c ]]; then exit 0; fi
printf '%s\0' "$@" $'\n' >>"$HOME/trained"
env | grep ^KERAS >"$HOME/keras"
training=$(<"$FAKE_WORLD/training")
if [[ $training == broken ]]; then
  echo "ConfigError: config.batch must be at least 1, got 0"
  exit 1
fi
for word; do if [[ $word == --workdir=* ]]; then folder=${word#*=}; fi; done
mkdir -p "$folder"
step=0
if [[ -f $folder/step ]]; then step=$(<"$folder/step"); fi
stop() {
  trap 'exit 1' TERM # as keras_vit.main: a second one ends it unsaved
  sleep 0.1 &
  wait "$!"
  echo $((step + 10)) >"$folder/step"
  echo "saved step $((step + 10))"
  exit 143
}
trap stop TERM
echo $$ >"$folder/child"
echo "training from step $step"
if [[ $training == short ]]; then
  echo weights >"$folder/model.keras"
  rm -f "$folder/old"
  exit 0
fi
echo checkpoint >"$folder/early"
while :; do
  sleep 0.05 &
  wait "$!"
done
"""

UV = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$HOME/uv.log"
if [[ $1 == venv ]]; then mkdir -p venv/bin && cp "${0%/*}/trainer" venv/bin/python; fi
"""

CURL = r"""#!/usr/bin/env bash
hosts=$(<"$FAKE_WORLD/number")
((hosts > 1)) || exit 22
case ${!#} in
  */worker-network-endpoints) seq 0 $((hosts - 1)) | sed 's/.*/name:&:10.0.0.&/' | paste -s -d, - ;;
  */agent-worker-number) printf '%s' "${HOME##*/}" ;;
esac
"""

ODD = [
    "--config=vit.py:b16,cifar10",
    '--config.note=it\'s $HOME "x"  two  spaces; `ls` & #\\ *',
    "--config.empty=",
    "--config.tab=a\tb\nc ü",
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A small git clone with the script in it."""
    clone = tmp_path_factory.mktemp("a clone")
    shutil.copy(SCRIPT, clone)
    (clone / "keras_vit").mkdir()
    for name in ("keras_vit/version.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "secret.txt"):
        (clone / name).write_text(name)
    me = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], [*me, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *words], cwd=clone, check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull})
    return clone


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    tools = tmp_path_factory.mktemp("bin")
    programs = {"gcloud": GCLOUD, "trainer": TRAINER, "uv": UV, "curl": CURL, "nvidia-smi": "#!/bin/sh\n"}
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return tools


class Cloud:
    """A machine that does not exist yet, and the script to manage it."""

    def __init__(self, folder, clone, tools):
        self.folder, self.script = folder, clone / SCRIPT.name
        self.facts(state="ABSENT", states="", queue="", number=1, training="long")
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("TPU_LAUNCH", "CLOUDSDK", "KERAS", "XDG", "GIT"))
        }
        self.environment = {**kept, "FAKE_WORLD": str(folder), "HOME": str(folder / "home"), "PATH": f"{tools}:{kept['PATH']}"}
        (folder / "home").mkdir()

    def facts(self, **facts):
        for name, value in facts.items():
            (self.folder / name).write_text(str(value))

    def fails(self, when, say, status=1, times=1, state=""):
        self.facts(rule=f"{when}\n{times}\n{status}\n{state}\n{say}\n")

    def __call__(self, command, *words, place=("--project=p", "--zone=z"), answer="", status=0, **environment):
        quick = () if command in ("help", "--help") else ("--pause=0", "--watch=0", "--attempts=3")
        options, dashes, training = list(words), [], []
        if "--" in options:
            at = options.index("--")
            options, dashes, training = options[:at], ["--"], options[at + 1 :]
        self.done = subprocess.run(
            ["bash", self.script, command, *quick, *place, *options, *dashes, *training],
            input=answer, capture_output=True, text=True, env={**self.environment, **environment}, cwd=self.folder, check=False,
        )  # fmt: skip
        self.said = self.done.stderr + self.done.stdout
        assert self.done.returncode == status, self.said
        return self.said

    def all_calls(self):
        path = self.folder / "calls"
        return [call.split("\0")[:-1] for call in path.read_text().split("\n\0")[:-1]] if path.exists() else []

    def calls(self):
        """gcloud's arguments, those of the machine's own copying to the bucket left out."""
        return [call for call in self.all_calls() if call[0] == "compute"]

    def forget_calls(self):
        (self.folder / "calls").unlink(missing_ok=True)

    def verbs(self):
        """What was asked of gcloud, a word each."""
        return [next(word for word in call if word in VERBS) for call in self.calls()]

    def home(self, host=0):
        return self.folder / "hosts" / str(host)

    def trained(self, host=0, times=1):
        """The arguments of the runs of keras_vit.main on a host, once there are so many."""
        path = self.home(host) / "trained"
        wait_for(lambda: path.exists() and path.read_text().count("\n\0") == times)
        return [call.split("\0")[:-1] for call in path.read_text().split("\n\0")[:-1]]

    def keras(self, host=0):
        """What Keras was told by the environment."""
        path = self.home(host) / "keras"
        wait_for(lambda: path.exists() and path.read_text())
        return dict(line.split("=", 1) for line in path.read_text().splitlines())

    def wait_for_end(self, host=0):
        status = self.home(host) / "launch/status"
        wait_for(lambda: status.exists() and status.read_text())

    def kill(self):
        """Ends what runs on the hosts as a loss of power would."""
        for path in self.folder.glob("hosts/*/launch/pid"):
            try:
                os.killpg(int(path.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def is_taken_away(self):
        self.kill()
        shutil.rmtree(self.folder / "hosts")
        self.facts(state="PREEMPTED")

    def made(self, *words):
        """A machine that was created with these options and prepared."""
        self("create", *words)
        self("prepare")
        self.forget_calls()
        return self


VERBS = ("create", "describe", "start", "delete", "ssh", "scp")
RUN = ("--workdir=gs://b/run", "--sync=0")


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path, clone, tools):
    cloud = Cloud(tmp_path, clone, tools)
    yield cloud
    cloud.kill()


def test_shellcheck_finds_nothing():
    shellcheck = pathlib.Path(sysconfig.get_path("scripts")) / "shellcheck"
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "shellcheck disable" not in SCRIPT.read_text()


def test_help_names_every_command_and_what_was_not_tried(cloud):
    said = " ".join(cloud("--help", place=()).split())
    for command in ("create", "prepare", "run", "resume", "status", "logs", "stop", "delete"):
        assert f" {command} " in said
    assert "tested with a stand-in for gcloud only, never against Google Cloud" in said
    assert "On TPU the backend is JAX" in said


@pytest.mark.parametrize(
    "words, place, says",
    [
        (["create"], ["--zone=z"], "pass --project=ID or export CLOUDSDK_CORE_PROJECT"),
        (["create"], ["--project=p"], "pass --zone=ZONE, such as us-central2-b, or export CLOUDSDK_COMPUTE_ZONE"),
        (["creat"], (), "there is no command 'creat'"),
        (["create", "--acelerator-type=v4-8"], (), "there is no option --acelerator-type=v4-8"),
        (["create", "--type=cpu"], None, "--type must be tpu or gpu"),
        (["create", "--name=Big"], None, "--name must be small letters"),
        (["create", "--attempts=x"], None, "--attempts must be a whole number"),
        (["create", "--backend=tensorflow"], None, "the last TensorFlow for TPUs is 2.20"),
        (["create", "--queued", "--type=gpu"], None, "--queued is for TPUs"),
        (["run", "--shared", "--workdir=gs://b/r"], None, "--shared is for a path on the machine"),
        (["create", "--queued", "--preemptible"], None, "a queued resource can be --spot"),
        (["create", "--accelerator-type=v9-8"], None, "pass --version="),
        (["run"], None, "run needs --workdir="),
        (["run", "--workdir=gs://b/r", "--", "--workdir=x"], None, "put it before --"),
        (["resume"], None, "pass the options and arguments that run had"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused_in_one_message_before_anything_is_made(cloud, words, place, says):
    cloud(*words, place=("--project=p", "--zone=z") if place is None else place, status=2)
    assert says in cloud.said
    assert not {"create", "ssh"} & set(cloud.verbs())


MACHINES = {
    "default": ("", "tpus tpu-vm create keras-vit PLACE --accelerator-type=v4-8 --version=tpu-ubuntu2204-base"),
    "spot": (
        "--spot --accelerator-type=v6e-8 --name=a",
        "tpus tpu-vm create a PLACE --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --spot",
    ),
    "preemptible": (
        "--preemptible --version=mine",
        "tpus tpu-vm create keras-vit PLACE --accelerator-type=v4-8 --version=mine --preemptible",
    ),
    "queued": (
        "--queued --spot",
        "tpus queued-resources create keras-vit PLACE --node-id=keras-vit --accelerator-type=v4-8 "
        "--runtime-version=tpu-ubuntu2204-base --spot",
    ),
    "gpu": (
        "--type=gpu --spot --accelerator-type=nvidia-tesla-t4:2",
        "instances create keras-vit PLACE --machine-type=n1-standard-8 --accelerator=type=nvidia-tesla-t4,count=2 "
        "--image-family=common-cu129-ubuntu-2204-nvidia-580 --image-project=deeplearning-platform-release "
        "--maintenance-policy=TERMINATE --boot-disk-size=200GB --metadata=install-nvidia-driver=True "
        "--provisioning-model=SPOT --instance-termination-action=STOP",
    ),
    "gpu of its own": (
        "--type=gpu --accelerator-type=none --machine-type=g2-standard-8 --create-flag=--network=mine",
        "instances create keras-vit PLACE --machine-type=g2-standard-8 "
        "--image-family=common-cu129-ubuntu-2204-nvidia-580 --image-project=deeplearning-platform-release "
        "--maintenance-policy=TERMINATE --boot-disk-size=200GB --metadata=install-nvidia-driver=True",
    ),
}


@pytest.mark.parametrize("words, expected", MACHINES.values(), ids=MACHINES)
def test_create_asks_for_the_machine_that_the_options_describe_and_only_once(cloud, words, expected):
    words = words.split()
    cloud.facts(queue="ABSENT\nWAITING_FOR_RESOURCES\nACTIVE\n")
    cloud("create", *words)
    (call,) = (call for call in cloud.calls() if "create" in call)
    end = ["--network=mine", "--quiet"] if "--create-flag=--network=mine" in words else ["--quiet"]
    expected = expected.replace("PLACE", "--project=p --zone=z").split()
    assert call == ["compute", *expected, "--scopes=https://www.googleapis.com/auth/cloud-platform", *end]
    assert "Next: " in cloud.said and " prepare " in cloud.said
    cloud.facts(state="RUNNING" if "--type=gpu" in words else "READY")
    cloud("create", *words)
    assert "is there already" in cloud.said
    assert cloud.verbs().count("create") == 1


def test_create_waits_for_a_machine_that_is_being_made_and_gives_up_in_the_end(cloud):
    cloud.facts(states="CREATING\nCREATING\n", state="READY")
    cloud("create")
    assert cloud.verbs() == ["describe"] * 3
    cloud.facts(state="CREATING")
    cloud("create", status=75)
    assert "still CREATING" in cloud.said and "costs money" in cloud.said


FAILURES = {
    "capacity": (
        'ERROR: {"code": 8, "message": "There is no more capacity in the zone"} RESOURCE_EXHAUSTED',
        "no such machine free now",
    ),
    "quota": ("ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV4PerProject' has been exceeded", "quota does not allow it"),
    "permission": ("ERROR: (gcloud) PERMISSION_DENIED: Cloud TPU API has not been used in project p", "may not do that in p"),
    "exists": ("ERROR: (gcloud) ALREADY_EXISTS: Resource 'x' already exists", "take another --name"),
    "login": ("ERROR: (gcloud.auth) You do not have an active account selected. Run: gcloud auth login", "is not logged in"),
    "other": ("ERROR: (gcloud) INTERNAL", "the output above says why"),
}


@pytest.mark.parametrize("message, says", FAILURES.values(), ids=FAILURES)
def test_a_failed_create_says_why_and_whether_something_is_left_that_costs_money(cloud, message, says):
    cloud.fails(" create ", message)
    cloud("create", status=1)
    assert says in cloud.said and "costs money" not in cloud.said
    cloud.fails(" create ", message, state="READY")
    cloud("create", status=1)
    assert says in cloud.said
    assert "still there and costs money until it is deleted" in cloud.said
    assert "delete --project=p --zone=z --name=keras-vit" in cloud.said


def test_a_describe_that_fails_is_not_taken_for_an_absent_machine(cloud):
    cloud.fails(
        " describe ", "ERROR: (gcloud) PERMISSION_DENIED: 'tpu.nodes.get' denied on 'locations/z' (or it may not be found)"
    )
    cloud("create", status=1)
    assert "cannot tell whether the machine keras-vit is there" in cloud.said
    assert cloud.verbs() == ["describe"]


def test_prepare_sends_the_commit_and_uploads_and_installs_them(cloud, clone):
    (cloud.folder / "my config.py").write_text("mine")
    cloud("create")
    cloud("prepare", "--upload=my config.py")
    launch = cloud.home() / "launch"
    (archive,) = launch.glob("keras_vit-*.tar.gz")
    with tarfile.open(archive) as opened:
        files = {member.name for member in opened if member.isfile()}
    assert files == {
        f"keras_vit/{name}" for name in ("keras_vit/version.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
    }
    assert (launch / "my config.py").read_text() == "mine"
    made, installed = (cloud.home() / "uv.log").read_text().splitlines()
    assert made == "venv --python=3.11 venv"
    assert installed == f"pip install --python=venv/bin/python --reinstall-package=keras-vit {archive} jax[tpu] orbax-checkpoint"
    cloud("prepare")
    assert (cloud.home() / "uv.log").read_text().count("venv --python=3.11") == 1


def test_prepare_without_a_machine_a_commit_or_a_source_says_what_to_do(cloud):
    assert "run create first" in cloud("prepare", status=1)
    cloud("create")
    assert "--commit names" in cloud("prepare", "--commit=none", status=2)
    assert "no such file" in cloud("prepare", "--source=none.whl", status=2)
    assert "costs money until it is deleted" in cloud.said


def test_prepare_tries_ssh_again_a_bounded_number_of_times(cloud):
    cloud("create")
    cloud.fails(" ssh ", "ssh: connect to host 10.0.0.1 port 22: Connection refused", status=255, times=2)
    cloud("prepare")
    assert cloud.said.count("ssh is not ready") == 2
    cloud.forget_calls()
    cloud.fails(" ssh ", "ssh: connect to host 10.0.0.1 port 22: Connection refused", status=255, times=99)
    cloud("prepare", status=1)
    assert cloud.verbs() == ["describe", "ssh", "ssh", "ssh"]
    assert "ssh does not work after 3 tries" in cloud.said
    assert "costs money until it is deleted" in cloud.said


def test_prepare_that_is_interrupted_names_the_machine(cloud):
    cloud("create")
    process = subprocess.Popen(
        ["bash", cloud.script, "prepare", "--project=p", "--zone=z", "--pause=30"],
        env={**cloud.environment, "TPU_LAUNCH_ATTEMPTS": "5"}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    cloud.fails(" ssh ", "refused", status=255, times=99)
    for line in process.stderr:
        if "again in 30 s" in line:
            os.killpg(process.pid, signal.SIGTERM)
            break
    assert "costs money until it is deleted" in process.communicate()[1]
    assert process.returncode == 143


def test_run_hands_every_argument_on_unchanged_and_once(cloud):
    cloud.made()
    cloud("run", *RUN, "--", *ODD)
    (call,) = cloud.trained()
    assert call == ["-u", "-m", "keras_vit.main", f"--workdir={cloud.home()}/launch/work", *ODD]
    assert cloud.keras() == {"KERAS_BACKEND": "jax"}
    assert "Next: " in cloud.said and " logs " in cloud.said
    assert "runs already" in cloud("run", *RUN, "--", *ODD)
    assert "another training runs here" in cloud("run", *RUN, "--", "--config=digits.py", status=1)
    assert "costs money until it is deleted" in cloud.said
    assert len(cloud.trained()) == 1
    assert "training from step 0" in cloud("status") and "host-0: training (pid" in cloud.said


def test_run_on_a_machine_that_is_not_prepared_says_so(cloud):
    cloud("create")
    cloud("run", *RUN, status=1)
    assert "not prepared. Run prepare first" in cloud.said and "costs money" in cloud.said


def test_a_training_that_ends_at_once_is_shown_and_its_status_kept(cloud):
    cloud.facts(training="broken")
    cloud.made()
    cloud("run", *RUN, "--watch=20", status=1)
    assert "config.batch must be at least 1, got 0" in cloud.said
    assert "exit status 1" in cloud.said and "costs money until it is deleted" in cloud.said
    assert "host-0: ended with exit status 1" in cloud("status")


def test_results_reach_the_bucket_and_what_training_deleted_leaves_it(cloud):
    cloud.facts(training="short")
    cloud.made()
    bucket = cloud.folder / "bucket/b/run"
    bucket.mkdir(parents=True)
    (bucket / "step").write_text("30")
    (bucket / "old").write_text("an old checkpoint")
    cloud("run", *RUN, "--watch=20")
    cloud.wait_for_end()
    assert (bucket / "model.keras").read_text() == "weights\n"
    assert not (bucket / "old").exists()
    assert "training from step 30" in cloud("logs")
    assert "host-0: done" in cloud("status")


def test_results_that_could_not_be_copied_are_copied_by_the_next_run(cloud):
    cloud.facts(training="short")
    cloud.made()
    cloud.fails("--delete-unmatched", "ERROR: 503", times=99)
    cloud("run", "--workdir=gs://b/run", "--watch=20", status=1)
    assert "what is new is in ~/launch/work only" in cloud.said
    assert not (cloud.folder / "bucket/b/run/model.keras").exists()
    cloud.facts(rule="-\n0\n0\n\n\n", training="long")
    cloud("run", "--workdir=gs://b/run")
    assert "copying back what the last run left" in cloud.said
    assert (cloud.folder / "bucket/b/run/model.keras").exists()


def test_stop_lets_training_save_and_resume_goes_on_from_there(cloud):
    cloud.made()
    cloud("run", "--workdir=gs://b/run", "--", *ODD)
    wait_for((cloud.home() / "launch/work/early").exists)
    cloud("stop")
    assert "exit status 143" in cloud.said and "still there and costs money" in cloud.said
    assert (cloud.folder / "bucket/b/run/step").read_text() == "10\n"
    assert "nothing runs" in cloud("stop")
    cloud.forget_calls()
    cloud("resume")
    assert cloud.verbs() == ["describe", "ssh", "ssh", "ssh", "ssh"], "neither made nor prepared again"
    first, second = cloud.trained(times=2)
    assert first == second
    cloud("stop")
    assert (cloud.folder / "bucket/b/run/step").read_text() == "20\n"


def test_stop_that_takes_too_long_kills_nothing_and_says_so(cloud):
    cloud.made()
    cloud("run", "--workdir=here")
    wait_for((cloud.home() / "launch/here/early").exists)
    child = int((cloud.home() / "launch/here/child").read_text())
    os.kill(child, signal.SIGSTOP)
    for _ in range(2):
        cloud("stop", "--grace=0", status=1)
        assert "not ended after 0 s" in cloud.said and "costs money until it is deleted" in cloud.said
    os.kill(child, signal.SIGCONT)
    cloud.wait_for_end()
    assert "host-0: stopped" in cloud("status")
    assert (cloud.home() / "launch/here/step").read_text() == "10\n"


def test_stop_now_ends_what_does_not_hear(cloud):
    cloud.made()
    cloud("run", "--workdir=gs://b/run")
    wait_for((cloud.home() / "launch/work/early").exists)
    os.kill(int((cloud.home() / "launch/work/child").read_text()), signal.SIGSTOP)
    assert "exit status 137" in cloud("stop", "--now")
    assert (cloud.folder / "bucket/b/run/early").exists()


def test_a_machine_that_shuts_down_lets_training_save(cloud):
    cloud.made()
    cloud("run", "--workdir=gs://b/run")
    wait_for((cloud.home() / "launch/work/early").exists)
    os.killpg(int((cloud.home() / "launch/pid").read_text()), signal.SIGTERM)
    cloud.wait_for_end()
    assert (cloud.home() / "launch/status").read_text() == "143\n"
    assert (cloud.folder / "bucket/b/run/step").read_text() == "10\n"


def test_after_a_preemption_resume_makes_the_machine_again_and_runs_the_same_command_on(cloud):
    cloud.made("--spot", "--accelerator-type=v6e-8")
    archive = next((cloud.home() / "launch").glob("*.tar.gz")).name
    cloud("run", *RUN, "--", *ODD)
    before = cloud.trained()
    wait_for((cloud.folder / "bucket/b/run/early").exists)
    cloud.is_taken_away()
    assert "PREEMPTED" in cloud("status") and " resume " in cloud.said
    assert "is PREEMPTED; run resume" in cloud("run", *RUN, status=1)
    (cloud.folder / "bucket/b/run/step").write_text("70")
    cloud.forget_calls()
    cloud("resume")
    assert cloud.verbs() == ["describe", "delete", "create", "ssh", "scp", "ssh", "ssh", "ssh"]
    (create,) = (call for call in cloud.calls() if "create" in call)
    assert {"--spot", "--accelerator-type=v6e-8"} <= set(create)
    assert (cloud.home() / "launch" / archive).exists(), "the same commit"
    assert cloud.trained() == before
    wait_for(lambda: "training from step 70" in (cloud.home() / "launch/run.log").read_text())


def test_a_machine_that_is_gone_is_made_again_by_resume(cloud):
    cloud.made()
    cloud("run", *RUN)
    cloud.trained()
    cloud.is_taken_away()
    cloud.facts(state="ABSENT")
    cloud.forget_calls()
    cloud("resume")
    assert cloud.verbs() == ["describe", "create", "ssh", "scp", "ssh", "ssh", "ssh"]


def test_resume_refuses_to_go_on_from_a_disk_that_is_lost(cloud):
    cloud.made("--spot")
    cloud("run", "--workdir=here")
    assert "loses its disk" in cloud.said
    cloud.is_taken_away()
    cloud.forget_calls()
    cloud("resume", status=1)
    assert "nothing to resume" in cloud.said and cloud.verbs() == ["describe"]


def test_a_failed_resume_names_the_machine_that_it_made(cloud):
    cloud.made()
    cloud("run", *RUN)
    cloud.trained()
    cloud.is_taken_away()
    cloud.fails(" scp ", "ERROR: scp exited with return code [1]")
    cloud("resume", status=1)
    assert "copying failed" in cloud.said and "costs money until it is deleted" in cloud.said


def test_a_gpu_machine_keeps_its_disk_and_is_only_started_again(cloud):
    cloud.made("--type=gpu", "--spot")
    assert "tensorflow[and-cuda]" in (cloud.home() / "uv.log").read_text()
    cloud("run", "--workdir=here", "--", "--config.strategy=mirrored")
    assert cloud.trained() and cloud.keras() == {"KERAS_BACKEND": "tensorflow"}
    cloud.kill()
    assert "host-0: cut off" in cloud("status")
    cloud.facts(state="TERMINATED")
    cloud.forget_calls()
    cloud("resume")
    assert cloud.verbs() == ["describe", "start", "ssh", "ssh", "ssh"]
    assert all(call[1] in ("instances", "ssh") for call in cloud.calls())
    assert cloud.trained(times=2)


def test_in_a_pod_slice_every_host_runs_in_the_folder_they_share(cloud):
    cloud.facts(number=3)
    (cloud.folder / "mount.sh").write_text('echo "mounted" >>"$HOME/mounts"\n')
    cloud.made("--accelerator-type=v4-24")
    cloud("prepare", "--setup=mount.sh")
    shared = cloud.folder / "a share"
    cloud("run", f"--workdir={shared}", "--shared", "--", *ODD)
    for host in range(3):
        assert cloud.trained(host) == [["-u", "-m", "keras_vit.main", f"--workdir={shared}", *ODD]]
        assert cloud.keras(host) == {
            "KERAS_BACKEND": "jax",
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": "10.0.0.0:8482,10.0.0.1:8482,10.0.0.2:8482",
            "KERAS_DISTRIBUTION_NUM_PROCESSES": "3",
            "KERAS_DISTRIBUTION_PROCESS_ID": str(host),
        }
        assert (cloud.home(host) / "mounts").read_text() == "mounted\n"
    wait_for((shared / "early").exists)
    cloud.is_taken_away()
    cloud("resume")
    for host in range(3):
        assert cloud.trained(host) == [["-u", "-m", "keras_vit.main", f"--workdir={shared}", *ODD]]
        wait_for(lambda host=host: "training from" in (cloud.home(host) / "launch/run.log").read_text())
    cloud("stop")
    assert cloud.said.count("exit status 143") == 3


def test_a_pod_slice_whose_hosts_do_not_share_the_folder_is_refused(cloud):
    cloud.facts(number=2)
    cloud.made("--accelerator-type=v4-16")
    assert "the 2 hosts of this TPU write one state together" in cloud("run", *RUN, status=1)
    assert "say so by --shared" in cloud.said and "host 0 (exit status 1), host 1 (exit status 1)" in cloud.said
    cloud("run", "--workdir=mine", "--shared", "--grace=0", "--watch=20", status=1)
    assert "1 of 2 hosts are seen in mine" in cloud.said
    assert not (cloud.home() / "trained").exists()


@pytest.mark.parametrize("old", [False, True], ids=["gcloud", "gcloud that hides it"])
def test_a_host_of_a_pod_slice_that_fails_is_named(cloud, old):
    cloud.facts(number=3, **({"hides": ""} if old else {}))
    cloud.made("--accelerator-type=v4-24")
    (cloud.home(1) / "launch/prepared").unlink()
    cloud("run", f"--workdir={cloud.folder}/share", "--shared", "--grace=0", status=1)
    assert "it failed on host 1 (exit status 1), and may have succeeded on the other hosts" in cloud.said
    assert "host-1 is not prepared: run prepare first" in cloud.said
    assert "costs money until it is deleted" in cloud.said


def test_delete_asks_first(cloud):
    cloud("create")
    assert "not deleted" in cloud("delete", status=1)
    assert "not deleted" in cloud("delete", answer="n\n", status=1)
    assert "delete" not in cloud.verbs()
    cloud("delete", answer="y\n")
    assert cloud.verbs()[-1] == "delete"
    assert "nothing to delete" in cloud("delete", "--yes")
    assert cloud.verbs().count("delete") == 1


def test_delete_that_fails_says_that_the_machine_costs_on(cloud):
    cloud("create")
    cloud.fails(" delete ", "ERROR: (gcloud) INTERNAL")
    cloud("delete", "--yes", status=1)
    assert "delete failed" in cloud.said and "costs money until it is deleted" in cloud.said


def test_a_queued_resource_is_deleted_as_such(cloud):
    cloud.facts(queue="ABSENT\nACTIVE\n")
    cloud("create", "--queued")
    cloud.facts(state="READY")
    cloud("delete", "--yes")
    assert cloud.calls()[-1][1:4] == ["tpus", "queued-resources", "delete"] and "--force" in cloud.calls()[-1]


def test_options_come_from_the_environment_and_from_what_create_was_given(cloud):
    cloud("create", place=(), CLOUDSDK_CORE_PROJECT="q", CLOUDSDK_COMPUTE_ZONE="y", TPU_LAUNCH_NAME="a", TPU_LAUNCH_TYPE="gpu")
    assert cloud.calls()[-1][1:6] == ["instances", "create", "a", "--project=q", "--zone=y"]
    cloud("status", "--name=a", place=("--project=q", "--zone=y"))
    assert cloud.calls()[-2][1] == "instances", "its type is known"


LIFE = {
    "create": (),
    "prepare": (),
    "run": (*RUN, "--", *ODD),
    "status": (),
    "logs": (),
    "stop": (),
    "resume": (),
    "delete": ("--yes",),
}
PASTE = r"""gcloud() { printf '%s\0' "$@"; printf '\n\0'; }; """


def test_a_dry_run_runs_nothing_and_prints_exactly_the_commands_of_the_real_one(cloud):
    cloud.facts(training="short")
    for command, words in LIFE.items():
        if command == "resume":
            cloud.is_taken_away()
        cloud.forget_calls()
        before = sorted(cloud.folder.rglob("*"))
        cloud(command, "--dry-run", *words)
        printed = cloud.done.stdout.splitlines()
        assert sorted(cloud.folder.rglob("*")) == before, command
        cloud(command, *words)
        assert [line[2:] for line in cloud.done.stderr.splitlines() if line.startswith("+ ")] == printed, command
        text = PASTE + "\n".join(line for line in printed if line.startswith("gcloud "))
        pasted = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout
        assert [words.split("\0")[:-1] for words in pasted.split("\n\0")[:-1]] == cloud.calls(), command
        if command in ("run", "resume"):
            cloud.wait_for_end()
