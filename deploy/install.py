"""make setup: a virtual environment with the pinned packages, a line a stage, one sentence where it cannot be.

    python3 deploy/install.py .venv requirements.txt
    python3 deploy/install.py .venv requirements.txt --cpu INDEX    # PyTorch without CUDA, from this index

Knows the standard library alone and the syntax of old Pythons, so that an old one can say that it is too old.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

OLDEST = (3, 11)
NEEDED_GB = 7.0  # the environment holds 6.8 GB; pip unpacks one package at a time beside it
NEEDED_GB_CPU = 2.5  # without CUDA it holds less than 2 GB
LARGE_MB = 50.0  # a download of more is announced
LOST = (  # what pip says where the index cannot be reached
    "NewConnectionError", "Temporary failure in name resolution", "Name or service not known", "Network is unreachable",
    "Connection refused", "timed out", "ProxyError", "SSLError", "Could not fetch URL", "ConnectTimeout",
)  # fmt: skip


class CannotInstall(Exception):
    """One sentence for the user."""


def say(text):
    print(text, flush=True)


def check_python(version=None):
    version = tuple(version or sys.version_info)[:2]
    if version < OLDEST:
        raise CannotInstall(
            "Python %d.%d or newer is needed, this is %d.%d; name one with make PYTHON=python3.11"
            % (OLDEST + version)
        )


def check_disk(folder, needed=NEEDED_GB):
    """Gigabytes free where the environment will lie."""
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(folder))).free / 1e9
    if free < needed:
        raise CannotInstall(
            "the packages need %.0f GB and %.1f GB are free in %s: free some space, or name a folder elsewhere with "
            "make VENV=/path/.venv" % (needed, free, os.path.dirname(os.path.abspath(folder)))
        )
    return free


def make_environment(folder):
    if os.path.isfile(os.path.join(folder, "bin", "pip")):  # pip comes last: without it, it is half made
        return
    done = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True, text=True)
    if done.returncode:
        raise CannotInstall(
            "no virtual environment could be made in %s (on Debian and Ubuntu: apt install python3-venv): %s"
            % (folder, last_line(done.stdout + done.stderr))
        )


def pip_of(folder):
    return [os.path.join(folder, "bin", "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]


def check_network(folder, requirements):
    """Fetch one small pinned package from the index that pip is set to use."""
    with open(requirements, encoding="utf-8") as file:
        names = [line.split(";")[0].strip() for line in file if "==" in line and not line.startswith("#")]
    small = next((name for name in names if name.startswith("einops==")), names[0])
    with tempfile.TemporaryDirectory() as temporary:
        command = [*pip_of(folder), "--retries", "1", "--timeout", "20", "download", "--no-deps", "--quiet"]
        done = subprocess.run([*command, "-d", temporary, small], capture_output=True, text=True)
    if done.returncode:
        raise CannotInstall(no_network(done.stderr))
    return len(names)


def no_network(said):
    return (
        "the package index cannot be reached: look at the network, or name a mirror with pip config set "
        "global.index-url URL; pip says: " + last_line(said)
    )


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["nothing"]
    return errors[0][:300]


def without_cuda(folder, requirements):
    """The pinned packages but for those that only a GPU needs; returns the new file."""
    with open(requirements, encoding="utf-8") as file:
        lines = [line for line in file if not line.startswith(("nvidia", "cuda", "triton"))]
    target = os.path.join(folder, "requirements.txt")
    with open(target, "w", encoding="utf-8") as file:
        file.writelines(lines)
    return target


def install_packages(folder, requirements, index=None):
    """pip's own lines shrink to one for each large download, and one when it starts to unpack."""
    command = [*pip_of(folder), "install", "--no-compile", "--progress-bar", "off", "-r", requirements]
    command += ["--extra-index-url", index] if index else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, seen = [], 0
    for line in process.stdout:
        said.append(line)
        seen += line.startswith("Collecting ")
        large = re.match(r"\s*Downloading (\S+) \(([\d.]+) (MB|GB)\)", line)
        if large and float(large.group(2)) * (1000 if large.group(3) == "GB" else 1) >= LARGE_MB:
            name = os.path.basename(large.group(1)).split("-")[0]
            say("      %s, %s %s (%d packages seen)" % (name, large.group(2), large.group(3), seen))
        if line.startswith("Installing collected packages"):
            say("      all downloaded: unpacking, which is silent for a minute or two")
    if process.wait():
        text = "".join(said)
        if any(word in text for word in LOST):
            raise CannotInstall(no_network(text))
        if "No space left" in text:
            raise CannotInstall("the disk is full: the packages need %.0f GB" % NEEDED_GB)
        raise CannotInstall("pip could not install %s: %s" % (requirements, last_line(text)))


def compile_imports(folder):
    """Python keeps compiled what is imported here, which takes 1.4 s off each start: also where a later one may not
    write (PYTHONDONTWRITEBYTECODE, a read-only environment). All that is installed would take a minute and 400 MB."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    python = os.path.join(os.path.abspath(folder), "bin", "python")
    done = subprocess.run(
        [python, "-c", "import generate, rerank, serve.app, serve.worker"],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise CannotInstall("the packages are installed but cannot be imported: " + lines[-1])


def install(folder, requirements, index=None):
    """index: where PyTorch without CUDA comes from; None: the usual one."""
    started = time.time()
    check_python()
    free = check_disk(folder, NEEDED_GB_CPU if index else NEEDED_GB)
    say("[1/5] Python %d.%d, %.0f GB free" % (sys.version_info[0], sys.version_info[1], free))
    say("[2/5] virtual environment %s" % folder)
    make_environment(folder)
    say("[3/5] does the package index answer?")
    count = check_network(folder, requirements)
    size = "less than 1 GB" if index else "about 3 GB"
    say("[4/5] %d packages, %s to download: 2 to 15 minutes" % (count, size))
    install_packages(folder, without_cuda(folder, requirements) if index else requirements, index)
    say("[5/5] first imports, compiled once")
    compile_imports(folder)
    say("installed in %d:%02d minutes" % divmod(int(time.time() - started), 60))


def main(argv):
    try:
        install(argv[0], argv[1], argv[3] if argv[2:3] == ["--cpu"] else None)
    except CannotInstall as error:
        sys.stderr.write("error: %s\n" % " ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; make setup goes on\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
